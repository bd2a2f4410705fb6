"""Adapters, and the JSON files of `compare`, `unpack` and `verify`, that are damaged or say what
nothing can be."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from made_runs import make_run
from malformed import refusal
from published_layout import published
from results import synthetic_result
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig
from typer.testing import CliRunner

from retrofit import cli
from retrofit.export.merge import merge
from retrofit.export.verify import verify
from retrofit.export.verify.reference import REFERENCE_FILE, summarize
from retrofit.models.fingerprint import config_values
from retrofit.models.loading import load_model
from retrofit.models.source import read_source

NAN = float("nan")
TEXT = "Call me Ishmael, some years ago. " * 40


def edited(path: Path, change) -> None:
    """Change what a JSON file says, or put what is returned in its place."""
    told = json.loads(path.read_text())
    changed = change(told)
    path.write_text(json.dumps(told if changed is None else changed))


def put(*keys_and_value):
    """Sets one value, however deep."""
    *keys, last, value = keys_and_value

    def change(told):
        for key in keys:
            told = told[key]
        told[last] = value

    return change


def drop(*keys):
    def change(told):
        for key in keys[:-1]:
            told = told[key]
        del told[keys[-1]]

    return change


NO_JSON = {
    "an empty file": b"",
    "half a file": b'{"models": [',
    "lists without end": b"[" * 100_000,
    "Latin-1": b'{"name": "\xe9"}',
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
    "zeros": b"\0" * 40,
    "NaN": b'{"models": NaN}',
    "infinity": b'{"models": -Infinity}',
}
NO_OBJECT = {"a list": b"[]", "null": b"null", "a number": b"3", "text": b'"x"'}


@pytest.fixture
def work(tmp_path, tiny_base):
    make_run(tmp_path / "run", tiny_base("llama"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def refusals(work: Path) -> list[str]:
    """What each verb that opens an adapter says, of the run and of the adapter by itself."""
    text = ("--text", work / "text.txt", "--length", "192", "--windows", "1")
    for command in (
        ["measure", work / "run", *text],
        ["merge", work / "run", "--out", work / "out"],
    ):
        yield refusal(*command, leaves_alone=work)


@pytest.mark.parametrize("text", (NO_JSON | NO_OBJECT).values(), ids=NO_JSON | NO_OBJECT)
def test_an_adapter_config_that_is_no_json_object_is_refused(work, text):
    path = work / "run/adapter/adapter_config.json"
    path.write_bytes(text)
    for told in refusals(work):
        assert str(path) in told


@pytest.mark.parametrize("text", (NO_JSON | NO_OBJECT).values(), ids=NO_JSON | NO_OBJECT)
def test_facts_that_are_no_json_object_are_refused(work, text):
    path = work / "run/run.json"
    path.write_bytes(text)
    for told in refusals(work):
        assert f"{path} is damaged" in told


SAID = {
    "granularity": ("granularity", "rowwise"),
    "granularity, a number": ("granularity", 3),
    "task type": ("task_type", "POETRY"),
    "task type, a list": ("task_type", ["CAUSAL_LM"]),
    "PEFT type": ("peft_type", "LORA"),
    "PEFT type, a number": ("peft_type", 5),
    "PEFT type, null": ("peft_type", None),
    "revision": ("revision", 3),
    "activation": ("activation", "tanh"),
    "position": ("position", "G9"),
    "sinks": ("sinks", True),
    "layers, one": ("layers_to_transform", 3),
    "layers, some": ("layers_to_transform", [0, 99]),
    "layers, below zero": ("layers_to_transform", [-1]),
    "layers, text": ("layers_to_transform", ["0"]),
    "projections": ("projection_layers", [0]),  # the adapter has one kind of gates
    "projections, text": ("projection_layers", "auto"),
    "projections, below zero": ("projection_layers", [-1]),
    "projections, beyond": ("projection_layers", [0, 99]),
    "projections, none": ("projection_layers", []),
    "turns, text": ("key_bias_turns", "an eighth"),
    "turns, none": ("key_bias_turns", 0),
    "turns, below zero": ("key_bias_turns", -0.125),
    "base": ("base_model_name_or_path", {"a": 1}),
    "base type": ("base_model_type", 7),
    "modules, no pattern": ("target_modules", "["),
    "left-out modules, no pattern": ("exclude_modules", "("),
    "layers, no pattern": ("layers_pattern", "["),
    "a field of another method": ("lora_alpha", 16),
}


@pytest.mark.parametrize(("key", "value"), SAID.values(), ids=SAID)
def test_an_adapter_config_with_a_value_of_a_wrong_kind_is_refused(work, key, value):
    edited(work / "run/adapter/adapter_config.json", put(key, value))
    for told in refusals(work):
        assert re.search(f"{key}|holds a .* adapter, not gates|gates in layer", told), told


# Each by itself is what an adapter may say, and means other modules than those that gates are for.
ELSEWHERE = {
    "modules that are not there": {"target_modules": ["nothing"]},
    "no modules": {"target_modules": []},
    "a pattern of nothing": {"target_modules": "nothing.*"},
    "all modules left out": {"exclude_modules": ["self_attn"]},
    "layers under another name": {"layers_pattern": "blocks", "layers_to_transform": [0]},
    "a list that is no pattern": {"layers_pattern": ["["], "layers_to_transform": [0]},
    "a further module": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("changes", ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_adapter_config_that_means_other_modules_is_refused(work, changes):
    edited(work / "run/adapter/adapter_config.json", lambda told: told | changes)
    for told in refusals(work):
        assert str(work / "run/adapter") in told, told


GATE_FACTS = {
    "another activation": put("activation", "silu"),
    "a gentler activation": put("activation", "ns_sigmoid"),
    "no activation": drop("activation"),
    "another position": put("position", "G2"),
    "constants": put("input_dependent", False),
    "gates around a center": put("centered", True),
}


@pytest.mark.parametrize("change", GATE_FACTS.values(), ids=GATE_FACTS)
def test_an_adapter_config_that_says_other_gates_than_its_run_is_refused(work, change):
    path = work / "run/adapter/adapter_config.json"
    gate = {"position": "G1", "input_dependent": True, "centered": False}
    # An adapter that says nothing has sigmoids.
    gate["activation"] = "silu" if change is GATE_FACTS["no activation"] else "sigmoid"
    edited(work / "run/run.json", put("gate", gate))
    edited(path, change)
    for told in refusals(work):
        assert f"{path} says " in told and "run.json of its run" in told


BASE_CONFIGS = {
    "an epsilon": ("rms_norm_eps", put("rms_norm_eps", 0.5)),
    "a base of RoPE": ("rope_theta", put("rope_parameters", "rope_theta", 77.0)),
    "an activation": ("hidden_act", put("hidden_act", "relu")),
}


def with_own_base(work: Path, tiny_base) -> Path:
    """A run that says what its base computes with, and the base's config."""
    base = Path(shutil.copytree(tiny_base("llama"), work / "base"))
    shutil.rmtree(work / "run")
    make_run(work / "run", base)
    values = config_values(AutoConfig.from_pretrained(base))
    edited(work / "run/run.json", put("base", "config", values))
    return base / "config.json"


