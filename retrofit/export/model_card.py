"""Writes the model card of a merged checkpoint: what was done to the base, and how to run it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from retrofit.export.registry import format_of
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import read_json

_GATES_PAPER = "[arXiv:2505.06708](https://arxiv.org/abs/2505.06708)"
_SINKS_PAPER = "[arXiv:2602.01203](https://arxiv.org/abs/2602.01203)"


class _Model(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    metrics: dict[str, FiniteFloat | None]


class _Measurement(BaseModel):
    """The part of `measure.json` that a card shows."""

    models: list[_Model]
    settings: dict[str, Any] = {}


def check_card_inputs(run: Path) -> None:
    """Checks early the files of a run that its model card will show.

    Args:
        run: the run folder.

    Raises:
        UserError: if its recipe or its measurement cannot be read.
    """
    measurement, recipe = run / "measure.json", run / "recipe.resolved.yaml"
    try:
        if measurement.is_file():
            _Measurement.model_validate(read_json(measurement))
    except ValidationError as error:
        raise UserError(f"{measurement}: {validation_problem(error)}; remove it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{measurement} is damaged ({error}); remove it") from None
    try:
        if recipe.is_file():
            recipe.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{recipe} is damaged: {error}") from None


def model_card(report: dict, base: Path, checkpoint: Path, name: str) -> ModelCard:
    """Returns the model card of a checkpoint.

    Args:
        report: the report that `retrofit.export.merge.merge` returns.
        base: the folder of the base model; if its card names a license, the new card has it too.
        checkpoint: the merged folder; the card shows its `measure.json` and recipe if it has them.
        name: the checkpoint's repository on the hub, or its path, for the code that loads it.
    """
    checkpoint_format = format_of(report["checkpoint"]["format"])
    sections = [
        f"---\n{_data(report, base).to_yaml()}\n---",
        f"# {report['base']['name']} with attention gates",
        _what_was_done(report),
        _measurement(checkpoint / "measure.json"),
        _verification(report),
        _costs(report),
        f"## How to load it\n\n{checkpoint_format.how_to_load(report, name)}",
        _recipe(checkpoint / "recipe.resolved.yaml"),
    ]
    return ModelCard("\n\n".join(section for section in sections if section) + "\n")


def _data(report: dict, base: Path) -> ModelCardData:
    """Returns the metadata for the hub, which can name a base only if it is on the hub."""
    return ModelCardData(
        base_model=None if report["base"]["is_local"] else report["base"]["name"],
        base_model_relation=None if report["base"]["is_local"] else "finetune",
        library_name=format_of(report["checkpoint"]["format"]).library,
        pipeline_tag="text-generation",
        tags=["retrofit", "gated-attention", "attention-sink"],
        **license_of(base / "README.md"),
    )


def license_of(card: Path) -> dict[str, Any]:
    """Returns the license and language in the base's card, or nothing if it cannot be read.

    A damaged card of the base is no reason for a verified merge to fail.
    """
    if not card.is_file():  # reading a pipe would never end
        return {}
    try:
        block = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig", errors="replace"))
        # BaseLoader reads all values as text: otherwise the language `no` would become false.
        metadata = yaml.load(block[2], yaml.BaseLoader) if block else None
    except (OSError, RecursionError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link", "language")
    metadata = metadata if isinstance(metadata, dict) else {}
    return {name: metadata[name] for name in names if _is_text(metadata.get(name))}


def _is_text(value: Any) -> bool:
    """Tells whether a value is a text that is not empty, or a list of such texts."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(value, str) and value for value in values)


def _what_was_done(report: dict) -> str:
    base, gate, training = report["base"], report["gate"], report["training"]
    length = f" for {training['tokens']:,} tokens" if training.get("tokens") else ""
    quantized = (
        f" The gates were trained on the base in {base['quantization']} and merged into its "
        "original weights."
        if base["quantization"]
        else ""
    )
    return (
        f"This is {base['name']} with attention gates in {gate['layers']} of {gate['of_layers']} "
        f"layers: {_gates(gate)}, so that a head may say nothing without parking its attention on "
        f"the first token. Only the {gate['parameters']:,} gate weights were trained{length}, from "
        "gates that change nothing; every weight of the base stayed as it "
        f"was.{quantized} Made with retrofit."
    )


