"""A run becomes a checkpoint that was verified in a fresh process, or nothing."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stock_transformers
import streamed
import torch
from huggingface_hub import ModelCard
from made_runs import BY_LAYER, MIXED, SINKS, WINDOWED, make_run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, normalizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import retrofit.export.merge
from retrofit import GateConfig
from retrofit.export import qwen3_5
from retrofit.export.granite_swa import NO_SINK
from retrofit.export.merge import MergeMismatchError, merge
from retrofit.export.registry import FORMATS, format_of
from retrofit.export.verify import verify
from retrofit.export.verify.reference import Reference, compare, summarize
from retrofit.export.verify.report import read_report
from retrofit.gates import gate_layers
from retrofit.measure import measure
from retrofit.measure.attention_hooks import collect_layer_statistics
from retrofit.models.fingerprint import base_weights, weights_sha256
from retrofit.models.loading import load_model
from retrofit.utils.errors import UserError


@pytest.fixture
def run(tmp_path, tiny_base) -> Path:
    return make_run(tmp_path / "run", tiny_base("llama"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_base) -> tuple[Path, dict]:
    """A native checkpoint in many shards, and the report."""
    folder = tmp_path_factory.mktemp("merged")
    run = make_run(folder / "run", tiny_base("qwen2"), "elementwise")
    return folder / "out", merge(run, folder / "out", max_shard_size="100KB")


@pytest.fixture(scope="module")
def sunk(tmp_path_factory, tiny_base) -> tuple[Path, dict]:
    """A native checkpoint of sinks alone, and the report."""
    folder = tmp_path_factory.mktemp("sunk")
    run = make_run(folder / "run", tiny_base("llama"), centered=True, **SINKS)
    return folder / "out", merge(run, folder / "out")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory, tiny_base) -> tuple[Path, dict]:
    """A Mistral with a sliding window, which no stock architecture can hold, with its own code."""
    folder = tmp_path_factory.mktemp("windowed")
    make_run(folder / "run", tiny_base("mistral", **WINDOWED), "elementwise", centered=True)
    return folder / "out", merge(folder / "run", folder / "out", format="remote-code")


@pytest.fixture
def edited_base(tiny_base, tmp_path):
    """A base whose config.json has other settings."""

    def edited(family: str, remove: tuple[str, ...] = (), **settings) -> Path:
        base = Path(shutil.copytree(tiny_base(family), tmp_path / "base"))
        config = json.loads((base / "config.json").read_text()) | settings
        config = {name: value for name, value in config.items() if name not in remove}
        (base / "config.json").write_text(json.dumps(config))
        return base

    return edited


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        ("qwen3", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}),
    ],
)  # fmt: skip
def test_a_base_with_the_former_settings_of_rope_merges_with_its_code(
    edited_base, tmp_path, family, scaling
):
    """Published checkpoints have them, and without the code they keep a tokenizer from opening."""
    rope = {"rope_theta": 10000.0, "rope_scaling": scaling}
    base = edited_base(family, ("rope_parameters",), **rope)
    run = make_run(tmp_path / "run", base, **SINKS)
    report = merge(run, tmp_path / "out", format="remote-code")
    assert report["verification"]["max_logprob_difference"] < 1e-4
    AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_a_window_that_the_attention_of_a_llama_does_not_read_is_left_out(edited_base, tmp_path):
    run = make_run(tmp_path / "run", edited_base("llama", sliding_window=16), **SINKS)
    merge(run, tmp_path / "out")
    assert {*AutoConfig.from_pretrained(tmp_path / "out").layer_types} == {"full_attention"}


def load_in_fresh_process(folder: Path, **options) -> subprocess.CompletedProcess:
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, **{options!r})\n"
        "print(type(model).__name__)\n"
        "print('retrofit' in sys.modules)"
    )
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)


def test_the_folder_is_complete(merged):
    out, report = merged
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "measure.json",
        "model.safetensors.index.json",
        "recipe.resolved.yaml",
        "retrofit-merge.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((out / "retrofit-merge.json").read_text()) == report
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    assert AutoConfig.from_pretrained(out).model_type == "qwen3_5_text"
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_shards_follow_the_index(merged):
    out, report = merged
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) == report["checkpoint"]["shards"] > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    stored = {path.name: load_file(path) for path in shards}
    for path in shards:
        assert path.stat().st_mode & 0o044 == 0o044, "others can read it"
        names = {name for name, file in index["weight_map"].items() if file == path.name}
        assert names == set(stored[path.name])
        assert len(names) == 1 or path.stat().st_size < 110_000
    assert index["metadata"]["total_size"] == report["checkpoint"]["bytes"]


def test_the_proof_can_be_repeated_and_notices_a_changed_weight(merged, tmp_path):
    out, report = merged
    again = verify.verify(read_report(out), out)
    assert again == {name: report["verification"][name] for name in again}
    changed = shutil.copytree(out, tmp_path / "changed")
    shard = sorted(changed.glob("model-*.safetensors"))[-1]
    tensors = load_file(shard)
    save_file({name: t * 1.01 for name, t in tensors.items()}, shard, metadata={"format": "pt"})
    with pytest.raises(MergeMismatchError, match="differs from the trained model"):
        verify.verify(read_report(changed), changed)
    config = changed / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"rms_norm_eps"', '"sliding_window": 999,\n  "rms_norm_eps"'))
    with pytest.raises(UserError, match="config.json is not the file that was merged"):
        read_report(changed)
    config.write_text(before)
    (changed / "retrofit-reference.json").unlink()
    with pytest.raises(UserError, match="no retrofit-reference.json"):
        read_report(changed)


@pytest.mark.parametrize(
    ("engine", "python", "message"),
    [
        (
            "llama.cpp",
            sys.executable,
            "llama.cpp does not read what is merged",
        ),
        ("vllm", sys.executable, "vllm is not installed for .*name a Python that has it"),
        ("transformers", "/nowhere/python", "no Python at /nowhere/python"),
    ],
)
def test_an_engine_that_cannot_be_asked_says_so(merged, engine, python, message):
    with pytest.raises(UserError, match=message):
        verify.verify(read_report(merged[0]), merged[0], engine, python)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("checkpoint", {"format": "remote-code"}, "says format remote-code, but the folder holds"),
        ("checkpoint", {"format": "adapter"}, "says format adapter, but the folder holds native"),
        ("checkpoint", {"format": "gguf", "file": "../x.gguf"}, "checkpoint.file: string should"),
        ("checkpoint", {"format": "gguf", "file": "x.gguf"}, "says format gguf, but the folder"),
        ("checkpoint", {"format": "nonsense"}, "checkpoint.format: input should be"),
        ("checkpoint", {"format": None}, "checkpoint.format: input should be"),
        ("checkpoint", {"dtype": "bfloat16"}, "says dtype bfloat16, but the folder holds float32"),
        ("checkpoint", {"model_type": "llama"}, "says model_type llama, but the folder holds qwen"),
        ("verification", {"rounding_kl": float("inf")}, "it holds Infinity, which is no JSON"),
        ("verification", {"rounding_kl": "0"}, "rounding_kl: input should be a valid number"),
        ("base", {"model_type": 3}, "base.model_type: input should be a valid string"),
    ],
)
def test_a_report_that_says_something_else_than_the_folder_is_refused(
    merged, tmp_path, part, changes, message
):
    changed = shutil.copytree(merged[0], tmp_path / "changed")
    report = read_report(changed)
    edit_json(changed / "retrofit-merge.json", **{part: report[part] | changes})
    with pytest.raises(UserError) as raised:
        read_report(changed)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_mismatch_says_in_words_what_differs():
    figures = {
        "missing": ["a", "b", "c", "d", "e", "f"],
        "unexpected": ["g"],
        "same_tokens": False,
        "unused_gates": ["model.layers.1"],
        "kl": float("nan"),
        "max_logprob_difference": 0.5,
    }
    limits = {"kl": 1e-4, "max_logprob_difference": 1.0}
    assert list(verify._differences(figures, limits)) == [
        "it lacks a, b, c, d, e and 1 more",
        "it holds g, which the engine leaves out",
        "its tokenizer cuts the text into other tokens",
        "the engine does not use the gates of model.layers.1",
        "KL nan where 1.0e-04 is allowed",
    ]


@pytest.mark.parametrize(
    ("wrong_positions", "experts", "message"),
    [
        (1, 0, "KL 5.0e-03 where 1.0e-07 is allowed, a log probability differs by 5.0e+00"),
        (1, 4, None),
        (3, 4, "KL 1.5e-02 where 1.0e-02 is allowed"),
        (51, 4, "KL at the median position 5.0e-01 where 1.0e-07 is allowed"),
    ],
)
def test_a_tie_between_experts_is_no_difference(
    wrong_positions, experts, message, merged, monkeypatch
):
    same = {"kl": 0.0, "max_logprob_difference": 0.0, "top1_agreement": 1.0}
    other = {"kl": 0.5, "max_logprob_difference": 5.0, "top1_agreement": 0.0}
    positions = [other] * wrong_positions + [same] * (100 - wrong_positions)
    figures = summarize(positions) | {"same_tokens": True}
    monkeypatch.setattr(verify, "_run", lambda *_args: figures)
    out, report = merged
    report = report | {"base": report["base"] | {"experts": experts}}
    if message is None:
        assert verify.verify(report, out) == figures
    else:
        with pytest.raises(MergeMismatchError, match=re.escape(message)):
            verify.verify(report, out)


def test_an_engine_that_lists_other_tokens_is_not_taken_for_the_same():
    ours = [-0.1, -3.0, -5.0]
    same = compare([7, 8, 9], ours, {7: -0.1, 8: -3.0, 9: -5.0, 4: -6.0})
    assert same == {"kl": 0.0, "max_logprob_difference": 0.0, "top1_agreement": 1.0}
    other = compare([7, 8, 9], ours, {1: -0.1, 2: -3.0, 9: -5.0})
    assert other["kl"] > 0.5 and other["max_logprob_difference"] > 4
    assert other["top1_agreement"] == 0.0


def test_a_gate_that_no_engine_reads_is_named(merged):
    model = AutoModelForCausalLM.from_pretrained(merged[0])
    input_ids = torch.arange(16)[None]
    assert stock_transformers.unused_gates(model, input_ids) == []
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    assert stock_transformers.unused_gates(model, input_ids) == ["model.layers.1.self_attn"]


def test_a_sink_that_no_engine_reads_is_named(sunk):
    model = AutoModelForCausalLM.from_pretrained(sunk[0])
    input_ids = torch.arange(16)[None]
    assert stock_transformers.unused_gates(model, input_ids) == []
    attention = [layer.self_attn for layer in model.model.layers]
    attention[0].sinks.data.fill_(NO_SINK)  # as in a layer without gates
    attention[1].o_proj.weight.data.zero_()
    before = attention[2].sinks.clone()
    assert stock_transformers.unused_gates(model, input_ids) == ["model.layers.1.self_attn"]
    assert torch.equal(attention[2].sinks, before)


def test_sinks_say_what_they_cost(sunk):
    out, report = sunk
    assert report["checkpoint"]["model_type"] == "granite_swa"
    # Odds, and key biases of the slow pairs of RoPE's channels.
    gates = load_file(out.parent / "run/adapter/adapter_model.safetensors")
    trained = [t for name, t in gates.items() if name.endswith(("odds", "key_bias", "key_off"))]
    assert report["gate"]["parameters"] == sum(tensor.numel() for tensor in trained)
    figures = report["verification"]
    assert figures["kl"] < 1e-9 and figures["max_logprob_difference"] < 1e-4
    card = (out / "README.md").read_text()
    assert "each head has a learned sink in its softmax, to which keys are moved by a bias" in card
    assert "sinks and biases" in card and "GraniteSWAForCausalLM" in card and "vllm serve" in card
    assert "SGLang" not in card and "float16" not in card


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_constant_sinks_go_native(family, dtype, tmp_path, tiny_base, in_process):
    overrides = WINDOWED if family == "mistral" else {}
    base, centered = tiny_base(family, **overrides), family != "gpt_oss"
    run = make_run(tmp_path / "run", base, centered=centered, **SINKS, layers_to_transform=[0, 2])
    report = merge(run, tmp_path / "out", dtype=dtype)
    assert report["checkpoint"]["model_type"] in ("granite_swa", "gpt_oss")
    assert report["gate"]["layers"] == 2
    figures = report["verification"]
    if dtype == "float32":
        assert figures["median_kl"] < 1e-9
        assert figures["max_logprob_difference"] < 1e-4 or family == "gpt_oss"
    elif family != "gpt_oss":  # where rounding may choose another expert
        assert figures["kl"] < 3 * figures["rounding_kl"] + 1e-7


@pytest.mark.parametrize("architectures", [None, ["GptOssModel"]])
def test_gpt_oss_names_its_class_though_the_base_does_not(
    architectures, tmp_path, tiny_base, in_process
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base("gpt_oss"), base)
    config = json.loads((base / "config.json").read_text()) | {"architectures": architectures}
    (base / "config.json").write_text(json.dumps(config))
    report = merge(make_run(tmp_path / "run", base, **SINKS), tmp_path / "out")
    assert report["checkpoint"]["architecture"] == "GptOssForCausalLM"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["GptOssForCausalLM"]


@pytest.mark.parametrize("gates", [SINKS, MIXED, BY_LAYER], ids=["constant", "mixed", "by-layer"])
def test_every_family_carries_sinks_in_code_of_its_own(
    family, gates, tmp_path, tiny_base, in_process
):
    run = make_run(tmp_path / "run", tiny_base(family), **gates, centered=True)
    report = merge(run, tmp_path / "out", format="remote-code")
    figures, experts = report["verification"], report["base"]["experts"]
    assert figures["median_kl"] < 1e-9
    assert figures["max_logprob_difference"] < 1e-4 or experts
    card = (tmp_path / "out/README.md").read_text()
    served = gates["sinks"] == "constant" and family != "gpt_oss"
    assert ("--no-deps PATH_TO_RETROFIT" in card and "vllm serve" in card) == served
    assert "--model-impl transformers" not in card


@pytest.mark.parametrize("gates", [SINKS, MIXED, BY_LAYER], ids=["constant", "mixed", "by-layer"])
def test_an_adapter_with_sinks_loads_through_transformers(gates, tmp_path, tiny_base):
    run = make_run(tmp_path / "run", tiny_base("llama"), **gates, centered=True)
    report = merge(run, tmp_path / "out", format="adapter")
    assert report["verification"]["max_logprob_difference"] < 1e-4


def test_without_a_format_it_is_native_where_a_stock_architecture_holds_the_gates(
    tmp_path, tiny_base, in_process
):
    written = {}
    for name, gates in {"sinks": SINKS, "by-layer": BY_LAYER}.items():
        run = make_run(tmp_path / name, tiny_base("llama"), **gates)
        written[name] = merge(run, tmp_path / f"{name}-merged")["checkpoint"]["format"]
    assert written == {"sinks": "native", "by-layer": "remote-code"}
    card = (tmp_path / "by-layer-merged/README.md").read_text()
    assert "in layers 0, 1 instead, each attention head is scaled by a sigmoid" in card


def test_the_verification_figures(merged, windowed):
    figures = merged[1]["verification"]
    assert figures["same_tokens"] and figures["greedy_until"] is None
    assert figures["kl"] < 1e-9 and figures["max_logprob_difference"] < 1e-3
    # Remote code runs on the very numbers that trained, but for adding up a gate's two parts.
    assert windowed[1]["verification"]["max_logprob_difference"] < 1e-4


def test_stock_software_loads_it(merged):
    done = load_in_fresh_process(merged[0])
    assert done.stdout.split() == ["Qwen3_5ForCausalLM", "False"], done.stderr


def test_the_card_says_what_was_done(merged, windowed):
    card = ModelCard.load(merged[0] / "README.md")
    assert "gated-attention" in card.data.tags
    assert "base_model" not in card.data.to_dict(), "the hub cannot know a local folder"
    assert "| perplexity | 20.5 | 20.5 |" in card.text and "kl_to_base" not in card.text
    assert "vllm serve" in card.text and "drops the biases of q, k and v" in card.text
    text = (windowed[0] / "README.md").read_text()
    assert "trust_remote_code=True" in text and "--model-impl transformers" in text


def test_remote_code_is_all_that_its_folder_needs(windowed):
    out, report = windowed
    assert {path.name for path in out.glob("*.py")} == {
        "_family.py",
        "_flash_on_cpu.py",
        "_log_sum_exp.py",
        "_sink.py",
        "_sink_attention.py",
        "mistral.py",
        "modeling_gated.py",
    }
    assert load_in_fresh_process(out, trust_remote_code=True).stdout.split() == [
        "GatedForCausalLM",
        "False",
    ]
    assert "trust_remote_code" in load_in_fresh_process(out).stderr, "and not unasked"
    assert report["checkpoint"]["model_type"] == "gated_mistral"


def test_remote_code_round_trips(windowed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(windowed[0], trust_remote_code=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.config.sliding_window == 16 and again.config.gated_layers == [0, 1, 2]
    weights = again.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_measure_opens_remote_code_if_it_is_trusted(windowed):
    with pytest.raises(UserError, match="brings code of its own; .* with --trust-remote-code"):
        load_model(str(windowed[0]))
    model, _ = load_model(str(windowed[0]), trust_remote_code=True)
    with collect_layer_statistics(model) as layers, torch.no_grad():
        model(torch.arange(200)[None] % 250)
    assert all(layer.gate is not None for layer in layers)


def test_remote_code_that_somebody_changed_is_not_run(windowed, tmp_path):
    changed = shutil.copytree(windowed[0], tmp_path / "changed")
    with (changed / "mistral.py").open("a") as file:
        file.write("raise SystemExit('run')\n")
    with pytest.raises(MergeMismatchError, match="mistral.py is not the file that this version"):
        verify.verify(read_report(changed), changed)


def test_code_beside_ours_is_not_run_either(windowed, tmp_path):
    changed = shutil.copytree(windowed[0], tmp_path / "changed")
    (changed / "other.py").write_text("raise SystemExit('run')\n")
    with pytest.raises(MergeMismatchError, match="other.py is not the file that this version"):
        verify.verify(read_report(changed), changed)
    (changed / "other.py").unlink()
    edit_json(changed / "config.json", auto_map={"AutoConfig": "a/b--other.Config"})
    with pytest.raises(UserError, match="config.json is not the file that was merged"):
        read_report(changed)
    with pytest.raises(MergeMismatchError, match="names code of somebody else's"):
        verify.verify(windowed[1], changed)


def test_a_model_without_gates_is_not_one_whose_gates_are_all_used(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    assert stock_transformers.unused_gates(model, torch.arange(16)[None])


def test_every_family_merges_with_its_own_code(
    family, granularity, tmp_path, tiny_base, in_process
):
    centered = granularity == "elementwise"
    run = make_run(tmp_path / "run", tiny_base(family), granularity, centered)
    report = merge(run, tmp_path / "out", format="remote-code")
    figures, experts = report["verification"], report["base"]["experts"]
    assert figures["median_kl"] < 1e-9
    assert figures["max_logprob_difference"] < 1e-4 or experts
    width = 64 if granularity == "elementwise" else 4
    gate = load_file(tmp_path / "out/model.safetensors")[
        "model.layers.1.self_attn.attn_gate.g_proj.weight"
    ]
    assert gate.shape == (width, 64)


def test_the_decoder_alone_has_gates_too(windowed):
    """What vLLM's Transformers backend builds."""
    out = windowed[0]
    decoder = AutoModel.from_pretrained(out, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.model(input_ids).last_hidden_state
        assert torch.equal(decoder(input_ids).last_hidden_state, expected)
    assert decoder.layers[1].self_attn.attn_gate.g_proj.weight.any()


def test_a_mixture_of_experts_goes_native(tmp_path, tiny_base, in_process):
    report = merge(make_run(tmp_path / "run", tiny_base("qwen3_moe")), tmp_path / "out")
    assert report["checkpoint"]["model_type"] == "qwen3_next"
    assert report["verification"]["median_kl"] < 1e-9 and report["base"]["experts"] == 4


def test_the_adapter_is_the_gates_alone(run, tiny_base, tmp_path, monkeypatch):
    base = tiny_base("llama")
    monkeypatch.setenv("HOME", str(base.parent))
    facts = json.loads((run / "run.json").read_text())["base"]
    edit_json(run / "run.json", base=facts | {"name_or_path": f"~/{base.name}"})
    report = merge(run, tmp_path / "out", format="adapter")
    assert report["verification"]["max_logprob_difference"] < 1e-4
    assert report["checkpoint"]["bytes"] < 10_000
    assert "import retrofit" in (tmp_path / "out/README.md").read_text()


def test_centers_become_heads_that_every_engine_reads_and_measure_leaves_out(
    tmp_path, tiny_base, in_process
):
    base, out = tiny_base("llama"), tmp_path / "out"
    run = make_run(tmp_path / "run", base, centered=True)
    report = merge(run, out)
    assert report["verification"]["kl"] < 1e-9
    weights = load_file(out / "model.safetensors")
    assert not any(t.any() for name, t in weights.items() if name.endswith("o_proj.bias"))
    card = (out / "README.md").read_text()
    assert "2 of its 6 attention heads a layer hold a constant, and 33% of its KV cache" in card
    assert "vllm serve" in card
    assert "around the value that the base's heads take from their first token" in card
    (tmp_path / "text.txt").write_text("The spouter inn, its sign and its landlord. " * 40)
    sources = [str(base), str(run / "adapter"), str(out)]
    result = measure(sources, tmp_path / "text.txt", length=192, windows=2, progress=False)
    trained, merged = (model["metrics"] for model in result["models"][1:])
    for name in ("f_attn", "peak_column_share", "head_load_cv", "gate_score", "max_activation"):
        assert merged[name] == pytest.approx(trained[name], rel=1e-3), name


def test_bfloat16_storage_costs_what_rounding_costs(run, tmp_path, in_process):
    figures = merge(run, tmp_path / "out", dtype="bfloat16")["verification"]
    assert 1e-7 < figures["rounding_kl"] < 1e-2
    assert figures["kl"] == pytest.approx(figures["rounding_kl"], rel=0.5)
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "format", "gates"),
    [
        ("qwen3", "native", {}),
        ("llama", "remote-code", {}),
        ("llama", "remote-code", MIXED),
        ("llama", "native", SINKS),
    ],
)
def test_what_memory_cannot_hold_is_proved_from_disk(
    family, format, gates, dtype, tmp_path, tiny_base, in_process, monkeypatch
):
    base = tiny_base(family, tie_word_embeddings=True)
    run = make_run(tmp_path / "run", base, centered=True, **gates)
    whole = merge(run, tmp_path / "whole", format=format, dtype=dtype)["verification"]
    for module in (streamed, verify.streamed):  # the script's own, and the package's
        monkeypatch.setattr(module, "fits_in_memory", lambda _model: False)
    read = merge(run, tmp_path / "read", format=format, dtype=dtype)["verification"]
    assert read["positions"] < whole["positions"], "fewer steps: it was not in memory"
    assert read["rounding_kl"] == pytest.approx(whole["rounding_kl"], rel=1e-4)
    assert read["kl"] == pytest.approx(whole["kl"], rel=0.2, abs=1e-9)
    assert read["greedy_until"] in (None, whole["greedy_until"]) and not read["unused_gates"]
    assert len(Reference.load(tmp_path / "read/retrofit-reference.json").greedy[0]) == 2


