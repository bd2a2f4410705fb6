"""Extends TRL's SFTTrainer by the gates' losses, mixed sources and checkpoints without pickles."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig

from retrofit.data.collator import PackedRows
from retrofit.data.sources import LoadedSource
from retrofit.gates import GateLayer, gate_layers
from retrofit.losses.distillation import add_objectives
from retrofit.losses.layer_losses import add_layer_losses
from retrofit.models.document_attention import attend_by_document
from retrofit.recipe import Recipe
from retrofit.training.calibrated_start import CalibratedStart, position_ids_of
from retrofit.training.divergence import check_finite
from retrofit.training.mixed_sources import MixedSources
from retrofit.training.trainer_state import SafetensorsCheckpoints
from retrofit.utils.errors import UserError

_TOKENS = "labelled_tokens"  # a sum of each batch, beside those of `lm` and `kl`


class GateTrainer(CalibratedStart, SafetensorsCheckpoints, MixedSources):
    """Trains gates on a frozen base.

    Args:
        model: a base with gates, from `gated_model`.
        args: TRL's settings; `max_length` is the length of a row.
        sources: the data; each source is tokenized and packed by itself, then their rows are mixed.
        processing_class: the tokenizer.
        recipe: the losses, how gates and learning rates start, and `data.first_tokens`.
        callbacks: callbacks beside the Trainer's own.

    Raises:
        UserError: if the data does not suffice for one optimizer step, or under DeepSpeed's ZeRO-3.
    """

    _tag_names = ["retrofit", "gated-attention"]  # noqa: RUF012 - as in TRL
    # The loss is divided by the labelled tokens of all accumulated batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PeftModel,
        args: SFTConfig,
        sources: list[LoadedSource],
        processing_class: PreTrainedTokenizerBase,
        recipe: Recipe,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.recipe = recipe
        super().__init__(
            model=model,
            sources=sources,
            args=args,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self._check_engine()
        if args.packing:
            self.data_collator = PackedRows(
                processing_class.pad_token_id, _takes_lengths(self.model), recipe.data.first_tokens
            )
            attend_by_document(self.model.get_base_model())
        for layer in gate_layers(self.model).values():
            layer.float()  # undoes TRL's cast of trainable weights to bf16 on a quantized base
        objective = recipe.objective
        add_objectives(self.model.get_base_model(), objective)
        has_losses = objective.reads_layers
        self.layer_losses = add_layer_losses(self.model, objective) if has_losses else None
        self._losses: list[torch.Tensor] = []  # one of each micro-batch of the step so far
        self._compiled = False
        self._last_log: tuple[float, int] | None = None  # time in seconds, tokens seen

    def _check_engine(self) -> None:
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise UserError("DeepSpeed's ZeRO-3 is not supported; to shard the base, use FSDP2")

    def compile_layers(self) -> None:
        """Compiles each layer by itself.

        One graph then serves all layers of a kind, while that of the whole model takes minutes.
        """
        self._compiled = True
        for layer in self.model.get_base_model().base_model.layers:
            layer.compile()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.layer_losses:
            progress = self.state.global_step / self.state.max_steps
            scale = 1 / self.current_gradient_accumulation_steps
            self.layer_losses.prepare(position_ids_of(inputs), progress, scale)
        # Compiled layers are not watched: their graphs contain the hooks, and new hooks at each
        # step would make new graphs.
        watched_layers = {} if self._compiled else gate_layers(self.model)
        with gate_movement(watched_layers.values()) as movements:
            outputs = model(**inputs, objectives=True)
        num_tokens = outputs.num_tokens if num_items_in_batch is None else num_items_in_batch
        loss = outputs.loss / torch.as_tensor(num_tokens, device=outputs.loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over ranks
        self._record(outputs, movements)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Checks the losses and the gradient, once a step and before the gates are updated."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        losses, self._losses = self._losses, []
        step = self.state.global_step
        check_finite(losses, grad_norm, step, self.highest_rate, self.model.dtype)
        return grad_norm

    def _record(self, outputs, movements: list[torch.Tensor]) -> None:
        metrics = self._metrics["train"]
        # These stay on the device until they are logged, so that nothing waits for it.
        metrics["lm"].append(outputs.lm)
        metrics["kl"].append(outputs.kl)
        metrics[_TOKENS].append(outputs.num_tokens)
        if movements:
            metrics["gate_movement"].append(torch.stack(movements).mean())

    def log(self, logs, start_time=None):
        if "loss" in logs:
            this_log = (time.monotonic(), self.state.num_input_tokens_seen)
            last_log, self._last_log = self._last_log, this_log
            if last_log:
                seconds, tokens = this_log[0] - last_log[0], this_log[1] - last_log[1]
                logs["tokens_per_second"] = tokens / seconds
            logs |= self._means_since_last_log()
        super().log(logs, start_time)

    def _means_since_last_log(self) -> dict[str, float]:
        """Returns means over what was recorded since the last log, and over ranks.

        `lm` and `kl` are means over labelled tokens, however many a batch has of them. The losses
        inside the layers are those of the last batch.
        """
        recorded = self._metrics["train"]
        means = {name: sum(values) / len(values) for name, values in recorded.items()}
        recorded.clear()
        if self.layer_losses:
            means |= self.layer_losses.means()
        device = self.accelerator.device
        means_here = torch.stack(
            [torch.as_tensor(value, device=device).float() for value in means.values()]
        )
        reduced = self.accelerator.reduce(means_here, "mean").tolist()
        logged = dict(zip(means, reduced, strict=True))
        if (tokens := logged.pop(_TOKENS, None)) is not None:
            logged |= {name: logged[name] / max(tokens, 1) for name in ("lm", "kl")}
        return logged

    def create_model_card(self, *args, **kwargs):
        """Writes no card. TRL would write a draft beside each checkpoint; merging writes the real
        one."""


def _takes_lengths(model: PreTrainedModel) -> bool:
    """Returns whether the attention kernel takes the lengths of packed documents."""
    return "flash" in model.config._attn_implementation


@contextmanager
def gate_movement(layers: Iterable[GateLayer]) -> Iterator[list[torch.Tensor]]:
    """Collects the mean |g - 1| of each gate `g` that runs inside the `with` block."""
    movements: list[torch.Tensor] = []

    def record(_module, _args, gate):
        movements.append((gate.detach() - 1).abs().mean(dtype=torch.float32))

    projections = [projection for layer in layers for projection in layer.g_proj.values()]
    handles = [projection.register_forward_hook(record) for projection in projections]
    try:
        yield movements
    finally:
        for handle in handles:
            handle.remove()
