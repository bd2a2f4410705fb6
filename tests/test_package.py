"""Top-level `adapters/` and `recipes/` are `retrofit.adapters` and `retrofit.recipes`, installed
editable and from a wheel."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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
    # setuptools leaves out the files of a package that pyproject.toml does not name.
    installed = {path.relative_to(site).as_posix() for path in (site / "retrofit").rglob("*.*")}
    for folder, place in {"retrofit": "", "adapters": "retrofit/", "recipes": "retrofit/"}.items():
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".yaml", ".jinja"):
                assert place + path.relative_to(ROOT).as_posix() in installed


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


REGISTERED = """
import peft
assert "G1_GATE" in peft.PEFT_TYPE_TO_TUNER_MAPPING
"""


def test_to_look_for_peft_is_not_to_import_it():
    """transformers looks before it imports; the gates are registered all the same."""
    python(
        "import retrofit, sys, importlib.util\n"
        "assert importlib.util.find_spec('peft').origin\n"
        "assert 'peft' not in sys.modules and 'retrofit.gates' not in sys.modules\n" + REGISTERED
    )


def test_peft_may_be_there_first():
    python("import peft\nimport retrofit\n" + REGISTERED)


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    import retrofit

    assert retrofit.__version__ == version("gate-retrofit")
    with pytest.raises(AttributeError, match="no attribute 'versions'"):
        _ = retrofit.versions


def pins(name: str) -> dict[str, Version]:
    lines = [line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line]
    return {canonicalize_name(package): Version(version) for package, version in lines}


REQUIREMENTS = [
    Requirement(line)
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
]


# Of these the next minor release is not taken unseen.
COMPUTES = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors"}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda each: each.name)
def test_versions_that_are_allowed_are_no_wider_than_those_that_are_run(requirement):
    name = canonicalize_name(requirement.name)
    oldest, newest = pins("constraints-oldest.txt")[name], pins("constraints.txt")[name]
    bounds = {each.operator: Version(each.version) for each in requirement.specifier}
    assert bounds.keys() == {">=", "<"}
    assert bounds[">="] == oldest and oldest <= newest < bounds["<"]
    if name in COMPUTES:
        assert bounds["<"] == Version(f"{newest.major}.{newest.minor + 1}")
