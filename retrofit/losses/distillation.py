"""The objectives at the output: next-token loss and KL to the base, without full logits.

Both are computed from the final hidden states and the frozen output head, a chunk of rows at a
time. The head needs no gradient. So the forward already computes the gradient of the hidden states,
while the logits of the chunk are at hand, and no tensor of vocabulary size outlives its chunk.
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

CHUNK_BYTES = 64 * 2**20  # size of the logits of one product with the head, in float32
BLOCK_BYTES = 3 * 2**20  # size of the logits that a CPU works on at a time, to stay in its cache


@dataclass
class ObjectiveOutput(ModelOutput):
    """Sums over the tokens that have a label, in nats.

    Attributes:
        loss: the weighted sum of `lm` and `kl`, and the only field with a gradient.
        lm: negative log-likelihood of the labels.
        kl: `KL(base || gated)` of the next-token distribution; 0 if its weight is 0.
        num_tokens: how many tokens have a label.
    """

    loss: torch.Tensor | None = None
    lm: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


class _ChunkedObjectives(torch.autograd.Function):
    """`lm_weight * NLL + kl_weight * KL` of `hidden @ weight.T`, summed over rows.

    The gradient of the logits is `lm_weight * (p - onehot) + kl_weight * (p - q)`, with `p` the
    gated model's distribution and `q` the base's.
    """

    @staticmethod
    def forward(ctx, hidden, teacher, weight, bias, labels, lm_weight, kl_weight, block_bytes):
        weights = lm_weight, kl_weight
        bytes_per_row = 4 * len(weight)
        sums = hidden.new_zeros(2, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        for chunk in _slices(len(hidden), CHUNK_BYTES // bytes_per_row):
            # Both logits of the chunk are [rows, vocab_size].
            logits = F.linear(hidden[chunk], weight, bias)
            base_logits = F.linear(teacher[chunk], weight, bias) if kl_weight else logits
            # Each block adds its NLL and KL, and its logits are overwritten by their gradient.
            for block in _slices(len(logits), block_bytes // bytes_per_row):
                sums += _replace_by_gradient(
                    logits[block], base_logits[block], labels[chunk][block], *weights
                )
            # From here on `logits` holds a gradient, and the head takes it to [rows, hidden_size].
            grad_hidden[chunk] = logits @ weight
        nll_sum, kl_sum = sums.unbind()
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(nll_sum, kl_sum)
        return lm_weight * nll_sum + kl_weight * kl_sum, nll_sum, kl_sum

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), *[None] * 7


def _replace_by_gradient(
    logits, base_logits, labels, lm_weight: float, kl_weight: float
) -> torch.Tensor:
    """Overwrite the logits `[rows, vocab_size]` of some rows by their gradient, and return the
    rows' summed NLL and KL, `[2]`."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    labels = labels.unsqueeze(-1)
    nll, divergence = -log_p.gather(-1, labels).sum(), log_p.new_zeros(())
    # The gradient without its one-hot term, made in place of `log_p`: (lm + kl) * p - kl * q.
    if not kl_weight:
        grad = log_p.exp_().mul_(lm_weight)
    else:
        log_q = base_logits.log_softmax(-1, dtype=torch.float32)
        q = log_q.exp()
        divergence = torch.dot(q.view(-1), log_q.sub_(log_p).view(-1))
        grad = log_p.exp_().mul_(lm_weight + kl_weight).sub_(q, alpha=kl_weight)
    # The one-hot term takes the weight off at the label of each row.
    grad.scatter_add_(-1, labels, grad.new_full(labels.shape, -lm_weight))
    logits.copy_(grad)
    return torch.stack([nll, divergence])


def _slices(length: int, size: int) -> Iterator[slice]:
    """Slices of `size`, at least 1, that cover `length` in order."""
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
    """Compute the objectives of one batch.

    Args:
        hidden: the gated model's final hidden states that predict a label, as `select_predicting`
            returns them, `[labelled tokens, hidden_size]`.
        teacher: the base's, of the same shape; they are read only if `objective.kl` is not 0.
        lm_head: the frozen output head.
        labels: token ids `[batch, seq_len]`, -100 where nothing is to be predicted; position `t`
            is predicted from position `t - 1`.
        objective: the weights of the objectives.
        block_bytes: size of the float32 logits that are worked on at a time. The default is what
            stays in the cache of a CPU, and on a GPU all that one product with the head gives.
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


def select_predicting(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Select the hidden states from which a label is predicted: no other state needs a product with
    the head.

    Args:
        hidden: `[batch, seq_len, hidden_size]`.
        labels: token ids `[batch, seq_len]`, -100 where nothing is to be predicted.

    Returns:
        `[labelled tokens, hidden_size]`.
    """
    return hidden[:, :-1][labels[:, 1:] != -100]


def add_objectives(
    model: PreTrainedModel, objective: Objective, block_bytes: int | None = None
) -> None:
    """Let `model(..., labels=labels, objectives=True)` return an `ObjectiveOutput`.

    Both passes, the base's and the gated one, run inside the model's own forward. So a wrapper
    (DDP, FSDP2, DeepSpeed) has gathered the head's weight by then, and counts one forward. Without
    the flag the forward is the original one.

    Args:
        model: the base with its gates.
        objective: the weights of the objectives.
        block_bytes: as in `chunked_objectives`.

    Raises:
        UserError: if the output head is trained, for its gradient would be silently missing.
    """
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise UserError("the output head must stay frozen: leave it out of modules_to_save")
    original_forward = model.forward
    shared_layers = SharedLayers(model)

    def forward(self, *args, objectives: bool = False, labels=None, **kwargs):
        if not objectives:
            return original_forward(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        # The base's pass: without gates and without gradients.
        teacher = None
        if objective.kl or objective.hidden:
            with torch.no_grad(), gates_off(self), shared_layers.keep_output():
                teacher = self.base_model(*args, **kwargs).last_hidden_state
            teacher = select_predicting(teacher, labels)
        # The gated pass starts at the lowest gate, from what the base's pass left below it.
        with shared_layers.reuse_output():
            hidden = self.base_model(*args, **kwargs).last_hidden_state
        hidden = select_predicting(hidden, labels)
        head = self.get_output_embeddings()
        return chunked_objectives(hidden, teacher, head, labels, objective, block_bytes)

    model.forward = types.MethodType(forward, model)
