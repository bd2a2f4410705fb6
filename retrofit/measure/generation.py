"""Greedy decoding, whatever a model's own generation config says."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase


@torch.inference_mode()
def generate_greedily(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Returns the token ids of continuations that always take the likeliest token,
    `[batch, new tokens]`, padded after their end.

    Of the model's generation config only the end-of-text tokens are heeded.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        input_ids: the prompts, `[batch, T]`, padded on the left.
        max_new_tokens: how many tokens a continuation has at most.
        attention_mask: 0 where a prompt is padded, `[batch, T]`; `None` if none is.
        **options: further arguments of `generate`.
    """
    input_ids = input_ids.to(model.device)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    own = model.generation_config
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=own.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # `generate` takes from the model's config what the given one does not say.
    model.generation_config = config
    try:
        output = model.generate(
            input_ids,
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            **options,
        )
    finally:
        model.generation_config = own
    return output[:, input_ids.shape[1] :]
