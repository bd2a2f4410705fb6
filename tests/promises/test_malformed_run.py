"""Run folders, checkpoints and output paths that are damaged, moved, full or oddly named."""

import errno
import html
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from malformed import files_below, refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from retrofit import cli
from retrofit.measure.evaluator import KeptFigures
from retrofit.recipe import Recipe, load_recipe
from retrofit.report import plot
from retrofit.training.callbacks import GradientCheck
from retrofit.training.checkpoints import last_checkpoint
from retrofit.training.divergence import DivergedError
from retrofit.training.run import Interrupted, train
from retrofit.training.trainer_state import SafetensorsCheckpoints
from retrofit.utils.console import PlainConsole
from retrofit.utils.errors import UserError
from retrofit.utils.files import atomic_folder, temporary_folder
from retrofit.utils.output_path import refuse_unwritable

STEPS = 5
NAN = float("nan")


class StopAt(GradientCheck):
    """Presses Ctrl-C in the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_base):
    """A folder with data, and a recipe that names base and data by relative paths."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_base("llama"), folder / "base")
    lines = (f"a sink is token {i} of all that there are" for i in range(60))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings("run")))
    return folder


def settings(output_dir: str) -> dict:
    return {
        "output_dir": output_dir,
        "model": {"base": "base"},
        "data": {"sources": [{"path": "text.jsonl"}], "sequence_length": 64},
        "train": {"max_steps": STEPS, "save_steps": 1, "batch_size": 2, "report_to": []},
    }


@pytest.fixture(scope="module")
def runs(home):
    """Two runs of one recipe, `whole` and one that was stopped after step 3."""
    from retrofit.training import run as module

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        whole = train(Recipe.model_validate(settings("whole")))
        patch.setattr(module, "GradientCheck", StopAt)
        with pytest.raises(Interrupted):
            train(Recipe.model_validate(settings("stopped")))
    return {"whole": home / whole, "stopped": home / "stopped"}


@pytest.fixture
def stopped(runs, tmp_path):
    """A copy of the stopped run somewhere else, so it has been moved as well."""
    return Path(shutil.copytree(runs["stopped"], tmp_path / "moved"))


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def command(*arguments) -> str:
    """What `retrofit` prints where it is done."""
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def resumes(run: Path, whole: Path) -> str:
    """What is said where a run goes on, and comes to what it would have come to."""
    said = command("train", run / "recipe.resolved.yaml", "--resume")
    ours, theirs = adapter_of(run), adapter_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((run / "run.json").read_text())["steps"] == STEPS
    return said


def missing(path: Path):
    path.unlink()


def empty(path: Path):
    path.write_bytes(b"")


def half(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def last_byte_off(path: Path):
    path.write_bytes(path.read_bytes().rstrip()[:-1])


def zeros(path: Path):
    path.write_bytes(bytes(path.stat().st_size))


def a_folder(path: Path):
    path.unlink()
    path.mkdir()


def latin_1(path: Path):
    path.write_bytes(b"\xe9" + path.read_bytes())


def another_value(path: Path):
    if path.suffix == ".json":
        path.write_text("[1, 2]")
    else:
        save_file({"x": torch.zeros(1)}, path)


def of_nothing(path: Path):
    if path.suffix == ".json":
        path.write_text("{}")
    else:
        save_file({}, path)


READ = ("trainer_state.json", "step.json", "state.json", "optimizer.safetensors",
        "adapter_model.safetensors", "rng-0.safetensors")  # fmt: skip
DAMAGES = (missing, empty, half, last_byte_off, zeros, a_folder, latin_1, another_value, of_nothing)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.replace("_", " "))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, name, damage):
    newest = stopped / "checkpoints" / "checkpoint-3"
    damage(newest / name)
    whole, damaged = last_checkpoint(stopped / "checkpoints")
    assert whole == newest.with_name("checkpoint-2")
    assert list(damaged) == [newest]
    assert damaged[newest] and "\n" not in damaged[newest]


def told(name, **changes):
    """A JSON file of a checkpoint that says something else."""

    def spoil(checkpoint):
        path = checkpoint / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def told_alone(name, *keys):
    def spoil(checkpoint):
        path = checkpoint / name
        said = json.loads(path.read_text())
        path.write_text(json.dumps({key: said[key] for key in keys}))

    return spoil


def group(change):
    """Another first group of the optimizer."""

    def spoil(checkpoint):
        path = checkpoint / "state.json"
        said = json.loads(path.read_text())
        change(said["param_groups"])
        path.write_text(json.dumps(said))

    return spoil


