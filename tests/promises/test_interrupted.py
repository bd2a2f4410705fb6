"""Real processes that are killed, told to end, or have nobody listening."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from retrofit import cli

pytestmark = pytest.mark.slow

MAIN = "from retrofit.cli import main; main()"
# Counts what a process writes below its run folder, and ends it at one of them as `kill -9` would.
# Each try is a fork, so that one import serves all.
KILLED_AT_EACH_WRITE = """
import os, sys
import retrofit.training.run
from retrofit import cli

recipe, folder, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def forked(work, *arguments):
    process = os.fork()
    if not process:
        code = 1
        try:
            work(*arguments)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def train(*arguments):
    cli.app(["train", *arguments], standalone_mode=False)


def killed(run, at):
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(args[0]).startswith(run):
            seen += 1
            if seen == at:
                os._exit(9)

    sys.addaudithook(hook)
    train(recipe, f"output_dir={run}")


at = 1
while True:
    run = f"{folder}/run-{at}"
    code = forked(killed, run, at)
    if code == 0:
        break
    assert code == 9, (at, code)
    left = sorted(os.listdir(run)) if os.path.exists(run) else None
    if "run.json" not in (left or ()):
        resume = ["--resume"] if left is not None else []
        assert forked(train, recipe, f"output_dir={run}", *resume) == 0, (at, left)
    print("tried", run, flush=True)
    at += every
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_base) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    lines = (f"a sink is token {i} of all that there are" for i in range(60))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    settings = {
        "output_dir": str(folder / "run"),
        "model": {"base": str(tiny_base("llama"))},
        "data": {"sources": [{"path": str(folder / "text.jsonl")}], "sequence_length": 64},
        "train": {"max_steps": 3, "save_steps": 2, "batch_size": 2, "report_to": []},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    cli.app(["train", str(recipe)], standalone_mode=False)
    return recipe.parent / "run"


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def process(code: str, *arguments, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | kwargs.pop("env", {})
    return subprocess.Popen(command, text=True, env=environment, **kwargs)


def test_a_run_killed_at_any_write_goes_on(recipe, whole, tmp_path):
    """Of its writes each seventh is tried, which is no multiple of how many a checkpoint takes."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_WRITE, str(recipe), str(tmp_path), "7"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    runs = {Path(line.removeprefix("tried ")) for line in lines if line.startswith("tried ")}
    assert len(runs) > 3
    expected = adapter_of(whole)
    for run in runs:
        found = adapter_of(run)
        assert all(torch.equal(found[name], expected[name]) for name in expected), run
        assert json.loads((run / "run.json").read_text())["steps"] == 3
        assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


HANGING = """
import sys, time

def wait(*args, **kwargs):
    print("here", file=sys.stderr, flush=True)
    time.sleep(600)

"""
WHILE_WRITING = "import retrofit.export.merge; retrofit.export.merge._report = wait\n"
WHILE_PROVING = """
import subprocess
run = subprocess.run
subprocess.run = lambda command, **given: (run if command[1] == "-c" else wait)(command, **given)
"""
WHILE_LOADING = """
from retrofit.training.trainer import GateTrainer
GateTrainer.initialize_gates = wait
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [WHILE_WRITING, WHILE_PROVING], ids=["writing", "proving"])
def test_a_merge_told_to_end_leaves_nothing(whole, tmp_path, number, at):
    (tmp_path / "tmp").mkdir()
    merging = process(
        *(HANGING + at + MAIN, "merge", whole, "--out", tmp_path / "a" / "out"),
        stderr=subprocess.PIPE,
        env={"TMPDIR": str(tmp_path / "tmp")},
        # A shell's background would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(merging, "here")
    assert list(tmp_path.glob("a/.out.partial-*"))
    merging.send_signal(number)
    assert merging.wait(60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert not list((tmp_path / "tmp").glob(".retrofit-*"))


def wait_for(started: subprocess.Popen, said: str) -> None:
    for line in started.stderr:
        if line.strip() == said:
            return
    raise AssertionError(f"ended with {started.wait()} and never said {said!r}")


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
def test_nobody_listening_does_not_end_a_run(recipe, whole, tmp_path, stream):
    read, write = os.pipe()
    os.close(read)
    named = ["stdout", "stderr"] if stream == "both" else [stream]
    with (tmp_path / "log").open("w") as log:
        streams = {"stdout": log, "stderr": log} | dict.fromkeys(named, write)
        training = process(MAIN, "train", recipe, f"output_dir={tmp_path / 'run'}", **streams)
    os.close(write)
    assert training.wait(300) == 0, (tmp_path / "log").read_text()[-2000:]
    found, expected = adapter_of(tmp_path / "run"), adapter_of(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_told_to_end_before_its_first_step_leaves_nothing(recipe, tmp_path):
    training = process(
        HANGING + WHILE_LOADING + MAIN, "train", recipe,
        f"output_dir={tmp_path / 'a' / 'run'}", stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(training, "here")
    training.send_signal(signal.SIGTERM)
    assert training.wait(60) == 130
    assert not list(tmp_path.iterdir())
