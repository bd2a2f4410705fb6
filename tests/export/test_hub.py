"""`retrofit merge --push-to-hub`, against a hub that is played."""

import shlex

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_api
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
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, *a, **k: [])
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
        ("gated", None, "'gated' is no name of a hub repository, as OWNER/NAME is"),
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


@pytest.mark.parametrize("is_model", [True, False])
def test_a_failed_upload_keeps_the_folder_and_says_how_to_go_on(
    hub, monkeypatch, tmp_path, is_model
):
    """A GGUF file, which has no config.json, takes the place of no other weights."""
    folder = tmp_path / "my model"
    folder.mkdir()
    if is_model:
        (folder / "config.json").write_text("{}")
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, *a, **k: [])
    monkeypatch.setattr(HfApi, "upload_folder", failing(OSError("broken\npipe")))
    message = "merged, but not pushed .*`hf upload me/gated "
    with pytest.raises(UserError, match=message) as raised:
        push(folder, "me/gated", private=is_model)
    assert shlex.split(str(raised.value).split("`")[1])[:4] == [
        "hf",
        "upload",
        "me/gated",
        str(folder),
    ]
    assert ("--delete" in str(raised.value)) == is_model
    assert ("--private" in str(raised.value)) == is_model
    assert "\n" not in str(raised.value) and folder.is_dir()


@pytest.fixture
def unreachable(monkeypatch) -> None:
    """The hub is at an address where nothing listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("unreachable")
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    with pytest.raises(UserError, match="the hub does not answer, or not to you: .*refused"):
        check_access("me/gated")
    with pytest.raises(UserError, match="merged, but not pushed .*refused.*`hf upload me/gated"):
        push(tmp_path, "me/gated", private=False)


def test_a_push_replaces_the_checkpoint_that_is_there(monkeypatch, tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*shards, "model.safetensors.index.json", "config.json"):
        (tmp_path / name).write_text("new")
    former = [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "modeling_gated.py",
        "adapter_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ]
    others = [
        ".gitattributes",
        "gated-F16.gguf",
        "picture.png",
        "adapter/adapter_model.safetensors",
        "src/run.py",
    ]
    held = [*former, *others, shards[0], "model.safetensors.index.json", "config.json"]
    commits: list[list] = []  # what the real `upload_folder` makes of it
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *a, **k: "https://hub/me/gated")
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, *a, **k: held)
    monkeypatch.setattr(hf_api, "is_xet_available", lambda: False)  # uploads in a single commit
    monkeypatch.setattr(HfApi, "create_commit", lambda self, **k: commits.append(k["operations"]))
    push(tmp_path, "me/gated", private=False)
    (commit,) = commits
    names = {
        kind: {operation.path_in_repo for operation in commit if isinstance(operation, kind)}
        for kind in (CommitOperationAdd, CommitOperationDelete)
    }
    assert names[CommitOperationDelete] == set(former)
    assert names[CommitOperationAdd] == {path.name for path in tmp_path.iterdir()}
    (tmp_path / "config.json").unlink()  # what is left is no model, as is the folder of a GGUF file
    push(tmp_path, "me/gated", private=False)
    assert not any(isinstance(operation, CommitOperationDelete) for operation in commits[1])