def schedule(**changes):
    def spoil(checkpoint):
        said = json.loads((checkpoint / "state.json").read_text())
        told("state.json", scheduler=said["scheduler"] | changes)(checkpoint)

    return spoil


def tensors(name, change):
    """Other tensors in a file, whose metadata stays."""

    def spoil(checkpoint):
        path = checkpoint / name
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        held = load_file(path)
        changed = change(held)
        save_file(changed if isinstance(changed, dict) else held, path, metadata=metadata)

    return spoil


def moments(change):
    return tensors("optimizer.safetensors", change)


def metadata(**rest):
    def spoil(checkpoint):
        path = checkpoint / "rng-0.safetensors"
        save_file(load_file(path), path, metadata=rest or None)

    return spoil


def with_nan(held):
    held["0.exp_avg"][0] = float("nan")


# How to spoil a checkpoint, and what is said of it.
SPOILT = {
    "a state with an unknown key": (told("trainer_state.json", poetry=1), "says poetry"),
    "a batch in words": (told("trainer_state.json", train_batch_size="2"), "train_batch_size"),
    "operations in words": (told("trainer_state.json", total_flos="many"), "total_flos"),
    "tokens in words": (told("trainer_state.json", num_input_tokens_seen="9"), "num_input_tok"),
    "an epoch in words": (told("trainer_state.json", epoch="first"), "epoch"),
    "callbacks in a list": (told("trainer_state.json", stateful_callbacks=[]), "stateful_callb"),
    "no callbacks": (told("trainer_state.json", stateful_callbacks={}), "TrainerControl"),
    "a step and a history": (
        told_alone("trainer_state.json", "global_step", "log_history"),
        "epoch: field required",
    ),
    "an empty schedule": (told("state.json", scheduler={}), "scheduler.last_epoch"),
    "a schedule in words": (schedule(last_epoch="3"), "scheduler.last_epoch"),
    "a schedule of more groups": (
        schedule(base_lrs=[0.1] * 9),
        "a schedule for other groups",
    ),
    "a schedule without shapes": (
        schedule(lr_lambdas=[]),
        "a schedule for other groups",
    ),
    "every group twice": (
        group(lambda groups: groups.extend(groups[:])),
        "a schedule for other groups",
    ),
    "a group of nothing but parameters": (
        group(lambda groups: groups.__setitem__(0, {"params": [0]})),
        "param_groups.0.lr: field required",
    ),
    "a parameter too many": (
        group(lambda groups: groups[0]["params"].append(99)),
        "holds other parameters than state.json names",
    ),
    "a parameter twice": (
        group(lambda groups: groups[0]["params"].append(groups[0]["params"][0])),
        "a parameter in two groups",
    ),
    "a rate in words": (group(lambda groups: groups[0].update(lr="fast")), "param_groups.0.lr"),
    "one moment of Adam's": (group(lambda groups: groups[0].update(betas=[0.9])), "betas"),
    "moments cut": (
        moments(
            lambda held: {name: each[:1] if each.ndim else each for name, each in held.items()}
        ),
        "exp_avg in another shape than the gates",
    ),
    "a moment missing": (moments(lambda held: held.pop("0.exp_avg")), "the moments of 0"),
    "a parameter without moments": (
        moments(lambda held: {n: t for n, t in held.items() if not n.startswith("0.")}),
        "holds other parameters than state.json names",
    ),
    "a moment of NaN": (moments(with_nan), "a number that is not finite in 0.exp_avg"),
    "no count of steps": (moments(lambda held: held.pop("0.step")), "the moments of 0"),
    "names without a dot": (
        moments(lambda held: {name.replace(".", ""): each for name, each in held.items()}),
        "which is no moment",
    ),
    "gates of NaN": (
        tensors("adapter_model.safetensors", lambda held: [t.fill_(NAN) for t in held.values()]),
        "adapter_model.safetensors has NaN in",
    ),
    "generators without what is beside them": (metadata(), "lacks a generator"),
    "junk beside the generators": (metadata(rest="junk"), "rng-0.safetensors is damaged"),
    "nothing beside the generators": (metadata(rest="{}"), "rng-0.safetensors is damaged"),
    **{
        f"a short state of {name}": (
            tensors("rng-0.safetensors", lambda held, name=name: {**held, name: held[name][:9]}),
            "rng-0.safetensors is damaged",
        )
        for name in ("torch", "python", "numpy")
    },
    "what FSDP writes": (
        lambda checkpoint: (checkpoint / "pytorch_model_fsdp_0").mkdir(),
        "holds pytorch_model_fsdp_0, which only FSDP reads",
    ),
    "more rows a step": (told("step.json", rows=10**9), "1000000000 rows a step, and the run tak"),
    "other rows a step": (told("step.json", rows=4), "of 4 rows a step, and the run takes 2"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_a_checkpoint_that_cannot_be_gone_on_from_gives_way(stopped, spoil, message):
    newest = stopped / "checkpoints" / "checkpoint-3"
    spoil(newest)
    whole, damaged = last_checkpoint(stopped / "checkpoints")
    assert whole == newest.with_name("checkpoint-2")
    assert message in damaged[newest] and "\n" not in damaged[newest]


def test_groups_of_another_optimizer_are_refused(stopped):
    def joined(said):
        params = [index for each in said for index in each["params"]]
        said[:] = [said[0] | {"params": params}]

    checkpoint = stopped / "checkpoints" / "checkpoint-3"
    group(joined)(checkpoint)
    schedule(base_lrs=[0.1], lr_lambdas=[{}])(checkpoint)
    message = refusal(
        "train", stopped / "recipe.resolved.yaml", "--resume", leaves_alone=stopped.parent
    )
    assert "its groups differ" in message and "checkpoint-3" in message


def test_a_file_in_the_place_of_the_checkpoints_is_refused(stopped):
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "checkpoints").write_text("mine")
    message = refusal(
        "train", stopped / "recipe.resolved.yaml", "--resume", leaves_alone=stopped.parent
    )
    assert f"{stopped / 'checkpoints'} is no folder" in message


@pytest.mark.parametrize("name", ["step.json", "optimizer.safetensors", "trainer_state.json"])
def test_what_is_wrong_with_a_checkpoint_names_the_file(stopped, name):
    missing(stopped / "checkpoints" / "checkpoint-3" / name)
    (wrong,) = last_checkpoint(stopped / "checkpoints")[1].values()
    assert wrong == f"it has no {name}"


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"global_step": 2}, "its trainer_state.json is of step 2"),
        ({"global_step": "3"}, "global_step: input should be a valid integer"),
        ({"log_history": None}, "log_history: input should be a valid list"),
    ],
)
def test_a_checkpoint_says_of_which_step_it_is(stopped, state, told):
    path = stopped / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | state))
    (wrong,) = last_checkpoint(stopped / "checkpoints")[1].values()
    assert wrong == told


