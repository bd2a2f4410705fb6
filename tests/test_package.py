"""Top-level `adapters/` and `recipes/` are `retrofit.adapters` and `retrofit.recipes`, installed
editable and from a wheel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACTS = """
import json, retrofit, retrofit.adapters, retrofit.recipes
from retrofit.recipe import bundled_recipes
print(json.dumps({
    "adapters": retrofit.adapters.__file__,
    "recipes": [name for name, _ in bundled_recipes()],
    "family": retrofit.adapters.family_of("qwen3").gated.__name__,
}))
"""


def facts(cwd: Path, **environment: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", FACTS],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_editable_install(tmp_path):
    found = facts(tmp_path)
    assert Path(found["adapters"]) == ROOT / "adapters" / "__init__.py"
    assert found["family"] == "GatedQwen3Attention"


@pytest.mark.slow
def test_built_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "-w", str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("gate_retrofit-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    found = facts(tmp_path, PYTHONPATH=str(site))
    assert Path(found["adapters"]) == site / "retrofit" / "adapters" / "__init__.py"
    assert found["recipes"] == facts(tmp_path)["recipes"]
    assert found["family"] == "GatedQwen3Attention"
