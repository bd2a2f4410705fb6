"""What is read off the base before training, from some of its texts.

**Centers**: what a sink adds to each head, the value of its first token. A head that pays the sink
a share `A` of its attention puts out `(1 - A) * Y + A * v`: less of what the rest of the text
gives, `Y`, and that much of the first token's value `v`. A gate that takes the sink's place by
scaling alone loses the second part. On SmolLM2 that costs 88% of perplexity even where every gate
is exactly `1 - A`; with `v` put back it is 1% (scripts/oracle.py), for `v` is nearly the same in
every text. So the gate closes on `v` instead of on nothing: `v + g * (Y - v)`.

**The size of the gates' input**: Adam moves every weight by about the learning rate, so a step
moves a gate's logit by up to `learning_rate * sum |X|`. That sum is 76 in SmolLM2 and 830 in
Qwen2.5-Coder-0.5B, as the norm before it is trained: one learning rate does not serve both.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import PeftModel

from retrofit.adapters._family import GatedAttention
from retrofit.gates import gates_off

STEP = 0.8  # of a logit, at most, at the highest rate: 1e-2 on SmolLM2, where it was tuned


@dataclass(frozen=True)
class Calibration:
    """What the base shows.

    Attributes:
        values: by layer, the mean value state of documents' first tokens,
            `[num_key_value_heads, head_dim]` in float32.
        input_size: mean of `sum |X|` over tokens and layers, `X` `[hidden_size]` what a gate reads.
    """

    values: dict[int, torch.Tensor]
    input_size: float

    @property
    def learning_rate(self) -> float:
        """The rate that moves a gate's logit by `STEP` a step at most."""
        return STEP / self.input_size


@torch.no_grad()
def calibrate(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> Calibration:
    """Read the base.

    Args:
        model: with gates, which are off for this.
        batches: `input_ids` and `position_ids`, both `[batch, T]`, positions from 0 at the start of
            each document.
    """
    sums: dict[int, torch.Tensor] = {}
    sizes: list[torch.Tensor] = []
    documents = 0
    starts = torch.empty(0)

    def see(index: int):
        def hook(_module, args, values):
            first = values[:, :-1][starts].float().sum(0)
            sums[index] = sums.get(index, 0) + first
            sizes.append(args[0].float().abs().sum(-1).mean())

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
    return Calibration(values, torch.stack(sizes).mean().item())
