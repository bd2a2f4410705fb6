"""Measures head collapse: how many heads a model could do without.

The sink makes attention a mixture of experts: heads that look at the first token add nothing, and a
few heads do the work (arXiv:2602.01203). Heads are ranked by their load, and the least loaded are
set to zero before `o_proj`. For comparison, as many random heads are zeroed, the same ones in every
model. The less the least loaded heads cost compared with the random ones, the fewer heads do the
work.

In a merged checkpoint the centers of the gates are part of a bias, so a head that is set to zero
still puts out its center. Compare runs with runs, and merged checkpoints with each other.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.metrics import TAIL, PredictionStatistics
from retrofit.measure.predictions import predict
from retrofit.measure.sinks import read_model
from retrofit.measure.texts import cut_windows
from retrofit.models.base_config import head_dim_of
from retrofit.report.sections.heads import HeadsFigures, Zeroed

Head = tuple[int, int]  # the layer's index, and the head's index in that layer


@dataclass(frozen=True)
class Heads:
    """Measures what a model loses without some of its heads.

    Attributes:
        shares: the shares of all heads to zero, at least one head.
        length: tokens of a window.
        windows: how many windows at most.
        batch_size: windows in a forward pass.
        draws: how often random heads are drawn.
        seed: the seed of the draws.
    """

    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        0.1,
        0.25,
        0.5,
    )
    length: Annotated[int, Field(ge=TAIL)] = 512
    windows: Count = 8
    batch_size: Count = 4
    draws: Count = 3
    seed: int = 0
    name = "heads"

    def measure(self, measured: MeasuredModel, track: Track) -> HeadsFigures:
        """Returns the perplexity, and the KL divergence from the whole model, by share of zeroed
        heads. Figures of random heads are means over the draws, with the range of the KL."""
        model = measured.inner
        input_ids = cut_windows(measured.documents, measured.tokenizer, self.length, self.windows)
        batches = input_ids.split(self.batch_size)
        layers, whole = read_model(model, track(batches, "loads of heads"), None)
        loads = [layer.attention.head_load if layer.attention else None for layer in layers]
        by_load = ranked(loads)
        predict_without = partial(self._predict_without, model, batches, whole, track)
        rng = random.Random(self.seed)
        shuffled = [rng.sample(sorted(by_load), len(by_load)) for _ in range(self.draws)]
        by_draw = [predict_without(order, "random") for order in shuffled]
        by_share = list(zip(*by_draw, strict=True))
        random_kl = [[kl for _, kl in draws] for draws in by_share]
        least_used = predict_without(by_load, "least used")
        return HeadsFigures(
            shares=list(self.shares),
            perplexity=whole.perplexity,
            least_used=Zeroed(
                perplexity=[perplexity for perplexity, _ in least_used],
                kl=[kl for _, kl in least_used],
            ),
            random=Zeroed(
                perplexity=[fmean(perplexity for perplexity, _ in draws) for draws in by_share],
                kl=[fmean(draws) for draws in random_kl],
                kl_range=[[min(draws), max(draws)] for draws in random_kl],
            ),
        )

    def _predict_without(
        self,
        model: Any,
        batches: Sequence[torch.Tensor],
        whole: PredictionStatistics,
        track: Track,
        order: Sequence[Head],
        kind: str,
    ) -> list[tuple[float, float]]:
        """Returns perplexity and KL divergence without the first heads of `order`, by share."""
        figures = []
        for share in self.shares:
            with zeroed(model, order[: max(1, round(share * len(order)))]):
                predictions = predict(
                    model, track(batches, f"without {share:.0%} of heads, {kind}"), whole
                )
            figures.append((predictions.perplexity, predictions.kl_to_base or 0.0))
        return figures


def ranked(loads: Sequence[Sequence[float] | None]) -> list[Head]:
    """Returns all heads of all layers, the least loaded first.

    Args:
        loads: the load by layer and head, `None` for a layer without softmax attention.
    """
    heads = [
        (layer, head)
        for layer, head_loads in enumerate(loads)
        for head in range(len(head_loads or ()))
    ]
    return sorted(heads, key=lambda head: loads[head[0]][head[1]])  # type: ignore[index]


@contextmanager
def zeroed(model: Any, heads: Sequence[Head]) -> Iterator[None]:
    """Run the model with zeros in place of the outputs of these heads, where `o_proj` reads them:
    after the gate and the center."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    with ExitStack() as stack:
        for layer, layer_heads in by_layer.items():
            o_proj = _o_proj(model.get_decoder().layers[layer])
            head_dim = head_dim_of(model.config)
            stack.enter_context(o_proj.register_forward_pre_hook(_zeroing(layer_heads, head_dim)))
        yield


def _zeroing(heads: Sequence[int], head_dim: int):
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        by_head = inputs[0].unflatten(-1, (-1, head_dim)).clone()  # [batch, T, heads, head_dim]
        by_head[..., heads, :] = 0
        return (by_head.flatten(-2),)

    return hook


def _o_proj(layer: nn.Module) -> nn.Module:
    return next(module for name, module in layer.named_modules() if name.endswith("o_proj"))