def test_each_rank_has_its_random_state(stopped):
    path = stopped / "checkpoints" / "checkpoint-3" / "step.json"
    path.write_text(json.dumps({"rows": 2, "ranks": 2}))
    (wrong,) = last_checkpoint(stopped / "checkpoints")[1].values()
    assert wrong == "it has no rng-1.safetensors"


def test_a_checkpoint_from_before_ranks_were_counted_is_accepted(stopped):
    path = stopped / "checkpoints" / "checkpoint-3" / "step.json"
    path.write_text(json.dumps({"rows": 2}))
    assert last_checkpoint(stopped / "checkpoints") == (path.parent, {})


@pytest.mark.parametrize("name", ["checkpoint-x", "checkpoint-", "checkpoint--1", "checkpoint-²"])
def test_a_folder_whose_name_has_no_step_is_no_checkpoint(stopped, name):
    shutil.copytree(stopped / "checkpoints" / "checkpoint-2", stopped / "checkpoints" / name)
    assert last_checkpoint(stopped / "checkpoints")[0].name == "checkpoint-3"


def test_a_run_goes_on_beside_what_is_no_checkpoint_and_says_so(stopped, runs):
    folder = stopped / "checkpoints"
    half(folder / "checkpoint-3" / "optimizer.safetensors")
    (folder / "checkpoint-999999").mkdir()
    said = resumes(stopped, runs["whole"])
    assert "checkpoint-3 is passed over: optimizer.safetensors is damaged" in said
    assert "checkpoint-999999 is passed over: it has no trainer_state.json" in said
    # The Trainer keeps two, and what is no checkpoint must not be one of them.
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-4", "checkpoint-5", "damaged-checkpoint-3", "damaged-checkpoint-999999"
    }  # fmt: skip


def test_a_run_without_a_whole_checkpoint_starts_from_the_beginning_and_says_so(stopped, runs):
    for folder in (stopped / "checkpoints").iterdir():
        empty(folder / "state.json")
    assert "has no whole checkpoint: it starts from the beginning" in resumes(
        stopped, runs["whole"]
    )


