"""Head collapse: how many heads a model could do without.

The sink makes attention a mixture of experts: heads that look at the first token add nothing, and a
few do the work (arXiv:2602.01203). Heads are ranked by their load; the least loaded are set to zero
before `o_proj`, beside as many drawn at random, the same ones in every model: the smaller the first
loss against the second, the more of the work is left to few.
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
from retrofit.measure.metrics import PredictionStatistics
from retrofit.measure.predictions import predict
from retrofit.measure.sinks import read_model
from retrofit.measure.texts import cut_windows
from retrofit.models.base_config import head_dim_of
from retrofit.report.sections.heads import HeadsFigures, Zeroed

Head = tuple[int, int]  # its layer, and its number there


@dataclass(frozen=True)
class Heads:
    """
    Attributes:
        shares: of all heads, that are zeroed.
        length: tokens of a window.
        windows: how many, at most.
        batch_size: windows in a forward pass.
        draws: of random heads.
        seed: of the draws.
    """

    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        0.1,
        0.25,
        0.5,
    )
    length: Count = 512
    windows: Count = 8
    batch_size: Count = 4
    draws: Count = 3
    seed: int = 0
    name = "heads"

    def measure(self, measured: MeasuredModel, track: Track) -> HeadsFigures:
        """Perplexity, and KL from the whole model, by share of the heads that are zeroed; of
        random ones the means over the draws, and the range of the KL."""
        model = measured.inner
        input_ids = cut_windows(measured.documents, measured.tokenizer, self.length, self.windows)
        batches = input_ids.split(self.batch_size)
        layers, whole = read_model(model, track(batches, "loads of heads"), None)
        loads = [layer.attention.head_load if layer.attention else None for layer in layers]
        by_load = ranked(loads)
        lost = partial(self._lost, model, batches, whole, track)
        rng = random.Random(self.seed)
        shuffled = [rng.sample(sorted(by_load), len(by_load)) for _ in range(self.draws)]
        drawn = [lost(order, "random") for order in shuffled]
        kl = [[each[1] for each in by_share] for by_share in zip(*drawn, strict=True)]
        least = lost(by_load, "least used")
        return HeadsFigures(
            shares=list(self.shares),
            perplexity=whole.perplexity,
            least_used=Zeroed(
                perplexity=[each[0] for each in least], kl=[each[1] for each in least]
            ),
            random=Zeroed(
                perplexity=[
                    fmean(each[0] for each in by_share) for by_share in zip(*drawn, strict=True)
                ],
                kl=[fmean(each) for each in kl],
                kl_range=[[min(each), max(each)] for each in kl],
            ),
        )

    def _lost(
        self,
        model: Any,
        batches: Sequence[torch.Tensor],
        whole: PredictionStatistics,
        track: Track,
        order: Sequence[Head],
        kind: str,
    ) -> list[tuple[float, float]]:
        """Perplexity and KL without the first heads of an order, by share."""
        found = []
        for share in self.shares:
            with zeroed(model, order[: round(share * len(order))]):
                left = predict(
                    model, track(batches, f"without {share:.0%} of heads, {kind}"), whole
                )
            found.append((left.perplexity, left.kl_to_base or 0.0))
        return found


def ranked(loads: Sequence[Sequence[float] | None]) -> list[Head]:
    """All heads of all layers, the least loaded first.

    Args:
        loads: by layer and head, `None` for a layer without softmax attention.
    """
    heads = [(layer, head) for layer, each in enumerate(loads) for head in range(len(each or ()))]
    return sorted(heads, key=lambda head: loads[head[0]][head[1]])  # type: ignore[index]


@contextmanager
def zeroed(model: Any, heads: Sequence[Head]) -> Iterator[None]:
    """These heads put out zeros: what `o_proj` reads of them, behind gate and center."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    with ExitStack() as stack:
        for layer, own in by_layer.items():
            o_proj = _o_proj(model.get_decoder().layers[layer])
            head_dim = head_dim_of(model.config)
            stack.enter_context(o_proj.register_forward_pre_hook(_zeroing(own, head_dim)))
        yield


def _zeroing(heads: Sequence[int], head_dim: int):
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        by_head = inputs[0].unflatten(-1, (-1, head_dim)).clone()
        by_head[..., heads, :] = 0
        return (by_head.flatten(-2),)

    return hook


def _o_proj(layer: nn.Module) -> nn.Module:
    return next(module for name, module in layer.named_modules() if name.endswith("o_proj"))