def _gates(gate: dict) -> str:
    """Returns a clause or two on what scales the heads."""
    scope = "head" if gate["granularity"] == "headwise" else "channel of each head"
    around = "around the value that the base's heads take from their first token"
    clauses = []
    if gate["sinks"] != "none":
        read = ", read from the layer's input," if gate["sinks"] == "input" else ""
        moved = ", to which keys are moved by a bias" if gate["key_bias"] else ""
        clauses.append(
            f"each head has a learned sink{read} in its softmax{moved} ({_SINKS_PAPER}), and is "
            "scaled by the share of attention that the sink leaves"
        )
    if gate["granularity"] != "none":
        layers = gate["projection_layers"]
        instead = f"in layers {', '.join(map(str, layers))} instead, " if layers else ""
        clauses.append(
            f"{instead}each attention {scope} is scaled by a sigmoid that reads the layer's input "
            f"(G1 of {_GATES_PAPER}, {gate['granularity']})"
        )
    if gate["centered"]:
        clauses[-1] += f", {around}"
    return "; ".join(clauses)


def _measurement(path: Path) -> str:
    """Returns a table with a column for each measured model and a row for each figure."""
    if not path.is_file():
        return ""
    measurement = read_json(path)
    models = measurement["models"]
    names = dict.fromkeys(name for model in models for name in model["metrics"])
    rows = [
        [name, *(_number(model["metrics"].get(name)) for model in models)]
        for name in names
        if any(isinstance(model["metrics"].get(name), int | float) for model in models)
    ]
    header = ["", *(model["name"] for model in models)]
    table = [header, ["---"] * len(header), *rows]
    settings = measurement.get("settings", {})
    conditions = ", ".join(
        f"{key} {settings[key]}" for key in ("text", "length", "tokens") if key in settings
    )
    lines = ["## Before and after\n", f"Measured on {conditions}.\n" if conditions else ""]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _verification(report: dict) -> str:
    figures, dtype = report["verification"], report["checkpoint"]["dtype"]
    until = figures["greedy_until"]
    greedy = "the same" if until is None else f"the same up to token {until}"
    rounding = (
        f" ({figures['rounding_kl']:.2g} is what {dtype} costs by itself)"
        if figures["rounding_kl"]
        else ""
    )
    return (
        "## Verification\n\n"
        f"Before this folder got its name, {_how_loaded(report)} was compared with the trained "
        f"model in float32 at {figures['positions']} positions of text:\n\n"
        f"- mean KL divergence {figures['kl']:.2g} nats{rounding}; "
        f"largest difference of a log probability {figures['max_logprob_difference']:.2g}\n"
        f"- same most probable token at {figures['top1_agreement']:.2%} of the positions; "
        f"greedy continuations of 16 tokens {greedy}"
    )


def _how_loaded(report: dict) -> str:
    if "file" in report["checkpoint"]:
        return "llama.cpp loaded it in a fresh process and, with the tokens it finds likely,"
    return "a fresh process loaded it and, computing in float32,"


def _costs(report: dict) -> str:
    base, checkpoint = report["base"], report["checkpoint"]
    if not format_of(checkpoint["format"]).is_model:
        return ""
    added = checkpoint["parameters"] / base["parameters"] - 1
    reasons = "the gates" if "heads" not in checkpoint else _added_parameters(report)
    reasons += ", and input and output embeddings are now two" if checkpoint["untied"] else ""
    lines = [f"{checkpoint['parameters']:,} parameters, {added:.1%} more than the base: {reasons}."]
    if _has_packed_gates(report):
        lines += _costs_of_packed_gates(report)
    return "## Costs\n\n" + "\n".join(f"- {line}" for line in lines)


def _has_packed_gates(report: dict) -> bool:
    """Tells whether its stock architecture holds the gates in `q_proj`, as Qwen3.5 does."""
    return "heads" in report["checkpoint"] and report["gate"]["sinks"] == "none"


def _added_parameters(report: dict) -> str:
    return "the gates fill half of `q_proj`" if _has_packed_gates(report) else "sinks and biases"


def _costs_of_packed_gates(report: dict) -> list[str]:
    base, checkpoint = report["base"], report["checkpoint"]
    lines = []
    if "file" in checkpoint:
        lines += ["One more layer, all zeros: llama.cpp needs one of linear attention."]
    else:
        lines += [
            "Run it in bfloat16 or float32: its activations exceed the range of float16.",
            "It is made for inference. To train the gates further, go on from the run.",
        ]
    if heads := checkpoint["constant_heads"]:
        lines += [
            f"{heads} of its {checkpoint['heads']} attention heads a layer hold a constant, and "
            f"{1 / checkpoint['kv_heads']:.0%} of its KV cache with them: only transformers reads "
            "the bias of `o_proj` that they replace."
        ]
    if "file" not in checkpoint and (base["biases"] or heads):
        lines += ["Not for SGLang, which drops the biases of q, k and v silently."]
    return lines


def _recipe(path: Path) -> str:
    if not path.is_file():
        return ""
    return f"## Recipe\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"