def test_gates_of_another_run_in_a_checkpoint_are_refused(stopped):
    tensors(
        "adapter_model.safetensors", lambda held: {f"other.{n}": gate for n, gate in held.items()}
    )(stopped / "checkpoints" / "checkpoint-3")
    message = refusal(
        "train", stopped / "recipe.resolved.yaml", "--resume", leaves_alone=stopped.parent
    )
    assert "does not hold the gates of this run" in message and "checkpoint-3" in message


# What a killed process may leave where it was finishing, by what is there.
LEFT_AT_THE_END = {
    "nothing of it": [],
    "half an adapter": [".adapter.partial"],
    "an adapter and no run.json": ["adapter"],
    "an adapter and a hidden run.json": ["adapter", ".run.json.partial"],
    "both kinds of adapter": ["adapter", ".adapter.partial", ".run.json.partial"],
}


@pytest.mark.parametrize("left", LEFT_AT_THE_END.values(), ids=LEFT_AT_THE_END)
def test_a_run_killed_while_it_finished_is_finished_by_resuming(runs, tmp_path, left):
    run = Path(shutil.copytree(runs["whole"], tmp_path / "run"))
    facts = (run / "run.json").read_text()
    (run / "run.json").unlink()
    (run / "adapter").rename(run / "whole")
    for name in left:
        if name.startswith(".run"):
            (run / name).write_text(facts[:50])
        else:
            shutil.copytree(run / "whole", run / name)
            half(run / name / "adapter_model.safetensors")
    shutil.rmtree(run / "whole")
    resumes(run, runs["whole"])
    assert {path.name for path in run.iterdir()} == {
        "adapter", "checkpoints", "recipe.resolved.yaml", "run.json", "started.json"
    }  # fmt: skip


def test_a_run_killed_before_it_wrote_anything_begins_by_resuming(home, runs, monkeypatch):
    monkeypatch.chdir(home)
    (home / "fresh" / "checkpoints").mkdir(parents=True)
    command("train", "recipe.yaml", "output_dir=fresh", "--resume")
    ours, theirs = adapter_of(home / "fresh"), adapter_of(runs["whole"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_with_other_files_is_not_resumed(home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    output = f"output_dir={tmp_path / 'run'}"
    message = refusal("train", home / "recipe.yaml", output, "--resume", leaves_alone=tmp_path)
    assert "holds no run" in message


def test_a_moved_run_says_where_it_is_by_where_it_lies(stopped, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe's relative paths mean what they meant
    said = resumes(Path("moved"), runs["whole"])
    assert "run: moved next: retrofit merge moved --out moved-merged" in said
    facts = json.loads((stopped / "run.json").read_text())
    assert Path(facts["base"]["name_or_path"]).is_absolute()


def test_a_moved_run_goes_on_by_its_first_recipe_too(home, runs, monkeypatch):
    monkeypatch.chdir(home)
    shutil.copytree(runs["stopped"], home / "elsewhere")
    command("train", "recipe.yaml", "output_dir=elsewhere", "--resume")
    assert (home / "elsewhere" / "run.json").is_file()


def test_the_recipe_of_a_run_trains_another_one_elsewhere(stopped):
    recipe = load_recipe(str(stopped / "recipe.resolved.yaml"), ["output_dir=other"])
    assert recipe.output_dir == "other"
    assert Path(recipe.model.base).is_dir() and Path(recipe.data.sources[0].path).is_file()


def test_what_is_no_file_is_not_anchored(home, monkeypatch):
    monkeypatch.chdir(home)
    given = settings("run") | {"model": {"base": "org/name"}, "measure": {"text": "~/text.txt"}}
    recipe = Recipe.model_validate(given).with_absolute_paths()
    assert recipe.model.base == "org/name" and recipe.measure.text == "~/text.txt"
    assert recipe.data.sources[0].path == str(home / "text.jsonl")


def another_seed(run: Path) -> list[str]:
    return ["train.seed=5"]


def finished(run: Path) -> list[str]:
    (run / "run.json").write_text("{}")
    return []


def no_recipe(run: Path) -> list[str]:
    (run / "recipe.resolved.yaml").write_text("")
    return []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_seed, "started with another recipe (its train differ); resume with"),
        (finished, "is finished; there is nothing to resume"),
        (no_recipe, "is not a recipe"),
    ],
)
def test_what_cannot_be_resumed_is_told(stopped, change, told):
    arguments = change(stopped)
    message = refusal(
        *("train", stopped / "recipe.resolved.yaml", *arguments, "--resume"),
        leaves_alone=stopped.parent,
    )
    assert told in message


@pytest.fixture
def moved(stopped, home, tmp_path):
    """A stopped run whose base and data lie beside it, to be changed."""
    shutil.copytree(home / "base", tmp_path / "base")
    shutil.copy(home / "text.jsonl", tmp_path / "text.jsonl")
    for name in ("recipe.resolved.yaml", "started.json"):
        path = stopped / name
        path.write_text(path.read_text().replace(str(home), str(tmp_path)))
    return stopped


def other_weights(folder: Path) -> str:
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, path, metadata={"format": "pt"})
    return "the weights in"


