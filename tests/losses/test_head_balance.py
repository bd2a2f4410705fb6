"""Head loads and the balance loss: values and gradients against full attention, edge cases."""

import pytest
import torch

from retrofit.losses.head_balance import (
    EPSILON,
    balance_loss,
    effective_load,
    gated_load,
    head_importance,
    sink_load,
    vanilla_load,
)
from retrofit.losses.sampled_attention import SampledRows, sampled_attention
from retrofit.measure.metrics import AttentionStatistics, attention_columns

BATCH, HEADS, T, HEAD_DIM, HIDDEN = 2, 5, 48, 8, 12
SCALING = 0.7


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.fixture
def states() -> tuple[torch.Tensor, ...]:
    """Query, key and gate logits of every token; heads differ in how much they like a sink."""
    query, key = randn(BATCH, HEADS, T, HEAD_DIM), randn(BATCH, HEADS, T, HEAD_DIM, seed=1)
    scale = torch.linspace(0.3, 1.5, HEADS).view(1, HEADS, 1, 1)
    query = (query.detach() * scale).requires_grad_()
    return query, key, randn(BATCH, T, HEADS, 3, seed=2)


def positions(*lengths: int) -> torch.Tensor:
    """The same packed documents in every sequence, `[batch, T]`."""
    return torch.cat([torch.arange(length) for length in lengths]).expand(BATCH, -1)


def full_logits(query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor):
    """`[batch, heads, T, T]`, masked: causal and within the document."""
    index = torch.arange(query.shape[2])
    start = index - position_ids
    allowed = (index[:, None] >= index) & (start.unsqueeze(-1) == start.unsqueeze(-2))
    return (query @ key.mT * SCALING).masked_fill(~allowed[:, None], -torch.inf)


def full_attention(query, key, position_ids) -> torch.Tensor:
    return full_logits(query, key, position_ids).softmax(-1)


def starts_of(position_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(position_ids.shape[1]) - position_ids


def naive_loads(query, key, scores, lengths) -> dict[str, torch.Tensor]:
    """The definitions, a document at a time as if it were alone: its first token is its key 0, and
    the one row that can see nothing else is left out. `[batch, tokens, heads]`."""
    vanilla, gated = [], []
    for sequence in range(BATCH):
        begin = 0
        for length in lengths:
            document = slice(begin, begin + length)
            logits = query[sequence, :, document] @ key[sequence, :, document].mT * SCALING
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            attention = logits.masked_fill(future, -torch.inf).softmax(-1)
            vanilla += [1 - attention[:, i, 0] for i in range(1, length)]
            gated += [scores[sequence, begin + i].mean(-1) for i in range(1, length)]
            begin += length
    both = {"vanilla": torch.stack(vanilla), "gated": torch.stack(gated)}
    both = {name: loads.view(BATCH, -1, HEADS) for name, loads in both.items()}
    return both | {"effective": both["vanilla"] * both["gated"]}


def naive_loss(loads: torch.Tensor, shared_heads: int) -> torch.Tensor:
    """`(N - m) * (std / mean)**2`, of importances `[tokens, heads] -> [heads]`, mean over
    sequences."""
    losses = []
    for sequence in loads:
        importance = sequence.mean(0).sort().values[: HEADS - shared_heads]
        mean = sum(importance) / len(importance)
        std = (sum((value - mean) ** 2 for value in importance) / len(importance)) ** 0.5
        losses.append(len(importance) * (std / mean) ** 2)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shared_heads", [0, 2])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "effective"])
@pytest.mark.parametrize("lengths", [(T,), (30, 18), (3, 25, 20)])
def test_all_rows_give_the_definition_values_and_gradients(states, lengths, kind, shared_heads):
    query, key, gate_logits = states
    position_ids = positions(*lengths)
    weights, starts = full_attention(query, key, position_ids), starts_of(position_ids)
    scores = 2 * gate_logits.sigmoid()
    load = {
        "vanilla": lambda: vanilla_load(weights, starts),
        "gated": lambda: gated_load(scores),
        "effective": lambda: effective_load(vanilla_load(weights, starts), scores),
    }[kind]()
    assert load.shape == (BATCH, HEADS, T)
    value = balance_loss(load, position_ids >= 1, shared_heads)
    # Half the gate: a constant factor makes no difference.
    loads = naive_loads(query, key, gate_logits.sigmoid(), lengths)
    expected = naive_loss(loads[kind], shared_heads)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    used = {"vanilla": states[:2], "gated": states[2:], "effective": states}[kind]
    grads = torch.autograd.grad(value, used)
    references = torch.autograd.grad(expected, used)
    for grad, reference in zip(grads, references, strict=True):
        assert reference.abs().max() > 1e-5
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-7)


