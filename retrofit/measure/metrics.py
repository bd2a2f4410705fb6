"""Defines the metrics that `retrofit measure` reports: their formulas, sources and running sums.

`A[i, j]` is the attention that query `i` pays to key `j`, and `T` is the length of a sequence. A
sink logit takes part in the softmax without being a key, so no metric counts it as one. Every sum
is streamed: over blocks of queries for attention, over chunks of tokens for logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from retrofit.adapters._sink import Sink
from retrofit.losses.sampled_attention import NEAR

TAIL = 128  # the last keys have too few far queries behind them, so they are left out
SINK_THRESHOLD = 0.3
GATE_BINS = 20  # equal bins of [0, 1]
_OUTLIER = 6.0  # standard deviations
_QUERY_BLOCK = 128
_TOKEN_CHUNK = 128


class AttentionColumns(NamedTuple):
    """Sums over the attention matrix of one layer.

    Attributes:
        first: `A[i, 0]` by query, `[batch, heads, T]`.
        share: mean of `A[i, j]` over the queries `i >= j + NEAR`, by key `j <= T - TAIL`:
            `[batch, heads, T - TAIL + 1]`.
        left: the attention that a sink logit leaves to the keys, `sum_j A[i, j]` by query,
            `[batch, heads, T]`; `None` without a sink logit, where the sum is 1.
    """

    first: torch.Tensor
    share: torch.Tensor
    left: torch.Tensor | None = None


def attention_columns(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    block: int = _QUERY_BLOCK,
) -> AttentionColumns:
    """Computes columns of the attention matrix in float32, in O(block * T) memory per head.

    Args:
        query_states: `[batch, heads, T, head_dim]`, after RoPE.
        key_states: `[batch, kv_heads, T, head_dim]`, after RoPE.
        scaling: factor of the logits.
        attention_mask: bool `[batch or 1, heads or 1, T, T]`, True where a query may look, never
            ahead of itself; `None` for plain causal attention.
        sink_logits: logits that join each softmax without being keys, as in gpt-oss: `[heads]`, or
            by query `[batch, heads, T]`. The attention that they take reaches no key.
        block: how many queries are processed at a time.
    """
    batch, heads, length, _ = query_states.shape
    first, left, columns = [], [], query_states.new_zeros(batch, heads, length, dtype=torch.float32)
    blocks = _blocks(query_states, key_states, scaling, attention_mask, block)
    for start, end, logits, hidden in blocks:
        # A query of padding sees no key, and its softmax is NaN.
        weights = logits.softmax(-1).masked_fill_(hidden, 0)  # [batch, heads, block, keys]
        if sink_logits is not None:
            block_logits = sink_logits if sink_logits.ndim == 1 else sink_logits[..., start:end]
            # [batch, heads, block]
            left.append(left_by_slot(logits.logsumexp(-1), block_logits))
            weights *= left[-1].unsqueeze(-1)
        first.append(weights[..., 0].clone())  # a view would keep the block in memory
        columns[..., :end] += weights.tril_(start - NEAR).sum(-2)
    # The number of far queries of each key, [T - TAIL + 1].
    far_queries = torch.arange(length - NEAR, TAIL - NEAR - 1, -1, device=columns.device)
    share = columns[..., : length - TAIL + 1] / far_queries
    return AttentionColumns(torch.cat(first, -1), share, torch.cat(left, -1) if left else None)


def left_by_slot(log_sum_exp: torch.Tensor, sink_logits: torch.Tensor) -> torch.Tensor:
    """Returns the share that a slot with this logit leaves to the keys, `sigmoid(LSE - s)`,
    `[batch, heads, T]` (arXiv:2602.01203).

    Args:
        log_sum_exp: `LSE` over the keys' logits, `[batch, heads, T]`.
        sink_logits: the slot's logit `s`, `[heads]` or `[batch, heads, T]`.
    """
    odds = torch.ones(log_sum_exp.shape[1], device=log_sum_exp.device)
    return Sink(sink_logits, odds).key_share(log_sum_exp)


def _blocks(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None,
    block: int,
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Yields `start`, `end`, the logits of the queries `start..end`, and a mask of hidden keys.

    The logits are in float32, `[batch, heads, end - start, keys]`, for the keys up to the last one
    that any of these queries sees. They are -inf where the mask is True.
    """
    batch, heads, length, _ = query_states.shape
    cached = key_states.shape[2] - length
    # Query groups are folded into the rows, so that keys are not repeated for every query head.
    # [batch, kv_heads, groups, T, head_dim]
    queries = query_states.float().unflatten(1, (key_states.shape[1], -1))
    keys = key_states.float().mT  # [batch, kv_heads, head_dim, cached + T]
    for start in range(0, length, block):
        end = min(start + block, length)
        seen = cached + end
        rows = queries[:, :, :, start:end].flatten(
            2, 3
        )  # [batch, kv_heads, groups * block, head_dim]
        logits = (rows @ keys[..., :seen]).view(batch, heads, end - start, seen) * scaling
        if attention_mask is None:
            hidden = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(cached + start + 1)
        else:
            hidden = ~attention_mask[..., start:end, :seen]
        yield start, end, logits.masked_fill_(hidden, -torch.inf), hidden