def other_config(folder: Path) -> str:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    return "rms_norm_eps 0.5"


def other_data(folder: Path) -> str:
    (folder / "text.jsonl").write_text('{"text": "something else of all that there is"}\n' * 60)
    return f"{folder / 'text.jsonl'} is not what"


def other_file(folder: Path) -> str:
    path = folder / "other.jsonl"
    path.write_text('{"text": "something else of all that there is"}\n' * 60)
    recipe = folder / "moved" / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text().replace("text.jsonl", path.name))
    return f"{path} is not what"


def fewer_files(folder: Path) -> str:
    started = folder / "moved" / "started.json"
    facts = json.loads(started.read_text())
    facts["files"]["second.jsonl"] = "0" * 64
    started.write_text(json.dumps(facts))
    return "the data of"


def other_tokenizer(folder: Path) -> str:
    path = folder / "base" / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(rules))
    return f"the tokenizer of {folder / 'base'} is not what"


def damaged_start(folder: Path) -> str:
    half(folder / "moved" / "started.json")
    return "started.json is damaged"


CHANGES = (
    other_weights, other_config, other_data, other_file, fewer_files, other_tokenizer, damaged_start
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.replace("_", " "))
def test_a_run_does_not_go_on_with_something_else(moved, change):
    told = change(moved.parent)
    message = refusal(
        "train", moved / "recipe.resolved.yaml", "--resume", leaves_alone=moved.parent
    )
    assert told in message and str(moved) in message


def test_a_run_goes_on_where_its_data_has_been_moved(moved, runs):
    (moved.parent / "text.jsonl").rename(moved.parent / "elsewhere.jsonl")
    recipe = moved / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text().replace("text.jsonl", "elsewhere.jsonl"))
    resumes(moved, runs["whole"])


def test_a_run_of_before_that_does_not_say_what_it_was_started_with_goes_on(moved, runs):
    (moved / "started.json").unlink()
    resumes(moved, runs["whole"])


@pytest.mark.parametrize("verb", ["measure", "merge"])
@pytest.mark.parametrize("change", [other_weights, other_config], ids=["weights", "config"])
def test_a_checkpoint_of_a_stopped_run_is_held_to_its_base(moved, home, change, verb):
    change(moved.parent)
    checkpoint = moved / "checkpoints" / "checkpoint-2"
    options = {
        "measure": ["--text", home / "text.jsonl", "--length", 192, "--windows", 1],
        "merge": ["--out", moved.parent / "out"],
    }[verb]
    message = refusal(verb, checkpoint, *options, leaves_alone=moved.parent)
    assert "sha256 differs" in message or "rms_norm_eps" in message


# Output paths: how to make each, and what is said of it.


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "out"


def deep_below_a_file(folder: Path) -> Path:
    return below_a_file(folder) / "a" / "b"


def a_long_name(folder: Path) -> Path:
    return folder / ("x" * 300)


def a_name_as_long_as_can_be(folder: Path) -> Path:
    return folder / ("x" * 250)


def a_long_path(folder: Path) -> Path:
    return Path(folder, *["y" * 200] * 20) / "out"


