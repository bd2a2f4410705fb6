"""What is read off the base before training, from some of its texts.

**Centers**: what a sink adds to each head, the value of its first token. A head that pays the sink
a share `A` of its attention puts out `(1 - A) * Y + A * v`: less of what the rest of the text
gives, `Y`, and that much of the first token's value `v`. A gate that takes the sink's place by
scaling alone loses the second part. On SmolLM2 that costs 88% of perplexity even where every gate
is exactly `1 - A`; with `v` put back it is 2% (scripts/oracle.py), for `v` is nearly the same in
every text. So the gate closes on `v` instead of on nothing: `v + g * (Y - v)`. Heads that pay no
sink have nothing to make up for, so their `v` is 0. Such are those of the first layers, whose gates
keep the massive activation from forming: closing on a first token's value would help it along.

**The size of the gates' input**: Adam moves every weight by about the learning rate, so a step
moves a gate's logit by up to `learning_rate * sum |X|`. That sum is what the norm before it was
trained to: 13 to 130 over the layers of SmolLM2, 63 to 1,400 over those of Qwen2.5-Coder-0.5B. One
rate serves neither. The first layer, where `X` is the token alone, would hardly learn, and what a
first token becomes is settled in the first few.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import PeftModel

from retrofit.adapters._family import GatedAttention
from retrofit.balance import vanilla_load
from retrofit.gates import gates_off
from retrofit.sampling import SampledRows, attention_of_rows, sample_rows

STEP = 0.8  # of a logit, at most, at the highest rate
SINK_SHARE = 0.1  # a head that pays the first token less has no sink; an even spread gives 0.005
ROWS = 32  # of each sequence, for that share


@dataclass(frozen=True)
class Calibration:
    """What the base shows.

    Attributes:
        values: by layer, the mean value state of documents' first tokens, 0 for heads that do not
            attend to them, `[num_key_value_heads, head_dim]` in float32.
        input_sizes: by layer, the mean of `sum |X|` over tokens, `X` `[hidden_size]` what a gate
            reads.
    """

    values: dict[int, torch.Tensor]
    input_sizes: dict[int, float]

    @property
    def learning_rates(self) -> dict[int, float]:
        """By layer, the rate that moves a gate's logit by `STEP` a step at most."""
        return {index: STEP / size for index, size in self.input_sizes.items()}


class _Reader:
    """Reads one layer as it runs, called as `GatedAttention.auxiliary`."""

    def __init__(self, attention: GatedAttention):
        self.attention = attention
        self.starts = torch.empty(0)  # bool [batch, T - 1]: the first tokens of documents
        self.sampled: SampledRows | None = None
        self.values: list[torch.Tensor] = []  # [documents, heads * head_dim]
        self.sizes: list[torch.Tensor] = []
        self.shares: list[torch.Tensor] = []  # [rows, heads]
        self.handle = attention.v_proj.register_forward_hook(self._read_values)
        self.auxiliary, attention.auxiliary = attention.auxiliary, self

    def close(self) -> None:
        self.handle.remove()
        self.attention.auxiliary = self.auxiliary

    def _read_values(self, _projection, args, values):
        self.values.append(values[:, :-1][self.starts].float())
        self.sizes.append(args[0].float().abs().sum(-1).mean())

    def __call__(self, attention, hidden_states, query_states, key_states, attn_output):
        if self.sampled is not None:
            weights = attention_of_rows(attention, query_states, key_states, self.sampled)
            shares = 1 - vanilla_load(weights, self.sampled.starts)
            # A row that only fills up sees itself alone, and would pay its own first token all.
            self.shares.append(shares.transpose(1, 2)[self.sampled.counts])
        return attn_output

    def mean_value(self) -> torch.Tensor:
        value = torch.cat(self.values).mean(0).view(-1, self.attention.head_dim)
        if not self.shares:  # no text is long enough to tell
            return value
        share = torch.cat(self.shares).mean(0).view(len(value), -1).mean(-1)
        return value * (share > SINK_SHARE).unsqueeze(-1)

    def mean_size(self) -> float:
        return torch.stack(self.sizes).mean().item()


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
        module.layer_idx: _Reader(module)
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
    return Calibration(
        {index: reader.mean_value() for index, reader in readers.items()},
        {index: reader.mean_size() for index, reader in readers.items()},
    )
