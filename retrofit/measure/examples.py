"""A look at a model: where four of its layers attend, and how it goes on from a few prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from retrofit.measure.attention_hooks import attention_watched
from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.metrics import left_by_slot
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.examples import ExamplesFigures, Generation, Maps

_LAYERS_SHOWN = 4


@dataclass(frozen=True)
class Examples:
    """
    Attributes:
        tokens: of the attention maps: the first of the text, few enough to be seen.
        prompt: tokens of a prompt, the first of a window.
        prompts: how many.
        new_tokens: of a greedy continuation.
    """

    tokens: Count = 48
    prompt: Count = 48
    prompts: Count = 3
    new_tokens: Count = 64
    name = "examples"

    def measure(self, measured: MeasuredModel, track: Track) -> ExamplesFigures:
        """Attention of four layers over the first tokens, mean over heads, `[queries, keys]`, as
        arXiv:2505.06708 shows it, and greedy text."""
        model, tokenizer = measured.inner, measured.tokenizer
        length = max(self.tokens, self.prompt)
        input_ids = cut_windows(measured.documents, tokenizer, length, self.prompts)
        shown = input_ids[0, : self.tokens]
        generations = []
        for row in track(input_ids[:, : self.prompt], "examples"):
            with torch.inference_mode():
                output = model.generate(
                    row[None].to(model.device),
                    attention_mask=torch.ones_like(row[None]).to(model.device),
                    max_new_tokens=self.new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            text = tokenizer.decode(output[0, self.prompt :], skip_special_tokens=True)
            generations.append(Generation(prompt=tokenizer.decode(row), text=text))
        return ExamplesFigures(
            maps=attention_maps(model, shown),
            tokens=[tokenizer.decode([token]) for token in shown],
            generations=generations,
        )


@torch.inference_mode()
def attention_maps(model: Any, input_ids: torch.Tensor) -> Maps:
    """What each query pays to each key, mean over heads, of four layers evenly apart among those
    with softmax attention: `layers` and their `shares`, `[T, T]` each."""
    seen: dict[int, torch.Tensor] = {}

    def watch(module, query_states, key_states, scaling, attention_mask, sink_logits):
        queries = query_states.float().unflatten(1, (key_states.shape[1], -1))
        logits = (queries @ key_states.float().unsqueeze(2).mT * scaling).flatten(1, 2)
        future = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1)
        hidden = future if attention_mask is None else ~attention_mask
        logits = logits.masked_fill(hidden, -torch.inf)
        weights = logits.softmax(-1)
        if sink_logits is not None:
            weights *= left_by_slot(logits.logsumexp(-1), sink_logits).unsqueeze(-1)
        seen[module.layer_idx] = weights.mean((0, 1)).cpu()

    with attention_watched(model, watch):
        model.get_decoder()(input_ids[None].to(model.device), use_cache=False)
    layers = _spread(sorted(seen))
    return Maps(layers=layers, shares=[seen[layer].tolist() for layer in layers])


def _spread(layers: Sequence[int]) -> list[int]:
    """The first, the last, and what lies evenly between."""
    last = len(layers) - 1
    places = {round(last * step / (_LAYERS_SHOWN - 1)) for step in range(_LAYERS_SHOWN)}
    return [layers[place] for place in sorted(places)]