def a_path_as_long_as_can_be(folder: Path) -> Path:
    rest = 4090 - len(os.fsencode(folder))
    return Path(folder, *["z" * 200] * (rest // 201), "z" * (rest % 201))


def a_variable(folder: Path) -> Path:
    return Path("$NOT_SET/runs/out")


def a_variable_in_braces(folder: Path) -> Path:
    return Path("${OUT}/run")


def a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / "out"


def there(folder: Path) -> Path:
    (folder / "out").mkdir()
    return folder / "out"


def a_dangling_link(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out"


def a_file(folder: Path) -> Path:
    (folder / "out").write_text("mine")
    return folder / "out"


UNWRITABLE = {
    below_a_file: "is no folder",
    deep_below_a_file: "is no folder",
    a_long_name: "File name too long",
    a_name_as_long_as_can_be: "File name too long",
    a_long_path: "File name too long",
    a_path_as_long_as_can_be: "File name too long",
    a_variable: "variable",
    a_variable_in_braces: "variable",
    a_loop: "Too many levels of symbolic links",
}
FOLDERS = UNWRITABLE | {there: "exists", a_dangling_link: "exists", a_file: "exists"}


def words(function) -> str:
    return getattr(function, "__name__", "").replace("_", " ") or None


@pytest.mark.parametrize(("made", "told"), FOLDERS.items(), ids=words)
@pytest.mark.parametrize("verb", ["train", "merge"])
def test_a_folder_that_cannot_be_made_is_refused_first(runs, home, tmp_path, verb, made, told):
    path = made(tmp_path)
    if verb == "train":
        arguments = ["train", home / "recipe.yaml", f"output_dir={json.dumps(str(path))}"]
    else:
        arguments = ["merge", runs["whole"], "--out", path]
    message = refusal(*arguments, leaves_alone=tmp_path)
    assert told in message


@pytest.mark.parametrize(("made", "told"), (UNWRITABLE | {there: "is a folder"}).items(), ids=words)
@pytest.mark.parametrize("option", ["--json", "--report", "--plot"])
@pytest.mark.parametrize("verb", ["measure", "compare"])
def test_a_file_that_cannot_be_written_is_refused_first(home, tmp_path, verb, option, made, told):
    path = made(tmp_path)
    if verb == "measure":
        arguments = ["measure", home / "base", "--text", home / "text.jsonl", option, path]
    elif option == "--plot":
        pytest.skip("compare draws nothing")
    else:
        arguments = ["compare", home / "a.json", option, path]
    message = refusal(*arguments, leaves_alone=tmp_path)
    assert told in message or "no folder to write" in message


@pytest.mark.parametrize("made", UNWRITABLE, ids=words)
def test_a_recipe_is_not_copied_where_nothing_can_be_written(tmp_path, made):
    message = refusal("recipes", "copy", "qwen3-0.6b", made(tmp_path), leaves_alone=tmp_path)
    assert UNWRITABLE[made] in message


def test_a_recipe_is_not_copied_into_a_folder_that_is_not_there(tmp_path):
    message = refusal("recipes", "copy", "qwen3-0.6b", tmp_path / "a/b", leaves_alone=tmp_path)
    assert "No such file or directory" in message


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("measure", ["--json", "{x}", "--report", "{x}"]),
        ("measure", ["--report", "{x}", "--plot", "{x}"]),
        ("measure", ["--json", "{text}"]),
        ("measure", ["--plot", "{text}"]),
        ("compare", ["--json", "{x}", "--report", "{x}"]),
        ("compare", ["--json", "{text}"]),
        ("compare", ["--report", "{text}"]),
        ("measure", ["--json", "{x}", "--report", "{same_x}"]),
        ("measure", ["--json", "{same_text}"]),
        ("compare", ["--json", "{same_text}"]),
    ],
)
def test_no_file_takes_the_place_of_another(home, tmp_path, verb, options):
    text = tmp_path / "text.jsonl"
    shutil.copy(home / "text.jsonl", text)
    (tmp_path / "a").mkdir()
    paths = {"x": tmp_path / "x", "text": text}
    paths |= {f"same_{name}": tmp_path / "a/.." / path.name for name, path in paths.items()}
    named = [option.format_map(paths) for option in options]
    given = [home / "base", "--text", text] if verb == "measure" else [text]
    message = refusal(verb, *given, *named, leaves_alone=tmp_path)
    assert "is named twice, or read as well" in message


LONG_NAME = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{long}.yaml"],
        ["check", "{home}/recipe.yaml", "data.sources=[{{path: {long}.jsonl}}]"],
        ["check", "{home}/recipe.yaml", "measure={{text: {long}.jsonl}}"],
        ["check", "{home}/recipe.yaml", "model.base=./{long}"],
        ["train", "{home}/recipe.yaml", "output_dir={long}", "--resume"],
        ["recipes", "show", "{long}.yaml"],
        ["measure", "./{long}", "--text", "{home}/text.jsonl"],
        ["measure", "{home}/base", "--text", "{long}.jsonl"],
        ["compare", "{long}.json"],
        ["merge", "./{long}", "--out", "out"],
        ["verify", "{long}"],
        ["unpack", "./{long}", "--out", "out"],
    ],
    ids=lambda arguments: " ".join(arguments).replace("/", " "),
)
def test_a_name_that_the_system_does_not_take_is_refused(home, tmp_path, monkeypatch, arguments):
    """So is a folder that is not the user's to look into, of which the system says as little."""
    monkeypatch.chdir(home)
    filled = [argument.format(long=LONG_NAME, home=home) for argument in arguments]
    assert "File name too long" in refusal(*filled, leaves_alone=tmp_path)


