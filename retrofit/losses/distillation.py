"""What the gates are trained on: next-token loss and KL to the base, without full logits.

Both come from the final hidden states and the frozen output head, some rows at a time. The head
needs no gradient, so the gradient of the hidden states is made in the forward, while the logits of
those rows are at hand, and nothing of vocabulary size outlives its chunk.
"""

import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from retrofit.gates import gates_off
from retrofit.losses.shared_layers import SharedLayers
from retrofit.recipe import Objective
from retrofit.utils.errors import UserError
from retrofit.utils.fsdp import full_tensor

CHUNK_BYTES = 64 * 2**20  # logits of one product with the head, in float32
BLOCK_BYTES = 3 * 2**20  # of them what a CPU works on at a time, so that it stays in its cache


@dataclass
class ObjectiveOutput(ModelOutput):
    """Sums over the tokens that have a label, in nats.

    Attributes:
        loss: `lm` and `kl` weighted and added; the only one with a gradient.
        lm: negative log-likelihood of the labels.
        kl: `KL(base || gated)` of the next-token distribution; 0 if it was not asked for.
        num_tokens: how many tokens had a label.
    """

    loss: torch.Tensor | None = None
    lm: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


class _ChunkedObjectives(torch.autograd.Function):
    """`lm * NLL + kl * KL` of `hidden @ weight.T`, summed over rows.

    The gradient of the logits is `lm * (p - onehot) + kl * (p - q)`, with `p` the gated model's
    distribution and `q` the base's.
    """

    @staticmethod
    def forward(ctx, hidden, teacher, weight, bias, labels, lm, kl, block_bytes):
        sums = hidden.new_zeros(2, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        for chunk in _slices(len(hidden), CHUNK_BYTES // (4 * len(weight))):
            logits = F.linear(hidden[chunk], weight, bias)
            base = F.linear(teacher[chunk], weight, bias) if kl else logits
            for block in _slices(len(logits), block_bytes // (4 * len(weight))):
                sums += _to_gradient(logits[block], base[block], labels[chunk][block], lm, kl)
            grad_hidden[chunk] = logits @ weight
        nll_sum, kl_sum = sums.unbind()
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(nll_sum, kl_sum)
        return lm * nll_sum + kl * kl_sum, nll_sum, kl_sum

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), *[None] * 7


def _to_gradient(logits, base, labels, lm: float, kl: float) -> torch.Tensor:
    """NLL and KL of some rows, whose logits become their own gradient."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    labels = labels.unsqueeze(-1)
    nll, divergence = -log_p.gather(-1, labels).sum(), log_p.new_zeros(())
    if not kl:
        grad = log_p.exp_().mul_(lm)
    else:
        log_q = base.log_softmax(-1, dtype=torch.float32)
        q = log_q.exp()
        divergence = torch.dot(q.view(-1), log_q.sub_(log_p).view(-1))
        grad = log_p.exp_().mul_(lm + kl).sub_(q, alpha=kl)
    grad.scatter_add_(-1, labels, grad.new_full(labels.shape, -lm))
    logits.copy_(grad)
    return torch.stack([nll, divergence])


def _slices(length: int, size: int) -> Iterator[slice]:
    step = max(1, size)
    return (slice(start, start + step) for start in range(0, length, step))


# Inductor compiles the in-place steps above to wrong gradients, with the right loss (torch 2.13).
@torch.compiler.disable
def chunked_objectives(
    hidden: torch.Tensor,
    teacher: torch.Tensor | None,
    lm_head: nn.Linear,
    labels: torch.Tensor,
    objective: Objective,
    block_bytes: int | None = None,
) -> ObjectiveOutput:
    """The objectives of one batch.

    Args:
        hidden: final hidden states of the gated model, `predicting` the labels
            `[labelled tokens, hidden_size]`.
        teacher: those of the base, same shape; only read if `objective.kl` is not 0.
        lm_head: the output head, frozen.
        labels: token ids `[batch, seq_len]`, -100 where nothing is to be predicted; position `t`
            is predicted from position `t - 1`.
        objective: the weights.
        block_bytes: of logits that are worked on at a time; by default what stays in the cache of
            a CPU, and on a GPU all that one product with the head gives.
    """
    if block_bytes is None:
        block_bytes = BLOCK_BYTES if hidden.is_cpu else CHUNK_BYTES
    targets = labels[:, 1:]
    targets = targets[targets != -100]
    loss, nll, kl = _ChunkedObjectives.apply(
        hidden,
        teacher,
        full_tensor(lm_head.weight),
        None if lm_head.bias is None else full_tensor(lm_head.bias),
        targets,
        objective.lm,
        objective.kl,
        block_bytes,
    )
    return ObjectiveOutput(loss=loss, lm=nll, kl=kl, num_tokens=labels.new_tensor(len(targets)))


def predicting(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of `[batch, seq_len, hidden_size]` the states from which a label is predicted; no others cost
    a product with the head."""
    return hidden[:, :-1][labels[:, 1:] != -100]


def add_objectives(
    model: PreTrainedModel, objective: Objective, block_bytes: int | None = None
) -> None:
    """Let `model(..., labels=labels, objectives=True)` return an `ObjectiveOutput`.

    Both passes, base and gated, run inside the model's own forward, so that what wraps it (DDP,
    FSDP2, DeepSpeed) has gathered the head's weight and counts one forward. Without the flag the
    forward is the original one.

    Args:
        model: base and gates.
        objective: the weights.
        block_bytes: see `chunked_objectives`.

    Raises:
        UserError: if the output head is trained: its gradient would be silently missing.
    """
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise UserError("the output head must stay frozen: leave it out of modules_to_save")
    original_forward = model.forward
    shared = SharedLayers(model)

    def forward(self, *args, objectives: bool = False, labels=None, **kwargs):
        if not objectives:
            return original_forward(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        teacher = None
        if objective.kl or objective.hidden:
            with torch.no_grad(), gates_off(self), shared.kept():
                teacher = self.base_model(*args, **kwargs).last_hidden_state
            teacher = predicting(teacher, labels)
        with shared.reused():
            hidden = self.base_model(*args, **kwargs).last_hidden_state
        hidden = predicting(hidden, labels)
        head = self.get_output_embeddings()
        return chunked_objectives(hidden, teacher, head, labels, objective, block_bytes)

    model.forward = types.MethodType(forward, model)
