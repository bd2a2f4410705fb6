"""Measures what quantization costs a model: its perplexity with linear layers, or keys and values,
in 8 or 4 bits.

Outliers cause the cost: one activation a thousand times the usual size leaves the others few of the
255 steps that an int8 tensor has (SmoothQuant, arXiv:2211.10438, section 3).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from retrofit.measure.attention_hooks import attention_replaced
from retrofit.measure.evaluation import Count, MeasuredModel, Track
from retrofit.measure.metrics import PredictionStatistics
from retrofit.measure.predictions import predict
from retrofit.measure.sink_attention import sdpa_with_sinks
from retrofit.measure.texts import cut_windows
from retrofit.report.sections.quantization import QuantizationFigures, Scheme
from retrofit.utils.errors import UserError

_INT8 = 127  # steps on either side of 0
_STEPS = {4: 15, 8: 255}  # between the smallest and the largest value, by bits
_CACHES = {"kv8": 8, "kv4": 4}  # bits of keys and values
_BITSANDBYTES = ("int8", "nf4")


@dataclass(frozen=True)
class Quantization:
    """Measures a model with quantized linear layers, and with a quantized cache.

    Attributes:
        group: how many channels share a scale and a zero in `w4`, `kv8` and `kv4`, at most.
        length: tokens of a window.
        windows: how many windows at most.
        batch_size: windows in a forward pass.
    """

    group: Count = 64
    length: Count = 512
    windows: Annotated[int, Field(gt=1)] = 16
    batch_size: Count = 4
    name = "quantization"

    def measure(self, measured: MeasuredModel, track: Track) -> QuantizationFigures:
        """Returns, for each scheme, the perplexity, the KL divergence from the unquantized model,
        and the negative log-likelihood of each window.

        - `w8a8_per_tensor` rounds weights and inputs of linear layers to symmetric int8, with one
          scale per weight matrix and one per sequence.
        - `w8a8_per_token` does so with one scale per row of the weights and one per token.
        - `fp8` rounds weights and inputs to the 8-bit floats e4m3, with one scale per weight matrix
          and one per sequence, as vLLM's `--quantization fp8` does with one scale per batch.
        - `w4` rounds weights to 4 bits, with a scale and a zero for each `group` input channels.
        - `kv8` and `kv4` round keys and values to 8 or 4 bits, with a scale and a zero for each
          `group` channels of a token and head, as transformers' quantized cache does.
        - `int8` and `nf4` are those of bitsandbytes, left out where it is not installed.

        The output head, unmerged gates and the experts of a mixture, which are no `nn.Linear`, are
        not rounded. Of a mixture of experts, that leaves only the attention.

        Raises:
            UserError: if the weights are quantized already, or the text has only one window.
        """
        if getattr(measured.inner.config, "quantization_config", None):
            raise UserError(
                f"quantization: the weights of {measured.name} are quantized already; leave this "
                "part out"
            )
        input_ids = cut_windows(measured.documents, measured.tokenizer, self.length, self.windows)
        if len(input_ids) < 2:
            raise UserError(
                f"quantization: the text has one window of {self.length} tokens, and a standard "
                "error takes two; take a longer text, or lower quantization.length"
            )
        batches = input_ids.split(self.batch_size)
        unquantized = predict(measured.model, track(batches, "as it is"))
        figures = {"none": _figures(unquantized)}
        for scheme, rounding in self._simulated_schemes().items():
            with quantized(measured.inner, rounding):
                predictions = predict(measured.model, track(batches, scheme), unquantized)
            figures[scheme] = _figures(predictions)
        for scheme, bits in _CACHES.items():
            with cache_rounded(measured.inner, self.group, bits):
                predictions = predict(measured.model, track(batches, scheme), unquantized)
            figures[scheme] = _figures(predictions)
        for scheme in _BITSANDBYTES if find_spec("bitsandbytes") else ():
            model, _ = measured.reload(quantization=scheme)
            predictions = predict(model, track(batches, f"bitsandbytes {scheme}"), unquantized)
            figures[scheme] = _figures(predictions)
        return QuantizationFigures(schemes=figures)

    def _simulated_schemes(self) -> dict[str, "Rounding"]:
        return {
            "w8a8_per_tensor": lambda x, w: (rounded(x, (-2, -1)), rounded(w, (-2, -1))),
            "w8a8_per_token": lambda x, w: (rounded(x, (-1,)), rounded(w, (-1,))),
            "fp8": lambda x, w: (rounded_to_fp8(x), rounded_to_fp8(w)),
            "w4": lambda x, w: (x, rounded_in_groups(w, self.group)),
        }


# Turns a linear layer's input and weight into rounded ones.
Rounding = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rounded(values: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Rounds to the nearest step of symmetric int8: `s * round(x / s)` with `s = max|x| / 127` over
    `dims`."""
    scale = values.abs().amax(dims, keepdim=True).float().clamp(min=1e-30) / _INT8
    return ((values / scale).round_() * scale).to(values.dtype)