def without_permission(monkeypatch, folder: Path):
    """Root may write anywhere, so the system's answer is another one."""
    answer = os.access
    monkeypatch.setattr(os, "access", lambda path, *a: Path(path) != folder and answer(path, *a))


@pytest.mark.parametrize("verb", ["train", "merge", "measure", "compare", "copy"])
def test_a_folder_of_somebody_else_is_refused_first(runs, home, tmp_path, monkeypatch, verb):
    without_permission(monkeypatch, tmp_path)
    out = tmp_path / "out"
    arguments = {
        "train": ["train", home / "recipe.yaml", f"output_dir={out}"],
        "merge": ["merge", runs["whole"], "--out", out],
        "measure": ["measure", home / "base", "--text", home / "text.jsonl", "--json", out],
        "compare": ["compare", home / "a.json", "--report", out],
        "copy": ["recipes", "copy", "qwen3-0.6b", out],
    }[verb]
    message = refusal(*arguments, leaves_alone=tmp_path)
    assert f"no permission to write in {tmp_path}" in message


def test_a_run_of_somebody_else_is_not_resumed(stopped, monkeypatch):
    without_permission(monkeypatch, stopped)
    message = refusal(
        "train", stopped / "recipe.resolved.yaml", "--resume", leaves_alone=stopped.parent
    )
    assert "no permission" in message


