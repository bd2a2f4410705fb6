"""How models are opened beside runs."""

import json

import pytest

from retrofit.models.run_folder import opened_as_trained, trained_on_others
from retrofit.utils.errors import UserError


@pytest.fixture
def run(tmp_path):
    def make(name: str, **base) -> str:
        folder = tmp_path / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter/adapter_config.json").write_text("{}")
        facts = {"dtype": "float32", "quantization": None, "weights_sha256": "0" * 64} | base
        (folder / "run.json").write_text(json.dumps({"base": facts}))
        return str(folder)

    return make


def test_a_base_and_checkpoints_are_opened_as_the_runs_were_trained(run):
    trained = run("run", name_or_path="some/base", revision="v2", quantization="nf4")
    assert opened_as_trained(["some/base", trained, "merged"]) == {
        "some/base": {"quantization": "nf4", "revision": "v2"},
        trained: {},
        "merged": {"quantization": "nf4"},
    }
    plain = run("plain", name_or_path="some/base")
    assert opened_as_trained(["some/base", plain]) == {"some/base": {}, plain: {}}
    assert opened_as_trained(["some/base"]) == {"some/base": {}}


@pytest.mark.parametrize(("name", "value"), [("quantization", "int8"), ("revision", "v3")])
def test_runs_of_different_bases_are_not_compared(run, name, value):
    base = {"name_or_path": "some/base", "revision": "v2", "quantization": "nf4"}
    runs = [run("one", **base), run("other", **base | {name: value})]
    with pytest.raises(UserError, match=f"of {name} {base[name]} and .* {value}; compare them"):
        opened_as_trained(["some/base", *runs])


def test_a_run_beside_a_base_that_is_not_its_own_is_named(run, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    base, hub = (
        run("one", name_or_path=str(tmp_path / "base")),
        run("hub", name_or_path="some/base"),
    )
    (line,) = trained_on_others([str(tmp_path / "link"), base, hub, "merged"])
    assert line.startswith(f"{hub} was trained on some/base, not on {tmp_path / 'link'}: unless")
    assert trained_on_others(["some/base", hub]) == trained_on_others([base, hub]) == []
