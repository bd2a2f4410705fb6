"""The command line: exit codes, one-line errors, and a help that answers at once."""

import json
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version

import pytest
import yaml
from malformed import refusal
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from retrofit import GateConfig, cli
from retrofit.measure.registry import EVALUATIONS
from retrofit.recipe import bundled_recipes

COMMAND = [sys.executable, "-c", "from retrofit.cli import main; main()"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture
def recipe_file(tiny_base, tmp_path):
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"a sink is token {i}"}) + "\n" for i in range(99)))
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text(json.dumps({"text": "a gate is token " * 99}) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "run"),
                "model": {"base": str(tiny_base("llama"))},
                "data": {"sources": [{"path": str(data)}], "sequence_length": 64},
                "train": {"max_steps": 2, "report_to": []},
                "measure": {"text": str(unseen), "length": 192, "windows": 2},
            }
        )
    )
    return path


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that the command line imports for these arguments."""
    code = (
        "import sys; from retrofit.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return set(result.stderr.split())


HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "yaml"}


def test_help_imports_nothing_that_takes_long():
    assert not (HEAVY | {"pydantic"}) & imported_by("--help")


@pytest.mark.parametrize(
    "verb", ["train", "measure", "compare", "merge", "verify", "unpack", "check", "recipes"]
)
def test_the_help_of_a_verb_imports_nothing_that_takes_long(verb):
    assert not HEAVY & imported_by(verb, "--help")


def test_recipes_are_listed_without_torch():
    assert not {"torch", "transformers", "peft", "datasets"} & imported_by("recipes", "ls")


def test_the_version_is_printed():
    assert run("--version").stdout.strip() == version("gate-retrofit")


def test_the_verbs_are_listed():
    result = run("--help")
    assert result.returncode == 0
    for verb in ("train", "measure", "merge", "check", "recipes"):
        assert verb in result.stdout


def test_recipes_lists_shows_and_copies(tmp_path):
    listed = run("recipes").stdout
    assert all(name in listed for name, _ in bundled_recipes())
    shown = run("recipes", "show", "qwen3-0.6b").stdout
    assert run("recipes", "copy", "qwen3-0.6b", str(tmp_path / "mine.yaml")).returncode == 0
    assert (tmp_path / "mine.yaml").read_text() == shown
    again = run("recipes", "copy", "qwen3-0.6b", str(tmp_path / "mine.yaml"))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_train_measure_merge_by_hand(recipe_file, tmp_path, tiny_base):
    base, folder, merged = str(tiny_base("llama")), str(tmp_path / "run"), str(tmp_path / "merged")
    trained = run("train", str(recipe_file), "train.max_steps=3")
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 3
    assert (tmp_path / "run" / "measure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    (tmp_path / "run" / "measure.json").unlink()
    # What is only measured is held to its recipe, and to a text that it was not trained on.
    for override, told in {
        "train.seed=1": "was started with another recipe",
        f"measure.text={tmp_path / 'text.jsonl'}": "is trained on",
    }.items():
        other = run("train", str(recipe_file), "train.max_steps=3", override, "--resume")
        assert other.returncode == 2 and told in other.stderr
    again = run("train", str(recipe_file), "train.max_steps=3", "--resume")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "measure.json").is_file()
    merging = run("merge", folder, "--out", merged)
    assert merging.returncode == 0, merging.stderr
    out, text = tmp_path / "figures.json", str(tmp_path / "text.jsonl")
    measured = run(
        "measure", base, folder, merged, "--text", text, "--length", "192", "--json", str(out)
    )
    assert measured.returncode == 0, measured.stderr
    base_model, adapter, checkpoint = json.loads(out.read_text())["models"]
    assert base_model["metrics"]["gate_score"] is None
    assert adapter["metrics"]["gate_score"] is not None
    for metric in ("f_attn", "perplexity", "gate_score", "kl_to_base", "max_activation"):
        assert checkpoint["metrics"][metric] == pytest.approx(
            adapter["metrics"][metric], rel=1e-3, abs=1e-6
        )


@pytest.mark.slow
def test_a_base_in_four_bits_is_compared_with_itself(recipe_file, tmp_path, tiny_base):
    """A run that has learned nothing is its base, which is not the unquantized one."""
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "again.json"
    trained = run(
        *("train", str(recipe_file), "model.quantization=nf4", "model.dtype=float32"),
        *("train.learning_rate=1e-12", "train.max_steps=1"),
    )
    assert trained.returncode == 0, trained.stderr
    measured = run(
        *("measure", str(tiny_base("llama")), str(tmp_path / "run"), "--json", str(out)),
        *("--text", str(tmp_path / "unseen.jsonl"), "--length", "192", "--dtype", "float32"),
    )
    assert measured.returncode == 0, measured.stderr
    for path in (tmp_path / "run" / "measure.json", out):
        base, gated = json.loads(path.read_text())["models"]
        assert gated["metrics"]["kl_to_base"] == pytest.approx(0, abs=1e-6)
        assert gated["metrics"]["perplexity"] == pytest.approx(base["metrics"]["perplexity"])


def test_all_is_measured_reported_and_compared(tmp_path, tiny_base, capsys, monkeypatch):
    base = str(tiny_base("llama"))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), GateConfig(init_weights=False)
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 60)
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    settings = [
        *("--set", "streaming.length=256", "--set", "streaming.cache=64"),
        *("--set", "quantization.length=128", "--set", "quantization.windows=2"),
        *("--set", "heads.length=192", "--set", "heads.windows=1"),
        *("--set", "cost.prompt=128", "--set", "cost.new_tokens=2"),
        *("--set", "long_context.lengths=[1024]", "--set", "long_context.samples=1"),
        *("--set", "long_context.tasks=[niah_single]"),
    ]
    arguments = ["--length", "192", "--windows", "2", "--text", str(text), "--json", str(out)]
    command = ["retrofit", "measure", base, str(tmp_path / "adapter"), *arguments]
    monkeypatch.setattr(sys, "argv", [*command, "--report", str(page), "--all", *settings])
    with suppress(SystemExit):
        cli.main()
    result = json.loads(out.read_text())
    for model in result["models"]:
        assert set(EVALUATIONS) < set(model)
        for scheme in ("int8", "nf4"):
            assert model["quantization"]["schemes"][scheme]["kl"] > 0, "bitsandbytes rounded it"
    assert result["settings"]["streaming"]["cache"] == 64
    html = page.read_text()
    assert html.startswith("<!doctype html>") and "adapter" in html
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter", "out.html", "out.json", "text.txt"
    ]  # fmt: skip
    again = tmp_path / "again.html"
    monkeypatch.setattr(sys, "argv", ["retrofit", "compare", str(out), "--report", str(again)])
    capsys.readouterr()
    with suppress(SystemExit):
        cli.main()
    assert "perplexity" in capsys.readouterr().out
    assert again.is_file()


def test_an_interrupted_measurement_says_how_to_go_on(tmp_path, tiny_base, capsys, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("Call me Ishmael. " * 60)

    def interrupt(self, subject, track):
        raise KeyboardInterrupt

    command = ["retrofit", "measure", str(tiny_base("llama")), "--text", str(text), "--cost"]
    command += ["--set", "cost.prompt=128"]
    monkeypatch.setattr(sys, "argv", [*command, "--length", "192", "--json", str(out)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr("retrofit.measure.cost.Cost.measure", interrupt)
        cli.main()
    assert exit.value.code == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err
    assert (tmp_path / ".out.json.parts").is_dir() and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{recipe}", "train.max_step=3"], "did you mean 'max_steps'?"),
        (["train", "{recipe}", "model.base=/nowhere"], "no model at '/nowhere'"),
        (["train", "nothing"], "no recipe 'nothing'"),
        (["train", "{recipe}", "output_dir={tmp}"], "exists; choose another output_dir"),
        (["train", "{recipe}", "measure.text=gone.txt"], "measure.text: no text file at gone.txt"),
        (
            [
                *("train", "{recipe}", "data.sequence_length=128"),
                *("objective.balance=1", "objective.balance_shared_heads=3"),
            ],
            "balance_shared_heads: 3 of 4 heads leave fewer than two to balance; lower it to 2",
        ),
        (["check", "{recipe}", "data.sources=[{{path: gone.jsonl}}]"], "no file gone.jsonl"),
        (["check", "{recipe}", "output_dir={tmp}"], "exists; choose another output_dir"),
        (["check", "{recipe}", "model.revision=main"], "and only models on the hub have revisions"),
        (
            ["check", "{recipe}", "data.sources=[{{path: '{tmp}/text.jsonl', split: test}}]"],
            "is a file, and name and split are of datasets on the hub",
        ),
        (["merge", "{tmp}/gone", "--out", "{tmp}/merged"], "{tmp}/gone"),
        (["merge", "{tmp}/gone", "--out", "{tmp}/m", "--private"], "--private has no effect"),
        (["measure", "{tmp}/a\nb", "--text", "{tmp}/text.jsonl"], "{tmp}/a\\nb"),
        (["measure", "$NOT_SET/base", "--text", "{tmp}/text.jsonl"], "names no model: base: "),
        (["measure", " ", "--text", "{tmp}/text.jsonl"], "the name of a model is empty"),
        (["measure", "{base}", "--text", "{tmp}/text.jsonl", "--windows", "0"], "at least 1"),
        (["check", "{recipe}", "--device-memory", "1e300"], "no device has 1e+300 GB"),
        (["recipes", "show", "{tmp}/latin.yaml"], "is not UTF-8"),
        (["measure", "{base}", "--text", "{tmp}/gone.txt"], "no text file at"),
        (["measure", "{base}", "--text", "{recipe}", "--json", "/no/x.json"], "no folder to write"),
        (
            ["measure", "{base}", "--text", "{tmp}/text.jsonl", "--set", "heads.seed=1"],
            "add --heads",
        ),
        (
            [
                *("measure", "{base}", "{tmp}/gone", "--text", "{tmp}/text.jsonl", "--length"),
                *("4096", "--json", "{tmp}/out.json"),
            ],
            "positions, fewer than the 4096 tokens of --length",
        ),
        (
            [
                *("measure", "{base}", "--text", "{tmp}/text.jsonl", "--cost"),
                *("--length", "192", "--set", "cost.prompt=128", "--set", "cost.new_tokens=99999"),
            ],
            "fewer than the 100127 tokens of cost.prompt + cost.new_tokens; lower",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    recipe_file, tmp_path, tiny_base, monkeypatch, capsys, arguments, message
):
    names = {"recipe": recipe_file, "tmp": tmp_path, "base": tiny_base("llama")}
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\n")
    before = sorted(tmp_path.rglob("*"))
    # In this process: the entry point is the same, and torch is imported once.
    monkeypatch.setattr(sys, "argv", ["retrofit", *(word.format(**names) for word in arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert message.format(**names) in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "~nobody-here/recipe.yaml"],
        ["train", "{recipe}", "output_dir=~nobody-here/run"],
        ["check", "{recipe}", "model.base=~nobody-here/base"],
        ["train", "{recipe}", "data.sources=[{{path: ~nobody-here/text.jsonl}}]"],
        ["train", "{recipe}", "measure={{text: ~nobody-here/text.jsonl}}"],
        ["measure", "~nobody-here/base", "--text", "{tmp}/text.jsonl"],
        ["measure", "{base}", "--text", "~nobody-here/text.jsonl"],
        ["merge", "~nobody-here/run", "--out", "{tmp}/merged"],
        ["merge", "{tmp}/gone", "--out", "~nobody-here/merged"],
        ["verify", "~nobody-here/merged"],
        ["compare", "~nobody-here/a.json", "{tmp}/b.json"],
        ["unpack", "~nobody-here/model", "--out", "{tmp}/unpacked"],
        ["recipes", "show", "~nobody-here/recipe.yaml"],
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_told(recipe_file, tmp_path, tiny_base, arguments):
    names = {"recipe": recipe_file, "tmp": tmp_path, "base": tiny_base("llama")}
    command = [word.format(**names) for word in arguments]
    assert "nobody here is called ~nobody-here" in refusal(*command, leaves_alone=tmp_path)


def test_an_error_of_a_real_process_is_its_only_line(tmp_path):
    result = run("train", "no-such-recipe")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no recipe 'no-such-recipe'")
    assert result.stderr.count("\n") == 1


def test_check_describes_and_writes_nothing(recipe_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run("check", str(recipe_file))
    assert result.returncode == 0, result.stderr
    assert "headwise projection on 3 layers: 768 numbers" in result.stdout
    assert "stock qwen3_5_text checkpoint" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
