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
    **options: Any,
) -> list[int]:
    """Returns the token ids of a continuation that always takes the likeliest token.

    Sampling and penalties in the model's generation config are ignored; its end-of-text tokens are
    not.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        input_ids: the prompt, `[1, T]`.
        max_new_tokens: how many tokens the continuation has at most.
        **options: further arguments of `generate`.
    """
    input_ids = input_ids.to(model.device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, **options
    )
    return output[0, input_ids.shape[1] :].tolist()
