"""What is read off the base before training, from some of its texts.

**Centers**: what a sink adds to each head, the value of its first token. A head that pays the sink
a share `A` of its attention puts out `(1 - A) * Y + A * v`: less of what the rest of the text
gives, `Y`, and that much of the first token's value `v`. A gate that takes the sink's place by
scaling alone loses the second part. On SmolLM2 that costs 88% of perplexity even where every gate
is exactly `1 - A`; with `v` put back it is 2% (scripts/oracle.py), for `v` is nearly the same in
every text. So the gate closes on `v` instead of on nothing: `v + g * (Y - v)`. Heads that pay no
sink have nothing to make up for, so their `v` is 0. Such are those of the first layers, whose gates
keep the massive activation from forming: closing on a first token's value would help it along.

**Sink logits**: the base's own sink is a slot whose logit changes from query to query. The constant
that comes closest takes the same share of a head's attention in the mean, `mean sigmoid(s - LSE) =
mean A` with `LSE` over all other keys. Training starts from it, with a slot of no weight yet. For
a key bias the mean first key and the mean query are read as well (`retrofit.gates.sinks`).

**The size of the gates' input**: Adam moves every weight by about the learning rate, so a step
moves a gate's logit by up to `learning_rate * sum |X|`. That sum is what the norm before it was
trained to: 13 to 130 over the layers of SmolLM2, 63 to 1,400 over those of Qwen2.5-Coder-0.5B. One
rate serves neither. The first layer, where `X` is the token alone, would hardly learn, and what a
first token becomes is settled in the first few.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from peft import PeftModel

from retrofit.adapters._family import GatedAttention
from retrofit.gates import gate_layers, gates_off
from retrofit.gates.rope import attention_scaling
from retrofit.losses.head_balance import vanilla_load
from retrofit.losses.sampled_attention import SampledRows, attention_of_rows, sample_rows

STEP = 0.8  # of a logit, at most, at the highest rate
SINK_SHARE = 0.1  # a head that pays the first token less has no sink; an even spread gives 0.005
ROWS = 32  # of each sequence, for that share and for sink logits
LEAST_SHARE = 1e-3  # of a slot: the logit of heads that have no sink


@dataclass(frozen=True)
class Calibration:
    """What the base shows.

    Attributes:
        values: by layer, the mean value state of documents' first tokens, 0 for heads that do not
            attend to them, `[num_key_value_heads, head_dim]` in float32.
        sink_logits: by layer, the constant logit closest to what a head pays first tokens,
            `[num_heads]` in float32; empty where no text is long enough to tell.
        mean_queries: by layer, what one of a key before RoPE is multiplied by to be a logit, on
            channels that do not turn: the mean query after RoPE, times all scalings, `[num_heads,
            head_dim]` in float32; empty likewise.
        first_keys: by layer, the mean key of documents' first tokens before RoPE,
            `[num_key_value_heads, head_dim]` in float32; empty likewise.
        first_shares: by layer, the mean share that a head pays first tokens, `[num_heads]` in
            float32; empty likewise.
        input_sizes: by layer, the mean of `sum |X|` over tokens, `X` `[hidden_size]` what a gate
            reads.
    """

    values: dict[int, torch.Tensor]
    sink_logits: dict[int, torch.Tensor]
    mean_queries: dict[int, torch.Tensor]
    first_keys: dict[int, torch.Tensor]
    first_shares: dict[int, torch.Tensor]
    input_sizes: dict[int, float]

    def give_to(self, model: PeftModel) -> None:
        """Let the gates of a model start from what its base shows."""
        for index, layer in gate_layers(model).items():
            for gate in layer.g_proj.values():
                if gate.center is not None:
                    gate.center.copy_(self.values[index])
                if gate.sink_odds is not None and index in self.sink_logits:
                    gate.set_calibration(
                        self.sink_logits[index], self.mean_queries[index], self.first_keys[index]
                    )

    def cpu(self) -> "Calibration":
        """The same on the CPU, to be told to other ranks."""
        by_layer = ("values", "sink_logits", "mean_queries", "first_keys", "first_shares")
        moved = {
            name: {index: tensor.cpu() for index, tensor in getattr(self, name).items()}
            for name in by_layer
        }
        return replace(self, **moved)

    def summary(self) -> str:
        """The sinks of the base in one line; empty where no text is long enough to tell."""
        if not self.first_shares:
            return ""
        shares = torch.cat([*self.first_shares.values()])
        by_layer = {index: share.mean().item() for index, share in self.first_shares.items()}
        most = max(by_layer, key=lambda index: by_layer[index])
        return (
            f"the base pays its first token {shares.mean():.2f} of its attention in the mean, and "
            f"{by_layer[most]:.2f} in layer {most}; {(shares > SINK_SHARE).sum()} of {len(shares)} "
            f"heads pay it more than {SINK_SHARE}"
        )

    @property
    def learning_rates(self) -> dict[int, float]:
        """By layer, the rate that moves a gate's logit by `STEP` a step at most."""
        return {index: STEP / size for index, size in self.input_sizes.items()}