@pytest.mark.parametrize("shards", ["5GB", "100KB"])
def test_other_safetensors_beside_the_base_are_not_read(
    shards, tmp_path, tiny_base, in_process, monkeypatch
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base("mistral"), base)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size=shards)
    vendor = {"layers.0.attention.wq.weight": torch.ones(1)}
    save_file(vendor, base / "consolidated.safetensors")
    save_file({"lm_head.weight": torch.ones(1)}, base / "adapter_model.safetensors")
    monkeypatch.setattr(verify.streamed, "fits_in_memory", lambda _model: False)
    figures = merge(make_run(tmp_path / "run", base), tmp_path / "out")["verification"]
    assert figures["kl"] < 1e-9


def test_a_bare_adapter_of_chosen_layers(tmp_path, tiny_base, in_process):
    model = AutoModelForCausalLM.from_pretrained(tiny_base("qwen3"))
    config = GateConfig(layers_to_transform=[2], init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "out")
    assert report["gate"]["layers"] == 1
    assert not (tmp_path / "out/recipe.resolved.yaml").exists()


def test_gates_trained_in_4_bits_merge_into_the_original(run, tmp_path, in_process):
    facts = json.loads((run / "run.json").read_text())
    facts["base"] |= {"quantization": "nf4", "weights_sha256": "0" * 64}  # of the packed weights
    (run / "run.json").write_text(json.dumps(facts))
    merge(run, tmp_path / "out")
    assert "trained on the base in nf4" in (tmp_path / "out/README.md").read_text()


