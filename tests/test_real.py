"""The whole road on real weights: SmolLM2-135M (Llama) and Qwen2.5-Coder-0.5B (Qwen2)."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from retrofit import GateConfig
from retrofit.export.merge import merge
from retrofit.measure import measure
from retrofit.recipe import load_recipe
from retrofit.training.run import train

pytestmark = pytest.mark.slow
TEXT = (
    "The first token of a text draws attention that no other token wants. It is read by every "
    "later one, and says nothing. In 1851, 135 million tokens later, it still does."
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return assets.ensure("smollm2")


@pytest.fixture(scope="module")
def texts() -> Path:
    return assets.ensure("texts")


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-coder"])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_zero_gates_equal_real_weights_bitwise(name, granularity):
    folder = assets.ensure(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits
        continued = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        gated = get_peft_model(model, GateConfig(granularity=granularity, task_type="CAUSAL_LM"))
        assert torch.equal(gated(**inputs).logits, expected)
        assert torch.equal(gated.generate(**inputs, max_new_tokens=8, do_sample=False), continued)


def test_the_base_has_the_sink_and_the_massive_activation_it_is_known_for(smollm2, texts):
    """The figures that everything else is compared with: see them before believing a change."""
    result = measure([str(smollm2)], texts / "wiki.jsonl", windows=4, progress=False)
    metrics = result["models"][0]["metrics"]
    assert 0.30 < metrics["peak_column_share"] < 0.37
    assert metrics["peak_column_position"] == 0
    assert 0.4 < metrics["sink_ratio"] < 0.65
    assert 10_000 < metrics["max_activation"] < 20_000
    assert 10 < metrics["perplexity"] < 30
    layers = result["models"][0]["per_layer"]
    assert layers["max_activation"][5] < 2_000 < 10_000 < layers["max_activation"][15]


@pytest.fixture(scope="module")
def run(smollm2, texts, tmp_path_factory) -> Path:
    """Six short steps on real text."""
    folder = tmp_path_factory.mktemp("real")
    recipe = load_recipe(
        "smollm2-135m-cpu",
        [
            f"output_dir={folder / 'run'}",
            f"model.base={smollm2}",
            f"data.sources=[{{path: {texts / 'c4-train.jsonl'}}}]",
            "data.sequence_length=192",
            "data.first_tokens=64",
            "train.max_steps=6",
            "train.report_to=[]",
            "measure=null",
        ],
    )
    return train(recipe)


def test_training_moves_the_gates_and_nothing_else(run, smollm2, texts):
    summary = json.loads((run / "run.json").read_text())
    assert summary["base"]["weights_sha256"] == summary["base_weights_sha256_after"]
    # By layer 9 odds, a key bias on 12 channels of 3 heads, and how much of 3 first keys goes.
    assert summary["gate"]["weights"] == 30 * (9 + 3 * 12 + 3)
    result = measure([str(smollm2), str(run)], texts / "wiki.jsonl", windows=2, progress=False)
    base, gated = (model["metrics"] for model in result["models"])
    assert 0.001 < gated["sink_share"] < 0.9
    assert 0 < gated["kl_to_base"] < 0.5
    assert gated["perplexity"] < 1.5 * base["perplexity"]  # the sink is just breaking


def test_the_merged_checkpoint_is_stock_and_says_what_the_trained_model_says(run, smollm2):
    out = run.parent / "merged"
    figures = merge(run, out)["verification"]
    assert figures["kl"] < 1e-7
    assert figures["greedy_until"] is None
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert type(merged).__name__ == "GraniteSWAForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(merged.generate(**prompt, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in text


def test_bfloat16_merge_costs_no_more_than_bfloat16(run):
    figures = merge(run, run.parent / "merged-bf16", dtype="bfloat16")["verification"]
    assert figures["kl"] < figures["rounding_kl"] + 1e-4
    assert figures["top1_agreement"] > 0.98


@pytest.mark.parametrize(("kind", "kl"), [("float32", 1e-9), ("q8_0", 2e-2)])
def test_llama_cpp_says_what_the_trained_model_says(run, kind, kl):
    report = merge(run, run.parent / f"gguf-{kind}", format="gguf", dtype=kind)
    assert report["verification"]["kl"] < kl
    assert kind != "float32" or report["verification"]["greedy_until"] is None
