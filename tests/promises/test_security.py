"""Nothing that a folder brings is run: neither its Python, unless the command at hand says so, nor
its pickles."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from retrofit import GateConfig, cli
from retrofit.export.merge import merge
from retrofit.export.verify.verify import verify
from retrofit.models.fingerprint import base_weights, weights_sha256
from retrofit.models.loading import load_base, load_model
from retrofit.recipe import Model, Recipe
from retrofit.training.check import check
from retrofit.training.run import train
from retrofit.utils.errors import UserError

BRINGS_CODE = "brings code of its own.*--trust-remote-code"


class Trap:
    """What its pickle does when it is opened: it leaves a file."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


@pytest.fixture
def sprung(tmp_path, monkeypatch):
    """The folder that appears when a pickle is opened or foreign code runs."""

    def opened(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", opened)
    yield tmp_path / "sprung"
    assert not (tmp_path / "sprung").exists()


def plant(path: Path, sprung: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(sprung)))


@pytest.fixture
def base(tmp_path):
    """A base of its own, so that it can be spoilt."""
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(base, tmp_path):
    """A finished run, whose recipe says that code is to be trusted."""
    folder = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(base)
    facts = {"weights_sha256": weights_sha256(base_weights(model)), "name_or_path": str(base)}
    get_peft_model(model, GateConfig(init_weights=False)).save_pretrained(folder / "adapter")
    told = {"base": facts | {"dtype": "float32", "quantization": None}, "steps": 1}
    (folder / "run.json").write_text(json.dumps(told))
    recipe = recipe_of(folder, base, model={"trust_remote_code": True})
    (folder / "recipe.resolved.yaml").write_text(recipe.to_yaml())
    return folder


def recipe_of(run: Path, base: Path, model=None, **train) -> Recipe:
    return Recipe.model_validate(
        {
            "output_dir": str(run),
            "model": {"base": str(base)} | (model or {}),
            "data": {"sources": [{"path": str(base.parent / "text.jsonl")}], "sequence_length": 64},
            "train": {"max_steps": 4, "save_steps": 1, "report_to": []} | train,
        }
    )


def bring_code(base: Path, sprung: Path, model_type: str) -> None:
    """Let a base name a Python file of its own, for its config and its model."""
    code = f"""
import os
os.mkdir({str(sprung)!r})
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig): model_type = {model_type!r}
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
"""
    (base / "own.py").write_text(code)
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": model_type, "auto_map": names}
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_what_a_run_says_is_no_consent_to_run_its_code(run, base, sprung, model_type):
    bring_code(base, sprung, model_type)
    with pytest.raises(UserError, match=BRINGS_CODE) as raised:
        load_model(str(run))
    assert "\n" not in str(raised.value)


def test_the_command_line_names_the_flag_and_runs_nothing(
    run, base, sprung, tmp_path, monkeypatch, capsys
):
    bring_code(base, sprung, "own")
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. " * 60)
    monkeypatch.setattr(
        sys, "argv", ["retrofit", "measure", str(run), "--text", str(text), "--length", "192"]
    )
    with pytest.raises(SystemExit) as exit:
        cli.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert "--trust-remote-code" in error and error.strip().count("\n") == 0


def test_a_tokenizer_of_its_own_code_is_refused_before_training(base):
    """Even if the code is trusted, since no merged checkpoint can hold it."""
    code = "from transformers import TokenizersBackend\nclass Own(TokenizersBackend): pass\n"
    (base / "own.py").write_text(code)
    path = base / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (base.parent / "text.jsonl").write_text('{"text": "a sink"}\n')
    with pytest.raises(UserError, match="code of its own, which no merged checkpoint"):
        train(recipe_of(base.parent / "new", base, model={"trust_remote_code": True}))


@pytest.mark.parametrize("verb", ["measure", "train", "merge", "adapter"])
def test_a_base_with_code_is_refused_by_every_verb(run, base, sprung, verb, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")  # nobody is asked either
    bring_code(base, sprung, "own")
    (base.parent / "text.jsonl").write_text('{"text": "a sink"}\n')
    with pytest.raises(UserError):
        {
            "measure": lambda: load_model(str(base)),
            "train": lambda: train(recipe_of(base.parent / "new", base)),
            "merge": lambda: merge(run, base.parent / "out"),
            "adapter": lambda: load_model(str(run / "adapter")),
        }[verb]()
    assert not (base.parent / "out").exists() and not (base.parent / "new").exists()


def test_a_kernel_from_the_hub_that_a_run_names_is_code_too(run, base):
    recipe = recipe_of(run, base, model={"attn_implementation": "someone/attention"})
    (run / "recipe.resolved.yaml").write_text(recipe.to_yaml())
    with pytest.raises(UserError, match="someone/attention.*--trust-remote-code"):
        load_model(str(run))


def test_a_base_of_pickles_alone_is_refused_by_name(base, sprung, tmp_path):
    (base / "model.safetensors").unlink()
    plant(base / "pytorch_model.bin", sprung)
    (tmp_path / "text.jsonl").write_text('{"text": "a sink"}\n')
    for attempt in (
        lambda: load_model(str(base)),
        lambda: train(recipe_of(tmp_path / "new", base)),
    ):
        with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
            attempt()
    assert not (tmp_path / "new").exists()


def test_a_pickle_beside_the_safetensors_of_a_base_is_never_opened(base, sprung):
    expected = load_file(base / "model.safetensors")["model.norm.weight"]
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        plant(base / name, sprung)
    loaded = load_base(Model(base=str(base)))
    assert torch.equal(loaded.model.norm.weight, expected)


def test_a_config_that_names_a_pickle_as_the_weights_is_refused(base, sprung):
    plant(base / "adapter_model.bin", sprung)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "adapter_model.bin"})
    )
    with pytest.raises(UserError, match="adapter_model.bin, which is no safetensors"):
        load_model(str(base))


