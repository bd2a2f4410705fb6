"""Sampled attention and the pressure on sinks: values and gradients against full attention."""

import pytest
import torch

from retrofit.losses.sampled_attention import sample_rows, sampled_attention
from retrofit.losses.sink_pressure import collision_probability
from retrofit.measure.metrics import NEAR

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


def pressure(query, key, scaling, sampled):
    return collision_probability(sampled_attention(query, key, scaling, sampled), sampled)


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
    value = pressure(query, key, 0.7, sample_rows(position_ids, T))
    grads = torch.autograd.grad(value, states)
    torch.testing.assert_close(value, expected)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference)


def test_sampled_rows_are_unbiased(states):
    query, key = (tensor.detach() for tensor in states)
    position_ids = positions(T)
    exact = pressure(query, key, 0.7, sample_rows(position_ids, T))
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack(
        [pressure(query, key, 0.7, sample_rows(position_ids, 8, generator)) for _ in range(600)]
    )
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - exact).abs() < 4 * error
    assert error < 0.05 * exact


def test_sampled_attention_is_full_attention_at_the_rows(states):
    query, key = (tensor.detach() for tensor in states)
    position_ids = positions(100, 30, 30)
    sampled = sample_rows(position_ids, 20)
    weights = sampled_attention(query, key, 0.7, sampled)
    full = full_attention(query, key, 0.7, position_ids)
    index = sampled.rows[:, None, :, None].expand_as(weights)
    torch.testing.assert_close(weights, full.gather(2, index))
    window = sampled_attention(query, key, 0.7, sampled, sliding_window=10)
    assert ((window > 0).sum(-1) == 10).all()


@pytest.mark.parametrize("where", ["first", "elsewhere", "by head"])
def test_a_sink_costs_its_squared_share_wherever_it_sits(where):
    """Half of all attention on one key of each head, the rest spread evenly."""
    position = {"first": [0] * 4, "elsewhere": [20] * 4, "by head": [3, 30, 7, 50]}[where]
    query = torch.zeros(1, 4, 400, 8)
    query[..., 0] = 1
    key = torch.zeros(1, 4, 400, 8)
    for head, place in enumerate(position):
        key[0, head, place, 0] = torch.log(torch.tensor(230.0))
    value = pressure(query, key, 1.0, sample_rows(positions(400), 64))
    assert 0.2 < value < 0.35


def test_rows_have_far_keys_and_padding_is_left_alone():
    position_ids = torch.stack([torch.arange(T), torch.arange(T)])
    position_ids[1, 120:] = -1
    sampled = sample_rows(position_ids, 32)
    assert sampled.rows.shape == (2, 32)
    assert sampled.valid.all()
    assert (position_ids.gather(-1, sampled.rows) >= NEAR).all()
    assert sample_rows(positions(40, 40, 40), 32) is None


def test_a_short_text_in_the_batch_changes_nothing_for_the_long_one(states):
    """Padded batches: the short sequence has no far keys, beside the long one's many, and counts 0
    in the mean of the two."""
    query, key = (tensor.detach() for tensor in states)
    alone = pressure(query, key, 0.7, sample_rows(positions(T), T))
    short = torch.arange(T)[None].clone()
    short[0, 50:] = -1
    sampled = sample_rows(torch.cat([positions(T), short]), T)
    both = [torch.cat([tensor, tensor.flip(2)]) for tensor in (query, key)]
    torch.testing.assert_close(pressure(*both, 0.7, sampled), alone / 2)
