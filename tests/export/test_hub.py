"""`retrofit merge --push-to-hub`, against a hub that is played."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from made_runs import make_run
from typer.testing import CliRunner

from retrofit.cli import app
from retrofit.export.hub import check_access, push
from retrofit.utils.errors import UserError


@pytest.fixture
def hub(monkeypatch) -> list:
    """What was asked of it."""
    asked: list = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, *a, **k: asked.append(k) or "https://hub/me/gated"
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: asked.append(k))
    return asked


def failing(error: Exception):
    def fail(*_arguments, **_options):
        raise error

    return fail


def test_the_folder_is_published_with_a_card_that_names_it(hub, tiny_base, tmp_path):
    run = make_run(tmp_path / "run", tiny_base("qwen3"))
    out = tmp_path / "out"
    arguments = ["merge", str(run), "--out", str(out), "--push-to-hub", "me/gated", "--private"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "https://hub/me/gated" in done.output
    created, uploaded = hub
    assert created["private"] and uploaded["folder_path"] == out
    card = (out / "README.md").read_text()
    assert 'from_pretrained("me/gated"' in card and "vllm serve me/gated" in card


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a/b/c", None, "is no name of a hub repository"),
        ("me/gated", LocalTokenNotFoundError("no token"), "not logged in to the hub"),
        ("me/gated", OSError("no route"), "the hub does not answer"),
    ],
)
def test_no_access_is_told_before_the_work(hub, monkeypatch, name, error, message):
    if error:
        monkeypatch.setattr(HfApi, "whoami", failing(error))
    with pytest.raises(UserError, match=message):
        check_access(name)
    assert not hub


def test_a_failed_upload_keeps_the_folder_and_says_how_to_go_on(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(HfApi, "upload_folder", failing(OSError("broken\npipe")))
    with pytest.raises(UserError, match="merged, but not pushed .*`hf upload me/gated") as raised:
        push(tmp_path, "me/gated", private=False)
    assert "\n" not in str(raised.value) and tmp_path.is_dir()
