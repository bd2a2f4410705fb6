"""RoPE is stretched as by a config that says so, and put back."""

import math
from typing import Any

import pytest
import torch
from native_checkpoints import as_native, trained
from peft import get_peft_model
from tiny import LLAMA3, SHAPE, tiny_model
from transformers import AutoConfig

from retrofit import GateConfig
from retrofit.measure.rope_scaling import has_rope_by_layer, rope_scaled
from retrofit.utils.errors import UserError

TRAINED = SHAPE["max_position_embeddings"]
LONG = 3 * TRAINED
FULL = {
    "layer_types": ["full_attention"] * 3,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,  # as merged
    },
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
OWN: dict[str, dict] = {"qwen3_5_text": FULL, "qwen3_next": FULL | EXPERTS}
STRETCHED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_next")
INPUT_IDS = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(0))


def scaling(family: str, kind: str) -> dict[str, Any]:
    """What a user writes into a config to read `LONG` tokens."""
    default = {"rope_theta": 10000.0}
    rope = OWN.get(family, {}).get("rope_parameters", default) | {"rope_type": kind, "factor": 3.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = TRAINED
    return OWN.get(family, {}) | {"rope_parameters": rope, "max_position_embeddings": LONG}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(INPUT_IDS).logits


def stretched_from_the_start(family: str, kind: str):
    return tiny_model(family, **scaling(family, kind))


@pytest.mark.parametrize("kind", ["yarn", "linear"])
@pytest.mark.parametrize("family", STRETCHED)
def test_a_stretched_model_is_one_that_was_loaded_so_and_is_put_back(family, kind):
    model = tiny_model(family, **OWN.get(family, {}))
    rotary, config, before = model.model.rotary_emb, model.config.to_dict(), logits(model)
    inv_freq = rotary.inv_freq.clone()
    expected = stretched_from_the_start(family, kind)
    with rope_scaled(model, LONG, kind):
        inside = logits(model)
        assert torch.equal(model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
        assert model.config.to_dict() == expected.config.to_dict()
    assert torch.equal(inside, logits(expected))
    assert not torch.allclose(inside, before, atol=1e-2), "stretching must matter"
    assert model.model.rotary_emb is rotary and torch.equal(rotary.inv_freq, inv_freq)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_frequencies_are_those_of_the_papers(kind):
    """Linear: all divided by the factor. YaRN: those that turn more than 32 times in the trained
    length stay, those that turn less than once are divided, and attention is sharper."""
    model = tiny_model("llama")
    before = model.model.rotary_emb.inv_freq
    with rope_scaled(model, LONG, kind):
        rotary = model.model.rotary_emb
    if kind == "linear":
        torch.testing.assert_close(rotary.inv_freq, before / 3)
        assert rotary.attention_scaling == 1
        return
    turns = TRAINED * before / (2 * math.pi)
    assert (turns > 32).any() and (turns < 1).any()
    torch.testing.assert_close(rotary.inv_freq[turns > 32], before[turns > 32])
    torch.testing.assert_close(rotary.inv_freq[turns < 1], before[turns < 1] / 3)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(3) + 1)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_gates_stay_where_they_are(kind):
    def gated(model):
        torch.manual_seed(0)
        return get_peft_model(model, GateConfig(init_weights=False)).eval()

    model = gated(tiny_model("qwen3"))
    before = logits(model)
    with rope_scaled(model.get_base_model(), LONG, kind):
        inside = logits(model)
    assert torch.equal(inside, logits(gated(stretched_from_the_start("qwen3", kind))))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_merged_model_stretches_as_the_gated_one_does(family, kind, tmp_path):
    model = trained(family, centered=True)
    merged = as_native(model, tmp_path, torch.float32)
    with rope_scaled(model.get_base_model(), LONG, kind), rope_scaled(merged, LONG, kind):
        torch.testing.assert_close(
            logits(model).log_softmax(-1), logits(merged).log_softmax(-1), rtol=0, atol=1e-3
        )


def test_a_length_within_the_trained_one_changes_nothing():
    model = tiny_model("llama")
    rotary, rope = model.model.rotary_emb, model.config.rope_parameters
    for length in (300, TRAINED):
        with rope_scaled(model, length, "yarn"):
            assert model.model.rotary_emb is rotary and model.config.rope_parameters is rope
            assert model.config.max_position_embeddings == TRAINED


def test_an_error_inside_puts_the_model_back():
    model = tiny_model("llama")
    rotary, config = model.model.rotary_emb, model.config.to_dict()
    with pytest.raises(KeyboardInterrupt), rope_scaled(model, LONG, "yarn"):
        raise KeyboardInterrupt
    assert model.model.rotary_emb is rotary and model.config.to_dict() == config


@pytest.mark.parametrize(
    ("family", "overrides", "reads", "reason"),
    [
        ("llama", {"rope_parameters": LLAMA3}, TRAINED, "stretched already (llama3)"),
        ("gemma3_text", {}, TRAINED, "a RoPE each"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 2.0,
                    "original_max_position_embeddings": TRAINED,
                }
            },
            2 * TRAINED,
            "stretched already (yarn)",
        ),
    ],
)
def test_what_cannot_be_stretched_is_refused_beyond_what_it_reads(family, overrides, reads, reason):
    model = tiny_model(family, **overrides)
    with rope_scaled(model, reads, "yarn"):
        pass
    message = f"reads {reads} tokens, fewer than {reads + 1}, and .*"
    with pytest.raises(UserError, match=message) as error, rope_scaled(model, reads + 1, "yarn"):
        pass
    assert reason in str(error.value) and f"up to {reads}" in str(error.value)


@pytest.mark.parametrize("own", [{"no_rope_layers": [1, 0, 1]}, {"no_rope_layers": [1, 1, 1]}])
def test_layers_without_rope_are_layers_with_another(own):
    """As every fourth of SmolLM3, whose queries no new position may turn."""
    config = AutoConfig.for_model("smollm3", num_hidden_layers=3, **own)
    assert has_rope_by_layer(config) == (0 in own["no_rope_layers"])
