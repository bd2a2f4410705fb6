"""What `retrofit measure` reports: formulas, sources, and the sums they are made of.

`A[i, j]` is the attention that query `i` pays to key `j`, and `T` the length of a sequence. A sink
logit takes part in the softmax without being a key, so that no metric counts it as one. Every
sum is streamed: over blocks of queries for attention, over chunks of tokens for logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from retrofit.adapters._sink import Sink
from retrofit.losses.sampled_attention import NEAR

TAIL = 128  # a key needs some far queries of its own: none of the last positions counts
SINK_THRESHOLD = 0.3
GATE_BINS = 20  # of [0, 1]
_OUTLIER = 6.0  # standard deviations
_QUERY_BLOCK = 128
_TOKEN_CHUNK = 128


class AttentionColumns(NamedTuple):
    """Readings of the attention matrix of one layer.

    Attributes:
        first: `A[i, 0]` by query, `[batch, heads, T]`.
        share: mean of `A[i, j]` over the queries `i >= j + NEAR`, by key `j <= T - TAIL`:
            `[batch, heads, T - TAIL + 1]`.
        left: `sum_j A[i, j]` by query, what a sink logit leaves to the keys, `[batch, heads, T]`;
            `None` without a sink logit, where it is 1.
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
    """Columns of the attention matrix in O(block * T) memory a head, in float32.

    Args:
        query_states: `[batch, heads, T, head_dim]`, after RoPE.
        key_states: `[batch, kv_heads, T, head_dim]`, after RoPE.
        scaling: factor of the logits.
        attention_mask: bool `[batch or 1, heads or 1, T, T]`, True where a query may look, never
            ahead of itself; `None` for plain causal attention.
        sink_logits: one that joins each softmax without being a key, as in gpt-oss: `[heads]`, or
            by query `[batch, heads, T]`. What it takes no key has.
        block: rows of queries at a time.
    """
    batch, heads, length, _ = query_states.shape
    first, left, columns = [], [], query_states.new_zeros(batch, heads, length, dtype=torch.float32)
    blocks = _blocks(query_states, key_states, scaling, attention_mask, block)
    for start, end, logits, hidden in blocks:
        # A row of padding sees nothing, and its softmax is not a number.
        weights = logits.softmax(-1).masked_fill_(hidden, 0)
        if sink_logits is not None:
            of_block = sink_logits if sink_logits.ndim == 1 else sink_logits[..., start:end]
            left.append(left_by_slot(logits.logsumexp(-1), of_block))
            weights *= left[-1].unsqueeze(-1)
        first.append(weights[..., 0].clone())  # a view would keep the block
        columns[..., :end] += weights.tril_(start - NEAR).sum(-2)
    far_queries = torch.arange(length - NEAR, TAIL - NEAR - 1, -1, device=columns.device)
    share = columns[..., : length - TAIL + 1] / far_queries
    return AttentionColumns(torch.cat(first, -1), share, torch.cat(left, -1) if left else None)


def left_by_slot(log_sum_exp: torch.Tensor, sink_logits: torch.Tensor) -> torch.Tensor:
    """`g = sigmoid(LSE - s)`, what a slot of this logit leaves to the keys (arXiv:2602.01203):
    `[batch, heads, T]`.

    Args:
        log_sum_exp: `LSE`, `[batch, heads, T]`.
        sink_logits: `[heads]` or `[batch, heads, T]`.
    """
    odds = torch.ones(log_sum_exp.shape[1], device=log_sum_exp.device)
    return Sink(sink_logits, odds).left(log_sum_exp)