def name_in_an_index(base: Path, file: str, told: bool) -> None:
    """Let an index, which the config may name, say that one weight lies in a file."""
    whole, name = base / "model.safetensors", "own.safetensors.index.json"
    places = dict.fromkeys(load_file(whole), "whole.safetensors")
    whole.rename(base / "whole.safetensors")
    index = {"metadata": {}, "weight_map": places | {"model.norm.weight": file}}
    (base / (name if told else "model.safetensors.index.json")).write_text(json.dumps(index))
    if told:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))


@pytest.mark.parametrize("told", [True, False], ids=["named by the config", "the usual one"])
@pytest.mark.parametrize("file", ["evil.bin", "evil.data", "../evil.bin", "../o.safetensors"])
def test_an_index_that_names_no_safetensors_beside_it_is_refused(run, base, sprung, file, told):
    name_in_an_index(base, file, told)
    plant(base / file, sprung)
    (base.parent / "text.jsonl").write_text('{"text": "a sink"}\n')
    recipe = recipe_of(base.parent / "new", base)
    for attempt in (
        lambda: load_model(str(base)),
        lambda: load_model(str(run / "adapter")),
        lambda: check(recipe),
        lambda: train(recipe),
        lambda: merge(run, base.parent / "out"),
    ):
        with pytest.raises(UserError, match=f"names '{file}', which is no saf|names other weights"):
            attempt()
    assert not (base.parent / "out").exists() and not (base.parent / "new").exists()


@pytest.mark.parametrize("told", [True, False], ids=["named by the config", "the usual one"])
def test_an_index_on_the_hub_that_names_a_pickle_is_refused(
    base, sprung, tmp_path, told, monkeypatch
):
    name_in_an_index(base, "evil.bin", told)
    plant(base / "evil.bin", sprung)
    repository = tmp_path / "hub" / "models--some--one"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"names 'evil.bin', which is no safetensors"):
        load_base(Model(base="some/one"))


def test_an_index_of_safetensors_that_the_config_names_is_accepted(base):
    expected = load_file(base / "model.safetensors")["model.norm.weight"]
    name_in_an_index(base, "whole.safetensors", told=True)
    assert torch.equal(load_base(Model(base=str(base))).model.norm.weight, expected)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_in_a_pickle_is_refused_by_name(run, sprung, alone):
    plant(run / "adapter" / "adapter_model.bin", sprung)
    if alone:
        (run / "adapter" / "adapter_model.safetensors").unlink()
    for source in (run, run / "adapter"):
        with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
            load_model(str(source))
    with pytest.raises(UserError, match="is a pickle|only safetensors"):
        merge(run, run.parent / "out")
    assert not (run.parent / "out").exists()


def test_an_adapter_on_top_of_a_base_is_refused(run, base):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "adapter" / name, base / name)
    with pytest.raises(UserError, match="holds an adapter"):
        load_base(Model(base=str(base)))


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "adapter_model.bin", "scaler.pt", "optimizer.pt", "scheduler.pt"),
        *("rng_state.pth", "training_args.bin", "default/adapter_model.bin"),
    ],
)
def test_a_checkpoint_with_a_pickle_is_not_resumed(base, sprung, tmp_path, name, monkeypatch):
    lines = "".join(json.dumps({"text": f"a sink is token {i}"}) + "\n" for i in range(99))
    (tmp_path / "text.jsonl").write_text(lines)
    recipe = recipe_of(tmp_path / "trained", base)
    with monkeypatch.context() as patch:
        patch.setattr("retrofit.training.run._finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe)
    path = tmp_path / "trained" / "checkpoints" / "checkpoint-4" / name
    path.parent.mkdir(exist_ok=True)
    plant(path, sprung)
    with pytest.raises(UserError, match=f"{name} is a pickle"):
        train(recipe, resume=True)


def test_a_merged_folder_with_a_pickle_is_not_verified(run, sprung, in_process):
    out = run.parent / "out"
    (run / "recipe.resolved.yaml").write_text(f"model:\n  base: {run.parent / 'base'}\n")
    report = merge(run, out, format="adapter")
    plant(out / "adapter_model.bin", sprung)
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        verify(report, out)


@pytest.mark.parametrize("format", ["remote-code", "adapter"])
@pytest.mark.parametrize("told", [True, False], ids=["named by the config", "the usual one"])
def test_a_merge_whose_index_names_a_pickle_is_not_verified(
    run, base, sprung, in_process, format, told
):
    out = run.parent / "out"
    report = merge(run, out, format=format)
    spoilt = base if format == "adapter" else out
    name_in_an_index(spoilt, "../evil.data", told)
    plant(spoilt / "../evil.data", sprung)
    with pytest.raises(UserError, match="evil.data', which is no saf|names other weights"):
        verify(report, out)
