"""GGUF files, loaded by llama.cpp itself and compared with the trained model."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from made_runs import MIXED, SINKS, WINDOWED, make_run
from native_checkpoints import LINEAR, YARN
from test_granite_swa import DYNAMIC, WINDOWED_QWEN
from tiny import DENSE, LLAMA3, tiny_model, write_tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retrofit.export import qwen3_5
from retrofit.export.gguf_tokenizer import pre_tokenizer_name
from retrofit.export.llama_cpp import KINDS
from retrofit.export.merge import MergeMismatchError, merge
from retrofit.export.verify.report import read_report
from retrofit.export.verify.verify import verify
from retrofit.utils.errors import UserError


@pytest.fixture
def base(tmp_path):
    """Builds a tiny model's folder."""

    def build(family: str, **overrides) -> Path:
        write_tiny(tmp_path / "base", family, **overrides)
        return tmp_path / "base"

    return build


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("centered", [False, True])
def test_llama_cpp_computes_what_was_trained(family, centered, tmp_path, base, in_process):
    run = make_run(tmp_path / "run", base(family), "elementwise", centered)
    figures = merge(run, tmp_path / "out", format="gguf")["verification"]
    assert figures["kl"] < 1e-9 and figures["max_logprob_difference"] < 1e-3
    assert figures["greedy_until"] is None and figures["same_tokens"]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"rope_parameters": YARN}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3_moe", {}),
    ],
)
def test_other_layouts(family, overrides, tmp_path, base, in_process):
    run = make_run(tmp_path / "run", base(family, **overrides))
    figures = merge(run, tmp_path / "out", format="gguf")["verification"]
    assert figures["median_kl"] < 1e-9 and figures["greedy_until"] is None


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
        ("llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"rope_parameters": YARN}),
        ("mistral", WINDOWED),
        ("qwen2", WINDOWED_QWEN),
    ],
)
def test_llama_cpp_has_sinks(family, overrides, tmp_path, base, in_process):
    run = make_run(tmp_path / "run", base(family, **overrides), centered=True, **SINKS)
    report = merge(run, tmp_path / "out", format="gguf")
    assert report["checkpoint"]["model_type"] == "granite_swa"
    figures = report["verification"]
    assert figures["kl"] < 1e-9 and figures["max_logprob_difference"] < 1e-3
    assert figures["greedy_until"] is None and figures["same_tokens"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32"])
def test_sinks_beside_smaller_weights(kind, tmp_path, base, in_process):
    run = make_run(tmp_path / "run", base("llama"), centered=True, **SINKS)
    figures = merge(run, tmp_path / "out", format="gguf", dtype=kind)["verification"]
    assert figures["kl"] < 3 * figures["rounding_kl"] + 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32"])
def test_smaller_weights_cost_about_their_rounding(family, kind, tmp_path, base, in_process):
    run = make_run(tmp_path / "run", base(family), centered=True)
    report = merge(run, tmp_path / "out", format="gguf", dtype=kind)
    figures = report["verification"]
    assert figures["rounding_kl"] > 0
    assert figures["kl"] < 3 * figures["rounding_kl"] + 1e-6
    assert (tmp_path / "out" / report["checkpoint"]["file"]).is_file()


def test_a_fresh_process_loads_it_and_the_card_says_how(tmp_path, base):
    run = make_run(tmp_path / "run", base("llama"), centered=True)
    report = merge(run, tmp_path / "out", format="gguf")
    assert report["checkpoint"]["file"] == "out-F32.gguf"
    card = (tmp_path / "out/README.md").read_text()
    assert "llama-server -m out-F32.gguf" in card and "from_pretrained" not in card
    assert "llama.cpp loaded it in a fresh process" in card


def test_a_file_that_differs_never_appears(tmp_path, base, in_process, monkeypatch):
    run = make_run(tmp_path / "run", base("llama"))
    monkeypatch.setattr("retrofit.export.gguf_qwen35._native_tensors", without_gates)
    with pytest.raises(MergeMismatchError, match="differs from the trained model"):
        merge(run, tmp_path / "out", format="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def without_gates(source, scales):
    parts = source.config, source.weights, {}, source.gates.centers
    return qwen3_5.native_tensors(*parts, torch.float32, scales)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("llama", {"rope_parameters": LLAMA3}, "leaves out the llama3 scaling"),
        ("mistral", WINDOWED, "no sliding window"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "has some without"),
        ("qwen3_moe", {"norm_topk_prob": False}, "sum to 1"),
        ("llama", {"gates": MIXED}, "sinks that read the input, .*--format remote-code"),
        ("llama", {"gates": SINKS, "rope_parameters": DYNAMIC}, "scale RoPE by 'dynamic'"),
        ("llama", {"gates": SINKS, "rope_parameters": YARN | {"beta_fast": 16}}, "YaRN's 'beta_fa"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "YaRN's 'attention_fac"),
        ("gpt_oss", {"gates": SINKS}, "has no experts"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(family, overrides, reason, tmp_path, base):
    overrides = dict(overrides)
    gates = overrides.pop("gates", {})
    run = make_run(tmp_path / "run", base(family, **overrides), **gates)
    with pytest.raises(UserError, match=reason):
        merge(run, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_rules_of_tokenizers_are_told_apart():
    def rules(model, *steps):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        return pre_tokenizer_name(json.loads(tokenizer.to_str()))

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert rules(models.BPE(), byte_level) == "gpt-2"
    assert rules(models.BPE(), digits, byte_level) == "smollm"
    assert rules(models.BPE(), pre_tokenizers.Digits(individual_digits=False), byte_level) is None
    assert rules(models.BPE(), pre_tokenizers.Metaspace()) is None
    assert rules(models.WordPiece(), byte_level) is None


def sentencepiece(metaspace: bool) -> Tokenizer:
    """As of Llama 2: a low line for the space, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz", "\u2581t", "he", "\u2581the", "in", "er", "\u2581w"]
    merges = [
        ("\u2581", "t"),
        ("h", "e"),
        ("\u2581t", "he"),
        ("i", "n"),
        ("e", "r"),
        ("\u2581", "w"),
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
    else:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("metaspace", [False, True])
def test_llama_cpp_cuts_text_as_sentencepiece_does(metaspace, tmp_path, in_process):
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tiny_model("llama", **special).save_pretrained(tmp_path / "base")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece(metaspace), **names)
    tokenizer.save_pretrained(tmp_path / "base")
    run = make_run(tmp_path / "run", tmp_path / "base")
    figures = merge(run, tmp_path / "out", format="gguf")["verification"]
    assert figures["same_tokens"] and figures["kl"] < 1e-9


def test_an_unknown_tokenizer_is_refused(tmp_path, base):
    run = make_run(tmp_path / "run", base("llama"))
    path = tmp_path / "base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="not one that can be named to llama.cpp"):
        merge(run, tmp_path / "out", format="gguf")
    path.unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        merge(run, tmp_path / "out", format="gguf")


def test_a_file_that_lost_its_sinks_is_refused_where_rounding_costs_as_much(
    tmp_path, base, in_process
):
    run = make_run(tmp_path / "run", base("llama"), centered=True, **SINKS)
    out = tmp_path / "out"
    report = merge(run, out, format="gguf", dtype="q8_0")
    file = out / report["checkpoint"]["file"]
    for tensor in GGUFReader(file, "r+").tensors:
        if tensor.name.endswith("attn_sinks.weight"):
            tensor.data[:] = -1e4
    with pytest.raises(UserError, match="is not the file that was merged"):
        read_report(out)
    allowed = report["verification"]["rounding_kl"] + 1.0  # as if rounding cost anything
    report["verification"] |= {"rounding_kl": allowed}
    with pytest.raises(MergeMismatchError, match="nearer to the base without gates"):
        verify(report, out)


def test_a_token_past_the_embeddings_is_left_out(tmp_path, base, in_process):
    folder = base("llama")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": size, "content": "[P]"})
    path.write_text(json.dumps(tokenizer))
    figures = merge(make_run(tmp_path / "run", folder), tmp_path / "out", format="gguf")
    assert figures["verification"]["same_tokens"]


@pytest.mark.parametrize("further", [False, True])
def test_the_chat_template_is_the_one_that_transformers_uses(further, tmp_path, base, in_process):
    folder = base("llama")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": "of tokenizer_config.json"}
    path.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("of chat_template.jinja")
    if further:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tools.jinja").write_text("of tools.jinja")
    used = AutoTokenizer.from_pretrained(folder).chat_template
    used = used if further else {"default": used}
    assert used["default"] == "of chat_template.jinja"
    out = tmp_path / "out"
    report = merge(make_run(tmp_path / "run", folder), out, format="gguf")
    fields = GGUFReader(out / report["checkpoint"]["file"]).fields
    assert fields["tokenizer.chat_template"].contents() == used["default"]
    if further:
        assert fields["tokenizer.chat_template.tools"].contents() == used["tools"]


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path, base, content):
    run = make_run(tmp_path / "run", base("llama"))
    (tmp_path / "base/tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json is damaged, or of a kind"):
        merge(run, tmp_path / "out", format="gguf")
    with pytest.raises(UserError, match="is not a model folder, or a damaged one"):
        merge(run, tmp_path / "out")