def _blocks(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None,
    block: int,
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """For the queries `start..end`, the logits in float32, -inf where they do not look, of the keys
    up to the last that any of them sees: `[batch, heads, end - start, keys]`; and where that is."""
    batch, heads, length, _ = query_states.shape
    before = key_states.shape[2] - length  # keys of a cache
    # Groups are folded into the rows, so that keys are not repeated for every query head.
    queries = query_states.float().unflatten(1, (key_states.shape[1], -1))
    keys = key_states.float().mT
    for start in range(0, length, block):
        end = min(start + block, length)
        seen = before + end
        rows = queries[:, :, :, start:end].flatten(2, 3)
        logits = (rows @ keys[..., :seen]).view(batch, heads, end - start, seen) * scaling
        if attention_mask is None:
            hidden = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(before + start + 1)
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
            gate_scores: `[batch, T, heads, channels]`, `None` without a gate. A constant factor
                makes no difference.
        """
        first, share, left = columns
        load = (1 if left is None else left) - first
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
        """Attention to the first token: mean of `A[i, 0]` over heads, all queries and sequences
        (F-Attn, arXiv:2505.06708)."""
        return (self._first.mean() / self.sequences).item()

    @property
    def sink_ratio(self) -> float:
        """Share of heads whose mean `A[i, 0]` over queries and sequences is above 0.3
        (arXiv:2410.10781)."""
        return (self._first / self.sequences > SINK_THRESHOLD).double().mean().item()

    @property
    def column_share(self) -> torch.Tensor:
        """`share(j)`, mean of `A[i, j]` over heads, sequences and the queries `i >= j + 64`, by
        key `j <= T - 128`: `[T - 127]` (ours)."""
        return self._share.mean(0) / self.sequences

    @property
    def peak_share_per_head(self) -> float:
        """Mean over heads and sequences of `max_j` of that head's own `share(j)`: a sink that sits
        elsewhere in every head or text cannot hide in the average (ours)."""
        return (self._peak.mean() / self.sequences).item()

    @property
    def sink_share(self) -> float | None:
        """Share of the attention that a sink logit takes from the keys: mean of `1 - sum_j A[i, j]`
        over heads, queries and sequences. `None` without one: its softmax sums to 1."""
        return None if self._left is None else 1 - (self._left.mean() / self.sequences).item()

    @property
    def head_load_cv(self) -> float:
        """Coefficient of variation (population std / mean) over heads of the importance: the mean
        over tokens and sequences of the effective load `(sum_j A[i, j] - A[i, 0]) * g[i]`, with `g`
        the mean gate over the head's channels, 1 without a gate (arXiv:2602.01203). The sum is 1
        but for what a sink logit takes."""
        return (self._load.std(correction=0) / self._load.mean()).item()

    @property
    def head_load(self) -> list[float]:
        """The importance of each head that `head_load_cv` is of."""
        return (self._load / self.sequences).tolist()


class GateStatistics:
    """The gate scores of one layer: `sigmoid(X W_g)`, half of a retrofit's doubled gate, so that
    0.5 is the identity there (arXiv:2505.06708)."""

    def __init__(self):
        self._sum = 0.0
        self._counts = torch.zeros(GATE_BINS, dtype=torch.int64)

    def add(self, scores: torch.Tensor) -> None:
        """Add a batch of scores of any shape, in [0, 1]."""
        self._sum += scores.mean().item() * scores.numel()
        # Integers, because a float32 bin stops counting at 2^24.
        bins = (scores.flatten() * GATE_BINS).long().clamp_(0, GATE_BINS - 1)
        self._counts += torch.bincount(bins, minlength=GATE_BINS).cpu()

    @property
    def score(self) -> float:
        """Mean over heads, channels, tokens and sequences."""
        return self._sum / self._counts.sum().item()

    @property
    def histogram(self) -> list[float]:
        """Share of the scores in each of 20 equal bins of [0, 1]."""
        return (self._counts / self._counts.sum()).tolist()

    @property
    def below_a_tenth(self) -> float:
        """Share of the scores below 0.1: gates that are all but shut."""
        return sum(self.histogram[: GATE_BINS // 10])


class ActivationStatistics:
    """The hidden states that one decoder layer puts out, by their largest absolute values, or what
    its `down_proj` reads, where outliers go that are held off the hidden states.

    Args:
        scale: what they are divided by.

    Attributes:
        largest_of_all: the largest of any token of any sequence.
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
            self._add_shape(sequence.float())
        by_token = hidden_states.abs().amax(-1).cpu().double() / self.scale
        by_sequence = by_token.amax(-1)
        self.sequences += len(by_sequence)
        self._largest += by_sequence.sum().item()
        self._first_token += by_token[:, 0].sum().item()
        self.largest_of_all = max(self.largest_of_all, by_sequence.max().item())

    def _add_shape(self, hidden_states: torch.Tensor) -> None:
        centered = hidden_states - hidden_states.mean()
        squared = centered.square_()  # in place: of a long sequence one copy is enough
        variance = squared.mean()
        self._outliers += (squared > _OUTLIER**2 * variance).double().mean().item()
        self._kurtosis += squared.div_(variance).square_().mean(dtype=torch.float64).item()

    @property
    def kurtosis(self) -> float:
        """`mean((x - m)**4) / mean((x - m)**2)**2` over all tokens and channels of a sequence, `m`
        their mean: 3 where they are normally distributed, and mean over sequences
        (arXiv:2306.12929, section 5)."""
        return self._kurtosis / self.sequences

    @property
    def outlier_share(self) -> float:
        """Share of the activations of a sequence that lie further than 6 standard deviations from
        their mean; mean over sequences (arXiv:2306.12929, section 3)."""
        return self._outliers / self.sequences

    @property
    def largest(self) -> float:
        """Mean over sequences of the largest activation of any token. Its mean over layers is
        M-Act (arXiv:2505.06708)."""
        return self._largest / self.sequences

    @property
    def largest_first_token(self) -> float:
        """Mean over sequences of the first token's largest activation."""
        return self._first_token / self.sequences


class PredictionStatistics:
    """Next-token predictions of one model, summed over the tokens of all sequences but each one's
    first, and their distance from the base's.

    Args:
        head: the output head, from final hidden states to logits.
        base: the base's predictions of the same batches; `None` if this is the base.
        logits_scaling: what the model divides its logits by, as Granite does.
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
        # By batch, `[tokens, hidden_size]` on the CPU: the logits are made again where needed.
        self.hidden_states: list[torch.Tensor] = []
        self.same_vocabulary = base is None or base.head.out_features == head.out_features
        self._nll: list[torch.Tensor] = []  # by batch, `[batch, T - 1]`
        self._kl = 0.0

    def add(self, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Add a batch of final hidden states `[batch, T, hidden_size]` and its tokens
        `[batch, T]`, a chunk of tokens at a time: full logits never exist."""
        rows = len(input_ids)
        hidden_states, labels = hidden_states[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        batch_nll = []
        for start in range(0, labels.numel(), _TOKEN_CHUNK):
            chunk = slice(start, start + _TOKEN_CHUNK)
            log_p = self._log_softmax(hidden_states[chunk])
            batch_nll.append(-log_p.gather(-1, labels[chunk, None]).squeeze(-1).cpu())
            if self.base is not None and self.same_vocabulary:
                log_q = self.base.log_probabilities(len(self.hidden_states), chunk)
                self._kl += (log_q.exp() * (log_q - log_p)).sum().item()
        self._nll.append(torch.cat(batch_nll).view(rows, -1))
        self.hidden_states.append(hidden_states.cpu())

    def log_probabilities(self, batch: int, chunk: slice) -> torch.Tensor:
        """Of the tokens in `chunk` of a batch, `[tokens, vocabulary]` in float32."""
        return self._log_softmax(self.hidden_states[batch][chunk].to(self.head.weight.device))

    def _log_softmax(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (self.head(hidden_states).float() / self.logits_scaling).log_softmax(-1)

    @property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihood of every token but the first, `[sequences, T - 1]`, in nats."""
        return torch.cat(self._nll).double()

    @property
    def nll_by_window(self) -> list[float]:
        """The mean of each sequence: differences between models, window by window, have the noise
        of the models and not that of the text."""
        return self.nll.mean(-1).tolist()

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-likelihood of the next token."""
        return self.nll.mean().exp().item()

    @property
    def perplexity_far(self) -> float:
        """That of the tokens from position `NEAR` on. A base without a BOS token predicts the first
        few badly, and gates that learn how texts begin gain enough there to hide a loss later."""
        return self.nll[:, NEAR - 1 :].mean().exp().item()

    @property
    def kl_to_base(self) -> float | None:
        """Mean over tokens of `KL(base || model)` of the next-token distribution, in nats; `None`
        between different vocabularies."""
        return self._kl / self.nll.numel() if self.same_vocabulary else None


def _batch_sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(0).cpu().double()