class AttentionStatistics:
    """The attention of one layer, summed over sequences."""

    def __init__(self):
        self.sequences = 0
        zero = torch.zeros(1, dtype=torch.float64)
        self._first = self._share = self._peak = self._load = zero
        self._left: torch.Tensor | None = None

    def add(self, columns: AttentionColumns, gate_scores: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            columns: from `attention_columns`.
            gate_scores: `[batch, T, heads, channels]`, `None` without a gate. A constant factor of
                the scores makes no difference.
        """
        first, share, left = columns
        load = (1 if left is None else left) - first  # [batch, heads, T]
        if left is not None:
            self._left = (0 if self._left is None else self._left) + _batch_sum(left.mean(-1))
        if gate_scores is not None:
            load = load * gate_scores.mean(-1).transpose(1, 2)
        self.sequences += first.shape[0]
        self._first = self._first + _batch_sum(first.mean(-1))
        self._share = self._share + _batch_sum(share)
        self._peak = self._peak + _batch_sum(share.amax(-1))
        self._load = self._load + _batch_sum(load.mean(-1))

    @property
    def f_attn(self) -> float:
        """The attention to the first token: the mean of `A[i, 0]` over heads, all queries and
        sequences (F-Attn, arXiv:2505.06708)."""
        return (self._first.mean() / self.sequences).item()

    @property
    def sink_ratio(self) -> float:
        """The share of heads whose mean `A[i, 0]` over queries and sequences is above 0.3
        (arXiv:2410.10781)."""
        return (self._first / self.sequences > SINK_THRESHOLD).double().mean().item()

    @property
    def column_share(self) -> torch.Tensor:
        """`share(j)`, the mean of `A[i, j]` over heads, sequences and the queries `i >= j + 64`, by
        key `j <= T - 128`: `[T - 127]` (ours)."""
        return self._share.mean(0) / self.sequences

    @property
    def peak_share_per_head(self) -> float:
        """The mean over heads and sequences of `max_j` of that head's own `share(j)`. A sink whose
        position differs between heads or texts cannot hide in this average (ours)."""
        return (self._peak.mean() / self.sequences).item()

    @property
    def sink_share(self) -> float | None:
        """The share of the attention that a sink logit takes from the keys: the mean of
        `1 - sum_j A[i, j]` over heads, queries and sequences. It is `None` without a sink logit."""
        return None if self._left is None else 1 - (self._left.mean() / self.sequences).item()

    @property
    def head_load_cv(self) -> float:
        """The coefficient of variation (population std / mean) of the importance over heads
        (arXiv:2602.01203).

        The importance of a head is the mean over tokens and sequences of its effective load
        `(sum_j A[i, j] - A[i, 0]) * g[i]`. `g` is the mean gate over the head's channels, or 1
        without a gate, and the sum is 1 without a sink logit.
        """
        return (self._load.std(correction=0) / self._load.mean()).item()

    @property
    def head_load(self) -> list[float]:
        """The importance of each head, as `head_load_cv` defines it."""
        return (self._load / self.sequences).tolist()


class GateStatistics:
    """The gate scores of one layer, `sigmoid(X W_g)` (arXiv:2505.06708). They are half of a
    retrofit's doubled gate, whose identity is therefore at 0.5."""

    def __init__(self):
        self._sum = 0.0
        self._counts = torch.zeros(GATE_BINS, dtype=torch.int64)

    def add(self, scores: torch.Tensor) -> None:
        """Add a batch of scores of any shape, in [0, 1]."""
        self._sum += scores.mean().item() * scores.numel()
        # Counts are integers, because a float32 count would stop at 2^24.
        bins = (scores.flatten() * GATE_BINS).long().clamp_(0, GATE_BINS - 1)
        self._counts += torch.bincount(bins, minlength=GATE_BINS).cpu()

    @property
    def score(self) -> float:
        """The mean over heads, channels, tokens and sequences."""
        return self._sum / self._counts.sum().item()

    @property
    def histogram(self) -> list[float]:
        """The share of the scores in each of 20 equal bins of [0, 1]."""
        return (self._counts / self._counts.sum()).tolist()

    @property
    def below_a_tenth(self) -> float:
        """The share of the scores below 0.1, where a gate is all but shut."""
        return sum(self.histogram[: GATE_BINS // 10])


class ActivationStatistics:
    """Statistics of activations: of a decoder layer's output, or of the inputs of its `down_proj`,
    where outliers may move when they are kept out of the hidden states.

    Args:
        scale: the number that activations are divided by.

    Attributes:
        largest_of_all: the largest absolute value of any token of any sequence.
    """

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.sequences = 0
        self.largest_of_all = 0.0
        self._largest = self._first_token = 0.0
        self._kurtosis = self._outliers = 0.0

    def add(self, hidden_states: torch.Tensor) -> None:
        """Add a batch `[batch, T, channels]`."""
        for sequence in hidden_states:
            self._add_distribution(sequence.float())
        by_token = hidden_states.abs().amax(-1).cpu().double() / self.scale  # [batch, T]
        by_sequence = by_token.amax(-1)  # [batch]
        self.sequences += len(by_sequence)
        self._largest += by_sequence.sum().item()
        self._first_token += by_token[:, 0].sum().item()
        self.largest_of_all = max(self.largest_of_all, by_sequence.max().item())

    def _add_distribution(self, hidden_states: torch.Tensor) -> None:
        centered = hidden_states - hidden_states.mean()  # [T, channels]
        squared = centered.square_()  # in place, to hold only one copy of a long sequence
        variance = squared.mean()
        self._outliers += (squared > _OUTLIER**2 * variance).double().mean().item()
        self._kurtosis += squared.div_(variance).square_().mean(dtype=torch.float64).item()

    @property
    def kurtosis(self) -> float:
        """The mean over sequences of `mean((x - m)**4) / mean((x - m)**2)**2` over all tokens and
        channels of a sequence, with `m` their mean (arXiv:2306.12929, section 5). A normal
        distribution has 3."""
        return self._kurtosis / self.sequences

    @property
    def outlier_share(self) -> float:
        """The share of a sequence's activations further than 6 standard deviations from their mean,
        averaged over sequences (arXiv:2306.12929, section 3)."""
        return self._outliers / self.sequences

    @property
    def largest(self) -> float:
        """The mean over sequences of the largest activation of any token. Its mean over layers is
        M-Act (arXiv:2505.06708)."""
        return self._largest / self.sequences

    @property
    def largest_first_token(self) -> float:
        """The mean over sequences of the first token's largest activation."""
        return self._first_token / self.sequences


class PredictionStatistics:
    """Next-token predictions of one model, and their distance from the base's.

    The sums are over all tokens except the first of each sequence.

    Args:
        head: the output head, from final hidden states to logits.
        base: the base's predictions of the same batches; `None` if this is the base.
        logits_scaling: the number that the model divides its logits by, as Granite does.

    Attributes:
        hidden_states: the final hidden states of each batch, `[tokens, hidden_size]`.
        same_vocabulary: whether the model's logits can be compared with the base's.
    """

    def __init__(
        self,
        head: nn.Linear,
        base: "PredictionStatistics | None" = None,
        logits_scaling: float = 1.0,
    ):
        self.head = head
        self.base = base
        self.logits_scaling = logits_scaling
        # Hidden states stay on the CPU, and the logits are computed again where they are needed.
        self.hidden_states: list[torch.Tensor] = []
        self.same_vocabulary = base is None or base.head.out_features == head.out_features
        self._nll: list[torch.Tensor] = []  # [batch, T - 1] of each batch
        self._kl = 0.0

    def add(self, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Add a batch of final hidden states `[batch, T, hidden_size]` and its tokens `[batch, T]`.

        One chunk of tokens is processed at a time, so the full logits never exist.
        """
        batch_size = len(input_ids)
        # [batch * (T - 1), hidden_size] and [batch * (T - 1)]
        hidden_states, labels = hidden_states[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        batch_nll = []
        for start in range(0, labels.numel(), _TOKEN_CHUNK):
            chunk = slice(start, start + _TOKEN_CHUNK)
            log_p = self._log_softmax(hidden_states[chunk])  # [chunk, vocabulary]
            batch_nll.append(-log_p.gather(-1, labels[chunk, None]).squeeze(-1).cpu())
            if self.base is not None and self.same_vocabulary:
                log_q = self.base.log_probabilities(len(self.hidden_states), chunk)
                self._kl += (log_q.exp() * (log_q - log_p)).sum().item()
        self._nll.append(torch.cat(batch_nll).view(batch_size, -1))
        self.hidden_states.append(hidden_states.cpu())

    def log_probabilities(self, batch: int, chunk: slice) -> torch.Tensor:
        """Returns the log probabilities of the tokens in `chunk` of a batch,
        `[tokens, vocabulary]` in float32."""
        return self._log_softmax(self.hidden_states[batch][chunk].to(self.head.weight.device))

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the logits `[..., vocabulary]` in float32 of hidden states `[..., hidden_size]`,
        which are the model's if it does nothing else after its output head."""
        return self.head(hidden_states).float() / self.logits_scaling

    def _log_softmax(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden_states).log_softmax(-1)

    @property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihoods of all tokens but the first, `[sequences, T - 1]`, in nats."""
        return torch.cat(self._nll).double()

    @property
    def nll_by_window(self) -> list[float]:
        """The mean negative log-likelihood of each sequence. Comparing models window by window
        removes the noise that comes from the text."""
        return self.nll.mean(-1).tolist()

    @property
    def perplexity(self) -> float:
        """The `exp` of the mean negative log-likelihood of the next token."""
        return self.nll.mean().exp().item()

    @property
    def perplexity_far(self) -> float:
        """The perplexity of the tokens from position `NEAR` on. A base without a BOS token predicts
        the first few tokens badly, and gates that learn how texts begin gain enough there to hide a
        loss later in the text."""
        return self.nll[:, NEAR - 1 :].mean().exp().item()

    @property
    def kl_to_base(self) -> float | None:
        """The mean over tokens of `KL(base || model)` of the next-token distribution, in nats;
        `None` between different vocabularies."""
        return self._kl / self.nll.numel() if self.same_vocabulary else None


def _batch_sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(0).cpu().double()