@pytest.mark.parametrize(("key", "change"), BASE_CONFIGS.values(), ids=BASE_CONFIGS)
def test_a_base_that_computes_something_else_than_it_did_is_refused(work, tiny_base, key, change):
    path = with_own_base(work, tiny_base)
    edited(path, change)
    for told in refusals(work):
        assert f"the config.json of {path.parent} says " in told and key in told, told


def test_what_a_base_says_beside_what_it_computes_is_accepted(work, tiny_base):
    path = with_own_base(work, tiny_base)
    edited(path, lambda told: told | {"use_cache": False, "eos_token_id": 3, "_name": "x"})
    load_model(str(work / "run"))
    read_source(work / "run")


def other_weights(work: Path, tiny_base) -> None:
    path = with_own_base(work, tiny_base).with_name("model.safetensors")
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": torch.ones(64)}, path, metadata={"format": "pt"})


def as_a_link(run: Path) -> Path:
    (run.parent / "link").symlink_to(run / "adapter")
    return run.parent / "link"


def as_a_checkpoint(run: Path) -> Path:
    return Path(shutil.copytree(run / "adapter", run / "checkpoints/checkpoint-2"))


def as_this_folder(run: Path) -> Path:
    os.chdir(run / "adapter")
    return Path()


@pytest.mark.parametrize(
    "named",
    [as_a_link, as_a_checkpoint, as_this_folder],
    ids=["a link", "a checkpoint", "this folder"],
)
@pytest.mark.parametrize("verb", ["measure", "merge"])
def test_an_adapter_of_a_run_is_held_to_its_base_by_any_name(
    work, tiny_base, named, verb, monkeypatch
):
    monkeypatch.chdir(work)
    other_weights(work, tiny_base)
    adapter = named(work / "run")
    options = {
        "measure": ["--text", work / "text.txt", "--length", "192", "--windows", "1"],
        "merge": ["--out", work / "out"],
    }[verb]
    assert "sha256 differs" in refusal(verb, adapter, *options, leaves_alone=work)