def test_the_loss_is_what_measuring_calls_head_load_cv():
    length = 160
    query = randn(1, HEADS, length, HEAD_DIM)
    key = randn(1, HEADS, length, HEAD_DIM, seed=1)
    position_ids = torch.arange(length).expand(1, -1)
    scores = randn(1, length, HEADS, 1, seed=2).sigmoid()
    with torch.no_grad():
        statistics = AttentionStatistics()
        statistics.add(attention_columns(query, key, SCALING), scores)
        weights = full_attention(query, key, position_ids)
        load = effective_load(vanilla_load(weights, starts_of(position_ids)), scores)
    value = balance_loss(load, position_ids >= 0)
    assert value.item() == pytest.approx(HEADS * statistics.head_load_cv**2, rel=1e-4)


def test_sampled_rows_give_an_unbiased_importance(states):
    query, key, gate_logits = (tensor.detach() for tensor in states)
    lengths = (30, 18)
    exact = naive_loads(query, key, gate_logits.sigmoid(), lengths)["effective"].mean(1)
    position_ids = positions(*lengths)
    attention, starts = full_attention(query, key, position_ids), starts_of(position_ids)
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        """Six rows that count and two that do not."""
        noise = torch.rand(BATCH, T, generator=generator).masked_fill(position_ids < 1, -1)
        rows = torch.cat([noise.topk(6).indices, noise.topk(2, largest=False).indices], -1)
        index = rows[:, None, :, None].expand(-1, HEADS, -1, T)
        scores = gate_logits.sigmoid()[torch.arange(BATCH)[:, None], rows]
        left = vanilla_load(attention.gather(2, index), starts.gather(-1, rows))
        load = effective_load(left, scores)
        return head_importance(load, position_ids.gather(-1, rows) >= 1)

    draws = torch.stack([draw() for _ in range(800)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.02 * exact).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_zero_gates_learn_from_the_effective_load_only(states, channels):
    query, key, _ = states
    position_ids = positions(T)
    weights = full_attention(query, key, position_ids).detach()
    starts, counts = starts_of(position_ids), position_ids >= 1
    hidden_states = randn(BATCH, T, HIDDEN, seed=3).detach() + 1
    g_proj = torch.zeros(HIDDEN, HEADS * channels, requires_grad=True)

    def scores() -> torch.Tensor:
        return 2 * (hidden_states @ g_proj).sigmoid().unflatten(-1, (HEADS, channels))

    (grad,) = torch.autograd.grad(balance_loss(gated_load(scores()), counts), g_proj)
    assert (grad == 0).all()

    def loss() -> torch.Tensor:
        return balance_loss(effective_load(vanilla_load(weights, starts), scores()), counts)

    before = loss()
    (grad,) = torch.autograd.grad(before, g_proj)
    assert (grad.view(HIDDEN, HEADS, channels).abs().amax((0, 2)) > 1e-4).all()
    optimizer = torch.optim.SGD([g_proj], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 0.5 * before


def test_the_busiest_head_is_pushed_down_and_the_idlest_up():
    importance = torch.tensor([0.5, 0.9, 0.1, 0.6])
    load = importance.view(1, 4, 1).expand(2, 4, 8).clone().requires_grad_()
    (grad,) = torch.autograd.grad(balance_loss(load, torch.ones(2, 8, dtype=torch.bool)), load)
    assert (grad[:, 1] > 0).all()
    assert (grad[:, 2] < 0).all()


def test_shared_heads_are_exactly_the_most_important():
    importance = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.5])
    load = importance.view(1, 5, 1).expand(2, 5, 8).clone().requires_grad_()
    counts = torch.ones(2, 8, dtype=torch.bool)
    value = balance_loss(load, counts, shared_heads=2)
    # Of 0.1, 0.3 and 0.5: mean 0.3, variance 0.08 / 3.
    assert value.item() == pytest.approx(3 * (0.08 / 3) / 0.09)
    value.backward()
    assert (load.grad[:, [0, 2]] == 0).all()
    assert (load.grad[:, [1, 3, 4]] != 0).all()


