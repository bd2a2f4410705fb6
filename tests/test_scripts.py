"""`scripts/ablate.py` fills its grid once, and says what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from retrofit.recipe import load_recipe

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.slow
def test_ablate_runs_a_grid_once_and_writes_table_and_plot(tiny_base, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"the sink draws {i} tokens " * 40}) + "\n" for i in range(40)]
    text.write_text("".join(lines))
    recipe = {
        "output_dir": "replaced",
        "model": {"base": str(tiny_base("llama"))},
        "data": {"sources": [{"path": str(text)}], "sequence_length": 64},
        "train": {"max_steps": 2, "report_to": []},
        "measure": {"text": str(text), "length": 192, "windows": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs = {"lm": [], "wide": ["gate.granularity=elementwise"]}
    grid = {"recipe": str(tmp_path / "recipe.yaml"), "runs": runs}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = [sys.executable, str(SCRIPTS / "ablate.py"), str(tmp_path / "grid.yaml")]
    command += ["--out", str(tmp_path / "out")]

    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.count("--- retrofit train") == 2
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == ["base", "lm", "wide"]
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--- retrofit train" not in again.stdout


@pytest.mark.parametrize("grid", sorted(SCRIPTS.glob("ablations/*.yaml")), ids=lambda p: p.stem)
def test_every_run_of_a_grid_is_a_recipe(grid):
    settings = yaml.safe_load(grid.read_text())
    recipes = [load_recipe(settings["recipe"], run) for run in settings["runs"].values()]
    assert len({recipe.to_yaml() for recipe in recipes}) == len(recipes), "no run twice"
