"""What is read off the base before training, from some of its texts.

**Centers**: what a sink adds to each head, the value of its first token. A head that pays the sink
a share `A` of its attention puts out `(1 - A) * Y + A * v`: less of what the rest of the text
gives, `Y`, and that much of the first token's value `v`. A gate that takes the sink's place by
scaling alone loses the second part. On SmolLM2 that costs 88% of perplexity even where every gate
is exactly `1 - A`; with `v` put back it is 1% (scripts/oracle.py), for `v` is nearly the same in
every text. So the gate closes on `v` instead of on nothing: `v + g * (Y - v)`.

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
from retrofit.gates import gates_off

STEP = 0.8  # of a logit, at most, at the highest rate


@dataclass(frozen=True)
class Calibration:
    """What the base shows.

    Attributes:
        values: by layer, the mean value state of documents' first tokens,
            `[num_key_value_heads, head_dim]` in float32.
        input_sizes: by layer, the mean of `sum |X|` over tokens, `X` `[hidden_size]` what a gate
            reads.
    """

    values: dict[int, torch.Tensor]
    input_sizes: dict[int, float]

    @property
    def learning_rates(self) -> dict[int, float]:
        """By layer, the rate that moves a gate's logit by `STEP` a step at most."""
        return {index: STEP / size for index, size in self.input_sizes.items()}


@torch.no_grad()
def calibrate(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> Calibration:
    """Read the base.

    Args:
        model: with gates, which are off for this.
        batches: `input_ids` and `position_ids`, both `[batch, T]`, positions from 0 at the start of
            each document.
    """
    sums: dict[int, torch.Tensor] = {}
    sizes: dict[int, list[torch.Tensor]] = {}
    documents = 0
    starts = torch.empty(0)

    def see(index: int):
        def hook(_module, args, values):
            first = values[:, :-1][starts].float().sum(0)
            sums[index] = sums.get(index, 0) + first
            sizes.setdefault(index, []).append(args[0].float().abs().sum(-1).mean())

        return hook

    decoder = model.get_base_model().base_model  # without the logits
    attentions = [module for module in model.modules() if isinstance(module, GatedAttention)]
    handles = [a.v_proj.register_forward_hook(see(a.layer_idx)) for a in attentions]
    try:
        for batch in batches:
            # Padding stands at position 0 too, but nothing follows it.
            starts = (batch["position_ids"][:, :-1] == 0) & (batch["position_ids"][:, 1:] == 1)
            documents += int(starts.sum())
            with gates_off(model):
                decoder(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    head_dim = attentions[0].head_dim
    values = {index: (total / documents).view(-1, head_dim) for index, total in sums.items()}
    means = {index: torch.stack(of_batches).mean().item() for index, of_batches in sizes.items()}
    return Calibration(values, means)