def test_a_merged_checkpoint_of_a_run_does_not_show_what_the_run_came_to(work):
    source = read_source(as_a_checkpoint(work / "run"))
    assert source.folder == source.adapter and set(source.facts) == {"base"}


BASE_FACTS = {
    "a dtype that is none": ("dtype", "nonsense"),
    "no dtype": ("dtype", None),
    "a dtype that is a number": ("dtype", 32),
    "a quantization that is none": ("quantization", "nf5"),
    "no hash": ("weights_sha256", None),
    "half a hash": ("weights_sha256", "ab" * 16),
    "a name that is a number": ("name_or_path", 5),
    "a revision that is a number": ("revision", 1.5),
}


@pytest.mark.parametrize(("key", "value"), BASE_FACTS.values(), ids=BASE_FACTS)
def test_facts_of_a_wrong_kind_are_refused(work, key, value):
    edited(work / "run/run.json", put("base", key, value))
    for told in refusals(work):
        assert f"run.json is damaged: base.{key}" in told


@pytest.mark.parametrize("key", ["steps", "tokens"])
def test_counts_of_a_run_that_are_text_are_refused(work, key):
    edited(work / "run/run.json", put(key, "x"))
    for told in refusals(work):
        assert f"run.json is damaged: {key}: input should be a valid integer" in told