@pytest.mark.parametrize("shared_heads", [4, 5, 6, -1])
def test_too_many_shared_heads_are_refused(shared_heads):
    load, counts = randn(1, 5, 8).sigmoid(), torch.ones(1, 8, dtype=torch.bool)
    assert balance_loss(load, counts, shared_heads=3) > 0
    with pytest.raises(ValueError, match="from 0 to 3"):
        balance_loss(load, counts, shared_heads)


def test_sink_load_is_what_a_softmax_with_one_more_logit_leaves(states):
    query, key, _ = states
    sinks = randn(HEADS, seed=4)
    logits = full_logits(query, key, positions(30, 18))
    every = torch.arange(T).expand(BATCH, -1)
    sampled = SampledRows(every, starts_of(positions(30, 18)), torch.ones_like(every).bool())
    load = sink_load(sampled_attention(query, key, SCALING, sampled, sinks=sinks))
    expected = (logits.logsumexp(-1) - sinks.view(1, HEADS, 1)).sigmoid()
    torch.testing.assert_close(load, expected)
    counts = torch.ones(BATCH, T, dtype=torch.bool)
    leaves = (query, key, sinks)
    grads = torch.autograd.grad(balance_loss(load, counts), leaves, retain_graph=True)
    references = torch.autograd.grad(balance_loss(expected, counts), leaves)
    for grad, reference in zip(grads, references, strict=True):
        assert reference.abs().max() > 1e-5
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("shared_heads", [0, 2])
def test_padding_does_not_count(states, shared_heads):
    """A batch of a long and a short sequence, whose padding holds anything."""
    query, key, gate_logits = states
    position_ids = positions(T).clone()
    position_ids[1, 20:] = -1
    counts = position_ids >= 1
    weights = full_attention(query, key, positions(T))
    left = vanilla_load(weights, torch.zeros(BATCH, T, dtype=torch.long))
    load = effective_load(left, gate_logits.sigmoid())
    value = balance_loss(load, counts, shared_heads)
    alone = [
        balance_loss(each, torch.ones(1, each.shape[-1], dtype=torch.bool), shared_heads)
        for each in (load[:1, :, 1:], load[1:, :, 1:20])
    ]
    torch.testing.assert_close(value, sum(alone) / 2)
    torch.testing.assert_close(
        balance_loss(load + 7 * ~counts[:, None], counts, shared_heads), value
    )
    (grad,) = torch.autograd.grad(value, gate_logits)
    assert (grad[~counts] == 0).all()
    assert (grad[counts].abs().amax(-1) > 0).any()


@pytest.mark.parametrize("nothing", ["load", "rows"])
def test_nothing_to_balance_is_zero_loss_and_zero_gradient(nothing):
    load = torch.full((BATCH, HEADS, 8), 0.0 if nothing == "load" else 0.5, requires_grad=True)
    counts = torch.full((BATCH, 8), nothing != "rows")
    value = balance_loss(load, counts)
    (grad,) = torch.autograd.grad(value, load)
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7, 1e-20, 1e-30])
def test_vanishing_loads_have_a_bounded_gradient(size):
    importance = (torch.linspace(0, 1, HEADS) * size).requires_grad_()
    load, counts = importance.view(1, HEADS, 1), torch.ones(1, 1, dtype=torch.bool)
    (grad,) = torch.autograd.grad(balance_loss(load, counts), importance)
    assert grad.isfinite().all()
    assert grad.abs().max() < 1 / EPSILON**0.5


def test_equally_small_loads_are_as_unbalanced_as_large_ones():
    load = randn(BATCH, HEADS, 8).detach().sigmoid()
    counts = torch.ones(BATCH, 8, dtype=torch.bool)
    value = balance_loss(load, counts)
    torch.testing.assert_close(balance_loss(load * 2, counts), value)
    torch.testing.assert_close(balance_loss(load * 1e-3, counts), value, rtol=1e-2, atol=0)


def test_half_precision_is_summed_in_float32():
    scores = randn(BATCH, 64, HEADS, 64).detach().sigmoid().bfloat16()
    weights = randn(BATCH, HEADS, 64, T).detach().softmax(-1).bfloat16()
    starts = torch.zeros(BATCH, 64, dtype=torch.long)
    counts = torch.ones(BATCH, 64, dtype=torch.bool)
    loads = [
        (vanilla_load(weights, starts), vanilla_load(weights.float(), starts)),
        (gated_load(scores), gated_load(scores.float())),
        (sink_load(weights), sink_load(weights.float())),
    ]
    for load, expected in loads:
        assert load.dtype == torch.float32
        assert (load == expected).all()
    assert balance_loss(loads[1][0].bfloat16(), counts).dtype == torch.float32