def assert_nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if "out" in path.name] == []


def without_doubling(tensors, exponent, *names, scale=qwen3_5.scale):
    scale(tensors, exponent - ("self_attn.o_proj.weight" in names), *names)


def with_shuffled_gate_rows(query, gate, num_heads, interleave=qwen3_5._interleave):
    return interleave(query, gate.flip(0), num_heads)


def without_q_norm(*arguments, tensors=qwen3_5.native_tensors):
    return ((name, t) for name, t in tensors(*arguments) if "1.self_attn.q_norm" not in name)


def with_partial_rotation(*arguments, native_config=qwen3_5.native_config):
    mapped = native_config(*arguments)
    del mapped["partial_rotary_factor"], mapped["rope_parameters"]["partial_rotary_factor"]
    return mapped


def with_unscaled_eps(*arguments, native_config=qwen3_5.native_config):
    return native_config(*arguments) | {"rms_norm_eps": arguments[0].rms_norm_eps}


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (qwen3_5, "scale", without_doubling),
        (qwen3_5, "_interleave", with_shuffled_gate_rows),
        (qwen3_5, "native_tensors", without_q_norm),
        (qwen3_5, "native_config", with_partial_rotation),
        (qwen3_5, "native_config", with_unscaled_eps),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_mapping_is_noticed(
    run, tmp_path, in_process, monkeypatch, module, name, mutant, dtype
):
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(MergeMismatchError, match="differs from the trained model"):
        merge(run, tmp_path / "out", dtype=dtype)
    assert_nothing_left(tmp_path)