@pytest.mark.parametrize("name", ["  ", "$NOT_SET/base"])
def test_an_adapter_names_its_base(work, name):
    adapter = Path(shutil.copytree(work / "run/adapter", work / "bare"))
    edited(adapter / "adapter_config.json", put("base_model_name_or_path", name))
    text = ("--text", work / "text.txt", "--length", "192", "--windows", "1")
    told = refusal("measure", adapter, *text, leaves_alone=work)
    assert f"{name!r} names no model" in told


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edited_gates(change):
    def spoil(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


def moved(to):
    """The gates of layer 2 under another number."""

    def change(tensors):
        for name in [name for name in tensors if ".layers.2." in name]:
            tensors[name.replace(".layers.2.", f".layers.{to}.")] = tensors.pop(name)

    return edited_gates(change)


OTHER_KINDS = {"int32": "I32", "float8_e4m3fn": "F8_E4M3", "complex64": "C64"}


def in_dtype(name):
    def change(tensors):
        tensors.update({key: t.to(getattr(torch, name)) for key, t in tensors.items()})

    return edited_gates(change)


GATES = {
    "cut off": (cut, "adapter_model.safetensors is missing or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "missing or damaged"),
    "missing": (Path.unlink, "has no adapter_model.safetensors"),
    "of no layer": (edited_gates(lambda tensors: tensors.clear()), "holds no gates|does not fit"),
    "of a layer that is not there": (moved(99), "layers.2.*is in only one of them|layer 99"),
    "of a layer with a further zero": (moved("00"), "layers.00"),
    "of another shape": (
        edited_gates(lambda tensors: tensors.update({n: t[:1] for n, t in tensors.items()})),
        "shape|does not fit its base",
    ),
    **{
        f"in {dtype}": (in_dtype(dtype), f"as {told}, and weights are F16")
        for dtype, told in OTHER_KINDS.items()
    },
    "beside something else": (
        edited_gates(lambda tensors: tensors.update(lora_A=torch.zeros(2))),
        "lora_A",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), GATES.values(), ids=GATES)
def test_gates_that_are_damaged_are_refused(work, spoil, message):
    spoil(work / "run/adapter/adapter_model.safetensors")
    for told in refusals(work):
        assert re.search(message, told), told


MEASURED = {
    "no models": (put("models", []), "models"),
    "models in a map": (put("models", {}), "models"),
    "a model without metrics": (drop("models", 0, "metrics"), "models.0.metrics"),
    "text for a number": (put("models", 0, "metrics", "perplexity", "20"), "metrics.perplexity"),
    "true for a number": (put("models", 0, "metrics", "perplexity", True), "metrics.perplexity"),
    "no perplexity": (put("models", 1, "metrics", "perplexity", 0), "metrics.perplexity"),
    "text for a further metric": (put("models", 0, "metrics", "kurtosis", "x"), "kurtosis"),
    "a list for a metric": (put("models", 0, "metrics", "f_attn", [1.0]), "f_attn"),
    "windows too few": (put("models", 0, "nll_by_window", [3.0]), "1 windows"),
    "text for a window": (put("models", 0, "nll_by_window", ["3"] * 8), "nll_by_window"),
    "copied text of one window": (put("models", 0, "copied_nats_by_window", [1.0]), "copied"),
    "layers of unlike number": (put("models", 0, "per_layer", "kurtosis", [1.0]), "lengths?"),
    "text in a layer": (put("models", 0, "per_layer", "kurtosis", ["x"] * 6), "kurtosis"),
    "rows of unlike length": (
        put("models", 0, "per_layer", "column_share", 1, [0.5]),
        "rows are not of the same length",
    ),
    "streaming in a list": (put("models", 0, "streaming", []), "streaming"),
    "streaming, null": (put("models", 0, "streaming", None), "streaming is null"),
    "streaming without a cache": (drop("models", 0, "streaming", "cache"), "streaming.cache"),
    "streaming of fewer windows": (
        put("models", 0, "streaming", "nll_by_window", "window", [1.0]),
        "windows are not of the same length",
    ),
    "streaming of fewer windows than the base": (
        put(
            *("models", 1, "streaming", "nll_by_window"),
            {kind: [1.0] for kind in ("full", "window", "kept_sinks")},
        ),
        "windows of streaming are not of the same length",
    ),
    "a curve of unlike length": (
        put("models", 0, "streaming", "by_position", "full", [1.0]),
        "not of the same length",
    ),
    "a scheme without figures": (
        put("models", 1, "quantization", "schemes", "w4", {}),
        "schemes.w4.perplexity",
    ),
    "no unrounded model": (
        drop("models", 1, "quantization", "schemes", "none"),
        "schemes has no none",
    ),
    "a scheme of fewer windows": (
        put("models", 1, "quantization", "schemes", "w4", "nll_by_window", [1.0]),
        "windows of the schemes are not of the same length",
    ),
    "a loss past all numbers": (
        put("models", 1, "quantization", "schemes", "w4", "nll_by_window", [1e6] * 3),
        "nll_by_window",
    ),
    "quantization of fewer windows than the base": (
        put(
            *("models", 1, "quantization", "schemes"),
            {"none": {"perplexity": 20.0, "kl": 0.0, "nll_by_window": [3.0]}},
        ),
        "windows of quantization are not of the same length",
    ),
    "a length in words": (
        put("models", 1, "long_context", "tasks", "niah_single", {"long": {}}),
        "long_context.tasks.niah_single.long",
    ),
    "a score in words": (
        put("models", 1, "long_context", "tasks", "niah_single", "2048", "score", "high"),
        "niah_single.2048.score",
    ),
    "an empty curve": (
        put("models", 1, "long_context", "perplexity", "2048", "perplexity", []),
        "perplexity",
    ),
    "heads of fewer shares": (put("models", 1, "heads", "least_used", "kl", [1.0]), "shares are"),
    "heads without random ones": (drop("models", 1, "heads", "random"), "heads.random"),
    "a cost in words": (put("models", 1, "cost", "weight_bytes", "538 MB"), "cost.weight_bytes"),
    "a ratio without its range": (drop("models", 1, "cost", "prefill_ratio", "low"), "ratio.low"),
    "maps of fewer layers": (put("models", 0, "examples", "maps", "layers", [1]), "maps are not"),
    "a generation without text": (drop("models", 0, "examples", "generations", 0, "text"), "text"),
    "an accuracy without its error": (
        drop("models", 1, "tasks", "hellaswag", "accuracy", "stderr"),
        "hellaswag.accuracy.stderr",
    ),
    "one name twice": (put("models", 1, "name", "base"), "base is there twice"),
    "a name that is a number": (put("models", 0, "name", 5), "models.0.name"),
    "half a character in a name": (put("models", 0, "name", "\ud800"), "surrogates"),
    "no settings": (drop("settings"), "settings"),
    "settings in a list": (put("settings", []), "settings"),
    "settings that are a number": (put("settings", 5), "settings"),
    "a length that is text": (put("settings", "length", "512"), "settings.length"),
    "versions in a list": (put("settings", "versions", []), "settings.versions"),
    "sources that are text": (put("settings", "sources", "base"), "settings.sources"),
    "tasks without documents": (put("settings", {"documents": 5, "seed": 0}), "settings"),
}


@pytest.mark.parametrize(("change", "message"), MEASURED.values(), ids=MEASURED)
def test_a_measurement_of_another_shape_is_refused(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(synthetic_result("gated")))
    edited(path, change)
    told = refusal("compare", path, "--report", tmp_path / "page.html", leaves_alone=tmp_path)
    assert str(path) in told and re.search(message, told), told


@pytest.mark.parametrize("text", (NO_JSON | NO_OBJECT).values(), ids=NO_JSON | NO_OBJECT)
def test_a_measurement_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    assert str(path) in refusal("compare", path, leaves_alone=tmp_path)


def test_a_measurement_with_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(synthetic_result("gated")), encoding="utf-8")
    assert CliRunner().invoke(cli.app, ["compare", str(path)]).exit_code == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model in the layout of qiuzh20/gated_attention."""
    folder = tmp_path_factory.mktemp("published")
    published(folder / "model", "qwen3", "headwise", False)
    return folder / "model"


PUBLISHED = {
    "no heads": (put("num_attention_heads", 0), "num_attention_heads"),
    "heads in words": (put("num_attention_heads", "4"), "num_attention_heads"),
    "a billion layers": (put("num_hidden_layers", 10**9), "lacks the tensor"),
    "fewer layers": (put("num_hidden_layers", 1), "num_hidden_layers. .1. must be equal"),
    "a width beyond all": (put("hidden_size", 10**12), "in the shape"),
    "another vocabulary": (put("vocab_size", 290), "model.embed_tokens.weight in the shape"),
    "no vocabulary": (put("vocab_size", -1), "vocab_size"),
    "a RoPE with a base in words": (
        put("rope_parameters", "rope_theta", "x"),
        "rope_theta|damaged",
    ),
    "an unknown RoPE": (put("rope_parameters", "rope_type", "nonsense"), "nonsense|damaged"),
    "an unknown activation": (put("hidden_act", "nonsense"), "hidden_act"),
    "an epsilon in words": (put("rms_norm_eps", "x"), "rms_norm_eps"),
    "norms in words": (put("use_qk_norm", "yes"), "use_qk_norm"),
    "a kind of gate in words": (put("headwise_attn_output_gate", "yes"), "headwise"),
    "both kinds of gates": (put("elementwise_attn_output_gate", True), "both kinds"),
    "no gates": (drop("headwise_attn_output_gate"), "asks for neither"),
    "a list": (lambda told: [], "asks for neither"),
}


@pytest.mark.parametrize(("change", "message"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_config_that_no_model_can_have_is_refused(whole, tmp_path, change, message):
    shutil.copytree(whole, tmp_path / "model")
    edited(tmp_path / "model/config.json", change)
    told = refusal("unpack", tmp_path / "model", "--out", tmp_path / "apart", leaves_alone=tmp_path)
    assert re.search(message, told) and str(tmp_path / "model") in told, told


def test_published_weights_of_another_kind_are_refused(whole, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "model")) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, path)
    told = refusal("unpack", tmp_path / "model", "--out", tmp_path / "apart", leaves_alone=tmp_path)
    assert "stores model.norm.weight as I8" in told and str(path) in told


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_a_published_config_that_is_no_json_is_refused(whole, tmp_path, text):
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model/config.json").write_bytes(text)
    told = refusal("unpack", tmp_path / "model", "--out", tmp_path / "apart", leaves_alone=tmp_path)
    assert "has no usable config.json" in told


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The gates of a run as `retrofit merge --format adapter` writes them, unverified."""
    folder = tmp_path_factory.mktemp("merged")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    make_run(folder / "run", folder / "base")
    figures = summarize([{"kl": 0.0, "max_logprob_difference": 0.0, "top1_agreement": 1.0}])
    with pytest.MonkeyPatch.context() as patch:
        held = figures | {"same_tokens": True, "greedy_until": None}
        patch.setattr(verify, "_run", lambda *args, **kwargs: held)
        merge(folder / "run", folder / "out", format="adapter")
    return folder / "out"


REPORTS = {
    "another format": (put("checkpoint", "format", "native"), "says format native"),
    "an unknown format": (put("checkpoint", "format", "onnx"), "checkpoint.format"),
    "a dtype that is none": (put("checkpoint", "dtype", "float12"), "checkpoint.dtype"),
    "no checkpoint": (drop("checkpoint"), "checkpoint"),
    "a checkpoint in a list": (put("checkpoint", []), "checkpoint"),
    "no verification": (drop("verification"), "verification"),
    "a difference in words": (put("verification", "rounding_kl", "0"), "rounding_kl"),
    "a difference of NaN": (put("verification", "rounding_kl", NAN), "NaN"),
    "a difference below zero": (put("verification", "rounding_kl", -1.0), "rounding_kl"),
    "no base": (put("base", None), "base"),
    "a number of experts in words": (put("base", "experts", "4"), "experts"),
    "a list": (lambda told: [], "damaged"),
}


@pytest.mark.parametrize(("change", "message"), REPORTS.values(), ids=REPORTS)
def test_a_report_of_another_shape_is_refused(merged, tmp_path, change, message):
    shutil.copytree(merged, tmp_path / "out")
    edited(tmp_path / "out/retrofit-merge.json", change)
    told = refusal("verify", tmp_path / "out", leaves_alone=tmp_path)
    assert re.search(message, told) and "merge again" in told, told


REFERENCES = {
    "no windows": (put("input_ids", []), "are not those of its text"),
    "one window": (lambda told: told["input_ids"].pop() and None, "are not those of its text"),
    "fewer tokens": (lambda told: told["tokens"][0].pop() and None, "tokens are not those"),
    "text for tokens": (put("tokens", "x"), "tokens"),
    "text for a probability": (put("logprobs", 0, 0, 0, "x"), "logprobs"),
    "no windows without gates": (put("ungated", []), "ungated are not those of its text"),
    "no greedy text": (drop("greedy"), "greedy"),
    "a list": (lambda told: [], "damaged"),
}


@pytest.mark.parametrize(("change", "message"), REFERENCES.values(), ids=REFERENCES)
def test_a_reference_of_another_shape_is_refused(merged, tmp_path, change, message):
    shutil.copytree(merged, tmp_path / "out")
    edited(tmp_path / "out" / REFERENCE_FILE, change)
    told = refusal("verify", tmp_path / "out", leaves_alone=tmp_path)
    assert REFERENCE_FILE in told and re.search(message, told), told


@pytest.mark.parametrize("name", ["retrofit-merge.json", REFERENCE_FILE])
@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_what_lies_beside_a_merge_and_is_no_json_is_refused(merged, tmp_path, name, text):
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(text)
    told = refusal("verify", tmp_path / "out", leaves_alone=tmp_path)
    assert f"{name} is damaged" in told and "merge again" in told


SHOWN = {
    "half a measurement": ("measure.json", b'{"models": ['),
    "a measurement of NaN": ("measure.json", b'{"models": NaN}'),
    "a measurement without models": ("measure.json", b'{"settings": {}}'),
    "a measurement in words": ("measure.json", b'{"models": [{"name": "x", "metrics": "y"}]}'),
    "a recipe in Latin-1": ("recipe.resolved.yaml", b"output_dir: \xe9"),
}


@pytest.mark.parametrize(("name", "text"), SHOWN.values(), ids=SHOWN)
def test_what_a_card_would_show_is_read_before_anything_is_merged(work, name, text):
    (work / "run" / name).write_bytes(text)
    told = refusal("merge", work / "run", "--out", work / "out", leaves_alone=work)
    assert name in told
