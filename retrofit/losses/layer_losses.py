"""Losses on the inside of the layers, which each layer adds where it has their inputs at hand.

- pressure: penalizes attention sinks (`retrofit.losses.sink_pressure`);
- balance: evens out the load of the heads (`retrofit.losses.head_balance`);
- hidden: keeps what each attention module reads close to what it reads in the base;
- activation: penalizes activations that dwarf all others (`retrofit.losses.massive_activations`).

`hidden` asks of every layer what `kl` asks of the last one, so that a gate learns from its own
layer what to make up for. It is `mean |X - X_base|**2 / |X_base|**2` over tokens, with `X` the
normalized hidden states. The first token of a document is left out, because its state carries the
sink.

Each loss is computed for each row of a batch by itself and averaged over the rows. A row to which a
loss does not apply counts as 0. So the gradients do not depend on how the rows of a step are dealt
to devices and accumulated micro-batches, as long as each has the same number of them, and no device
has to ask another how many documents or tokens it holds. Only the queries that `pressure` and
`balance` sample differ. Where an attention kernel needs the rows laid end to end, a micro-batch is
one row.
"""

import math

import torch
from torch import nn

from retrofit.adapters._family import GatedAttention
from retrofit.adapters._sink import Sink
from retrofit.losses.head_balance import (
    balance_loss,
    effective_load,
    gated_load,
    sink_load,
    vanilla_load,
)
from retrofit.losses.massive_activations import excess_activation, is_massive
from retrofit.losses.sampled_attention import SampledRows, attention_of_rows, sample_rows
from retrofit.losses.sink_pressure import collision_probability
from retrofit.recipe import Objective


