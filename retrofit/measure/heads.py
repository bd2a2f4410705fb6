"""Head collapse: how many heads a model could do without.

The sink makes attention a mixture of experts: heads that look at the first token add nothing, and a
few do the work (arXiv:2602.01203). Heads are ranked by their load; the least loaded are set to zero
before `o_proj`, beside as many drawn at random: the smaller the first loss against the second, the
more of the work is left to few.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from retrofit.measure.predictions import predict
from retrofit.measure.sinks import read_model
from retrofit.measure.subject import Count, Subject, Track
from retrofit.measure.texts import cut_windows

Head = tuple[int, int]  # its layer, and its number there


@dataclass(frozen=True)
class Heads:
    """
    Attributes:
        shares: of all heads, that are zeroed.
        length: tokens of a window.
        windows: how many, at most.
        batch_size: windows in a forward pass.
        seed: of the random heads.
    """

    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.25, 0.5)
    length: Count = 512
    windows: Count = 8
    batch_size: Count = 4
    seed: int = 0
    name = "heads"

    def measure(self, subject: Subject, track: Track) -> dict[str, Any]:
        """Perplexity, and KL from the whole model, by share of the heads that are zeroed."""
        model = subject.inner
        input_ids = cut_windows(subject.documents, subject.tokenizer, self.length, self.windows)
        batches = input_ids.split(self.batch_size)
        layers, whole = read_model(model, track(batches, "loads of heads"), None)
        loads = [layer.attention.head_load if layer.attention else None for layer in layers]
        by_load = ranked(loads)
        shuffled = random.Random(self.seed).sample(by_load, len(by_load))
        figures: dict[str, Any] = {"shares": list(self.shares), "perplexity": whole.perplexity}
        for kind, order in (("least_used", by_load), ("random", shuffled)):
            figures[kind] = {"perplexity": [], "kl": []}
            for share in self.shares:
                chosen = order[: round(share * len(order))]
                with zeroed(model, chosen):
                    left = predict(model, track(batches, f"{share:.0%} of heads, {kind}"), whole)
                figures[kind]["perplexity"].append(left.perplexity)
                figures[kind]["kl"].append(left.kl_to_base)
        return figures


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
            head_dim = _head_dim(model.config)
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


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
