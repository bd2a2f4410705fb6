"""`retrofit check` finds out what a recipe would do without loading a weight."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from retrofit.data.chats import render
from retrofit.export import native
from retrofit.gate_settings import has_both
from retrofit.gates.recipe import gate_config
from retrofit.memory.estimate import Device, NotTracedError, estimate, remedy, this_device
from retrofit.models.gated_model import gated_model
from retrofit.models.opening import opening
from retrofit.recipe import Gate, Recipe
from retrofit.training.preflight import load_tokenizer_and_data, preflight
from retrofit.training.resuming import RUN_EXISTS
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import UserError
from retrofit.utils.output_path import refuse_existing
from retrofit.utils.paths import expanded

_BYTES = {  # of one weight in each format
    "float64": 8.0,
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "nf4": 0.5,
    "fp4": 0.5,
}


@dataclass(frozen=True)
class Check:
    """One line of what `retrofit check` prints.

    Attributes:
        name: what was checked, such as `data`.
        finding: what was found.
    """

    name: str
    finding: str


def check(recipe: Recipe, gpu_gigabytes: float | None = None) -> list[Check]:
    """Opens the config, the tokenizer and the data of a recipe, and traces a step without weights.

    The data is not tokenized, so that it may still prove too short.

    Args:
        recipe: what would be trained.
        gpu_gigabytes: the memory of a GPU to plan for, in GB; `None` plans for this machine.

    Raises:
        UserError: for anything else that would stop `retrofit train` before its first step, or if
            that step takes more memory than the device has.
    """
    refuse_existing(expanded(recipe.output_dir), RUN_EXISTS)
    config = preflight(recipe)
    base_weights, gate_weights, projections = _count_weights(config, recipe)
    tokenizer, sources = load_tokenizer_and_data(recipe, config)
    return [
        Check("base", _describe_base(config, recipe, base_weights)),
        Check("gates", _describe_gates(config, recipe, gate_weights, projections, base_weights)),
        *(
            Check("data", f"{source.path}: {_preview(loaded.rows, tokenizer)}")
            for source, loaded in zip(recipe.data.sources, sources, strict=True)
        ),
        Check("step", _describe_step(recipe)),
        Check("memory", _describe_memory(config, recipe, this_device(gpu_gigabytes))),
        Check("merge", _describe_merge(config, recipe)),
    ]


def _count_weights(config: PreTrainedConfig, recipe: Recipe) -> tuple[int, int, int]:
    """Returns the number of weights of the base, of its gates, and of the projections in these."""
    with opening(recipe.model.base), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        base_weights = model.num_parameters()
        gated = gated_model(model, recipe)
    gates = {name: p.numel() for name, p in gated.named_parameters() if p.requires_grad}
    projections = [n for name, n in gates.items() if name.endswith((".weight", ".channel_weight"))]
    return base_weights, sum(gates.values()), sum(projections)


def _dtype(config: PreTrainedConfig, recipe: Recipe) -> str:
    stored = dtype_name(config.dtype or torch.float32)
    return recipe.model.dtype if recipe.model.dtype != "auto" else stored


def _describe_base(config: PreTrainedConfig, recipe: Recipe, weights: int) -> str:
    held_in = recipe.model.quantization or _dtype(config, recipe)
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, {config.num_attention_heads} "
        f"heads; {weights:,} weights in {held_in}: about {weights * _BYTES[held_in] / 1e9:.1f} GB"
    )


def _describe_gates(
    config: PreTrainedConfig, recipe: Recipe, gate_weights: int, projections: int, base_weights: int
) -> str:
    layers = len(recipe.gate.layers or range(config.num_hidden_layers))
    gate = recipe.gate
    projection = f"{gate.granularity} projection"
    varies = gate.projection_layers is not None and has_both(gate)
    kinds = [f"{gate.sinks} sinks"] if gate.sinks != "none" else []
    kinds += ["a key bias"] if gate.key_bias else []
    kinds += [projection] if gate.granularity != "none" and not varies else []
    exception = f", {_where_projected(gate)} a {projection} instead" if varies else ""
    numbers = f"{gate_weights:,} numbers, {gate_weights / base_weights:.2g} of the model"
    if gate.chooses_projection_layers:
        fewest = f"{gate_weights - projections:,}"
        numbers = f"{fewest} numbers if none does, and fewer than {gate_weights:,} in any case"
    return f"{', '.join(kinds)} on {layers} layers{exception}: {numbers}"


def _where_projected(gate: Gate) -> str:
    if isinstance(gate.projection_layers, list):
        return f"in layers {', '.join(map(str, gate.projection_layers))}"
    return "where a layer needs one"


def _describe_memory(config: PreTrainedConfig, recipe: Recipe, device: Device) -> str:
    try:
        needed = estimate(recipe, config, device)
    except NotTracedError as error:
        if recipe.train.gradient_checkpointing == "auto":
            raise
        return f"not known; {error}"
    if not needed.fits(device):
        overrides = remedy(recipe, config, device)
        hint = (
            f"it would fit with {overrides}"
            if overrides
            else "no shorter or smaller recipe would fit"
        )
        raise UserError(
            f"memory: this needs {needed}, more than {device.name} has room for; {hint}"
        )
    return f"{needed} on {device.name}; gradient checkpointing {needed.checkpointing}"


def _describe_merge(config: PreTrainedConfig, recipe: Recipe) -> str:
    if not gate_config(recipe).is_mergeable:
        return "none: an ablation that no checkpoint can carry"
    gate = recipe.gate
    # Where the base chooses the layers of the projection, it may choose none.
    granularity = "none" if gate.chooses_projection_layers else gate.granularity
    reason = native.refusal(config, granularity, gate.sinks, gate.centered)
    if reason is not None:
        return f"with --format remote-code, which brings its code: {reason}"
    model_type = native.stock_architecture(config.model_type, gate.sinks).model_type(config)
    unless = ", unless a layer needs a projection" if granularity != gate.granularity else ""
    return f"stock {model_type} checkpoint, no code of ours needed{unless}"


def _preview(rows, tokenizer: PreTrainedTokenizerBase, characters: int = 60) -> str:
    row = next(iter(rows))
    if "chat_template_kwargs" in row:
        text = render(tokenizer, row)
    elif "completion" in row:
        text = f"{row['prompt']} -> {row['completion']}"
    else:
        text = row["text"]
    length = f"{len(rows):,} documents" if hasattr(rows, "__len__") else "a stream"
    return f"{length}; {' '.join(str(text).split())[:characters]!r}..."


def _describe_step(recipe: Recipe) -> str:
    train = recipe.train
    rows = train.batch_size * train.gradient_accumulation_steps
    tokens = rows * recipe.data.sequence_length
    total = f"{train.max_steps} steps, " if train.max_steps else f"{train.epochs:g} epochs, "
    return f"{total}{rows} rows x {recipe.data.sequence_length} = {tokens:,} tokens a step"
