"""Shows what rounding to few bits costs a model (`measure/quantization.py`)."""

import math
from collections.abc import Iterator, Sequence

from pydantic import FiniteFloat, model_validator

from retrofit.report.charts import Line, bar_chart
from retrofit.report.figures import Figures, Log
from retrofit.report.findings import Item, cost_item, independent
from retrofit.report.part import Measured, Part
from retrofit.report.section import Section, Table
from retrofit.report.wording import change, figure

_NAMES = {
    "w8a8_per_tensor": "8 bits, one scale for each tensor",
    "w8a8_per_token": "8 bits, one scale for each token and row",
    "fp8": "8-bit floats, one scale for each tensor",
    "w4": "4-bit weights, to the nearest",
    "kv8": "keys and values in 8 bits",
    "kv4": "keys and values in 4 bits",
    "int8": "bitsandbytes int8",
    "nf4": "bitsandbytes nf4",
}


class Scheme(Figures):
    """The figures of one way to round.

    Attributes:
        perplexity: the perplexity of the rounded model.
        kl: the KL divergence from the unrounded model in nats.
        log_ratio: the mean nats per token that rounding adds; `None` only for the unrounded model.
        log_ratio_stderr: the standard error of `log_ratio` over windows.
    """

    perplexity: FiniteFloat
    kl: FiniteFloat | None = None
    log_ratio: Log | None = None
    log_ratio_stderr: FiniteFloat | None = None


class QuantizationFigures(Figures):
    """The figures of `retrofit.measure.quantization.Quantization`, by the name of the scheme;
    `none` is the unrounded model."""

    schemes: dict[str, Scheme]

    @model_validator(mode="after")
    def _compares_with_none(self):
        for name, scheme in self.schemes.items():
            if name != "none" and scheme.log_ratio is None:
                raise ValueError(f"schemes.{name} has no log_ratio")
        return self


def _sections(models: Sequence[Measured[QuantizationFigures]]) -> list[Section]:
    # The dict serves as an ordered set.
    all_schemes = {scheme: None for _, _, figures in models for scheme in figures.schemes}
    schemes = [scheme for scheme in all_schemes if scheme != "none"]
    added, distance = (_lines(models, schemes, what) for what in ("log_ratio", "kl"))
    rows = [
        [scheme, *(_cell(figures.schemes.get(scheme), scheme) for _, _, figures in models)]
        for scheme in ("none", *schemes)
    ]
    section = Section(
        "quantization",
        "Quantization",
        "What rounding to few bits costs each model over itself as it is: weights in w4, "
        "activations too in w8a8 and fp8, keys and values in kv8 and kv4. One scale for a whole "
        "tensor is what large activations spoil; one for each token, or a floating point, forgives "
        "them. Bars have standard errors.",
        legend=[model.key for model in models],
        plots=[
            bar_chart("log-ratio", "Loss", schemes, added, y="log perplexity added (nats)"),
            bar_chart("kl", "Distance", schemes, distance, y="KL from the model as it is (nats)"),
        ],
        table=Table(
            "Perplexity, its change from that of the same model as it is, and KL in nats",
            ["scheme", *(name for _, name, _ in models)],
            rows,
        ),
    )
    return [section]


def _lines(
    models: Sequence[Measured[QuantizationFigures]], schemes: Sequence[str], what: str
) -> list[Line]:
    lines = []
    for number, name, figures in models:
        measured = [scheme for scheme in schemes if scheme in figures.schemes]
        lines.append(
            Line(
                name,
                number,
                [schemes.index(scheme) for scheme in measured],
                [getattr(figures.schemes[scheme], what) for scheme in measured],
                [getattr(figures.schemes[s], f"{what}_stderr", None) or 0 for s in measured],
            )
        )
    return lines


def _cell(scheme: Scheme | None, name: str) -> str:
    if scheme is None:
        return "-"
    if name == "none":
        return figure(scheme.perplexity)
    moved = change(math.exp(scheme.log_ratio or 0.0))
    return f"{figure(scheme.perplexity)} ({moved}), KL {figure(scheme.kl)}"


def _findings(base: QuantizationFigures, model: QuantizationFigures) -> Iterator[Item]:
    """Compares what rounding costs both models, each against its unrounded self."""
    for name, after in model.schemes.items():
        before = base.schemes.get(name)
        if before is None or before.log_ratio is None or after.log_ratio is None or name == "none":
            continue
        difference = independent(
            after.log_ratio - before.log_ratio, before.log_ratio_stderr, after.log_ratio_stderr
        )
        plain = f"Quantized: {_NAMES.get(name, name)}"
        ratios = (math.exp(before.log_ratio), math.exp(after.log_ratio))
        yield cost_item(plain, name, *ratios, difference)


PART = Part(
    "quantization", QuantizationFigures, _sections, subject="quantization", findings=_findings
)
