"""What a sink adds to each head, read off the base: the value of its first token.

A head that pays the sink a share `A` of its attention puts out `(1 - A) * Y + A * v`: less of what
the rest of the text gives, `Y`, and that much of the first token's value `v`. A gate that takes the
sink's place by scaling alone loses the second part. On SmolLM2 that costs 88% of perplexity even
where every gate is exactly `1 - A`; with `v` put back it is 1% (scripts/oracle.py), for `v` is
nearly the same in every text. So the gate closes on `v` instead of on nothing: `v + g * (Y - v)`.
"""

from collections.abc import Iterable

import torch
from peft import PeftModel

from retrofit.adapters._family import GatedAttention
from retrofit.gates import gates_off


@torch.no_grad()
def first_token_values(
    model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """The mean value state of documents' first tokens in the base.

    Args:
        model: with gates, which are off for this.
        batches: `input_ids` and `position_ids`, both `[batch, T]`, positions from 0 at the start of
            each document.

    Returns:
        By layer `[num_key_value_heads, head_dim]`, in float32.
    """
    sums: dict[int, torch.Tensor] = {}
    documents = 0
    starts = torch.empty(0)

    def see(index: int):
        def hook(_module, _args, values):
            first = values[:, :-1][starts].float().sum(0)
            sums[index] = sums.get(index, 0) + first

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
    return {index: (total / documents).view(-1, head_dim) for index, total in sums.items()}