class _InjectGradient(torch.autograd.Function):
    """Returns `tensor` unchanged; its backward also starts the gradient of `loss`.

    A loss that is handed up to the trainer instead would lose its gradient under reentrant
    checkpointing, and would be counted twice under the other kind.
    """

    @staticmethod
    def forward(ctx, tensor, loss):
        ctx.save_for_backward(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


class LayerLosses:
    """The losses of all gated layers in one training step, each averaged over layers.

    Each layer adds the gradient of its own losses. Call `prepare` before the forward. If `hidden`
    has a weight, the base must run before the gated model does.

    Args:
        num_layers: how many gated layers the model has.
        objective: the weights of the losses.

    Attributes:
        weights: the weight of each loss in this batch; losses without one are not computed.
        sampled: the query rows that `pressure` and `balance` read; `None` if there are none.
        position_ids: positions of the batch, `[batch, T]`.
        base_inputs: by layer, what its attention module reads in the base, `[batch, T,
            hidden_size]`.
        compared_tokens: by layer, the tokens that `hidden` compares with the base, bool `[batch,
            T]`.
        values: by name and layer, the losses of this batch, unweighted.
        has_sinks: whether the gates of a layer that has run have sinks.
        key_shares: by layer, the share of the attention that its sinks leave to the keys.
    """

    def __init__(self, num_layers: int, objective: Objective):
        self.num_layers = num_layers
        self.objective = objective
        self.weights: dict[str, float] = {}
        self.sampled: SampledRows | None = None
        self.position_ids = torch.empty(0)
        self.base_inputs: dict[int, torch.Tensor] = {}
        self.compared_tokens: dict[int, torch.Tensor] = {}
        self.values: dict[str, dict[int, torch.Tensor]] = {}
        self.has_sinks = False
        self.key_shares: dict[int, torch.Tensor] = {}

    def prepare(self, position_ids: torch.Tensor, progress: float, scale: float = 1.0) -> None:
        """Get ready for a batch.

        Args:
            position_ids: positions, which start at 0 in each document and are negative for padding,
                `[batch, T]`.
            progress: the share of the training steps that are done.
            scale: factor of all gradients, for gradient accumulation.
        """
        objective = self.objective
        weights = {
            "pressure": objective.pressure_at(progress),
            "balance": objective.balance,
            "hidden": objective.hidden_at(progress),
            "activation": objective.activation,
        }
        self.weights = {name: weight * scale for name, weight in weights.items() if weight}
        self.values = {name: {} for name in self.weights}
        # The last batch's tensors are freed before this batch's take as much memory again.
        self.base_inputs, self.compared_tokens, self.key_shares = {}, {}, {}
        self.position_ids = position_ids
        self.sampled = None
        if self.reads_attention():
            self.sampled = sample_rows(position_ids, objective.sampled_rows)

    def reads_attention(self) -> bool:
        """Whether a loss of this batch samples query rows and reads their attention."""
        return "pressure" in self.weights or "balance" in self.weights

    @torch.compiler.disable  # the dictionaries by layer would make each layer a graph of its own
    def __call__(
        self,
        attention: nn.Module,
        hidden_states: torch.Tensor,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        sink: Sink | None,
        attn_output: torch.Tensor,
    ) -> torch.Tensor:
        """The observer of a `GatedAttention`, which is given what the layer computes.

        Args:
            attention: the attention module.
            hidden_states: what the module reads, `[batch, T, hidden_size]`.
            query_states: queries after RoPE, `[batch, heads, T, head_dim]`.
            key_states: keys after RoPE, `[batch, kv_heads, T, head_dim]`.
            sink: the sinks that the gates add, if they add any.
            attn_output: the gated output, `[batch, T, heads, head_dim]`.

        Returns:
            `attn_output`, whose backward also starts the gradients of the losses.
        """
        index = attention.layer_idx
        if attention.attn_gate.disable_adapters:  # the base's pass
            if "hidden" in self.weights:
                self.base_inputs[index] = hidden_states.detach()
            return attn_output
        # The first pass of a reentrant checkpoint runs without gradients.
        if not self.weights or not torch.is_grad_enabled():
            return attn_output
        self.has_sinks |= sink is not None
        losses = self._attention_losses(attention, hidden_states, query_states, key_states, sink)
        if "hidden" in self.weights:
            losses["hidden"] = relative_distance(
                hidden_states, self.base_inputs[index], self.compared_tokens[index]
            )
        return self._inject(attn_output, index, losses)

    @torch.compiler.disable
    def before_layer(self, layer: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of a decoder layer, whose first argument is the residual stream."""
        attention = layer.self_attn
        if attention.attn_gate.disable_adapters:
            if "hidden" in self.weights:
                self.compared_tokens[attention.layer_idx] = self._compared_tokens(args[0])
            return None
        if "activation" not in self.weights or not torch.is_grad_enabled():
            return None
        losses = {"activation": excess_activation(args[0], self.position_ids)}
        return self._inject(args[0], attention.layer_idx, losses), *args[1:]

    def _compared_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The tokens whose hidden states should stay as in the base, bool `[batch, T]`: all but the
        first of each document and those with massive activations."""
        return (self.position_ids > 0) & ~is_massive(hidden_states, self.position_ids)

    def _inject(self, tensor: torch.Tensor, index: int, losses: dict) -> torch.Tensor:
        """Note a layer's losses by name, and let the backward of `tensor` start their
        gradients."""
        for name, loss in losses.items():
            # They are noted by layer, so that a recomputed forward overwrites its first values.
            self.values[name][index] = loss.detach()
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        return _InjectGradient.apply(tensor, total / self.num_layers) if losses else tensor

    def _attention_losses(self, attention, hidden_states, query_states, key_states, sink) -> dict:
        """The losses of one layer that read its attention, by name."""
        losses: dict[str, torch.Tensor] = {}
        if (sampled := self.sampled) is None:
            return losses
        # The attention of the sampled rows, [batch, heads, num_rows, T].
        weights = attention_of_rows(attention, query_states, key_states, sampled, sink)
        if sink is not None:
            self.key_shares[attention.layer_idx] = _mean_key_share(weights.detach(), sampled)
        if "pressure" in self.weights:
            losses["pressure"] = collision_probability(weights, sampled)
        if "balance" in self.weights:
            load = self._load(attention, hidden_states, weights, sampled, sink)
            shared_heads = self.objective.balance_shared_heads
            losses["balance"] = balance_loss(load, sampled.valid, shared_heads)
        return losses

    def _load(self, attention, hidden_states, weights, sampled, sink) -> torch.Tensor:
        """The load of each head that the recipe asks for, `[batch, heads, num_rows]`."""
        kind = self.objective.balance_load
        base_has_sinks = "s_aux" in attention.attention_kwargs()
        # The load without gates: the attention to all keys, or to all but the first token.
        load = sink_load(weights)
        if not base_has_sinks and kind != "gated":
            load = vanilla_load(weights, sampled.starts, load if sink is not None else 1.0)
        gates = attention.attn_gate.active_gates()
        projections = [gate for gate in gates if gate.weight is not None]
        if kind == "vanilla" or not projections:
            return load
        # The gates of the sampled rows, [batch, num_rows, heads, channels], which multiply if there
        # are several adapters.
        inputs = hidden_states.take_along_dim(sampled.rows.unsqueeze(-1), 1)
        # A call would also run the hooks that watch the gates of the whole batch.
        scores = math.prod(gate.forward(inputs) for gate in projections)
        if kind == "gated" and sink is None:
            return gated_load(scores)
        return effective_load(load, scores)

    def means(self) -> dict[str, torch.Tensor]:
        """The losses of the last batch by name, unweighted and averaged over layers; 0 for a loss
        that applies to no row. If the gates have sinks and a loss reads attention, `sink_share` is
        the share of the attention that these take, and 0 if no row has been sampled. So all devices
        have the same names."""
        means = {
            name: torch.stack(list(by_layer.values())).mean() if by_layer else torch.tensor(0.0)
            for name, by_layer in self.values.items()
        }
        if self.has_sinks and self.reads_attention():
            shares = list(self.key_shares.values())
            means["sink_share"] = 1 - torch.stack(shares).mean() if shares else torch.tensor(0.0)
        return means


def add_layer_losses(model: nn.Module, objective: Objective) -> LayerLosses:
    """Let every gated layer of `model` add its losses."""
    layers = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "self_attn", None), GatedAttention)
    ]
    layer_losses = LayerLosses(len(layers), objective)
    for layer in layers:
        layer.self_attn.observer = layer_losses
        layer.register_forward_pre_hook(layer_losses.before_layer)
    return layer_losses


def _mean_key_share(weights: torch.Tensor, sampled: SampledRows) -> torch.Tensor:
    """The attention that all keys have together, averaged over heads and valid rows; a scalar."""
    share = sink_load(weights).mean(1)  # [batch, num_rows]
    return (share * sampled.valid).sum() / sampled.valid.sum().clamp(min=1)


def relative_distance(
    hidden_states: torch.Tensor, base: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """`mean |X - X_base|**2 / |X_base|**2` over the compared tokens of a row, averaged over rows.

    Args:
        hidden_states: `X`, `[batch, T, hidden_size]`.
        base: `X_base`, the base's hidden states, of the same shape.
        tokens: the tokens to compare, bool `[batch, T]`.

    Returns:
        A float32 scalar with the gradient of `hidden_states`.
    """
    base = base.float()
    # Squaring a norm takes fewer passes over the states than summing their squares does.
    distance = ((hidden_states.float() - base).norm(dim=-1) / base.norm(dim=-1)).square()
    return (distance.masked_fill(~tokens, 0).sum(-1) / tokens.sum(-1).clamp(min=1)).mean()
