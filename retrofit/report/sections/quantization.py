"""Shows what rounding to few bits costs a model (`measure/quantization.py`)."""

import math
from collections.abc import Callable, Iterator, Sequence

from pydantic import FiniteFloat, model_validator

from retrofit.report.charts import Line, bar_chart
from retrofit.report.figures import Figures, Logs, check_same_length
from retrofit.report.findings import Difference, Item, cost_item, differences, paired
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
        nll_by_window: the mean negative log-likelihood of each window in nats.
    """

    perplexity: FiniteFloat
    kl: FiniteFloat
    nll_by_window: Logs


class QuantizationFigures(Figures):
    """The figures of `retrofit.measure.quantization.Quantization`, by the name of the scheme;
    `none` is the unrounded model."""

    schemes: dict[str, Scheme]

    @model_validator(mode="after")
    def _compares_with_none(self):
        if "none" not in self.schemes:
            raise ValueError("schemes has no none")
        by_window = [scheme.nll_by_window for scheme in self.schemes.values()]
        check_same_length("the windows of the schemes", by_window)
        return self

    @property
    def unrounded(self) -> Scheme:
        """The figures of the unrounded model."""
        return self.schemes["none"]

    def added(self, scheme: str) -> Difference:
        """Returns the nats per token that a scheme adds to the unrounded model, over windows."""
        return paired(self.unrounded.nll_by_window, self.schemes[scheme].nll_by_window)

    def added_by_window(self, scheme: str) -> list[float]:
        """Returns the nats per token that a scheme adds, for each window."""
        return differences(self.unrounded.nll_by_window, self.schemes[scheme].nll_by_window)


def _sections(models: Sequence[Measured[QuantizationFigures]]) -> list[Section]:
    # The dict serves as an ordered set.
    all_schemes = {scheme: None for _, _, figures in models for scheme in figures.schemes}
    schemes = [scheme for scheme in all_schemes if scheme != "none"]
    added = _lines(models, schemes, lambda figures, scheme: figures.added(scheme))
    distance = _lines(
        models, schemes, lambda figures, scheme: Difference(figures.schemes[scheme].kl)
    )
    rows = [
        [scheme, *(_cell(figures, scheme) for _, _, figures in models)]
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
    models: Sequence[Measured[QuantizationFigures]],
    schemes: Sequence[str],
    figure_of: Callable[[QuantizationFigures, str], Difference],
) -> list[Line]:
    lines = []
    for number, name, figures in models:
        measured = [scheme for scheme in schemes if scheme in figures.schemes]
        values = [figure_of(figures, scheme) for scheme in measured]
        lines.append(
            Line(
                name,
                number,
                [schemes.index(scheme) for scheme in measured],
                [value.value for value in values],
                [value.stderr or 0 for value in values],
            )
        )
    return lines


def _cell(figures: QuantizationFigures, name: str) -> str:
    if name not in figures.schemes:
        return "-"
    scheme = figures.schemes[name]
    if name == "none":
        return figure(scheme.perplexity)
    moved = change(math.exp(figures.added(name).value))
    return f"{figure(scheme.perplexity)} ({moved}), KL {figure(scheme.kl)}"


def _findings(base: QuantizationFigures, model: QuantizationFigures) -> Iterator[Item]:
    """Compares what rounding costs both models, each against its unrounded self."""
    for name in model.schemes:
        if name == "none" or name not in base.schemes:
            continue
        before, after = (math.exp(figures.added(name).value) for figures in (base, model))
        difference = paired(base.added_by_window(name), model.added_by_window(name))
        plain = f"Quantized: {_NAMES.get(name, name)}"
        yield cost_item(plain, name, before, after, difference)


PART = Part(
    "quantization",
    QuantizationFigures,
    _sections,
    subject="quantization",
    findings=_findings,
    by_window=lambda figures: figures.unrounded.nll_by_window,
)
