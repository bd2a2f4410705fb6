"""Grids and seeds are trained once each, and what they gave is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_with_trl
import yaml

from oracle import fit
from retrofit.models.loading import load_model
from retrofit.recipe import load_recipe

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def recipe(tiny_base, tmp_path) -> Path:
    """Two steps on a tiny model, and a measurement."""
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"the sink draws {i} tokens " * 40}) + "\n" for i in range(40)]
    text.write_text("".join(lines))
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(lines[1:]))
    settings = {
        "output_dir": str(tmp_path / "replaced"),
        "model": {"base": str(tiny_base("llama"))},
        "data": {"sources": [{"path": str(text)}], "sequence_length": 64},
        "train": {"max_steps": 2, "report_to": []},
        "measure": {"text": str(unseen), "length": 192, "windows": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


def test_gates_train_in_a_trainer_of_ones_own(recipe, tiny_base, tmp_path):
    text, out = str(tmp_path / "text.jsonl"), tmp_path / "out"
    train_with_trl.main(str(tiny_base("llama")), text, str(out), max_steps=2)
    model, _ = load_model(str(out))
    odds = [odds for name, odds in model.named_parameters() if name.endswith("sink_odds")]
    assert len(odds) == 3 and all(each.any() for each in odds)


@pytest.mark.slow
def test_ablate_runs_a_grid_once_and_writes_table_and_plot(recipe, tmp_path):
    runs = {"lm": [], "wide": ["gate.granularity=elementwise"]}
    grid = {"recipe": str(recipe), "common": ["train.max_steps=2"], "runs": runs}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = [sys.executable, str(SCRIPTS / "ablate.py"), str(tmp_path / "grid.yaml")]
    command += ["train.max_steps=1", "--out", str(tmp_path / "out")]

    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.count("--- retrofit train") == 2
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == ["base", "lm", "wide"]
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--- retrofit train" not in again.stdout
    assert json.loads((tmp_path / "out" / "wide" / "run.json").read_text())["steps"] == 1


@pytest.mark.slow
def test_seeds_are_trained_once_each_and_measured_on_all_texts(recipe, tmp_path):
    command = [sys.executable, str(SCRIPTS / "seeds.py"), str(recipe), "train.max_steps=1"]
    command += ["--out", str(tmp_path / "out"), "--seeds", "3", "4"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.count("--- retrofit train") == 2
    for seed in (3, 4):
        resolved = tmp_path / "out" / f"seed-{seed}" / "recipe.resolved.yaml"
        assert load_recipe(str(resolved)).train.seed == seed
    wiki = json.loads((tmp_path / "out" / "wiki.json").read_text())["models"]
    assert [model["name"] for model in wiki][1:] == ["seed-3", "seed-4"]
    before = wiki[0]["metrics"]["perplexity"]
    after = [model["metrics"]["perplexity"] for model in wiki[1:]]
    table = (tmp_path / "out" / "table.md").read_text()
    expected = f"{before:.2f} -> {sum(after) / 2:.2f} ({min(after):.2f} to {max(after):.2f})"
    assert f"| perplexity | {expected} |" in table
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--- retrofit train" not in again.stdout
    command[command.index("train.max_steps=1")] = "train.max_steps=2"
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 2 and "was trained with another recipe" in other.stderr


@pytest.mark.parametrize("grid", sorted(SCRIPTS.glob("ablations/*.yaml")), ids=lambda p: p.stem)
def test_every_run_of_a_grid_is_a_recipe(grid):
    settings = yaml.safe_load(grid.read_text())
    common = settings.get("common", [])
    runs = [[*common, *run] for run in settings["runs"].values()]
    recipes = [load_recipe(settings["recipe"], run) for run in runs]
    assert len({recipe.to_yaml() for recipe in recipes}) == len(recipes), "no run twice"


def test_the_oracle_finds_gates_that_can_be_read_off_their_input():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4000, 24, generator=generator)
    wanted = torch.randn(3, 24, generator=generator) / 10
    logits = states @ wanted.mT - 2  # gates below 1; the -2 needs an input of its own
    states = torch.cat([states, torch.ones(4000, 1)], 1)
    noise = torch.rand(4000, 1, generator=generator)
    target = torch.cat([2 * logits.sigmoid(), noise], 1)
    weights, explained = fit(states, target)
    assert (explained[:3] > 0.98).all() and explained[3] < 0.05
    torch.testing.assert_close(weights[:3, :24], wanted, atol=0.05, rtol=0)


def test_the_separation_of_each_layer_is_told(recipe):
    command = [sys.executable, str(SCRIPTS / "separation.py"), str(recipe)]
    command += ["data.sequence_length=128", "--layers", "2"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    header, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert header == ["layer", "share", "separation", "projection"]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(0 <= float(row[1]) <= 1 for row in rows)
