"""The layers below the lowest gate, which run once for both passes."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.losses.distillation import add_objectives
from retrofit.recipe import Objective

OBJECTIVE = Objective(lm=1.0, kl=1.0)


def gated(layers=None, family="llama"):
    torch.manual_seed(0)
    config = GateConfig(init_weights=False, layers_to_transform=layers)
    model = get_peft_model(tiny_model(family), config).train()
    add_objectives(model.get_base_model(), OBJECTIVE)
    return model


def batch():
    """Two rows of 20 and 14 tokens; only the last 8 of the second are predicted."""
    input_ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[1, :6] = labels[1, 14:] = -100
    mask = (torch.arange(20) < torch.tensor([[20], [14]])).long()
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def step(model, inputs):
    model.zero_grad()
    outputs = model(**inputs, objectives=True)
    outputs.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return outputs, gradients


def runs_of_first_layer(model):
    runs = []
    layer = model.get_base_model().model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "reentrant"])
def test_layers_below_the_lowest_gate_run_once(family, checkpointing):
    model = gated(layers=[1, 2], family=family)
    expected, gradients = step(gated(layers=[1, 2], family=family), batch())
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()
    runs = runs_of_first_layer(model)
    outputs, shared = step(model, batch())
    assert len(runs) == 1
    # The same as two whole passes, one with the gates off.
    naive = gated(layers=[1, 2], family=family)
    naive.get_base_model().base_model.embed_tokens.requires_grad_(True)  # nothing to share
    runs = runs_of_first_layer(naive)
    twice, plain = step(naive, batch())
    assert len(runs) == 2
    assert torch.equal(outputs.kl, twice.kl) and torch.equal(outputs.kl, expected.kl)
    gates = [p.shape for p in model.parameters() if p.grad is not None]
    plain = [grad for grad in plain if grad.shape in gates]
    assert all(map(torch.equal, shared, plain)) and all(map(torch.equal, shared, gradients))


def test_all_layers_run_again_where_the_first_is_gated():
    model = gated()
    runs = runs_of_first_layer(model)
    step(model, batch())
    assert len(runs) == 2
