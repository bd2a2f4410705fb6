"""Pressure on sinks: its value and gradients against full attention, and its place in training."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.adapters._family import GatedAttention
from retrofit.gates import gate_layers, gates_off
from retrofit.metrics import NEAR
from retrofit.pressure import Pressure, collision_probability, sample_rows
from retrofit.recipe import Objective

T = 160


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def naive(attention: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The definition, over all pairs of rows: `attention` is `[batch, heads, T, T]`."""
    total, pairs = 0.0, 0
    for sequence, places in zip(attention, position_ids, strict=True):
        start = torch.arange(len(places)) - places
        rows = [i for i in range(len(places)) if places[i] >= NEAR]
        for i in rows:
            for k in rows:
                if i != k and start[i] == start[k]:
                    far = slice(int(start[i]), min(i, k) - NEAR + 1)
                    total = total + (sequence[:, i, far] * sequence[:, k, far]).sum(-1).mean()
                    pairs += 1
    return total / pairs


def full_attention(query, key, scaling, position_ids):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    index = torch.arange(query.shape[2])
    start = index - position_ids
    causal = index[:, None] >= index
    same = start.unsqueeze(-1) == start.unsqueeze(-2)
    logits = (query @ key.mT * scaling).masked_fill(~(causal & same)[:, None], -torch.inf)
    return logits.softmax(-1)


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, T, 8, generator=generator, requires_grad=True)
    key = torch.randn(1, 2, T, 8, generator=generator, requires_grad=True)
    return query, key


@pytest.mark.parametrize("lengths", [(T,), (90, 70), (100, 30, 30)])
def test_all_rows_give_the_definition_values_and_gradients(states, lengths):
    query, key = states
    position_ids = positions(*lengths)
    expected = naive(full_attention(query, key, 0.7, position_ids), position_ids)
    expected_grads = torch.autograd.grad(expected, states)
    value = collision_probability(query, key, 0.7, sample_rows(position_ids, T))
    grads = torch.autograd.grad(value, states)
    torch.testing.assert_close(value, expected)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference)


def test_sampled_rows_are_unbiased(states):
    query, key = (tensor.detach() for tensor in states)
    position_ids = positions(T)
    exact = collision_probability(query, key, 0.7, sample_rows(position_ids, T))
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack(
        [
            collision_probability(query, key, 0.7, sample_rows(position_ids, 8, generator))
            for _ in range(600)
        ]
    )
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - exact).abs() < 4 * error
    assert error < 0.05 * exact


@pytest.mark.parametrize("where", ["first", "elsewhere", "by head"])
def test_a_sink_costs_its_squared_share_wherever_it_sits(where):
    """Half of all attention on one key of each head, the rest spread evenly."""
    position = {"first": [0] * 4, "elsewhere": [20] * 4, "by head": [3, 30, 7, 50]}[where]
    query = torch.zeros(1, 4, 400, 8)
    query[..., 0] = 1
    key = torch.zeros(1, 4, 400, 8)
    for head, place in enumerate(position):
        key[0, head, place, 0] = torch.log(torch.tensor(230.0))
    value = collision_probability(query, key, 1.0, sample_rows(positions(400), 64))
    assert 0.2 < value < 0.35


def test_rows_have_far_keys_and_padding_is_left_alone():
    position_ids = torch.stack([torch.arange(T), torch.arange(T)])
    position_ids[1, 120:] = -1
    sampled = sample_rows(position_ids, 32)
    assert sampled.rows.shape == (2, 32)
    assert sampled.pairs == 2 * 32 * 31
    assert (position_ids.gather(-1, sampled.rows) >= NEAR).all()
    assert sample_rows(positions(40, 40, 40), 32) is None


def test_a_short_text_in_the_batch_changes_nothing_for_the_long_one(states):
    """Padded batches: the short sequence has no far keys, or a few, beside the long one's many."""
    query, key = (tensor.detach() for tensor in states)
    alone = collision_probability(query, key, 0.7, sample_rows(positions(T), T))
    short = torch.arange(T)[None].clone()
    short[0, 50:] = -1
    sampled = sample_rows(torch.cat([positions(T), short]), T)
    both = [torch.cat([tensor, tensor.flip(2)]) for tensor in (query, key)]
    torch.testing.assert_close(collision_probability(*both, 0.7, sampled), alone)


def test_injected_gradients_equal_an_added_loss(family):
    input_ids = torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(0))
    position_ids = torch.arange(T).expand(2, T)

    def gradients(mode: str):
        model = get_peft_model(tiny_model(family), GateConfig(init_weights=False)).train()
        if mode in ("reentrant", "non_reentrant"):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        attentions = [m for m in model.modules() if isinstance(m, GatedAttention)]
        seen = []

        class Added(Pressure):
            def __call__(self, attention, query_states, key_states):
                value = collision_probability(
                    query_states, key_states, attention.scaling, self.sampled
                )
                seen.append(value * self.weight / self.layers)
                return query_states

        pressure = (Added if mode == "added" else Pressure)(len(attentions), T)
        pressure.prepare(position_ids, weight=3.0)
        for attention in attentions:
            attention.pressure = pressure
        loss = model(input_ids, labels=input_ids).loss
        (loss + sum(seen)).backward()
        weights = [layer.g_proj["default"].weight for layer in gate_layers(model).values()]
        return pressure.mean(), [weight.grad for weight in weights]

    _, expected = gradients("added")
    for mode in ("injected", "reentrant", "non_reentrant"):
        value, grads = gradients(mode)
        assert 0 < value < 1
        for grad, reference in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-6)


def test_the_base_pass_is_not_pressed():
    model = get_peft_model(tiny_model("llama"), GateConfig())
    attention = model.base_model.model.model.layers[0].self_attn
    attention.pressure = Pressure(1, 32)
    attention.pressure.prepare(torch.arange(T)[None], weight=1.0)
    with torch.no_grad(), gates_off(model):
        model(torch.zeros(1, T, dtype=torch.long))
    assert attention.pressure.mean() is None


def test_schedule_holds_then_lets_go():
    objective = Objective(pressure=4.0, pressure_release=0.5)
    assert [objective.pressure_at(p) for p in (0.0, 0.5, 0.75, 1.0)] == [4.0, 4.0, 2.0, 0.0]
    assert Objective(pressure=4.0).pressure_at(1.0) == 4.0
