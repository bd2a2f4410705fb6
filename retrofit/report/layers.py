"""Sections of a report on what is always measured: attention, activations and gates by layer."""

from collections.abc import Sequence
from typing import Any

from retrofit.report.charts import SMALL, Line, Plot, heat_map, line_chart
from retrofit.report.section import Section, having, key

Models = Sequence[dict[str, Any]]
_LEAST_SHARE = 1e-3  # where the colors of attention begin


def layer_sections(models: Models) -> list[Section]:
    """Those that the models have figures for, in the order of the page."""
    made = [
        make(models)
        for make in (_first_positions, _share_maps, _sinks, _activations, _gates, _head_loads)
    ]
    return [section for section in made if section]


def _first_positions(models: Models) -> Section | None:
    shown = _with_layers(models, "column_share")
    if not shown:
        return None
    shares = [rows for _, _, rows in shown]
    largest = max(max(row) for rows in shares for row in rows if row)
    plots = [
        heat_map(
            f"positions-{number}", model["name"], rows, x="key position", y="layer",
            color="mean share (log)", limits=(_LEAST_SHARE, max(largest, 0.1)), log=True,
        )
        for number, model, rows in shown
    ]  # fmt: skip
    return Section(
        "attention",
        "Attention to the first positions",
        "How much of the attention of later queries, at least 64 tokens on, each of a text's first "
        "positions gets in each layer; mean over heads and windows. A sink is a column that stands "
        "out. All maps have the same colors.",
        plots=plots,
    )


def _share_maps(models: Models) -> Section | None:
    shown = [(n, model) for n, model in having(models, "examples") if model["examples"].get("maps")]
    plots = [
        heat_map(
            f"map-{number}-{place}", f"{model['name']}, layer {layer}", _causal(shares),
            x="key position", y="query position", color="share", limits=(_LEAST_SHARE, 1.0),
            log=True, width=SMALL,
        )
        for number, model in shown
        for place, (layer, shares) in enumerate(
            zip(model["examples"]["maps"]["layers"], model["examples"]["maps"]["shares"],
                strict=True)
        )
    ]  # fmt: skip
    if not plots:
        return None
    text = "".join(shown[0][1]["examples"].get("tokens", ()))
    return Section(
        "maps",
        "Attention maps",
        "What each query pays to each key, mean over the heads of a layer, at the beginning of one "
        "text, as in arXiv:2505.06708. A sink is a first column that stands out. "
        f"{'The text: ' + ' '.join(text.split()) if text else ''}",
        plots=plots,
        small=True,
    )


def _sinks(models: Models) -> Section | None:
    plot = _by_layer(models, "sink_share", "Taken by sink logits", "mean share")
    if plot is None:
        return None
    return Section(
        "sinks",
        "Sink logits",
        "How much of the attention each layer's sink logits take from the keys: a sink logit joins "
        "the softmax of a head without being a key, as in gpt-oss, so that a head may find "
        "nothing. No share of any position counts it.",
        legend=[key(each) for each in enumerate(models) if each[1]["per_layer"].get("sink_share")],
        plots=[plot],
    )


def _activations(models: Models) -> Section:
    plots = [
        _by_layer(models, "max_activation", "Largest activation", "largest |hidden state|"),
        _by_layer(models, "kurtosis", "Kurtosis of activations", "kurtosis"),
        _by_layer(models, "down_proj_max_activation", "Largest input of down_proj", "largest |x|"),
        _by_layer(models, "down_proj_kurtosis", "Kurtosis of inputs of down_proj", "kurtosis"),
    ]
    return Section(
        "activations",
        "Activations",
        "The largest hidden state of any token after each layer, and the kurtosis of the hidden "
        "states, which is 3 where they are normally distributed; means over windows. Both are what "
        "quantization suffers from. The inputs of each layer's down_proj are where outliers may go "
        "that are held off the hidden states.",
        legend=[key(model) for model in enumerate(models)],
        plots=[plot for plot in plots if plot],
    )


def _gates(models: Models) -> Section | None:
    shown = _with_layers(models, "gate_histogram")
    if not shown:
        return None
    largest = max(max(row) for _, _, rows in shown for row in rows if row)
    plots = [
        heat_map(
            f"gates-{number}", model["name"], rows, x="gate score", y="layer",
            color="share of gates", limits=(0, largest), extent=(0, 1),
        )
        for number, model, rows in shown
    ]  # fmt: skip
    return Section(
        "gates",
        "Gates",
        "How the gate scores, sigmoid(X W), of each layer are distributed over tokens, heads and "
        "channels. A retrofit starts at 0.5, which changes nothing; 0 is shut.",
        plots=plots,
    )


def _head_loads(models: Models) -> Section | None:
    shown = _with_layers(models, "head_load")
    if not shown:
        return None
    largest = max(max(row) for _, _, rows in shown for row in rows if row)
    plots = [
        heat_map(
            f"loads-{number}", model["name"], rows, x="head", y="layer",
            color="mean load", limits=(0, largest),
        )
        for number, model, rows in shown
    ]  # fmt: skip
    return Section(
        "loads",
        "Head loads",
        "How much each head works: the attention that it pays to keys but the first, times "
        "its gate, mean over tokens (arXiv:2602.01203). All maps have the same colors; a gate at "
        "its start halves a load.",
        plots=plots,
    )


def _by_layer(models: Models, metric: str, title: str, y: str) -> Plot | None:
    lines = [
        Line(model["name"], number, range(len(rows)), rows)
        for number, model, rows in _with_layers(models, metric)
    ]
    name = metric.replace("_", "-")
    return line_chart(name, title, lines, x="layer", y=y, log=True) if lines else None


def _with_layers(models: Models, metric: str) -> list[tuple[int, dict[str, Any], list]]:
    """The models of which any layer has the metric."""
    rows = [model["per_layer"].get(metric) or [] for model in models]
    return [
        (number, model, values)
        for number, (model, values) in enumerate(zip(models, rows, strict=True))
        if any(value is not None for value in values)
    ]


def _causal(shares: list[list[float]]) -> list[list[float]]:
    """Without the keys that a query cannot see, which would look like keys that it ignores."""
    return [row[: query + 1] for query, row in enumerate(shares)]
