"""Shows attention maps and generations of a model (`measure/examples.py`)."""

from collections.abc import Sequence

from pydantic import Field, model_validator

from retrofit.report.charts import SMALL, heat_map
from retrofit.report.figures import Figures, Numbers, check_same_length
from retrofit.report.part import Measured, Part
from retrofit.report.section import Exchange, Key, Section

_LIMITS = (1e-3, 1.0)  # The attention of the first and last color, on a logarithmic scale.


class Maps(Figures):
    """Attention at the beginning of one text.

    Attributes:
        layers: the indices of the layers.
        shares: for each layer, the attention of each query to each key, mean over heads, `[T, T]`.
    """

    layers: list[int]
    shares: list[list[Numbers]]

    @model_validator(mode="after")
    def _has_one_for_each_layer(self):
        check_same_length("the maps", (self.layers, self.shares))
        for rows in self.shares:
            check_same_length("the rows of a map", (rows, *rows))
        return self


class Generation(Figures):
    """A prompt and the text that a model wrote after it."""

    prompt: str
    text: str


class ExamplesFigures(Figures):
    """The figures of `retrofit.measure.examples.Examples`.

    Attributes:
        maps: the attention maps of four layers.
        tokens: the tokens of the text that the maps show.
        generations: greedy continuations of prompts.
    """

    maps: Maps | None = None
    tokens: list[str] = Field(default_factory=list)
    generations: list[Generation] = Field(default_factory=list)


def _sections(models: Sequence[Measured[ExamplesFigures]]) -> list[Section]:
    with_maps = [model for model in models if model.figures.maps]
    with_text = [model for model in models if model.figures.generations]
    sections = [_maps(with_maps)] if with_maps else []
    return [*sections, _generations(with_text)] if with_text else sections


def _maps(models: Sequence[Measured[ExamplesFigures]]) -> Section:
    plots = [
        heat_map(
            f"map-{number}-{place}", f"{name}, layer {layer}", _causal(shares),
            x="key position", y="query position", color="share", limits=_LIMITS,
            log=True, width=SMALL,
        )
        for number, name, figures in models
        if figures.maps
        for place, (layer, shares) in enumerate(
            zip(figures.maps.layers, figures.maps.shares, strict=True)
        )
    ]  # fmt: skip
    text = " ".join("".join(models[0].figures.tokens).split())
    return Section(
        "maps",
        "Attention maps",
        "What each query pays to each key, mean over the heads of a layer, at the beginning of one "
        "text, as in arXiv:2505.06708. A sink is a first column that stands out. "
        f"{f'The text: {text}' if text else ''}",
        plots=plots,
        small=True,
    )


def _causal(shares: list[list[float]]) -> list[list[float]]:
    """Returns a map without the keys that a query cannot see, since they would look like keys that
    it ignores."""
    return [row[: query + 1] for query, row in enumerate(shares)]


def _generations(models: Sequence[Measured[ExamplesFigures]]) -> Section:
    answers: dict[str, list[tuple[Key, str]]] = {}
    for model in models:
        for generation in model.figures.generations:
            answers.setdefault(generation.prompt, []).append((model.key, generation.text))
    return Section(
        "generations",
        "Generations",
        "What each model writes after the same prompt, always taking the likeliest token.",
        exchanges=[Exchange(prompt, texts) for prompt, texts in answers.items()],
    )


PART = Part("examples", ExamplesFigures, _sections)
