"""Bases that are damaged, or none: every verb that opens one says so in one line, before it writes
anything."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from made_runs import make_run
from malformed import refusal
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from retrofit import cli
from retrofit.export.merge import merge
from retrofit.export.model_card import license_of
from retrofit.models.loading import load_base
from retrofit.recipe import Model

NAN = float("nan")
QUERY = "model.layers.1.self_attn.q_proj.weight"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A base, and a run on it."""
    folder = tmp_path_factory.mktemp("good")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    make_run(folder / "run", folder / "base")
    return folder


@pytest.fixture
def work(good, tmp_path):
    """A base to be spoilt, a run that was trained on it, a recipe and texts."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    for name in ("run.json", "recipe.resolved.yaml"):  # which say where the base is
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(str(good), str(tmp_path)))
    lines = [json.dumps({"text": f"a sink is token {number} " * 20}) for number in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.txt").write_text("Call me Ishmael, some years ago. " * 40)
    write_recipe(tmp_path)
    return tmp_path


def write_recipe(work: Path, **sections) -> None:
    train = {"max_steps": 1, "learning_rate": 0.001, "report_to": []}
    data = {"sources": [{"path": str(work / "data.jsonl")}], "sequence_length": 64}
    recipe = {
        "output_dir": str(work / "new"),
        "model": {"base": str(work / "base")},
        "data": data,
        "train": train | {"gradient_checkpointing": "none"},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe | sections))


def refusals(work: Path, *verbs: str) -> list[str]:
    """What each verb that opens the base says."""
    text = ("--text", work / "text.txt", "--length", "192", "--windows", "1")
    commands = {
        "check": ["check", work / "recipe.yaml"],
        "train": ["train", work / "recipe.yaml"],
        "measure": ["measure", work / "base", *text],
        "measure run": ["measure", work / "run", *text],
        "merge": ["merge", work / "run", "--out", work / "out"],
    }
    return [refusal(*commands[verb], leaves_alone=work) for verb in verbs or commands]


def config(**changes):
    def spoil(base):
        told = json.loads((base / "config.json").read_text()) | changes
        (base / "config.json").write_text(json.dumps(told))

    return spoil


def without(key):
    def spoil(base):
        told = json.loads((base / "config.json").read_text())
        del told[key]
        (base / "config.json").write_text(json.dumps(told))

    return spoil


def content(name, text):
    def spoil(base):
        (base / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def rope(**told):
    return config(rope_parameters={"rope_type": "default", "rope_theta": 1e4} | told)


CONFIGS = {
    "no heads": (config(num_attention_heads=0), "integer modulo by zero|num_attention_heads"),
    "heads below zero": (config(num_attention_heads=-1), "num_attention_heads: .*greater than 0"),
    "heads in words": (config(num_attention_heads="four"), "num_attention_heads.*expected int"),
    "heads and a half": (config(num_attention_heads=4.5), "num_attention_heads.*expected int"),
    "heads true": (config(num_attention_heads=True), "num_attention_heads.*expected int"),
    "heads null": (config(num_attention_heads=None), "num_attention_heads.*expected int"),
    "heads in a list": (config(num_attention_heads=[4]), "num_attention_heads.*expected int"),
    "heads that do not divide": (config(num_attention_heads=3), "not a multiple"),
    "a billion heads": (config(num_attention_heads=10**9), "not a multiple"),
    "no key-value heads": (config(num_key_value_heads=0), "num_key_value_heads: .*greater than 0"),
    "key-value heads below zero": (config(num_key_value_heads=-2), "num_key_value_heads"),
    "key-value heads that do not divide": (config(num_key_value_heads=3), "4 heads are no multip"),
    "no width": (config(hidden_size=0), "hidden_size: .*greater than 0, not '0'"),
    "a width below zero": (config(hidden_size=-64), "hidden_size: .*greater than 0, not '-64'"),
    "a width in words": (config(hidden_size="64"), "hidden_size.*expected int"),
    "a width beyond all": (config(hidden_size=10**12), "hidden_size: .*less than or equal to"),
    "a width that overflows": (config(hidden_size=2**63), "hidden_size: "),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers: .*greater than 0"),
    "layers below zero": (config(num_hidden_layers=-1), "num_hidden_layers: .*greater than 0"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers: .*not '1000000000'"),
    "layers in words": (config(num_hidden_layers="3"), "num_hidden_layers.*expected int"),
    "no vocabulary": (config(vocab_size=0), "vocab_size: .*greater than 0"),
    "a vocabulary below zero": (config(vocab_size=-1), "vocab_size: .*greater than 0"),
    "a vocabulary beyond all": (config(vocab_size=10**12), "vocab_size: .*less than or equal"),
    "no intermediate size": (config(intermediate_size=0), "intermediate_size: .*greater than 0"),
    "a huge intermediate size": (config(intermediate_size=10**12), "intermediate_size: "),
    "an intermediate size in words": (config(intermediate_size="x"), "intermediate_size"),
    "no head dimension": (config(head_dim=0), "head_dim: .*greater than 0"),
    "a head dimension below zero": (config(head_dim=-16), "head_dim: .*greater than 0"),
    "an odd head dimension": (config(head_dim=15), "even rotary dimension"),
    "a huge head dimension": (config(head_dim=10**9), "head_dim: .*less than or equal"),
    "no positions": (config(max_position_embeddings=0), "max_position_embeddings: .*greater"),
    "positions below zero": (config(max_position_embeddings=-1), "max_position_embeddings: "),
    "padding past the vocabulary": (config(pad_token_id=10**9), "pad_token_id 1000000000 is past"),
    "an epsilon in words": (config(rms_norm_eps="tiny"), "rms_norm_eps.*expected float"),
    "an epsilon of NaN": (config(rms_norm_eps=NAN), "rms_norm_eps: .*greater|rms_norm_eps: .*fini"),
    "an infinite epsilon": (config(rms_norm_eps=float("inf")), "rms_norm_eps: .*finite"),
    "an epsilon below zero": (config(rms_norm_eps=-1.0), "rms_norm_eps: .*greater than 0"),
    "no epsilon": (config(rms_norm_eps=0.0), "rms_norm_eps: .*greater than 0"),
    "an unknown activation": (config(hidden_act="nonsense"), "hidden_act 'nonsense' is unknown"),
    "an activation that is a number": (config(hidden_act=5), "hidden_act.*expected str"),
    "an unknown RoPE": (rope(rope_type="nonsense"), "rope_type 'nonsense' is unknown; .* yarn"),
    "a RoPE without its factor": (rope(rope_type="linear"), "factor"),
    "a RoPE with the factor 0": (rope(rope_type="linear", factor=0), "factor: .*greater than 0"),
    "a RoPE with a factor in words": (rope(rope_type="linear", factor="8"), "factor: "),
    "a RoPE in words": (config(rope_parameters="text"), "rope_parameters"),
    "a RoPE in a list": (config(rope_parameters=[]), "rope_parameters"),
    "a RoPE with the base 0": (rope(rope_theta=0), "rope_theta: .*greater than 0"),
    "a RoPE with a base of NaN": (rope(rope_theta=NAN), "rope_theta: "),
    "a RoPE with a base in words": (rope(rope_theta="x"), "rope_theta: "),
    "Llama 3's RoPE without its factors": (rope(rope_type="llama3"), "factor"),
    "a dtype that is none": (config(dtype="float12"), "float12"),
    "a dtype of whole numbers": (config(dtype="int8"), "torch.int8 holds no weights"),
    "a dtype that is a module": (config(dtype="nn"), "dtype"),
    "a dtype that is a number": (config(dtype=5), "dtype"),
    "no model type": (without("model_type"), "model_type"),
    "an unknown model type": (config(model_type="nonsense"), "nonsense"),
    "a model type that is a number": (config(model_type=5), "damaged"),
    "a quantization of no kind": (config(quantization_config={}), "quantization_config: .*None"),
    "a quantization in words": (config(quantization_config="x"), "quantization_config"),
    "an unknown quantization": (
        config(quantization_config={"quant_method": "nonsense"}),
        "transformers knows no quant_method 'nonsense'",
    ),
    "an empty file": (content("config.json", ""), "not a valid JSON file"),
    "a list": (content("config.json", "[]"), "holds no settings|damaged"),
    "null": (content("config.json", "null"), "damaged"),
    "half a file": (content("config.json", '{"model_type": "lla'), "not a valid JSON file"),
    "lists without end": (content("config.json", "[" * 100_000), "recursion"),
    "Latin-1": (content("config.json", b'{"model_type": "llama", "x": "\xe9"}'), "damaged"),
    "zeros": (content("config.json", b"\0" * 50), "not a valid JSON file"),
}


@pytest.mark.parametrize(("spoil", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_no_model_can_have_is_refused(work, spoil, message):
    spoil(work / "base")
    for told in refusals(work):
        assert_told(message, told, work / "base")


OF_OTHER_TYPES = {
    "a window of 0": ("mistral", {"sliding_window": 0}, "sliding_window: .*greater than 0"),
    "a window below zero": ("mistral", {"sliding_window": -5}, "sliding_window: .*greater than 0"),
    "a window of 0 in some layers": ("gemma3_text", {"sliding_window": 0}, "sliding_window: .*gre"),
    "a window of 0 beside sinks": ("gpt_oss", {"sliding_window": 0}, "sliding_window: .*greater"),
    "layers with no window": ("gemma3_text", {"sliding_window": None}, "no sliding_window"),
    "layers with a window that is off": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
        "layer_types has sliding_attention, and there is no sliding_window",
    ),
    "more experts than there are": ("qwen3_moe", {"num_experts_per_tok": 9}, "not from 1 to 4"),
    "experts below zero": ("qwen3_moe", {"num_experts_per_tok": -1}, "not from 1 to 4"),
    "more experts beside sinks": ("gpt_oss", {"num_experts_per_tok": 9}, "not from 1 to 4"),
    "no experts beside sinks": ("gpt_oss", {"num_experts_per_tok": 0}, "not from 1 to 4"),
    "a scale below zero": ("gemma3_text", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
    "a cap of the logits": (
        "gemma3_text",
        {"final_logit_softcapping": 30.0},
        "capped logits are not supported",
    ),
    "a cap of 0": ("gemma3_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    "all of it dropped": ("llama", {"attention_dropout": 2.0}, "attention_dropout: .*less than 1"),
    "dropped below zero": ("llama", {"attention_dropout": -1.0}, "attention_dropout: .*greater"),
    "tuples for results": ("llama", {"return_dict": False}, "return_dict: input should be true"),
}


@pytest.mark.parametrize(
    ("kind", "changes", "message"), OF_OTHER_TYPES.values(), ids=OF_OTHER_TYPES
)
def test_a_value_that_would_fail_in_the_first_step_is_refused(
    tiny_base, work, kind, changes, message
):
    shutil.rmtree(work / "base")
    shutil.copytree(tiny_base(kind), work / "base")
    config(**changes)(work / "base")
    for told in refusals(work, "check", "train", "measure"):
        assert_told(message, told, work / "base")


def test_nothing_is_dropped_in_a_frozen_base(work):
    config(attention_dropout=0.5)(work / "base")
    model = load_base(Model(base=str(work / "base"))).train()
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)


def assert_told(message: str, told: str, base: Path) -> None:
    assert re.search(message, told, re.IGNORECASE), told
    assert str(base) in told, told


def weights(change):
    def spoil(base):
        tensors = load_file(base / "model.safetensors")
        changed = change(tensors)
        save_file(
            changed if isinstance(changed, dict) else tensors,
            base / "model.safetensors",
            metadata={"format": "pt"},
        )

    return spoil


def tensor(change, name=QUERY):
    return weights(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def with_number(number, at=0):
    def change(values):
        values = values.clone()
        values.view(-1)[at] = number
        return values

    return change


def raw(change):
    def spoil(base):
        path = base / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def header(**changes):
    """One that lies about a tensor."""

    def lie(data):
        size = struct.unpack("<Q", data[:8])[0]
        told = json.loads(data[8 : 8 + size])
        told[QUERY] |= changes
        text = json.dumps(told).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return raw(lie)


def sharded(change=lambda index, base: None):
    """The weights in two shards, with an index that is changed, or written as it is returned."""

    def spoil(base):
        path = base / "model.safetensors"
        tensors = load_file(path)
        path.unlink()
        names = sorted(tensors)
        shards = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
        for file, held in shards.items():
            held = {name: tensors[name] for name in held}
            save_file(held, base / file, metadata={"format": "pt"})
        places = {name: file for file, held in shards.items() for name in held}
        index = {"metadata": {}, "weight_map": places}
        told = change(index, base)
        told = index if told is None else told
        text = told if isinstance(told, str) else json.dumps(told)
        (base / "model.safetensors.index.json").write_text(text)

    return spoil


def placed(change):
    def edit(index, base):
        index["weight_map"] = change(index["weight_map"])

    return sharded(edit)


def outside(index, base):
    shutil.copy(base / FIRST, base.parent / "elsewhere.safetensors")
    places = index["weight_map"]
    index["weight_map"] = {
        name: "../elsewhere.safetensors" if file == FIRST else file for name, file in places.items()
    }


def in_both(index, base):
    """One tensor also in the shard that the index does not name, with other numbers."""
    name = "model.norm.weight"
    file = FIRST if index["weight_map"][name] == SECOND else SECOND
    held = load_file(base / file)
    save_file(held | {name: torch.ones(64)}, base / file, metadata={"format": "pt"})


OTHER_KINDS = {
    "int8": "I8",
    "int64": "I64",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e5m2": "F8_E5M2",
}


def in_dtype(name):
    return lambda values: values.to(getattr(torch, name))


def renamed(to):
    return lambda base: (base / "model.safetensors").rename(base / to)


def replaced(name, make):
    def spoil(base):
        (base / name).unlink()
        make(base / name)

    return spoil


FILES = {
    "cut off": (raw(lambda data: data[: len(data) // 2]), "model.safetensors is missing or damag"),
    "three bytes": (raw(lambda data: data[:3]), "model.safetensors is missing or damaged"),
    "a page of a browser": (raw(lambda data: b"<html>not found</html>"), "missing or damaged"),
    "a pointer of git-lfs": (
        raw(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        "missing or damaged",
    ),
    "bytes at the end": (raw(lambda data: data + b"abc"), "missing or damaged"),
    "a header without end": (
        raw(lambda data: struct.pack("<Q", 2**62) + data[8:]),
        "missing or damaged",
    ),
    "a header with an unknown dtype": (header(dtype="F12"), "missing or damaged"),
    "a header with offsets past the end": (header(data_offsets=[0, 10**9]), "missing or damaged"),
    "a header with another shape": (header(shape=[64, 63]), "missing or damaged"),
    "a header with a shape below zero": (header(shape=[-64, -64]), "missing or damaged"),
    "a tensor in another shape": (tensor(lambda values: values[:32]), f"{QUERY}.* shape"),
    "a tensor without shape": (tensor(lambda values: torch.tensor(1.0)), f"{QUERY}.* shape"),
    "a tensor too few": (weights(lambda tensors: [tensors.pop(QUERY)]), f"lacks .*{QUERY}"),
    "no tensors": (weights(lambda tensors: tensors.clear()), "lacks the tensor"),
    "another model's tensors": (
        weights(lambda tensors: {f"transformer.{name}": each for name, each in tensors.items()}),
        "lacks the tensor",
    ),
    "fewer layers than told": (config(num_hidden_layers=5), r"lacks .*model.layers.3"),
    "more layers than told": (config(num_hidden_layers=1), "stores model.layers.1.*has no place"),
    "a tensor too many": (
        weights(lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)})),
        "stores model.extra.weight, for which its config.json has no place",
    ),
    "fewer tokens than told": (config(vocab_size=400), "shape"),
    "another width": (config(hidden_size=128, head_dim=32), "shape"),
    "a pickle alone": (renamed("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "GGUF alone": (renamed("model.gguf"), "has no model.safetensors"),
    "another name": (renamed("weights.safetensors"), "has no model.safetensors"),
    "a vendor's own format": (renamed("consolidated.safetensors"), "has no model.safetensors"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), "has no model.safetensors"),
    "shards without an index": (renamed(FIRST), "has shards but no model.safetensors.index.json"),
    "an empty index": (sharded(lambda index, base: ""), "index.json is damaged"),
    "half an index": (sharded(lambda index, base: '{"weight_map'), "index.json is damaged"),
    "an index that is a list": (sharded(lambda index, base: []), "index.json is damaged"),
    "an index without a map": (sharded(lambda index, base: {"metadata": {}}), "index.json is dam"),
    "an index with a list for a map": (placed(lambda places: []), "index.json is damaged"),
    "an index with an empty map": (placed(lambda places: {}), "index.json is damaged"),
    "an index with numbers for files": (
        placed(lambda places: dict.fromkeys(places, 5)),
        "index.json is damaged",
    ),
    "an index that points outside": (sharded(outside), "names '../elsewhere.safetensors'"),
    "an index that points to a pickle": (
        placed(lambda places: dict.fromkeys(places, "pytorch_model.bin")),
        "names 'pytorch_model.bin', which is no safetensors",
    ),
    "an index that names what is nowhere": (
        placed(lambda places: places | {"model.nothing.weight": FIRST}),
        "lacks the tensor model.nothing.weight",
    ),
    "a shard too few": (
        sharded(lambda index, base: (base / SECOND).unlink()),
        f"{SECOND} is missing",
    ),
    "half a shard": (
        sharded(lambda index, base: (base / SECOND).write_bytes(b"abc") and None),
        f"{SECOND} is missing or damaged",
    ),
    "a tensor in two shards": (
        sharded(in_both),
        f"{FIRST} and {SECOND} both hold model.norm.weight",
    ),
    **{
        f"a tensor in {dtype}": (tensor(in_dtype(dtype)), f"stores {QUERY} as {told}")
        for dtype, told in OTHER_KINDS.items()
    },
    "all tensors in float8": (
        weights(lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}),
        "as F8_E4M3, and weights are F16",
    ),
    "a pipe for the config": (replaced("config.json", os.mkfifo), "config.json is no file"),
    "a pipe for the weights": (
        replaced("model.safetensors", os.mkfifo),
        "model.safetensors is no file",
    ),
    "a pipe for the tokenizer": (
        replaced("tokenizer.json", os.mkfifo),
        "tokenizer.json is no file",
    ),
    "a folder for the config": (replaced("config.json", Path.mkdir), "config.json is no file"),
    "a folder for the weights": (replaced("model.safetensors", Path.mkdir), "is no file"),
    "a link to nothing": (
        replaced("model.safetensors", lambda path: path.symlink_to("nowhere")),
        "model.safetensors is no file",
    ),
    "no config": (lambda base: (base / "config.json").unlink(), "has no config.json"),
    "an empty folder": (lambda base: [shutil.rmtree(base), base.mkdir()], "has no config.json"),
    "weights elsewhere": (
        config(transformers_weights="../x.safetensors"),
        "outside of its folder|names other weights",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), FILES.values(), ids=FILES)
def test_files_that_are_damaged_missing_or_unlike_the_config_are_refused(work, spoil, message):
    spoil(work / "base")
    for told in refusals(work):
        assert_told(message, told, work / "base")


@pytest.mark.parametrize("number", [NAN, float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", [QUERY, "model.norm.weight", "model.embed_tokens.weight"])
def test_numbers_that_are_none_are_blamed_on_the_base(work, name, number):
    tensor(with_number(number, at=-1), name)(work / "base")
    for told in refusals(work, "train", "measure", "measure run", "merge"):
        assert_told(f"has NaN or infinite numbers in {name}", told, work / "base")


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo], ids=["a file", "a pipe"])
def test_what_is_no_folder_is_refused(work, make):
    shutil.rmtree(work / "base")
    make(work / "base")
    for told in refusals(work, "check", "train", "measure"):
        assert_told("is no folder", told, work / "base")
    assert "no base model" in refusals(work, "merge")[0]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere", "no model"),
        ("no/where", "no model"),
        ("", "model.base: is empty"),
        ("a" * 300, "File name too long"),
        ("a\0b", "holds what is no character"),
        ("nobody/nothing/at/all", "no model"),
    ],
)
def test_a_base_that_is_nowhere_is_refused(work, base, message):
    write_recipe(work, model={"base": base})
    for told in refusals(work, "check", "train"):
        assert message in told, told


def test_gates_beyond_the_last_layer_are_refused_before_a_weight_is_read(work, monkeypatch):
    monkeypatch.setattr(
        "retrofit.training.run.load_base", lambda spec: pytest.fail("it was loaded")
    )
    write_recipe(work, gate={"layers": [0, 3]})
    for told in refusals(work, "check", "train"):
        assert "gates in layer 3 of" in told and "3 layers, 0 to 2" in told
        assert "gate.layers" in told


def test_a_family_without_gates_and_without_layers_is_refused(work):
    folder = work / "base"
    shutil.rmtree(folder)
    told = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(told).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for message in refusals(work, "check", "train", "merge"):
        assert "cannot gate a 'gpt2' model; supported: " in message
    assert "cannot measure a 'gpt2' model" in refusals(work, "measure")[0]


@pytest.fixture
def in_four_bits(work):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(work / "base", quantization_config=how)
    (work / "base/model.safetensors").unlink()
    model.save_pretrained(work / "base")
    return work


def test_a_base_that_is_stored_quantized_is_not_trained_on_or_merged(in_four_bits):
    for told in refusals(in_four_bits, "check", "train"):
        assert "is stored quantized (bitsandbytes)" in told and "model.quantization" in told
    assert "is stored quantized; name the unquantized" in refusals(in_four_bits, "merge")[0]


def test_a_base_that_is_stored_quantized_is_accepted_by_measure(in_four_bits):
    text = ("--text", str(in_four_bits / "text.txt"), "--length", "192", "--windows", "1")
    done = CliRunner().invoke(cli.app, ["measure", str(in_four_bits / "base"), *text])
    assert done.exit_code == 0 and "perplexity" in done.output


def test_a_config_that_says_packed_of_weights_that_are_not_is_refused(work):
    config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(
        work / "base"
    )
    assert "they are not packed" in refusals(work, "measure")[0]


def test_a_base_that_is_stored_without_its_prefix_is_accepted_and_merged(work, in_process):
    expected = load_file(work / "base/model.safetensors")
    weights(lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})(
        work / "base"
    )
    loaded = load_base(Model(base=str(work / "base"))).state_dict()
    assert all(torch.equal(loaded[name], each) for name, each in expected.items())
    merge(work / "run", work / "out", format="remote-code")
    merged = load_file(work / "out/model.safetensors")
    assert all(torch.equal(merged[name], each) for name, each in expected.items())


def swapped(places):
    return {name: FIRST if file == SECOND else SECOND for name, file in places.items()}


@pytest.mark.parametrize("spoil", [sharded(), placed(swapped)], ids=["as told", "swapped"])
def test_shards_are_accepted_and_read_by_what_they_hold(work, spoil):
    expected = load_file(work / "base/model.safetensors")
    spoil(work / "base")
    loaded = load_base(Model(base=str(work / "base"))).state_dict()
    assert all(torch.equal(loaded[name], each) for name, each in expected.items())


def test_a_single_file_is_accepted_beside_a_broken_index(work):
    content("model.safetensors.index.json", "{")(work / "base")
    load_base(Model(base=str(work / "base")))


def test_a_pipe_for_the_card_of_the_base_is_accepted_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert license_of(tmp_path / "README.md") == {}


@pytest.mark.parametrize("name", ["tokenizer.pkl", "tokenizer.bin", "vocab.bin"])
def test_a_pickle_beside_the_tokenizer_is_accepted_and_left_behind(work, in_process, name):
    (work / "base" / name).write_bytes(b"anything")
    merge(work / "run", work / "out", format="remote-code")
    assert not (work / "out" / name).exists()


CARDS = {
    "broken": ("---\nlicense: [mit\n---\n", {}),
    "a list": ("---\n- mit\n---\n", {}),
    "Latin-1": (b"---\nlicense: mit\n---\nGr\xf6\xdfe", {"license": "mit"}),
    "Norwegian": ("---\nlicense: mit\nlanguage: [no, en]\n---\n", {"language": ["no", "en"]}),
    "a license that is a map": ("---\nlicense: {a: b}\n---\n", {}),
    "a byte order mark": ("\ufeff---\nlicense: mit\n---\n", {"license": "mit"}),
    "a number for a name": ("---\nlicense: mit\nlicense_name: 2.0\n---\n", {"license_name": "2.0"}),
    "nothing": ("", {}),
}


@pytest.mark.parametrize(("text", "kept"), CARDS.values(), ids=CARDS)
def test_a_broken_card_of_the_base_is_accepted_and_what_it_says_kept(tmp_path, text, kept):

    path = tmp_path / "README.md"
    content("README.md", text)(tmp_path)
    found = license_of(path)
    assert kept.items() <= found.items() and (kept or not found)
    card = ModelCard("---\n" + yaml.safe_dump({"tags": ["x"]} | found) + "---\n# Name\n")
    assert kept.items() <= card.data.to_dict().items()
