"""A run whose loss or gradient is no number ends at that step, before the gates take it."""

import math

import torch
from accelerate.utils import reduce

from retrofit.utils.errors import UserError


class DivergedError(UserError):
    """The loss or its gradient is infinite or NaN."""


def check_trained(gates: dict[str, torch.Tensor], learning_rate: float) -> None:
    """
    Args:
        gates: after the last step, whose effect no later loss has shown.
        learning_rate: the highest of them.

    Raises:
        DivergedError: if one holds what is no number.
    """
    for name, gate in gates.items():
        if not gate.isfinite().all():
            raise DivergedError(
                f"training diverged: {name} is no number after the last step; lower "
                f"train.learning_rate (it is {learning_rate:g} at most), and start again in "
                "another output_dir"
            )


def check_finite(
    losses: list[torch.Tensor],
    grad_norm: torch.Tensor | float | None,
    step: int,
    learning_rate: float,
    dtype: torch.dtype,
) -> None:
    """Of several ranks all stop together.

    Args:
        losses: of the step's micro-batches, on this rank.
        grad_norm: of all gates, before it was clipped; `None` where an engine does not tell.
        step: how many are done.
        learning_rate: the highest of the gates.
        dtype: that the base computes in.

    Raises:
        DivergedError: if one of them is not finite.
    """
    norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=losses[0].device)
    loss_and_norm = torch.stack([sum(losses).float(), norm.float()])
    if bool(reduce((~loss_and_norm.isfinite()).any().float(), "sum") == 0):
        return
    loss, gradient = loss_and_norm.tolist()
    what = f"the loss is {loss:g}" if not math.isfinite(loss) else f"the gradient is {gradient:g}"
    if step == 0:
        raise DivergedError(
            f"{what} at the first step, where the gates change nothing yet: lower the weights in "
            f"objective, or the base cannot be run in {str(dtype).removeprefix('torch.')}: set "
            "model.dtype to float32"
        )
    raise DivergedError(
        f"training diverged: {what} at step {step + 1}; lower train.learning_rate (it is "
        f"{learning_rate:g} at most) or the weights in objective, and start again "
        "in another output_dir: resumed, it would come to the same"
    )
