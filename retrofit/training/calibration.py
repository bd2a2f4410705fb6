"""Reads from the base, on some training texts, what its gates and learning rates start from.

**Centers** stand for what a sink adds to each head: the value of the first token. A head that pays
the sink a share `A` of its attention outputs `(1 - A) * Y + A * v`, where `Y` is its output over
the rest of the text and `v` is the value of the first token. A gate that takes the sink's place
only by scaling loses the second term. On SmolLM2 this raises perplexity by 88% even where every
gate is exactly `1 - A`; with `v` put back, by 2% (scripts/oracle.py), because `v` is nearly the
same in every text. So the gate closes on `v` instead of on zero: `v + g * (Y - v)`. Heads without
a sink have nothing to make up for, so their `v` is 0. The heads of the first layers are among them.
Their gates keep the massive activation from forming, and would help it form if they closed on the
value of a first token.

**Sink logits** are fitted to the sink of the base, which acts as a slot whose logit changes from
query to query. The closest constant logit `s` takes the same share of a head's attention in the
mean: `mean sigmoid(s - LSE) = mean A`, where `LSE` is the log-sum-exp over all other keys. Training
starts from this logit, with a slot that has no weight yet. For a key bias, the mean first key and
the mean query are read as well (`retrofit.gates.sinks`).

**Projection layers** are those whose sink logits could not prevent the sink. What makes the first
token of a text a sink is decided below the first layer that attends to it: there the first few
layers write the massive activation. A gate can keep them from it only by closing on first tokens.
A first token sees no key but its own, so mostly its log-sum-exp is far below that of every other
query, and a slot takes its attention. But where biases of the keys make log-sum-exps differ by
hundreds from query to query, as in the first three layers of Qwen2.5-Coder-0.5B, no constant tells
first tokens apart. Such a layer gets a projection, which reads what token it is.

**Input sizes** set the learning rate of each layer. Adam moves every weight by about the learning
rate, so a step moves the logit of a gate by up to `learning_rate * sum |X|`. This sum is whatever
the preceding norm was trained to: 13 to 130 over the layers of SmolLM2, 63 to 1,400 over those of
Qwen2.5-Coder-0.5B. A single rate does not serve all layers: the first layer, where `X` depends only
on the token, would hardly learn, although the first few layers settle what a first token becomes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from peft import PeftModel

from retrofit.adapters._family import GatedAttention
from retrofit.gates import gate_layers, gates_off
from retrofit.gates.rope import attention_scaling
from retrofit.losses.sampled_attention import NEAR, SampledRows, sample_rows, sampled_logits

STEP = 0.8  # the most that a step at the highest learning rate moves a gate's logit by
# A head has a sink if it pays the first token a greater share of its attention than this. Evenly
# spread attention would give it 0.005.
SINK_SHARE = 0.1
# One query of so many tokens is sampled, for shares and sink logits, but at least `LEAST_ROWS` of
# each sequence.
TOKENS_PER_ROW = 32
LEAST_ROWS = 32
# A slot tells first tokens apart if their log-sum-exps are far enough below those of other queries,
# in standard deviations of the latter: the median over the heads of a layer. In the layers below
# its sink, SmolLM2-135M is at 2.7 to 7.1 and does without projections, and the first layer of both
# sizes of Qwen2.5-Coder is below 0.5. So one layer with less than `BLURRED` shows that a model
# needs projections, and then all layers below its sink get one. In Qwen2.5-Coder-1.5B, whose other
# such layer is not blurred, a projection in the first alone left a seventh of the sink.
BLURRED = 2.0
LEAST_SHARE = 1e-3  # the share that the slot of a head without a sink starts from


@dataclass(frozen=True)
class Calibration:
    """Statistics of a base that its gates and their learning rates start from.

    Each attribute is a mapping from the index of a layer. `sink_logits`, `mean_queries`,
    `first_keys`, `first_shares` and `separations` are empty if no text is long enough to read them
    from.

    Attributes:
        values: the mean value state of documents' first tokens, 0 for heads that do not attend to
            them, `[num_key_value_heads, head_dim]` in float32.
        sink_logits: the constant logits closest to the attention that heads pay first tokens,
            `[num_heads]` in float32.
        mean_queries: the mean query after RoPE, times all scalings, `[num_heads, head_dim]` in
            float32. On channels that RoPE does not turn, its product with a key before RoPE is a
            logit.
        first_keys: the mean key of documents' first tokens before RoPE, `[num_key_value_heads,
            head_dim]` in float32.
        first_shares: the mean share of attention that each head pays first tokens, `[num_heads]`
            in float32.
        separations: by how much the log-sum-exps of first tokens are below those of other queries,
            in standard deviations of the latter; the median over heads.
        input_sizes: the mean of `sum |X|` over tokens, where `X`, `[hidden_size]`, is the input of
            a gate.
    """

    values: dict[int, torch.Tensor]
    sink_logits: dict[int, torch.Tensor]
    mean_queries: dict[int, torch.Tensor]
    first_keys: dict[int, torch.Tensor]
    first_shares: dict[int, torch.Tensor]
    separations: dict[int, float]
    input_sizes: dict[int, float]

    def initialize_gates(self, model: PeftModel) -> None:
        """Sets the centers and sinks of a model's gates to the statistics of its base."""
        for index, layer in gate_layers(model).items():
            for gate in layer.g_proj.values():
                if gate.center is not None:
                    gate.center.copy_(self.values[index])
                if gate.sink_odds is not None and index in self.sink_logits:
                    gate.set_calibration(
                        self.sink_logits[index], self.mean_queries[index], self.first_keys[index]
                    )

    def cpu(self) -> "Calibration":
        """Returns a copy on the CPU, which is sent to the other ranks."""
        names = ("values", "sink_logits", "mean_queries", "first_keys", "first_shares")
        on_cpu = {
            name: {index: tensor.cpu() for index, tensor in getattr(self, name).items()}
            for name in names
        }
        return replace(self, **on_cpu)

    def summary(self) -> str:
        """Describes the sinks of the base in one line, which is empty if they could not be read."""
        if not self.first_shares:
            return ""
        shares = torch.cat([*self.first_shares.values()])
        layer_means = {index: share.mean().item() for index, share in self.first_shares.items()}
        top_layer = max(layer_means, key=lambda index: layer_means[index])
        return (
            f"the base pays its first token {shares.mean():.2f} of its attention in the mean, and "
            f"{layer_means[top_layer]:.2f} in layer {top_layer}; {(shares > SINK_SHARE).sum()} of "
            f"{len(shares)} heads pay it more than {SINK_SHARE}"
        )

    @property
    def projection_layers(self) -> list[int]:
        """The layers below the first sink, if the slots of one of them do not tell first tokens
        apart; otherwise none."""
        with_sink = [
            index for index, share in self.first_shares.items() if share.mean() > SINK_SHARE
        ]
        first_sink = min(with_sink, default=0)
        below = {index: gap for index, gap in self.separations.items() if index < first_sink}
        return list(below) if min(below.values(), default=BLURRED) < BLURRED else []

    @property
    def learning_rates(self) -> dict[int, float]:
        """The learning rate of each layer: a step moves a gate's logit by at most `STEP`."""
        return {index: STEP / size for index, size in self.input_sizes.items()}


class _Reader:
    """Collects the statistics of one layer while it runs, as its `GatedAttention.observer`."""

    def __init__(self, attention: GatedAttention, rope_scaling: float):
        self.attention = attention
        self.rope_scaling = rope_scaling
        self.starts = torch.empty(0)  # bool [batch, T - 1], true at the first tokens of documents
        self.sampled: SampledRows | None = None
        self.values: list[torch.Tensor] = []  # [documents, heads * head_dim]
        self.sizes: list[torch.Tensor] = []  # the mean of sum |X| in each batch
        self.shares: list[torch.Tensor] = []  # [rows, heads]
        self.log_sum_exps: list[torch.Tensor] = []  # [rows, heads], over all keys but the first
        self.first_log_sum_exps: list[torch.Tensor] = []  # [rows, heads], those of first tokens
        self.queries: list[torch.Tensor] = []  # [rows, heads, head_dim]
        self.keys: list[torch.Tensor] = []  # [rows, kv_heads, head_dim], those of first tokens
        self.handle = attention.v_proj.register_forward_hook(self._read_values)
        self.previous_observer, attention.observer = attention.observer, self

    def close(self) -> None:
        self.handle.remove()
        self.attention.observer = self.previous_observer

    def _read_values(self, _projection, args, values):
        self.values.append(values[:, :-1][self.starts].float())
        self.sizes.append(args[0].float().abs().sum(-1).mean())

    def __call__(self, attention, hidden_states, query_states, key_states, sink, attn_output):
        if self.sampled is not None:
            self._read_rows(query_states, key_states, self.sampled)
        return attn_output

    def _read_rows(self, query_states, key_states, sampled: SampledRows) -> None:
        scaling, kwargs = self.attention.scaling, self.attention.attention_kwargs()
        window = kwargs.get("sliding_window")
        logits = sampled_logits(query_states, key_states, scaling, sampled, window)
        starts = sampled.starts[:, None, :, None].expand(*logits.shape[:3], 1)
        logits_of_first_keys = logits.gather(-1, starts).squeeze(-1)
        log_sum_exps = logits.scatter(-1, starts, -torch.inf).logsumexp(-1)
        groups = query_states.shape[1] // key_states.shape[1]
        keys = _gather_rows(key_states, sampled.starts).float()
        first_queries = _gather_rows(query_states, sampled.starts).float() * scaling
        first_log_sum_exps = (first_queries * keys.repeat_interleave(groups, 1)).sum(-1)
        if (base_sinks := kwargs.get("s_aux")) is not None:  # a base's own, as in gpt-oss
            log_sum_exps = torch.logaddexp(log_sum_exps, base_sinks.float()[:, None])
            first_log_sum_exps = torch.logaddexp(first_log_sum_exps, base_sinks.float()[:, None])
        # A sampled row that only fills up the batch is left out: it sees only itself, and would pay
        # all of its attention to itself as a first token. So is a row whose sliding window does not
        # reach back to the first token, unless the window is too short for any row to do so.
        read = sampled.valid
        if window is not None and window > NEAR:
            read = read & (sampled.rows - sampled.starts < window)
        for collected, states in (
            (self.shares, (logits_of_first_keys - log_sum_exps).sigmoid()),
            (self.log_sum_exps, log_sum_exps),
            (self.first_log_sum_exps, first_log_sum_exps),
            (self.queries, _gather_rows(query_states, sampled.rows).float() * scaling),
            (self.keys, keys),
        ):
            collected.append(states.transpose(1, 2)[read])

    @property
    def has_shares(self) -> bool:
        """Whether any row was read."""
        return any(len(shares) for shares in self.shares)

    def sink_logits(self) -> torch.Tensor:
        return closest_logits(torch.cat(self.log_sum_exps), torch.cat(self.shares))

    def separation(self) -> float:
        log_sum_exps, first = torch.cat(self.log_sum_exps), torch.cat(self.first_log_sum_exps)
        gaps = (log_sum_exps.mean(0) - first.mean(0)) / log_sum_exps.std(0)
        return gaps.median().item()

    def first_share(self) -> torch.Tensor:
        return torch.cat(self.shares).mean(0)

    def mean_query(self) -> torch.Tensor:
        return torch.cat(self.queries).mean(0) * self.rope_scaling

    def first_key(self) -> torch.Tensor:
        # RoPE does not turn the first position.
        return torch.cat(self.keys).mean(0) / self.rope_scaling

    def mean_value(self) -> torch.Tensor:
        value = torch.cat(self.values).mean(0).view(-1, self.attention.head_dim)
        if not self.has_shares:  # no text is long enough to read shares from
            return value
        share = self.first_share().view(len(value), -1).mean(-1)
        return value * (share > SINK_SHARE).unsqueeze(-1)

    def mean_size(self) -> float:
        return torch.stack(self.sizes).mean().item()


def closest_logits(log_sum_exps: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Finds by bisection the constant `s` of each head with `mean sigmoid(s - LSE) = mean A`.

    Args:
        log_sum_exps: `LSE` of each query, `[rows, heads]`.
        shares: `A` of each query, in (0, 1), `[rows, heads]`.

    Returns:
        The logits, `[heads]`. Heads that pay less than `LEAST_SHARE` get the logit of that share.
    """
    target = shares.mean(0).clamp(LEAST_SHARE, 1 - LEAST_SHARE)
    low, high = log_sum_exps.amin(0) - 20, log_sum_exps.amax(0) + 20
    for _ in range(40):
        middle = (low + high) / 2
        above = (middle - log_sum_exps).sigmoid().mean(0) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _gather_rows(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows `[batch, num_rows]` of states `[batch, heads, T, head_dim]`."""
    return states.take_along_dim(rows[:, None, :, None], 2)


@torch.no_grad()
def calibrate(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> Calibration:
    """Reads the statistics of a base.

    Args:
        model: the base with its gates, which are switched off meanwhile.
        batches: `input_ids` and `position_ids`, both `[batch, T]`; positions count from 0 at the
            start of each document.
    """
    decoder = model.get_base_model().base_model  # the logits are not needed
    readers = {
        module.layer_idx: _Reader(module, attention_scaling(decoder, module.layer_idx))
        for module in model.modules()
        if isinstance(module, GatedAttention)
    }
    generator = torch.Generator().manual_seed(0)
    try:
        for batch in batches:
            starts = (batch["position_ids"][:, :-1] == 0) & (batch["position_ids"][:, 1:] == 1)
            num_rows = batch["position_ids"].shape[1] // TOKENS_PER_ROW
            sampled = sample_rows(batch["position_ids"], max(num_rows, LEAST_ROWS), generator)
            for reader in readers.values():
                reader.starts, reader.sampled = starts, sampled
            with gates_off(model):
                decoder(**batch, use_cache=False)
    finally:
        for reader in readers.values():
            reader.close()
    with_shares = {index: reader for index, reader in readers.items() if reader.has_shares}
    return Calibration(
        values={index: reader.mean_value() for index, reader in readers.items()},
        sink_logits={index: reader.sink_logits() for index, reader in with_shares.items()},
        mean_queries={index: reader.mean_query() for index, reader in with_shares.items()},
        first_keys={index: reader.first_key() for index, reader in with_shares.items()},
        first_shares={index: reader.first_share() for index, reader in with_shares.items()},
        separations={index: reader.separation() for index, reader in with_shares.items()},
        input_sizes={index: reader.mean_size() for index, reader in readers.items()},
    )
