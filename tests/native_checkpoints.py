"""Trained models and their native checkpoints, without files of a run between them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from stock_transformers import compare_with_reference
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.export import qwen3_5
from retrofit.export.verify.reference import make_reference, observe
from retrofit.gates import gate_layers
from retrofit.models.fingerprint import base_weights

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def trained(
    family: str,
    granularity: Any = "headwise",
    layers: list[int] | None = None,
    centered: bool = False,
    **overrides,
) -> Any:
    """A tiny model with random gates. All weights are bfloat16 numbers, so that storing them in
    bfloat16 costs nothing and the mapping alone is judged."""
    config = GateConfig(
        granularity=granularity,
        layers_to_transform=layers,
        centered=centered,
        init_weights=False,
    )
    model = get_peft_model(tiny_model(family, **overrides), config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for gate in gate_layers(model).values():
        projection = gate.g_proj["default"]
        if granularity == "elementwise":  # the sum of its two parts, too
            excess = projection.matrix() - projection.matrix().bfloat16().float()
            projection.channel_weight.data -= excess.detach() / projection.channel_scale
    return model


def as_native(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """`model` mapped, written, and loaded by stock transformers in float32."""
    base: Any = model.get_base_model()
    gates = {i: gate.g_proj["default"].matrix().detach() for i, gate in gate_layers(model).items()}
    projections = {i: gate.g_proj["default"] for i, gate in gate_layers(model).items()}
    centers = {i: p.center for i, p in projections.items() if p.center is not None}
    stored = dict(base_weights(model))
    tensors = dict(qwen3_5.native_tensors(base.config, stored, gates, centers, dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(qwen3_5.native_config(base.config, bool(centers)))
    )
    both: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    loaded, info = both
    experts = base.config.model_type == "qwen3_moe"
    assert type(loaded).__name__ == ("Qwen3NextForCausalLM" if experts else "Qwen3_5ForCausalLM")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


def assert_same(model: Any, loaded: torch.nn.Module, kl: float, max_logprob_difference: float):
    """In prefill, token by token, greedily, and with padding on the left."""
    input_ids = torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(1))
    trained = make_reference(tiny_tokenizer(), "", input_ids, observe(model, input_ids))
    figures = compare_with_reference(trained, observe(loaded, input_ids))
    assert figures["kl"] < kl and figures["max_logprob_difference"] < max_logprob_difference, (
        figures
    )
    assert figures["greedy_until"] is None
    mask = torch.ones_like(input_ids)
    mask[0, :40] = 0
    with torch.no_grad():
        padded = [m(input_ids, attention_mask=mask).logits[mask.bool()] for m in (model, loaded)]
    torch.testing.assert_close(*padded, rtol=0, atol=max_logprob_difference)
