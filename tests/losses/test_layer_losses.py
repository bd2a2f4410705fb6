"""Losses inside the layers: their gradients against losses added outside, and their schedule."""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.gates import gate_layers, gates_off
from retrofit.losses import massive_activations
from retrofit.losses.head_balance import balance_loss, effective_load, sink_load, vanilla_load
from retrofit.losses.layer_losses import LayerLosses, add_layer_losses, relative_distance
from retrofit.losses.sampled_attention import attention_of_rows
from retrofit.losses.sink_pressure import collision_probability
from retrofit.recipe import Objective

T = 160
INPUT_IDS = torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(0))
POSITION_IDS = torch.arange(T).expand(2, T)
# All rows are sampled, so that every mode sees the same ones.
ALL = Objective(
    pressure=3.0, hidden=2.0, activation=0.7, balance=0.5, balance_shared_heads=1, sampled_rows=T
)


@pytest.fixture(autouse=True)
def _random_activations_count_as_massive(monkeypatch):
    monkeypatch.setattr(massive_activations, "MARGIN", 0.9)


class Added(LayerLosses):
    """The same losses, handed up to be added to the loss."""

    total = 0.0

    def __call__(self, attention, hidden_states, query_states, key_states, sink, attn_output):
        weights = attention_of_rows(attention, query_states, key_states, self.sampled, sink)
        load = sink_load(weights)
        if not hasattr(attention, "sinks"):
            load = vanilla_load(weights, self.sampled.starts, load if sink else 1.0)
        projection = attention.attn_gate.g_proj["default"]
        if projection.weight is not None:
            gate = projection(hidden_states)
            rows = zip(gate, self.sampled.rows, strict=True)
            load = effective_load(load, torch.stack([g[sampled] for g, sampled in rows]))
        index = attention.layer_idx
        losses = (
            3.0 * collision_probability(weights, self.sampled)
            + 0.5 * balance_loss(load, self.sampled.valid, 1)
            + 2.0
            * relative_distance(hidden_states, self.base_inputs[index], self.compared_tokens[index])
        )
        self.total = self.total + losses / 3
        return attn_output

    def before_layer(self, layer, args):
        if layer.self_attn.attn_gate.disable_adapters:
            return
        self.total = (
            self.total + 0.7 * massive_activations.excess_activation(args[0], POSITION_IDS) / 3
        )


def press(model, objective=ALL, progress=0.0, scale=1.0):
    layer_losses = add_layer_losses(model, objective)
    layer_losses.prepare(POSITION_IDS, progress, scale)
    with torch.no_grad(), gates_off(model):
        model(INPUT_IDS)
    return layer_losses


GATES = [
    {"granularity": "headwise"},
    {"granularity": "elementwise"},
    {"granularity": "shared"},
    {"granularity": "none", "sinks": "constant", "key_bias": True},
    {"granularity": "headwise", "sinks": "input", "centered": True},
]


@pytest.mark.parametrize("gates", GATES, ids=lambda gates: "-".join(map(str, gates.values())))
def test_injected_gradients_equal_an_added_loss(family, gates):
    def gradients(mode: str):
        torch.manual_seed(0)
        config = GateConfig(**gates, init_weights=False)
        model = get_peft_model(tiny_model(family), config).train()
        if mode in ("reentrant", "non_reentrant"):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        layer_losses = press(model)
        if mode == "added":
            layer_losses.__class__ = Added
            for layer in model.get_base_model().model.layers:
                layer._forward_pre_hooks.clear()
                layer.register_forward_pre_hook(layer_losses.before_layer)
        loss = model(INPUT_IDS, labels=INPUT_IDS).loss
        (loss + getattr(layer_losses, "total", 0.0)).backward()
        weights = [w for layer in gate_layers(model).values() for w in layer.parameters()]
        return layer_losses.means(), [weight.grad for weight in weights]

    _, expected = gradients("added")
    for mode in ("injected", "reentrant", "non_reentrant"):
        means, grads = gradients(mode)
        assert set(means) - {"sink_share"} == {"pressure", "balance", "hidden", "activation"}
        assert ("sink_share" in means) == ("sinks" in gates)
        assert all(value > 0 for value in means.values())
        for grad, reference in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-6)


