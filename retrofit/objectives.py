"""What the gates are trained on: next-token loss and KL to the base, without full logits.

Both come from the final hidden states and the frozen output head, some rows at a time. The head
needs no gradient, so the gradient of the hidden states is made in the forward, while the logits of
those rows are at hand, and nothing of vocabulary size outlives its chunk.
"""

import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from retrofit.errors import UserError
from retrofit.gates import gates_off
from retrofit.recipe import Objective

# Logits of one chunk in float32; three such buffers stand at once.
_CHUNK_BYTES = 64 * 2**20


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
    def forward(ctx, hidden, teacher, weight, bias, labels, lm, kl):
        nll_sum = hidden.new_zeros((), dtype=torch.float32)
        kl_sum = torch.zeros_like(nll_sum)
        grad_hidden = torch.empty_like(hidden)
        rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            log_p = F.linear(hidden[chunk], weight, bias).float().log_softmax(-1)
            target = labels[chunk].unsqueeze(-1)
            nll_sum -= log_p.gather(-1, target).sum()
            grad = (lm + kl) * log_p.exp()
            grad.scatter_add_(-1, target, grad.new_full(target.shape, -lm))
            if kl:
                log_q = F.linear(teacher[chunk], weight, bias).float().log_softmax(-1)
                q = log_q.exp()
                kl_sum += torch.sum(q * log_q.sub_(log_p))
                grad -= q.mul_(kl)
            grad_hidden[chunk] = grad.to(weight.dtype) @ weight
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(nll_sum, kl_sum)
        return lm * nll_sum + kl * kl_sum, nll_sum, kl_sum

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), *[None] * 6


# Inductor compiles the in-place steps above to wrong gradients, with the right loss (torch 2.13).
@torch.compiler.disable
def chunked_objectives(
    hidden: torch.Tensor,
    teacher: torch.Tensor | None,
    lm_head: nn.Linear,
    labels: torch.Tensor,
    objective: Objective,
) -> ObjectiveOutput:
    """The objectives of one batch.

    Args:
        hidden: final hidden states of the gated model `[batch, seq_len, hidden_size]`.
        teacher: those of the base, same shape; only read if `objective.kl` is not 0.
        lm_head: the output head, frozen.
        labels: token ids `[batch, seq_len]`, -100 where nothing is to be predicted; position `t`
            is predicted from position `t - 1`.
        objective: the weights.
    """
    # Only labelled rows cost a matrix product.
    labels = labels[:, 1:]
    mask = labels != -100
    weight, bias = lm_head.weight, lm_head.bias
    if isinstance(weight, DTensor):  # FSDP2 shards the head, which is read here as a plain matrix
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    loss, nll, kl = _ChunkedObjectives.apply(
        hidden[:, :-1][mask],
        None if teacher is None else teacher[:, :-1][mask],
        weight,
        bias,
        labels[mask],
        objective.lm,
        objective.kl,
    )
    return ObjectiveOutput(loss=loss, lm=nll, kl=kl, num_tokens=mask.sum())


def add_objectives(model: PreTrainedModel, objective: Objective) -> None:
    """Let `model(..., labels=labels, objectives=True)` return an `ObjectiveOutput`.

    Both passes, base and gated, run inside the model's own forward, so that what wraps it (DDP,
    FSDP2, DeepSpeed) has gathered the head's weight and counts one forward. Without the flag the
    forward is the original one.

    Raises:
        UserError: if the output head is trained: its gradient would be silently missing.
    """
    if any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters()):
        raise UserError("the output head must stay frozen: leave it out of modules_to_save")
    original_forward = model.forward

    def forward(self, *args, objectives: bool = False, labels=None, **kwargs):
        if not objectives:
            return original_forward(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        teacher = None
        if objective.kl or objective.hidden:
            with torch.no_grad(), gates_off(self):
                teacher = self.base_model(*args, **kwargs).last_hidden_state
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        return chunked_objectives(hidden, teacher, self.get_output_embeddings(), labels, objective)

    model.forward = types.MethodType(forward, model)
