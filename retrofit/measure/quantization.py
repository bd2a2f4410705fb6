"""What quantization costs a model: perplexity with its linear layers in 8 or 4 bits.

Outliers are what makes it cost: one activation a thousand times the usual leaves the usual ones few
of the 255 steps that a tensor of int8 has (SmoothQuant, arXiv:2211.10438, section 3).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.metrics import PredictionStatistics
from retrofit.measure.predictions import predict
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.quantization import QuantizationFigures, Scheme

_INT8, _INT4 = 127, 15
_BITSANDBYTES = ("int8", "nf4")


@dataclass(frozen=True)
class Quantization:
    """
    Attributes:
        group: input channels that share a scale and a zero in `w4`, at most.
        length: tokens of a window.
        windows: how many, at most.
        batch_size: windows in a forward pass.
    """

    group: Count = 64
    length: Count = 512
    windows: Annotated[int, Field(gt=1)] = 16
    batch_size: Count = 4
    name = "quantization"

    def measure(self, measured: MeasuredModel, track: Track) -> QuantizationFigures:
        """Perplexity of each scheme, its KL from the same model as it is, and the mean difference
        of the log-likelihood with the standard error over windows.

        - `w8a8_per_tensor`: weights and inputs of linear layers rounded to int8, symmetric, with
          one scale a weight matrix and one a sequence.
        - `w8a8_per_token`: with one scale a row of the weights and one a token.
        - `w4`: weights rounded to 4 bits with a scale and a zero for each `group` input channels.
        - `int8`, `nf4`: bitsandbytes, as users run it; left out where it is not installed.

        The output head stays as it is, and so do gates that are not merged, and the experts of a
        mixture, which are no `nn.Linear`: of one, only attention is rounded here.
        """
        input_ids = cut_windows(measured.documents, measured.tokenizer, self.length, self.windows)
        batches = input_ids.split(self.batch_size)
        as_it_is = predict(measured.model, track(batches, "as it is"))
        figures = {"none": _figures(as_it_is, as_it_is)}
        for scheme, linear in self._simulated().items():
            with quantized(measured.inner, linear):
                found = predict(measured.model, track(batches, scheme), as_it_is)
            figures[scheme] = _figures(found, as_it_is)
        for scheme in _BITSANDBYTES if find_spec("bitsandbytes") else ():
            model, _ = measured.reload(quantization=scheme)
            found = predict(model, track(batches, f"bitsandbytes {scheme}"), as_it_is)
            figures[scheme] = _figures(found, as_it_is)
        return QuantizationFigures(schemes=figures)

    def _simulated(self) -> dict[str, "Linear"]:
        return {
            "w8a8_per_tensor": lambda x, w: (rounded(x, (-2, -1)), rounded(w, (-2, -1))),
            "w8a8_per_token": lambda x, w: (rounded(x, (-1,)), rounded(w, (-1,))),
            "w4": lambda x, w: (x, rounded_in_groups(w, self.group)),
        }


Linear = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rounded(values: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """`s * round(x / s)` with `s = max|x| / 127` over `dims`: int8, symmetric, to nearest."""
    scale = values.abs().amax(dims, keepdim=True).float().clamp(min=1e-30) / _INT8
    return ((values / scale).round_() * scale).to(values.dtype)


def rounded_in_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`[out, in]` in 4 bits: 16 even steps from the smallest to the largest of each `group` input
    channels of a row, as round-to-nearest is in GPTQ (arXiv:2210.17323) and its followers.

    Groups are as large as divides the input channels.
    """
    grouped = weight.float().unflatten(1, (-1, math.gcd(group, weight.shape[1])))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)  # 0 stays 0
    scale = ((high - low) / _INT4).clamp(min=1e-30)
    zero = (-low / scale).round()
    steps = ((grouped / scale).round() + zero).clamp(0, _INT4)
    return ((steps - zero) * scale).flatten(1).to(weight.dtype)


@contextmanager
def quantized(model: Any, linear: Linear) -> Iterator[None]:
    """Every `nn.Linear` of the decoder's layers computes with what `linear` makes of its input and
    its weight, one layer at a time: no second copy of the weights is held."""
    with ExitStack() as stack:
        for module in model.get_decoder().layers.modules():
            if isinstance(module, nn.Linear):
                stack.enter_context(_replaced(module, linear))
        yield


@contextmanager
def _replaced(module: nn.Linear, linear: Linear) -> Iterator[None]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        x, weight = linear(x, module.weight)
        return F.linear(x, weight, module.bias)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _figures(found: PredictionStatistics, base: PredictionStatistics) -> Scheme:
    difference = (found.nll - base.nll).mean(-1)
    return Scheme(
        perplexity=found.perplexity,
        kl=found.kl_to_base,
        log_ratio=difference.mean().item(),
        log_ratio_stderr=(difference.std() / len(difference) ** 0.5).item(),
    )