class _Reader:
    """Reads one layer as it runs, called as `GatedAttention.observer`."""

    def __init__(self, attention: GatedAttention, rope_scaling: float):
        self.attention = attention
        self.rope_scaling = rope_scaling
        self.starts = torch.empty(0)  # bool [batch, T - 1]: the first tokens of documents
        self.sampled: SampledRows | None = None
        self.values: list[torch.Tensor] = []  # [documents, heads * head_dim]
        self.sizes: list[torch.Tensor] = []
        self.shares: list[torch.Tensor] = []  # [rows, heads]
        self.others: list[torch.Tensor] = []  # [rows, heads], log-sum-exp of all other keys
        self.queries: list[torch.Tensor] = []  # [rows, heads, head_dim]
        self.keys: list[torch.Tensor] = []  # [rows, kv_heads, head_dim], of first tokens
        self.handle = attention.v_proj.register_forward_hook(self._read_values)
        self.before, attention.observer = attention.observer, self

    def close(self) -> None:
        self.handle.remove()
        self.attention.observer = self.before

    def _read_values(self, _projection, args, values):
        self.values.append(values[:, :-1][self.starts].float())
        self.sizes.append(args[0].float().abs().sum(-1).mean())

    def __call__(self, attention, hidden_states, query_states, key_states, sink, attn_output):
        if self.sampled is not None:
            self._read_rows(query_states, key_states, self.sampled)
        return attn_output

    def _read_rows(self, query_states, key_states, sampled: SampledRows) -> None:
        weights = attention_of_rows(self.attention, query_states, key_states, sampled)
        shares = 1 - vanilla_load(weights, sampled.starts)
        queries = _of_rows(query_states, sampled.rows) * self.attention.scaling
        groups = query_states.shape[1] // key_states.shape[1]
        keys = _of_rows(key_states, sampled.starts)
        logits = (queries * keys.repeat_interleave(groups, 1)).sum(-1, dtype=torch.float32)
        # `A = sigmoid(logit - LSE)` of the first key.
        others = logits - shares.logit(eps=1e-7)
        # A row that only fills up sees only itself, and would pay all to its own first token.
        for seen, states in (
            (self.shares, shares),
            (self.others, others),
            (self.queries, queries.float()),
            (self.keys, keys.float()),
        ):
            seen.append(states.transpose(1, 2)[sampled.valid])

    def sink_logits(self) -> torch.Tensor:
        return closest_logits(torch.cat(self.others), torch.cat(self.shares))

    def first_share(self) -> torch.Tensor:
        return torch.cat(self.shares).mean(0)

    def mean_query(self) -> torch.Tensor:
        return torch.cat(self.queries).mean(0) * self.rope_scaling

    def first_key(self) -> torch.Tensor:
        # RoPE does not turn the first position.
        return torch.cat(self.keys).mean(0) / self.rope_scaling

    def mean_value(self) -> torch.Tensor:
        value = torch.cat(self.values).mean(0).view(-1, self.attention.head_dim)
        if not self.shares:  # no text is long enough to tell
            return value
        share = self.first_share().view(len(value), -1).mean(-1)
        return value * (share > SINK_SHARE).unsqueeze(-1)

    def mean_size(self) -> float:
        return torch.stack(self.sizes).mean().item()


def closest_logits(others: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The constant `s` of each head with `mean sigmoid(s - LSE) = mean A`, by bisection.

    Args:
        others: `LSE` of each query, `[rows, heads]`.
        shares: `A` of each query, in (0, 1), `[rows, heads]`.

    Returns:
        `[heads]`. Heads that pay less than `LEAST_SHARE` get the logit of that share.
    """
    wanted = shares.mean(0).clamp(LEAST_SHARE, 1 - LEAST_SHARE)
    low, high = others.amin(0) - 20, others.amax(0) + 20
    for _ in range(40):
        middle = (low + high) / 2
        above = (middle - others).sigmoid().mean(0) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _of_rows(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of `[batch, heads, T, head_dim]` the rows `[batch, num_rows]`."""
    index = rows[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
    return states.gather(2, index)


@torch.no_grad()
def calibrate(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> Calibration:
    """Read the base.

    Args:
        model: with gates, which are off for this.
        batches: `input_ids` and `position_ids`, both `[batch, T]`, positions from 0 at the start of
            each document.
    """
    decoder = model.get_base_model().base_model  # without the logits
    readers = {
        module.layer_idx: _Reader(module, attention_scaling(decoder, module.layer_idx))
        for module in model.modules()
        if isinstance(module, GatedAttention)
    }
    generator = torch.Generator().manual_seed(0)
    try:
        for batch in batches:
            starts = (batch["position_ids"][:, :-1] == 0) & (batch["position_ids"][:, 1:] == 1)
            sampled = sample_rows(batch["position_ids"], ROWS, generator)
            for reader in readers.values():
                reader.starts, reader.sampled = starts, sampled
            with gates_off(model):
                decoder(**batch, use_cache=False)
    finally:
        for reader in readers.values():
            reader.close()
    with_shares = {index: reader for index, reader in readers.items() if reader.shares}
    return Calibration(
        values={index: reader.mean_value() for index, reader in readers.items()},
        sink_logits={index: reader.sink_logits() for index, reader in with_shares.items()},
        mean_queries={index: reader.mean_query() for index, reader in with_shares.items()},
        first_keys={index: reader.first_key() for index, reader in with_shares.items()},
        first_shares={index: reader.first_share() for index, reader in with_shares.items()},
        input_sizes={index: reader.mean_size() for index, reader in readers.items()},
    )
