"""Shows where four of a model's layers attend, and how the model continues a few prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from retrofit.measure.attention_hooks import attention_watched
from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.generation import generate_greedily
from retrofit.measure.metrics import left_by_slot
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.examples import ExamplesFigures, Generation, Maps

_LAYERS_SHOWN = 4


@dataclass(frozen=True)
class Examples:
    """Collects attention maps and greedy continuations.

    Attributes:
        tokens: how many tokens of the text an attention map covers, few enough to be seen.
        prompt: how many tokens a prompt has: the first ones of a window.
        prompts: how many prompts are continued.
        new_tokens: how many tokens a continuation has.
    """

    tokens: Count = 48
    prompt: Count = 48
    prompts: Count = 3
    new_tokens: Count = 64
    name = "examples"

    def measure(self, measured: MeasuredModel, track: Track) -> ExamplesFigures:
        """Returns the attention of four layers over the first tokens, averaged over heads,
        `[queries, keys]`, as arXiv:2505.06708 shows it, and greedy continuations of prompts."""
        model, tokenizer = measured.inner, measured.tokenizer
        length = max(self.tokens, self.prompt)
        input_ids = cut_windows(measured.documents, tokenizer, length, self.prompts)
        map_tokens = input_ids[0, : self.tokens]
        generations = []
        for prompt in track(input_ids[:, : self.prompt], "examples"):
            (token_ids,) = generate_greedily(
                model, tokenizer, prompt[None], self.new_tokens
            ).tolist()
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
            generations.append(Generation(prompt=tokenizer.decode(prompt), text=text))
        return ExamplesFigures(
            maps=attention_maps(model, map_tokens),
            tokens=[tokenizer.decode([token]) for token in map_tokens],
            generations=generations,
        )


@torch.inference_mode()
def attention_maps(model: Any, input_ids: torch.Tensor) -> Maps:
    """Returns the attention weights of four layers, averaged over heads.

    The layers are evenly spaced among those with softmax attention: `layers` has their indices and
    `shares` a `[T, T]` matrix of each.
    """
    maps: dict[int, torch.Tensor] = {}

    def watch(module, query_states, key_states, scaling, attention_mask, sink_logits):
        # [batch, kv_heads, groups, T, head_dim]
        queries = query_states.float().unflatten(1, (key_states.shape[1], -1))
        # [batch, heads, T, T]
        logits = (queries @ key_states.float().unsqueeze(2).mT * scaling).flatten(1, 2)
        future = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1)  # [T, T]
        hidden = future if attention_mask is None else ~attention_mask
        logits = logits.masked_fill(hidden, -torch.inf)
        weights = logits.softmax(-1)
        if sink_logits is not None:
            weights *= left_by_slot(logits.logsumexp(-1), sink_logits).unsqueeze(-1)
        maps[module.layer_idx] = weights.mean((0, 1)).cpu()  # [T, T]

    with attention_watched(model, watch):
        model.get_decoder()(input_ids[None].to(model.device), use_cache=False)
    layers = _evenly_spaced(sorted(maps))
    return Maps(layers=layers, shares=[maps[layer].tolist() for layer in layers])


def _evenly_spaced(layers: Sequence[int]) -> list[int]:
    """Returns the first layer, the last, and those evenly between them."""
    last = len(layers) - 1
    places = {round(last * step / (_LAYERS_SHOWN - 1)) for step in range(_LAYERS_SHOWN)}
    return [layers[place] for place in sorted(places)]