def test_a_checkpoint_that_does_not_load_is_noticed(run, tmp_path, monkeypatch):
    """Through the real process."""
    mapped, unknown = qwen3_5.native_config, {"model_type": "nothing"}
    monkeypatch.setattr(qwen3_5, "native_config", lambda *a: mapped(*a) | unknown)
    with pytest.raises(MergeMismatchError, match="does not load"):
        merge(run, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_an_interrupted_merge_leaves_nothing(run, tmp_path, in_process, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(retrofit.export.merge, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("format", ["native", "gguf"])
def test_a_disk_that_fills_up_half_way(run, tmp_path, format):
    """No file may be larger than this; the reference fits, the weights do not."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "from retrofit.cli import main; main()"
    )
    command = ["merge", run, "--out", tmp_path / "out", "--format", format]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written, and nothing is left of it" in done.stderr.strip().splitlines()[-1]
    assert_nothing_left(tmp_path)


def test_a_merge_that_is_killed_leaves_no_model_and_the_next_one_tidies_up(
    run, tmp_path, in_process
):
    code = (
        "import os, signal, sys, retrofit.export.merge\n"
        "retrofit.export.merge._report = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from retrofit.cli import main; main()"
    )
    command = ["merge", run, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.partial-*"))
    merge(run, tmp_path / "out")
    assert not list(tmp_path.glob(".out.partial-*"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def out_exists(run, base, tmp_path):
    (tmp_path / "out").mkdir()
    return {}


def not_a_run(run, base, tmp_path):
    shutil.rmtree(run / "adapter")
    return {}


def lora(run, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base("llama"))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(run / "adapter")
    return {}


def no_base(run, base, tmp_path):
    return {"base": str(tmp_path / "nowhere")}


def unknown_hub_id(run, base, tmp_path):
    return {"base": "nobody/nothing"}


def other_family(run, base, tmp_path):
    return {"base": str(base("qwen3"))}


def other_shape(run, base, tmp_path):
    return {"base": str(base("llama", hidden_size=32, head_dim=8))}


def other_weights(run, base, tmp_path):
    return {"base": str(base("llama", seed=1))}


def quantized_base(run, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    edit_json(tmp_path / "base/config.json", quantization_config={"quant_method": "fp8"})
    return {"base": str(tmp_path / "base")}


def float16_base(run, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    weights = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    facts = json.loads((run / "run.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    sha256 = weights_sha256(base_weights(base))
    edit_json(run / "run.json", base=facts["base"] | {"weights_sha256": sha256})
    return {"base": str(tmp_path / "base")}


def truncated_shard(run, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return {"base": str(tmp_path / "base")}


def missing_index(run, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    path.rename(path.with_name("model-00001-of-00002.safetensors"))
    return {"base": str(tmp_path / "base")}


def damaged_index(run, base, tmp_path):
    options = missing_index(run, base, tmp_path)
    (tmp_path / "base/model.safetensors.index.json").write_text('{"weight_map": ')
    return options


def missing_tensor(run, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    return {"base": str(tmp_path / "base")}


def no_native_form(run, base, tmp_path):
    make_run(tmp_path / "windowed", base("mistral", **WINDOWED))
    shutil.copytree(tmp_path / "windowed", run, dirs_exist_ok=True)
    return {}


def further_tensor(run, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    further = {"model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)}
    save_file(load_file(path) | further, path, metadata={"format": "pt"})
    return {"base": str(tmp_path / "base")}


def pickled_base(run, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/pytorch_model.bin")
    return {"base": str(tmp_path / "base")}


def edit_gates(run, edit):
    path = run / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)
    return {}


def nan_gate(run, base, tmp_path):
    return edit_gates(run, lambda weights: next(iter(weights.values()))[0].fill_(torch.nan))


def extra_weights(run, base, tmp_path):
    return edit_gates(run, lambda weights: weights.update(lora_a=torch.zeros(2)))


def ablation(run, base, tmp_path):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"activation": "silu"}))
    return {}


def no_channels(run, base, tmp_path):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"granularity": "elementwise"}))
    return {}


def with_sinks(family="llama", edit=lambda weights: None, **gates):
    def prepare(run, base, tmp_path):
        make_run(tmp_path / "sunk", base(family), **(SINKS | gates))
        shutil.copytree(tmp_path / "sunk", run, dirs_exist_ok=True)
        return edit_gates(run, edit)

    return prepare


def each(part, change):
    """Changes the parts of all gates that have this name."""

    def edit(weights):
        for name in [name for name in weights if name.endswith(part)]:
            weights[name] = change(weights[name]).contiguous()

    return edit


def without_logits(weights):
    del weights[next(name for name in weights if name.endswith("logits"))]


def damaged_run(run, base, tmp_path):
    (run / "run.json").write_text('{"base": ')
    return {}


def bad_size(run, base, tmp_path):
    return {"max_shard_size": "five"}


def bad_dtype(run, base, tmp_path):
    return {"dtype": "int8"}


def one_token(run, base, tmp_path):
    """The base's tokenizer takes any text for the letter a."""
    folder = tmp_path / "base"
    shutil.copytree(base("llama"), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "a")
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"base": str(folder)}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (out_exists, "out exists; remove it, or choose another"),
        (not_a_run, "is not a finished run: it has no adapter/adapter_config.json"),
        (lora, "holds a LORA adapter, not gates"),
        (no_base, "no base model at '.*nowhere'; name its folder or hub id with --base"),
        (unknown_hub_id, "base model 'nobody/nothing' not found; name .* with --base"),
        (other_family, "trained on a llama model, but base .* is a qwen3 model; name .* --base"),
        (other_shape, r"has shape \(4, 64\), but the base needs \(4, 32\); name .* --base"),
        (other_weights, "has other weights than the gates were trained on: its sha256 differs"),
        (quantized_base, "is stored quantized; name the unquantized original with --base"),
        (float16_base, "is stored in float16, but .* choose --dtype bfloat16 or float32"),
        (truncated_shard, "model.safetensors is missing or damaged; download it again"),
        (missing_index, "has shards but no model.safetensors.index.json; download it again"),
        (damaged_index, "model.safetensors.index.json is damaged; download it again"),
        (missing_tensor, "lacks the tensor model.norm.weight; download it again"),
        (
            no_native_form,
            "no native checkpoint of .* has no sliding window; .* --format remote-code",
        ),
        (further_tensor, "stores model.layers.3.mlp.up_proj.weight, for which its config.json"),
        (pickled_base, "has no safetensors, and pytorch_model.bin is a pickle"),
        (nan_gate, r"gate of layer \d has NaN or infinite weights: training diverged"),
        (ablation, "no checkpoint can carry the gates of .*: only sigmoid gates at G1"),
        (no_channels, "the gate of layer 0 lacks a part of its weights; train again"),
        (extra_weights, "also holds lora_a; only gates can be merged"),
        (
            with_sinks(sinks="input"),
            "no native checkpoint of .* sinks that read the input, .*--format remote-code",
        ),
        (
            with_sinks(granularity="headwise"),
            "no native checkpoint of .* both sinks and gates .*--format remote-code",
        ),
        (with_sinks("qwen3"), "no norms of q and k; --format remote-code"),
        (with_sinks("gpt_oss", centered=True), "no bias gives back what a center takes away"),
        (with_sinks(edit=without_logits), "the gate of layer 0 lacks a part of its weights"),
        (with_sinks(edit=each("odds", lambda t: t * torch.nan)), "NaN or infinite weights"),
        (with_sinks(edit=each("odds", lambda t: t[:3])), r"has shape \(3,\), but the base needs"),
        (with_sinks(edit=each("key_bias", lambda t: t[0])), r"has shape \(2, \d\), but the base"),
        (with_sinks(edit=each("odds", lambda t: -t)), "no sink of .* has any weight"),
        (
            with_sinks(
                edit=lambda w: w.update(
                    {next(iter(w)).rpartition(".")[0] + ".extra": torch.zeros(2)}
                )
            ),
            "also holds .*extra",
        ),
        (damaged_run, "run.json is damaged"),
        (bad_size, "'five' is not a size; write one like 5GB"),
        (bad_dtype, "cannot store weights as int8; dtype must be bfloat16, float32, float16"),
        (one_token, "makes fewer than 64 tokens of the passage .*; download the tokenizer again"),
    ],
)
def test_bad_input_is_named_in_one_line(run, tmp_path, tiny_base, prepare, message):
    options = prepare(run, tiny_base, tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        merge(run, tmp_path / "out", **({"format": "native"} | options))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out/config.json").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_adapter_itself_still_loads(run, tiny_base):
    """PEFT's own loading of what `make_run` writes, so that these runs are real ones."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    assert len(gate_layers(PeftModel.from_pretrained(base, run / "adapter"))) == 3


def test_an_adapter_is_not_merged_into_another_dtype(run, tmp_path):
    with pytest.raises(UserError, match="an adapter is kept in float32"):
        merge(run, tmp_path / "out", format="adapter", dtype="bfloat16")


def test_what_is_no_python_is_told(merged):
    folder, report = merged
    with pytest.raises(UserError, match="/bin/true is no Python"):
        verify.verify(report, folder, python="/bin/true")


@pytest.mark.parametrize("size", ["infGB", "nanGB", "manyGB"])
def test_what_is_no_size_is_told(run, tmp_path, size):
    with pytest.raises(UserError, match="is not a size"):
        merge(run, tmp_path / "out", max_shard_size=size)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_by_its_name(name):
    assert format_of(name).name == name


def test_further_chat_templates_come_along(tmp_path, tiny_base):
    base = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    merge(make_run(tmp_path / "run", base, **SINKS), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
