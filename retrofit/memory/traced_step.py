"""Traces one training step of a recipe without its weights, and counts the memory of its tensors.

Every operation runs, on tensors that have a shape and no storage. The step is that of
`GateTrainer`, with the same losses, gates, checkpointing and optimizer. A formula for its memory
would have to know which tensors each of them keeps; the trace sees them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.models import enable_selective_activation_checkpointing

from retrofit.adapters._family import sliding_window_of
from retrofit.adapters._sink_attention import SINK_ATTENTION_FUNCTIONS, sdpa_with_sink
from retrofit.gates import gate_layers
from retrofit.losses.distillation import BLOCK_BYTES, CHUNK_BYTES, add_objectives
from retrofit.losses.layer_losses import add_layer_losses
from retrofit.memory.packed_linear import pack_linears
from retrofit.memory.tensor_memory import EveryTokenCounts, PeakTensorMemory
from retrofit.models.document_attention import attend_to_documents
from retrofit.models.gated_model import gated_model
from retrofit.recipe import Recipe

# Attention functions that are only traced, by their names in transformers.
_BY_DOCUMENT, _MASKLESS = "traced_by_document", "traced_without_mask"


@dataclass(frozen=True)
class TracedStep:
    """The bytes of the tensors of a step.

    Attributes:
        weights: bytes of the base's weights.
        gates: bytes of the gates' weights, gradients and AdamW moments.
        saved: bytes that the forward leaves for the backward.
        peak: the most bytes that are held at any time of the step, including all of these.
    """

    weights: int
    gates: int
    saved: int
    peak: int


def trace_step(
    recipe: Recipe, config: PreTrainedConfig, checkpointing: str, on_gpu: bool
) -> TracedStep:
    """Traces the largest step that a recipe can have: rows are full, and every token has a label.

    Args:
        recipe: what would be trained.
        config: the config of its base.
        checkpointing: `none`, `selective`, `full` or `reentrant`.
        on_gpu: whether to trace what a run does on a GPU rather than on a CPU. The kernels are
            those of a CPU in both cases, since torch without CUDA has no others.
    """
    model = _traced_model(recipe, config, on_gpu)
    _enable_checkpointing(model.get_base_model(), checkpointing)
    layer_losses = (
        add_layer_losses(model, recipe.objective) if recipe.objective.reads_layers else None
    )
    with FakeTensorMode(allow_non_fake_inputs=True), EveryTokenCounts():
        model.to_empty(device="cpu")
        model.get_base_model().tie_weights()  # `to_empty` has untied them
        inputs = _inputs(recipe)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=False)
        with PeakTensorMemory() as memory:
            weights = _hold_base(model, memory)
            gates = _hold_gates(trained, optimizer, memory) - weights
            if recipe.train.gradient_accumulation_steps == 1:
                optimizer.zero_grad()
            if layer_losses:
                layer_losses.prepare(inputs["position_ids"], progress=0.0)
            held_before = memory.now
            outputs = model(**inputs, objectives=True)
            saved = memory.now - held_before
            outputs.loss.backward()
    return TracedStep(weights, gates, saved, memory.peak)


def _traced_model(recipe: Recipe, config: PreTrainedConfig, on_gpu: bool) -> PeftModel:
    """Builds the model that `GateTrainer` trains, on the meta device."""
    spec = recipe.model
    stored = config.dtype or torch.float32
    dtype = stored if spec.dtype == "auto" else getattr(torch, spec.dtype)
    own_kernel = None if spec.takes_lengths else spec.attn_implementation
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=own_kernel)
        if spec.quantization:
            compute = torch.bfloat16 if spec.dtype == "auto" else dtype
            pack_linears(base, spec.quantization, compute)
        base.set_attn_implementation(_attention(recipe, base, on_gpu))
        model = gated_model(base, recipe).train()
    blocks = CHUNK_BYTES if on_gpu else BLOCK_BYTES
    add_objectives(base, recipe.objective, block_bytes=blocks)
    return model


def _attention(recipe: Recipe, base: PreTrainedModel, on_gpu: bool) -> str:
    """Returns the name of the attention function to trace.

    With transformers' own `sdpa` a mask of `T x T` would be made even where a run has none, since
    transformers takes every row for packed while it traces.
    """
    default = base.config._attn_implementation
    if recipe.model.takes_lengths:
        return _MASKLESS
    if default != "sdpa" or sliding_window_of(base.config) is not None:
        return default
    if recipe.data.packing:
        return default if on_gpu else _BY_DOCUMENT
    return _MASKLESS if recipe.train.batch_size == 1 else default  # a single row has no padding


def _enable_checkpointing(base: PreTrainedModel, checkpointing: str) -> None:
    if checkpointing == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": checkpointing == "reentrant"}
    if checkpointing == "selective":
        enable_selective_activation_checkpointing(base)
    base.activation_checkpointing_enable(kwargs)


def _inputs(recipe: Recipe) -> dict[str, torch.Tensor]:
    rows, length = recipe.train.batch_size, recipe.data.sequence_length
    if recipe.model.takes_lengths and recipe.data.packing:
        rows, length = 1, rows * length
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.empty(rows, length, dtype=torch.long) for name in names}


def _hold_base(model: PeftModel, memory: PeakTensorMemory) -> int:
    """Counts the weights and buffers of the base, and returns the bytes that are held."""
    gates = {id(tensor) for layer in gate_layers(model).values() for tensor in layer.parameters()}
    tensors = (*model.parameters(), *model.buffers())
    memory.hold(tensor for tensor in tensors if id(tensor) not in gates)
    return memory.now


def _hold_gates(trained: list, optimizer: torch.optim.Optimizer, memory: PeakTensorMemory) -> int:
    """Counts the gates with their gradients and moments, and returns the bytes that are held.

    Every step but the first begins with moments, and every micro-batch but a step's first with
    gradients.
    """
    memory.hold(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return memory.now


def _by_document(
    module, query, key, value, attention_mask, scaling, dropout=0.0, sink=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Stands in for `sdpa_by_document` on rows of one document each; others take as much memory."""
    outputs = []
    for row in range(len(query)):
        queries = slice(row, row + 1), slice(None)
        slot = None if sink is None else sink.select_block(*queries)
        q, k, v = (states[queries] for states in (query, key, value))
        attended = attend_to_documents(q, k, v, scaling, dropout, slot)
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs), None


AttentionInterface.register(_BY_DOCUMENT, _by_document)
AttentionInterface.register(_MASKLESS, sdpa_attention_forward)
SINK_ATTENTION_FUNCTIONS[_BY_DOCUMENT] = _by_document
SINK_ATTENTION_FUNCTIONS[_MASKLESS] = sdpa_with_sink
