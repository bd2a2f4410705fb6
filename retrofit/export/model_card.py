"""The model card of a merged checkpoint: what was done to the base, what it cost, how to run it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from retrofit.export.registry import format_of
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import read_json

_PAPER = "[arXiv:2505.06708](https://arxiv.org/abs/2505.06708)"
_SINKS = "[arXiv:2602.01203](https://arxiv.org/abs/2602.01203)"


class _Model(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    metrics: dict[str, FiniteFloat | None]


class _Measured(BaseModel):
    """What is shown of `measure.json`."""

    models: list[_Model]
    settings: dict[str, Any] = {}


def check_card_inputs(run: Path) -> None:
    """
    Args:
        run: whose recipe and measurement a card is to show.

    Raises:
        UserError: if one of them cannot be read, which would else be noticed when all is done.
    """
    measured, recipe = run / "measure.json", run / "recipe.resolved.yaml"
    try:
        if measured.is_file():
            _Measured.model_validate(read_json(measured))
    except ValidationError as error:
        raise UserError(f"{measured}: {validation_problem(error)}; remove it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{measured} is damaged ({error}); remove it") from None
    try:
        if recipe.is_file():
            recipe.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{recipe} is damaged: {error}") from None


def model_card(report: dict, base: Path, checkpoint: Path, name: str) -> ModelCard:
    """The card of `checkpoint`.

    Args:
        report: what `retrofit.export.merge.merge` returns.
        base: folder of the base model; its license is carried over if its card names one.
        checkpoint: the merged folder, whose `measure.json` and recipe are shown if it has them.
        name: what it is loaded by, its repository on the hub or a path.
    """
    form = format_of(report["checkpoint"]["format"])
    sections = [
        f"---\n{_data(report, base).to_yaml()}\n---",
        f"# {report['base']['name']} with attention gates",
        _what_was_done(report),
        _measured(checkpoint / "measure.json"),
        _verified(report),
        _costs(report),
        f"## How to load it\n\n{form.how_to_load(report, name)}",
        _recipe(checkpoint / "recipe.resolved.yaml"),
    ]
    return ModelCard("\n\n".join(section for section in sections if section) + "\n")


def _data(report: dict, base: Path) -> ModelCardData:
    """Metadata for the hub, which knows its own models only."""
    return ModelCardData(
        base_model=None if report["base"]["is_local"] else report["base"]["name"],
        base_model_relation=None if report["base"]["is_local"] else "finetune",
        library_name=format_of(report["checkpoint"]["format"]).library,
        pipeline_tag="text-generation",
        tags=["retrofit", "gated-attention", "attention-sink"],
        **license_of(base / "README.md"),
    )


def license_of(card: Path) -> dict[str, Any]:
    """License and language as the base's card has them, or nothing if it cannot be read: a merge
    that is verified does not end at somebody's README."""
    if not card.is_file():  # a pipe would be read for ever
        return {}
    try:
        block = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig", errors="replace"))
        # Read as text, for in YAML the language `no` is false.
        metadata = yaml.load(block[2], yaml.BaseLoader) if block else None
    except (OSError, RecursionError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link", "language")
    metadata = metadata if isinstance(metadata, dict) else {}
    return {name: metadata[name] for name in names if _is_text(metadata.get(name))}


def _is_text(value: Any) -> bool:
    """Or a list of texts."""
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
        f"was.{quantized} Made with [retrofit](https://pypi.org/project/gate-retrofit/)."
    )


def _gates(gate: dict) -> str:
    """What scales a head, in a clause or two."""
    scope = "head" if gate["granularity"] == "headwise" else "channel of each head"
    around = "around the value that the base's heads take from their first token"
    clauses = []
    if gate["sinks"] != "none":
        read = ", read from the layer's input," if gate["sinks"] == "input" else ""
        moved = ", to which keys are moved by a bias" if gate["key_bias"] else ""
        clauses.append(
            f"each head has a learned sink{read} in its softmax{moved} ({_SINKS}), and is scaled "
            "by how much it found"
        )
    if gate["granularity"] != "none":
        clauses.append(
            f"each attention {scope} is scaled by a sigmoid that reads the layer's input (G1 of "
            f"{_PAPER}, {gate['granularity']})"
        )
    if gate["centered"]:
        clauses[-1] += f", {around}"
    return "; ".join(clauses)


def _measured(path: Path) -> str:
    """A column for each model that was measured, a row for each figure."""
    if not path.is_file():
        return ""
    measured = read_json(path)
    models = measured["models"]
    names = dict.fromkeys(name for model in models for name in model["metrics"])
    rows = [
        [name, *(_number(model["metrics"].get(name)) for model in models)]
        for name in names
        if any(isinstance(model["metrics"].get(name), int | float) for model in models)
    ]
    header = ["", *(model["name"] for model in models)]
    table = [header, ["---"] * len(header), *rows]
    settings = measured.get("settings", {})
    at = ", ".join(
        f"{key} {settings[key]}" for key in ("text", "length", "tokens") if key in settings
    )
    lines = ["## Before and after\n", f"Measured on {at}.\n" if at else ""]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _verified(report: dict) -> str:
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
        f"Before this folder got its name, {_by(report)} was compared with the trained model in "
        f"float32 at {figures['positions']} positions of text:\n\n"
        f"- mean KL divergence {figures['kl']:.2g} nats{rounding}; "
        f"largest difference of a log probability {figures['max_logprob_difference']:.2g}\n"
        f"- same most probable token at {figures['top1_agreement']:.2%} of the positions; "
        f"greedy continuations of 16 tokens {greedy}"
    )


def _by(report: dict) -> str:
    if "file" in report["checkpoint"]:
        return "llama.cpp loaded it in a fresh process and, with the tokens it finds likely,"
    return "a fresh process loaded it and, computing in float32,"


def _costs(report: dict) -> str:
    base, checkpoint = report["base"], report["checkpoint"]
    if not format_of(checkpoint["format"]).is_model:
        return ""
    added = checkpoint["parameters"] / base["parameters"] - 1
    reasons = "the gates" if "heads" not in checkpoint else _why_more(report)
    reasons += ", and input and output embeddings are now two" if checkpoint["untied"] else ""
    lines = [f"{checkpoint['parameters']:,} parameters, {added:.1%} more than the base: {reasons}."]
    if _is_qwen(report):
        lines += _costs_of_qwen(report)
    return "## Costs\n\n" + "\n".join(f"- {line}" for line in lines)


def _is_qwen(report: dict) -> bool:
    """Whether its stock architecture holds gates in `q_proj`, by scaling what the base has."""
    return "heads" in report["checkpoint"] and report["gate"]["sinks"] == "none"


def _why_more(report: dict) -> str:
    return "the gates fill half of `q_proj`" if _is_qwen(report) else "sinks and biases"


def _costs_of_qwen(report: dict) -> list[str]:
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
            "the bias of `o_proj` that would do."
        ]
    if "file" not in checkpoint and (base["biases"] or heads):
        lines += ["Not for SGLang, which drops the biases of q, k and v without a word."]
    return lines


def _recipe(path: Path) -> str:
    if not path.is_file():
        return ""
    return f"## Recipe\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"
