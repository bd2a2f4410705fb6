"""The chunked losses against the plain ones, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.gates import gate_layers, gates_off
from retrofit.losses import distillation
from retrofit.recipe import Objective
from retrofit.utils.errors import UserError


def gated(family="llama"):
    return get_peft_model(tiny_model(family), GateConfig(init_weights=False)).train()


def batch():
    input_ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :6] = -100
    labels[1, 15:] = -100
    return input_ids, labels


def naive(model, input_ids, labels, objective):
    """Full logits of both models, as a textbook has it."""
    logits = model(input_ids).logits[:, :-1]
    with torch.no_grad(), gates_off(model):
        base = model(input_ids).logits[:, :-1]
    mask = labels[:, 1:] != -100
    log_p, log_q = logits[mask].log_softmax(-1), base[mask].log_softmax(-1)
    lm = F.nll_loss(log_p, labels[:, 1:][mask], reduction="sum")
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    return objective.lm * lm + objective.kl * kl, lm, kl


@pytest.mark.parametrize(
    ("chunk_bytes", "block_bytes"),
    [(64 * 2**20, 3 * 2**20), (5 * 300 * 4, 3 * 2**20), (64 * 2**20, 3 * 300 * 4)],
    ids=["at once", "in chunks", "in blocks"],
)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 0.7), (0.3, 2.0)])
def test_values_and_gradients_equal_full_logits(
    family, weights, chunk_bytes, block_bytes, monkeypatch
):
    monkeypatch.setattr(distillation, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(distillation, "BLOCK_BYTES", block_bytes)
    objective = Objective(lm=weights[0], kl=weights[1])
    input_ids, labels = batch()
    model = gated(family)
    expected, lm, kl = naive(model, input_ids, labels, objective)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_grads = torch.autograd.grad(expected, parameters)

    distillation.add_objectives(model.get_base_model(), objective)
    outputs = model(input_ids=input_ids, labels=labels, objectives=True)
    grads = torch.autograd.grad(outputs.loss, parameters)

    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.lm, lm.detach())
    torch.testing.assert_close(outputs.kl, kl.detach() if objective.kl else torch.tensor(0.0))
    assert outputs.num_tokens == 14 + 14
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-4)


def test_kl_alone_has_no_gradient_at_zero_init():
    """Why a recipe with `lm: 0` is refused."""
    model = get_peft_model(tiny_model("llama"), GateConfig())
    input_ids, labels = batch()
    objective = Objective.model_construct(lm=0.0, kl=1.0)
    distillation.add_objectives(model.get_base_model(), objective)
    model(input_ids=input_ids, labels=labels, objectives=True).loss.backward()
    for layer in gate_layers(model).values():
        assert layer.g_proj["default"].weight.grad.abs().max() < 1e-5


def test_no_tensor_of_full_logits_is_made(monkeypatch):
    """The largest tensor of a step stays that of a chunk, however many tokens there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    monkeypatch.setattr(distillation, "CHUNK_BYTES", 8 * 4 * 5000)
    hidden = torch.randn(1, 400, 16, requires_grad=True)
    head = torch.nn.Linear(16, 5000, bias=False).requires_grad_(False)
    labels = torch.randint(0, 5000, (1, 400))
    with Largest() as largest:
        states = distillation.select_predicting(hidden, labels)
        outputs = distillation.chunked_objectives(
            states, states.detach(), head, labels, Objective(lm=1, kl=1)
        )
        outputs.loss.backward()
    assert largest.numel == 5000 * 16  # the head itself


def test_a_trained_head_is_refused():
    model = tiny_model("llama").requires_grad_(True)
    with pytest.raises(UserError, match="modules_to_save"):
        distillation.add_objectives(model, Objective())


def test_without_the_flag_the_forward_is_the_original():
    model = gated()
    input_ids, labels = batch()
    expected = model(input_ids=input_ids, labels=labels)
    distillation.add_objectives(model.get_base_model(), Objective())
    outputs = model(input_ids=input_ids, labels=labels)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
