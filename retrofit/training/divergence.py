"""Ends a run at the step whose loss or gradient is not finite, before the gates are updated."""

import math

import torch
from accelerate.utils import reduce

from retrofit.utils.errors import UserError


class DivergedError(UserError):
    """The loss, its gradient or a gate is infinite or NaN."""


def check_gates_finite(gates: dict[str, torch.Tensor], learning_rate: float) -> None:
    """Checks the gates after the last step, whose effect no later loss has shown.

    Args:
        gates: the trained parameters by name.
        learning_rate: the highest learning rate of any gate.

    Raises:
        DivergedError: if a gate holds NaN or an infinity.
    """
    for name, gate in gates.items():
        if not gate.isfinite().all():
            raise DivergedError(
                f"training diverged: {name} is not finite after the last step; lower "
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
    """Checks the losses and the gradient of a step. If one rank fails, all of them do.

    Args:
        losses: the losses of the step's micro-batches on this rank.
        grad_norm: the norm of the gradient of all gates before clipping; `None` if the training
            engine does not report it.
        step: the number of steps done before this one.
        learning_rate: the highest learning rate of any gate.
        dtype: the dtype that the base computes in.

    Raises:
        DivergedError: if a loss or the gradient is not finite.
    """
    norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=losses[0].device)
    loss_and_norm = torch.stack([sum(losses).float(), norm.float()])
    if bool(reduce((~loss_and_norm.isfinite()).any().float(), "sum") == 0):
        return
    loss, gradient = loss_and_norm.tolist()
    is_loss = not math.isfinite(loss)
    problem = f"the loss is {loss:g}" if is_loss else f"the gradient is {gradient:g}"
    if step == 0:
        raise DivergedError(
            f"{problem} at the first step, where the gates change nothing yet: lower the weights "
            f"in objective, or the base cannot be run in {str(dtype).removeprefix('torch.')}: set "
            "model.dtype to float32"
        )
    raise DivergedError(
        f"training diverged: {problem} at step {step + 1}; lower train.learning_rate (it is "
        f"{learning_rate:g} at most) or the weights in objective, and start again "
        "in another output_dir: resumed, it would come to the same"
    )