def test_micro_batches_each_give_their_part():
    """Two accumulated batches scaled by a half give the mean of their gradients."""

    def gradient(scale: float, times: int):
        model = get_peft_model(tiny_model("llama"), GateConfig()).train()
        for _ in range(times):
            press(model, objective=Objective(pressure=3.0, sampled_rows=T), scale=scale)
            (model(INPUT_IDS).logits.sum() * 0).backward()
        return gate_layers(model)[0].g_proj["default"].weight.grad

    assert gradient(1.0, 1).abs().max() > 0
    torch.testing.assert_close(gradient(0.5, 2), gradient(1.0, 1))


def test_projections_that_are_chosen_later_are_balanced_too():
    """Calibration chooses the layers with projections when the losses are there already."""

    def loss(chosen_first: bool):
        config = GateConfig(granularity="headwise", sinks="constant")
        model = get_peft_model(tiny_model("llama"), config).train()
        choose = partial(model.base_model.choose_projection_layers, "default", [0, 1, 2])
        if chosen_first:
            choose()
        layer_losses = press(model, objective=Objective(balance=1.0, sampled_rows=T))
        if not chosen_first:
            choose()
        for layer in gate_layers(model).values():
            weight = layer.g_proj["default"].weight
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
        model(INPUT_IDS)
        return layer_losses.means()["balance"]

    assert loss(chosen_first=False) == loss(chosen_first=True)


def test_a_batch_without_far_keys_has_the_same_names_as_any_other():
    model = get_peft_model(tiny_model("llama"), GateConfig(granularity="none", sinks="constant"))
    layer_losses = press(model.train(), objective=Objective(pressure=1.0))
    model(INPUT_IDS)
    whole = layer_losses.means()
    layer_losses.prepare(POSITION_IDS[:, :20], 0.0)
    model(INPUT_IDS[:, :20])
    short = layer_losses.means()
    assert short.keys() == whole.keys() == {"pressure", "sink_share"}
    assert not any(short.values())


def test_the_base_pass_has_no_losses():
    model = get_peft_model(tiny_model("llama"), GateConfig())
    assert not any(press(model).means().values())


def test_zero_gates_have_no_distance_and_others_have():
    for zero in (True, False):
        model = get_peft_model(tiny_model("llama"), GateConfig(init_weights=zero)).train()
        layer_losses = press(model, objective=Objective(hidden=1.0))
        model(INPUT_IDS)
        assert (layer_losses.means()["hidden"] == 0) == zero


def test_a_token_that_is_massive_in_the_base_is_not_held_to_it(monkeypatch):
    monkeypatch.setattr(massive_activations, "MARGIN", 20.0)
    model = get_peft_model(tiny_model("llama"), GateConfig(init_weights=False)).train()
    embeddings = model.get_input_embeddings()(INPUT_IDS).detach()
    embeddings[0, 5, 3] = 1e4
    layer_losses = add_layer_losses(model, Objective(hidden=1.0))
    layer_losses.prepare(POSITION_IDS, 0.0)
    with torch.no_grad(), gates_off(model):
        model(inputs_embeds=embeddings, position_ids=POSITION_IDS)
    expected = POSITION_IDS > 0
    expected[0, 5] = False
    assert all(tokens.equal(expected) for tokens in layer_losses.compared_tokens.values())


def test_distance_is_relative_and_leaves_out_what_does_not_count():
    base = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(relative_distance(1.5 * base, base, tokens), torch.tensor(0.25))
    tokens[:, 0] = False
    moved = base.clone()
    moved[:, 0] += 100
    assert relative_distance(moved, base, tokens) == 0


def test_losses_hold_then_let_go():
    objective = Objective(pressure=4.0, pressure_release=0.5)
    assert [objective.pressure_at(p) for p in (0.0, 0.5, 0.75, 1.0)] == [4.0, 4.0, 2.0, 0.0]
    assert Objective(pressure=4.0).pressure_at(1.0) == 4.0
    assert Objective(hidden=4.0, hidden_release=0.2).hidden_at(0.9) == pytest.approx(2.0)
    model = get_peft_model(tiny_model("llama"), GateConfig()).train()
    layer_losses = press(model, objective=objective, progress=0.75, scale=0.5)
    assert layer_losses.weights == {"pressure": 1.0}
    assert press(model, objective=objective, progress=1.0).weights == {}
