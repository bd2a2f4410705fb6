"""Losses on what happens inside the layers, added where each layer has it at hand.

- pressure: the attention sink (`retrofit.losses.sink_pressure`);
- balance: the load of the heads (`retrofit.losses.head_balance`);
- hidden: the distance of what each attention module reads from what it reads in the base;
- activation: activations that dwarf all others (`retrofit.losses.massive_activations`).

`hidden` asks of every layer what `kl` asks of the last, so that a gate learns from its own layer
what to make up for: `mean |X - X_base|**2 / |X_base|**2` over tokens, with `X` the normalized
hidden states. The first token of a document is left out: its state is what carries the sink.

Each loss is the mean over the rows of a batch of the row's own value, and a row that has nothing to
say counts as 0. So any way to deal the rows of a step to devices and accumulated micro-batches, as
many to each, gives the same gradients, and no device has to ask another how many documents or
tokens it holds. Only the queries that `pressure` and `balance` sample are drawn anew. Where an
attention kernel wants rows laid end to end, a micro-batch is one row.
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
    """Identity of `tensor` whose backward also starts the gradient of `loss`.

    A loss handed up to the trainer would lose its gradient under reentrant checkpointing, and be
    counted twice under the other kind.
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
    """The losses of all gated layers in one training step, each the mean over layers.

    Each layer adds the gradient of its share. Call `prepare` before the forward, which must run
    the base first where `hidden` is asked for.

    Args:
        layers: how many there are.
        objective: the weights.
    """

    def __init__(self, layers: int, objective: Objective):
        self.layers = layers
        self.objective = objective
        self.weights: dict[str, float] = {}
        self.sampled: SampledRows | None = None
        self.position_ids = torch.empty(0)
        self.base: dict[int, torch.Tensor] = {}  # by layer, what it reads in the base
        self.kept: dict[int, torch.Tensor] = {}  # by layer, the tokens that are compared with it
        self.values: dict[str, dict[int, torch.Tensor]] = {}
        self.gates: list[torch.Tensor] = []  # of the layer that runs
        self.left: dict[int, torch.Tensor] = {}  # by layer, what the slots leave to the keys

    def prepare(self, position_ids: torch.Tensor, progress: float, scale: float = 1.0) -> None:
        """Get ready for a batch.

        Args:
            position_ids: `[batch, T]`, from 0 at the start of each document; negative for padding.
            progress: share of the steps that are done.
            scale: factor of all gradients, for accumulation.
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
        self.base, self.kept = {}, {}  # the last batch's, before this one's take as much again
        self.position_ids = position_ids
        self.sampled = None
        if "pressure" in self.weights or "balance" in self.weights:
            self.sampled = sample_rows(position_ids, objective.sampled_rows)

    @torch.compiler.disable  # what is kept by layer would make a graph of each
    def __call__(
        self,
        attention: nn.Module,
        hidden_states: torch.Tensor,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        sink: Sink | None,
        attn_output: torch.Tensor,
    ) -> torch.Tensor:
        """`attn_output`, unchanged but for the gradients that start where it is."""
        gates, self.gates = self.gates, []
        index = attention.layer_idx
        if attention.attn_gate.disable_adapters:  # the base's own pass
            if "hidden" in self.weights:
                self.base[index] = hidden_states.detach()
            return attn_output
        # The first pass of a reentrant checkpoint runs without gradients.
        if not self.weights or not torch.is_grad_enabled():
            return attn_output
        losses = self._attention_losses(attention, query_states, key_states, sink, gates)
        if "hidden" in self.weights:
            losses["hidden"] = relative_distance(hidden_states, self.base[index], self.kept[index])
        return self._inject(attn_output, index, losses)

    @torch.compiler.disable
    def before_layer(self, layer: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of a decoder layer, whose first argument is the residual stream."""
        attention = layer.self_attn
        if attention.attn_gate.disable_adapters:
            if "hidden" in self.weights:
                self.kept[attention.layer_idx] = self._kept(args[0])
            return None
        if "activation" not in self.weights or not torch.is_grad_enabled():
            return None
        losses = {"activation": excess_activation(args[0], self.position_ids)}
        return self._inject(args[0], attention.layer_idx, losses), *args[1:]

    def _kept(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Bool `[batch, T]`: the tokens that are to stay what they are in the base, which are all
        but the first of each document and those whose activation is massive."""
        return (self.position_ids > 0) & ~is_massive(hidden_states, self.position_ids)

    def keep_gate(self, _projection: nn.Module, _args: tuple, gate: torch.Tensor) -> None:
        """Forward hook of a gate, for `balance` to read what its layer has computed."""
        self.gates.append(gate)

    def _inject(self, tensor: torch.Tensor, index: int, losses: dict) -> torch.Tensor:
        for name, loss in losses.items():
            # By layer, so that a recomputed forward replaces its first value.
            self.values[name][index] = loss.detach()
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        return _InjectGradient.apply(tensor, total / self.layers) if losses else tensor

    def _attention_losses(self, attention, query_states, key_states, sink, gates) -> dict:
        losses: dict[str, torch.Tensor] = {}
        if (sampled := self.sampled) is None:
            return losses
        weights = attention_of_rows(attention, query_states, key_states, sampled, sink)
        if sink is not None:
            self.left[attention.layer_idx] = _mean_row_sum(weights.detach(), sampled)
        if "pressure" in self.weights:
            losses["pressure"] = collision_probability(weights, sampled)
        if "balance" in self.weights:
            load = self._load(attention, weights, sampled, sink, gates)
            shared = self.objective.balance_shared_heads
            losses["balance"] = balance_loss(load, sampled.counts, shared)
        return losses

    def _load(self, attention, weights, sampled, sink, gates) -> torch.Tensor:
        """What each head works on: what its own sink and its gates leave."""
        kind = self.objective.balance_load
        has_sinks = "s_aux" in attention.attention_kwargs()
        left = sink_load(weights)
        if not has_sinks and kind != "gated":
            left = vanilla_load(weights, sampled.starts, left if sink is not None else 1.0)
        if kind == "vanilla" or not gates:
            return left
        gate = math.prod(gates)
        index = sampled.rows[:, :, None, None].expand(-1, -1, *gate.shape[2:])
        scores = gate.gather(1, index)
        if kind == "gated" and sink is None:
            return gated_load(scores)
        return effective_load(left, scores)

    def means(self) -> dict[str, torch.Tensor]:
        """The losses of the last batch, unweighted, each the mean over layers; 0 where no row has
        anything to say. Of sink logits also `sink_share`, what their slots take."""
        means = {
            name: torch.stack(list(by_layer.values())).mean() if by_layer else torch.tensor(0.0)
            for name, by_layer in self.values.items()
        }
        if self.left:
            means["sink_share"] = 1 - torch.stack(list(self.left.values())).mean()
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
        if objective.balance:
            for projection in layer.self_attn.attn_gate.g_proj.values():
                projection.register_forward_hook(layer_losses.keep_gate)
    return layer_losses


def _mean_row_sum(weights: torch.Tensor, sampled: SampledRows) -> torch.Tensor:
    """Mean over the rows that count of the weight of all keys."""
    left = sink_load(weights).mean(1)
    return (left * sampled.counts).sum() / sampled.counts.sum().clamp(min=1)


def relative_distance(
    hidden_states: torch.Tensor, base: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """`mean |X - X_base|**2 / |X_base|**2` over the tokens of a row that count, mean over rows.

    Args:
        hidden_states: `[batch, T, hidden_size]`.
        base: the same of the base.
        tokens: bool `[batch, T]`, those that count.

    Returns:
        A float32 scalar with the gradient of `hidden_states`.
    """
    base = base.float()
    # A norm squared takes fewer passes over the states than the sum of their squares.
    distance = ((hidden_states.float() - base).norm(dim=-1) / base.norm(dim=-1)).square()
    return (distance.masked_fill(~tokens, 0).sum(-1) / tokens.sum(-1).clamp(min=1)).mean()
