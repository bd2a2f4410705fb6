"""Converts the norms of other families to those of Qwen3.5: `1 + w`, with norms of q and k.

All scaling is by powers of two, so that no bit of a weight is lost.
"""

import math
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scales:
    """The scaling that makes q and k norms constant in a family that has none.

    Attributes:
        residual_shift: the residual stream is multiplied by 2 to this power. The larger it is, the
            less q and k are scaled down: by about 2**-12 at 14.
        dominance: the mean squares of q and k stay below this share of eps. The norm is then
            constant to within half of this share.
    """

    residual_shift: int = 14
    dominance: float = 2.0**-26


def scale(tensors: Tensors, exponent: int, *names: str) -> None:
    """Multiplies the named tensors, those that are there, by `2**exponent`."""
    for name in names:
        if name in tensors:
            tensors[name] = tensors[name] * 2.0**exponent


def fold_norm(tensors: Tensors, norm: str, consumers: list[str]) -> None:
    """Moves powers of two from a norm into its consumers until `w - 1` keeps every bit of `w`.

    It keeps them for `w >= 1/2` and for 0. Smaller and negative weights, often 0.02 to 0.5 in
    Llama, would be rounded by up to 9% in bfloat16, so they are divided by `p = +-2**e` into
    [1/2, 1).

    Args:
        tensors: the tensors of a layer by name, changed in place.
        norm: the name of the norm's weight.
        consumers: the names of the matrices that read the norm's output.
    """
    weight = tensors[norm]
    mantissa, exponent = torch.frexp(weight)
    exact = (weight >= 0.5) | (weight == 0)
    power = torch.where(exact, 1.0, mantissa.sign() * power_of_two(exponent))
    tensors[norm] = weight / power
    if not exact.all():
        for name in consumers:
            tensors[name] = tensors[name] * power.to(tensors[name].dtype)


def balance_qk_norms(layer: Tensors) -> None:
    """Moves powers of two between q_norm and k_norm so that both reach 1/2 where possible.

    `q . k` stays exactly the same. RoPE mixes the channels i and i + head_dim/2, so a pair has one
    factor. Where both norms are small, `w - 1` still rounds.
    """
    smallest = []
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        pairs = layer[name].abs().view(2, -1)
        smallest.append(torch.where(pairs == 0, 1.0, pairs).amin(dim=0))
    shift = torch.round(torch.log2(smallest[1] / smallest[0]) / 2)
    power = power_of_two(shift).repeat(2)
    layer["self_attn.q_norm.weight"] = layer["self_attn.q_norm.weight"] * power
    layer["self_attn.k_norm.weight"] = layer["self_attn.k_norm.weight"] / power


def add_constant_qk_norms(
    layer: Tensors, head_dim: int, eps: float, scales: Scales, dtype: torch.dtype
) -> None:
    """Scales q and k by `2**-m` and adds norms that scale them back.

    `RMSNorm(x * 2**-m) * g = x * g * 2**-m / sqrt(eps + mean(x**2) * 4**-m)`, and with the mean
    far below `eps` this is `x` for `g = sqrt(eps) * 2**m`.
    """
    needed = qk_bound(layer) / math.sqrt(eps * scales.dominance)
    m = max(0, math.ceil(math.log2(max(needed, 1.0))))
    for name in "qk":
        scale(layer, -m, f"self_attn.{name}_proj.weight", f"self_attn.{name}_proj.bias")
    for name, value in zip("qk", factorize(eps * 4.0**m, dtype), strict=True):
        layer[f"self_attn.{name}_norm.weight"] = torch.full((head_dim,), value)


def factorize(target: float, dtype: torch.dtype) -> tuple[float, float]:
    """Returns `a` and `b` with `a * b` near `target`, where `dtype` holds `a - 1` and `b - 1`.

    No single bfloat16 number is close enough to `sqrt(eps) * 2**m`. The best pair over one octave
    of `a` is within 1e-4, which changes attention logits far less than bfloat16 itself does.
    """
    a = 1 + (math.sqrt(target) * torch.linspace(1, 2, 129).double()).to(dtype).double()
    b = 1 + (target / a - 1).to(dtype).double()
    best = (a * b / target - 1).abs().argmin()
    return a[best].item(), b[best].item()


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Returns exactly `2**exponent` in float32, made from its bits; `exp2` and `pow` may round."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def qk_bound(layer: Tensors) -> float:
    """Returns a bound on q and k: `|W (w * x)| <= |W w| sqrt(n)` for a normed `x`."""
    norm = layer["input_layernorm.weight"]
    bounds = []
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        rows = (layer[f"{name}.weight"] * norm).norm(dim=1) * len(norm) ** 0.5  # in float32
        if f"{name}.bias" in layer:
            rows = rows + layer[f"{name}.bias"].abs()
        bounds.append(rows.max().item())
    return max(bounds)