@pytest.mark.parametrize("name", ["a\udcffb", "\ud800", "a\0b"], ids=["byte", "half", "zero"])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not a file name"):
        refuse_unwritable(tmp_path / name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "r\udcff.yaml"],
        ["train", "recipe.yaml", "output_dir=r\udcff"],
        ["check", "r\udcff"],
        ["merge", "r\udcff", "--out", "out"],
        ["merge", "run", "--out", "r\udcff"],
        ["measure", "r\udcff", "--text", "t.txt"],
        ["measure", "base", "--text", "r\udcff"],
        ["compare", "r\udcff"],
        ["verify", "r\udcff"],
        ["unpack", "r\udcff", "--out", "out"],
        ["recipes", "show", "r\udcff"],
    ],
    ids=" ".join,
)
def test_no_verb_takes_a_name_that_is_not_utf_8(tmp_path, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is not UTF-8" in refusal(*arguments, leaves_alone=tmp_path)


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
@pytest.mark.parametrize("first", [True, False], ids=["the first", "a later one"])
def test_a_full_disk_during_a_checkpoint_is_one_line(home, tmp_path, monkeypatch, at, first):
    monkeypatch.chdir(home)
    original = getattr(SafetensorsCheckpoints, at)

    def filling(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if first or self.state.global_step == 3:
            full()

    monkeypatch.setattr(SafetensorsCheckpoints, at, filling)
    run = tmp_path / "deep" / "run"
    with pytest.raises(UserError) as raised:
        train(Recipe.model_validate(settings(str(run))))
    message = str(raised.value)
    again = "start again" if first else "go on with --resume"
    assert f"No space left on device; make room, and {again}" in message
    left = {path.name for path in run.glob("checkpoints/*")}
    assert left == (set() if first else {"checkpoint-1", "checkpoint-2"})
    assert run.exists() != first and (tmp_path / "deep").exists() != first


@pytest.mark.parametrize("at", ["write_text", "atomic_file"])
def test_a_full_disk_at_the_start_or_the_end_is_one_line(home, tmp_path, monkeypatch, at):
    from retrofit.training import run as module

    monkeypatch.chdir(home)
    monkeypatch.setattr(module, at, full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        train(Recipe.model_validate(settings(str(tmp_path / "run"))))
    assert (tmp_path / "run").exists() == (at == "atomic_file")


def test_a_run_that_diverges_at_once_leaves_its_name_to_the_next_try(home, tmp_path, monkeypatch):
    from retrofit.training.trainer import GateTrainer

    monkeypatch.chdir(home)
    monkeypatch.setattr(
        GateTrainer,
        "compute_loss",
        lambda self, model, inputs, **_: model(**inputs).logits.sum() * float("nan"),
    )
    message = refusal("train", "recipe.yaml", f"output_dir={tmp_path}/a/b", leaves_alone=tmp_path)
    assert "the loss is nan at the first step" in message


@pytest.mark.parametrize("rate", ["1e39", "1e300"])
def test_a_run_whose_last_step_diverges_offers_no_merge(home, tmp_path, monkeypatch, rate):
    monkeypatch.chdir(home)
    recipe = load_recipe(
        "recipe.yaml",
        [
            f"output_dir={tmp_path}/run",
            f"train.learning_rate={rate}",
            "train.max_steps=1",
            "train.warmup_steps=0",
            "train.schedule=constant_with_warmup",
        ],
    )
    with pytest.raises(DivergedError, match="after the last step; lower train.learning_rate"):
        train(recipe)
    assert not (tmp_path / "run/run.json").exists()


def test_what_was_measured_is_measured_again_where_it_is_damaged(tmp_path):
    done = KeptFigures(tmp_path / "kept", {"text": 1})
    done.put({"x": 1}, "a")
    done.put({"x": 2}, "b")
    first, _ = sorted((tmp_path / "kept").iterdir())
    half(first)
    found = KeptFigures(tmp_path / "kept", {"text": 1})
    assert sorted([found.get("a") is None, found.get("b") is None]) == [False, True]


def test_a_folder_for_what_is_measured_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(UserError, match="kept cannot be written"):
        KeptFigures(tmp_path / "kept", {}).put(1, "a")


def test_what_fails_leaves_no_folder_that_was_made_for_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), atomic_folder(tmp_path / "there" / "a" / "b" / "out"):
        raise KeyError
    assert files_below(tmp_path) == {tmp_path / "there"}


def test_what_killed_processes_left_for_a_while_is_tidied_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder() as folder:
        dead = folder.with_name(folder.name.rpartition("-")[0] + "-4194999")
        others = {tmp_path / name for name in ("retrofit-4194999", ".retrofit-other-4194999")}
        for each in (dead, *others):
            each.mkdir()
        with temporary_folder():
            assert folder.is_dir() and not dead.exists()
    assert set(tmp_path.iterdir()) == others


# Brackets are markup to rich, and a dollar sign begins a formula in matplotlib.
NAMES = ["[v2]", "[/b]", "[bold]", "a\\", "[red]x[/red]", "[link=x]", "$x^$", "_x", "{x}", "50%"]


@pytest.fixture(scope="module")
def measured(home):
    """What is measured of a model whose name looks like markup."""
    base, out = home / "[v2] [bold]", home / "[v2].json"
    base.symlink_to(home / "base")
    said = command(
        *("measure", home / "base", base, "--text", home / "text.jsonl", "--length", 192),
        *("--windows", 1, "--json", out, "--plot", home / "[v2].png"),
    )
    assert "[v2] [bold]" in said and (home / "[v2].png").stat().st_size
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_by_every_part_of_a_report(measured, tmp_path, name):
    measured["models"][1]["name"] = name
    (tmp_path / "given.json").write_text(json.dumps(measured))
    report = tmp_path / "report.html"
    assert name in command("compare", tmp_path / "given.json", "--report", report)
    assert html.escape(name) in report.read_text()


@pytest.mark.parametrize("name", ["$x^$", "_x"])
def test_a_name_is_no_formula_in_a_picture(measured, tmp_path, name):
    measured["models"][1]["name"] = name
    plot(measured, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size


@pytest.mark.parametrize("name", ["[v2]", "[/b] $ x$"])
def test_a_run_is_told_by_the_name_that_it_has(home, tmp_path, name, monkeypatch, in_process):
    monkeypatch.chdir(home)
    run = tmp_path / name
    said = command(
        "train", "recipe.yaml", f"output_dir={json.dumps(str(run))}", "train.max_steps=1"
    )
    assert f"run: {run} " in said
    assert f"--out '{run}-merged'" in said
    assert name in command("merge", run, "--out", tmp_path / f"{name}-merged")


def test_a_long_path_is_not_cut_into_lines(capsys):
    from retrofit.utils.console import say

    say("x" * 300)
    assert capsys.readouterr().out == "x" * 300 + "\n"


@pytest.mark.parametrize("to", ["stdout", "stderr"])
def test_nobody_listening_is_no_reason_to_end(to):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        console = PlainConsole(file=file)
        console.print("x" * 10_000)
        console.print("again")
    assert console.quiet


def test_a_merged_checkpoint_names_no_folder_and_is_not_resumed(home, runs, tmp_path, in_process):
    command("merge", runs["whole"], "--out", tmp_path / "merged")
    recipe = tmp_path / "merged" / "recipe.resolved.yaml"
    assert str(home) not in recipe.read_text() and "text.jsonl" in recipe.read_text()
    message = refusal("train", recipe, "--resume", leaves_alone=tmp_path)
    assert "holds no run" in message