def rounded_to_fp8(values: torch.Tensor) -> torch.Tensor:
    """Rounds matrices `[..., rows, channels]` to the nearest 8-bit floats with 3 bits of mantissa
    (e4m3, arXiv:2209.05433), with a scale for each matrix, whose largest value becomes 448."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = values.abs().amax((-2, -1), keepdim=True).float().clamp(min=1e-30) / largest
    return ((values / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


def rounded_in_groups(values: torch.Tensor, group: int, bits: int = 4) -> torch.Tensor:
    """Rounds values `[..., channels]` to 4 or 8 bits, as the round-to-nearest baseline of GPTQ does
    with weights (arXiv:2210.17323): to even steps from the smallest to the largest value of each
    `group` channels, of which the last group may have fewer.
    """
    channels = values.shape[-1]
    # Zeros fill up the last group. They do not change its steps, whose range always includes 0.
    padded = F.pad(values.float(), (0, -channels % group))
    grouped = padded.unflatten(-1, (-1, group))  # [..., groups, channels of a group]
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)  # 0 stays 0
    scale = ((high - low) / _STEPS[bits]).clamp(min=1e-30)
    zero = (-low / scale).round()
    steps = ((grouped / scale).round() + zero).clamp(0, _STEPS[bits])
    return ((steps - zero) * scale).flatten(-2)[..., :channels].to(values.dtype)


@contextmanager
def cache_rounded(model: Any, group: int, bits: int) -> Iterator[None]:
    """Run the model as from a cache of `bits`: its keys, after RoPE, and values are rounded before
    attention reads them."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        key, value = (rounded_in_groups(states, group, bits) for states in (key, value))
        return sdpa_with_sinks(module, query, key, value, attention_mask, **kwargs)

    with attention_replaced(model, attention):
        yield


@contextmanager
def quantized(
    model: Any, rounding: Rounding, names: Collection[str] | None = None
) -> Iterator[None]:
    """Run the model with the `nn.Linear` of its decoder layers on rounded inputs and weights.

    Each layer rounds its weight when it runs, so no second copy of all weights is held.

    Args:
        model: a transformers model.
        rounding: how inputs and weights are rounded.
        names: the names of those that are rounded, such as `down_proj`; `None` for all.
    """
    with ExitStack() as stack:
        for path, module in model.get_decoder().layers.named_modules():
            if names is not None and path.rpartition(".")[2] not in names:
                continue
            if isinstance(module, nn.Linear):
                stack.enter_context(layer_rounded(module, rounding))
        yield


@contextmanager
def layer_rounded(module: nn.Linear, rounding: Rounding) -> Iterator[None]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        x, weight = rounding(x, module.weight)
        return F.linear(x, weight, module.bias)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _figures(quantized: PredictionStatistics) -> Scheme:
    return Scheme(
        perplexity=quantized.perplexity,
        kl=quantized.kl_to_base or 0.0,
        nll_by_window=quantized.nll_by_window,
    )
