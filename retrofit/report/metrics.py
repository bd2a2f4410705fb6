"""Describes the metrics that are always measured: their names, their formats, which direction is
better, and their sources. `retrofit.measure.metrics` has their formulas."""

from typing import Literal, NamedTuple

Better = Literal["less", "more"]


class Metric(NamedTuple):
    """The description of one metric.

    Attributes:
        label: the metric's name in tables.
        meaning: what the metric is, in one sentence.
        style: the format of its values in documents, for `str.format`.
        better: which direction is better; `None` if neither is.
        source: the paper that defines the metric, or `retrofit`.
        belongs_to: the metric below which this one is listed, as another view of the same thing.
        axis: the label of the axis in a chart by layer; empty if there is no such chart.
        has_change: whether a change from the base means anything.
    """

    label: str
    meaning: str
    style: str
    better: Better | None
    source: str
    belongs_to: str = ""
    axis: str = ""
    has_change: bool = True

    @property
    def full_label(self) -> str:
        """The label for places where the parent metric is not listed above it."""
        above = METRICS[self.belongs_to].label if self.belongs_to else ""
        return f"{above}, {self.label}".removeprefix(", ")

    @property
    def indented(self) -> str:
        """The label, indented by two spaces if the metric belongs to another."""
        return f"  {self.label}" if self.belongs_to else self.label


_GATED_ATTENTION = "arXiv:2505.06708"

METRICS: dict[str, Metric] = {
    "f_attn": Metric(
        "attention to the first token",
        "The share of attention that the first token gets, mean over layers, heads and queries.",
        "{:.3f}",
        "less",
        _GATED_ATTENTION,
        axis="mean share",
    ),
    "peak_column_share": Metric(
        "peak column share",
        "The largest mean share of attention that any key position gets from queries at least 64 "
        "positions after it: a sink that has moved cannot hide.",
        "{:.4f}",
        "less",
        "retrofit",
        axis="share of the most attended key",
    ),
    "peak_column_position": Metric(
        "at position",
        "The key position that gets it.",
        "{:.0f}",
        None,
        "retrofit",
        belongs_to="peak_column_share",
        has_change=False,
    ),
    "peak_share_per_head": Metric(
        "of each head by itself",
        "The same, with a key position of its own for each head and text.",
        "{:.3f}",
        "less",
        "retrofit",
        belongs_to="peak_column_share",
    ),
    "sink_ratio": Metric(
        "sink heads (share)",
        "The share of heads that pay the first token more than 0.3 of their attention.",
        "{:.3f}",
        "less",
        "arXiv:2410.10781",
    ),
    "sink_share": Metric(
        "taken by sink logits (share)",
        "What the slots of sink logits take of the softmax. They are no keys, and no other share "
        "counts them.",
        "{:.3f}",
        None,
        "arXiv:2602.01203",
        axis="mean share",
    ),
    "max_activation": Metric(
        "largest activation",
        "The largest hidden state of any token after a layer, mean over layers and windows.",
        "{:,.0f}",
        "less",
        _GATED_ATTENTION,
        axis="largest |hidden state|",
    ),
    "max_activation_first_token": Metric(
        "of the first token",
        "The same of the first token of each window.",
        "{:,.0f}",
        "less",
        "retrofit",
        belongs_to="max_activation",
    ),
    "max_activation_any_window": Metric(
        "in any window",
        "The same of the window in which it is largest.",
        "{:,.0f}",
        "less",
        "retrofit",
        belongs_to="max_activation",
    ),
    "kurtosis": Metric(
        "kurtosis of activations",
        "The kurtosis of hidden states, mean over layers: 3 where they are normally distributed.",
        "{:,.0f}",
        "less",
        "arXiv:2306.12929",
        axis="kurtosis",
    ),
    "outlier_share": Metric(
        "outliers (share past 6 std)",
        "The share of hidden states more than six standard deviations from the mean.",
        "{:.2e}",
        "less",
        "arXiv:2306.12929",
        belongs_to="kurtosis",
    ),
    "down_proj_max_activation": Metric(
        "largest input of down_proj",
        "The largest input of each layer's `down_proj`, where outliers may go that are held off "
        "the hidden states.",
        "{:,.0f}",
        "less",
        "retrofit",
        axis="largest |x|",
    ),
    "down_proj_kurtosis": Metric(
        "kurtosis",
        "The kurtosis of those inputs.",
        "{:,.0f}",
        "less",
        "retrofit",
        belongs_to="down_proj_max_activation",
        axis="kurtosis",
    ),
    "gate_score": Metric(
        "gate score",
        "The mean of `sigmoid(X W)`, 0.5 at the start of a retrofit.",
        "{:.3f}",
        None,
        _GATED_ATTENTION,
    ),
    "gate_below_0.1": Metric(
        "share below 0.1",
        "The share of gate scores below 0.1.",
        "{:.3f}",
        None,
        _GATED_ATTENTION,
        belongs_to="gate_score",
        has_change=False,
    ),
    "head_load_cv": Metric(
        "head-load CV",
        "The coefficient of variation of the heads' loads in a layer, mean over layers.",
        "{:.3f}",
        "less",
        "arXiv:2602.01203",
    ),
    "perplexity": Metric(
        "perplexity",
        "The exponential of the mean negative log-likelihood of the next token.",
        "{:.2f}",
        "less",
        "",
    ),
    "perplexity_far": Metric(
        "past the first 64 tokens",
        "The same of the tokens past the first 64 of each window.",
        "{:.2f}",
        "less",
        "",
        belongs_to="perplexity",
    ),
    "kl_to_base": Metric(
        "KL to the base (nats)",
        "The mean KL divergence of the model's next-token distribution from the base's.",
        "{:.3f}",
        "less",
        "",
        has_change=False,
    ),
    "copied_nats": Metric(
        "copied text (nats a token)",
        "The mean negative log-likelihood of the second half of a passage that comes twice.",
        "{:.3f}",
        "less",
        "retrofit",
    ),
}
