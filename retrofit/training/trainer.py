"""Extends TRL's SFTTrainer by the gates' losses, mixed sources and checkpoints without pickles."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from datasets.config import HF_DATASETS_CACHE
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from retrofit.data.chats import naming_source
from retrofit.data.collator import PackedRows
from retrofit.data.mixture import check_any_left, mix
from retrofit.data.pieces import split_rows
from retrofit.data.sources import LoadedSource
from retrofit.data.vocabulary import check_rows_of_tokens, embedded_tokens, prepended_token
from retrofit.gates import GateLayer, gate_layers
from retrofit.losses.distillation import add_objectives
from retrofit.losses.layer_losses import add_layer_losses
from retrofit.models.document_attention import attend_by_document
from retrofit.recipe import Recipe
from retrofit.training.calibration import Calibration, calibrate
from retrofit.training.divergence import check_finite
from retrofit.training.trainer_state import SafetensorsCheckpoints, rows_per_step
from retrofit.utils.errors import UserError
from retrofit.utils.files import writing

# The learning rate of sink logits and key biases. They are stored in tens of nats, so a step moves
# them by up to 0.2.
CONSTANTS_RATE = 2e-2
_TOKENS = "labelled_tokens"  # a sum of each batch, beside those of `lm` and `kl`


class GateTrainer(SafetensorsCheckpoints, SFTTrainer):
    """Trains gates on a frozen base.

    Args:
        model: a base with gates, from `gated_model`.
        args: TRL's settings; `max_length` is the length of a row.
        sources: the data; each source is tokenized and packed by itself, then their rows are mixed.
        processing_class: the tokenizer.
        recipe: the losses, how gates and learning rates start, and `data.first_tokens`.
        callbacks: callbacks beside the Trainer's own.

    Attributes:
        learning_rates: the rate of each layer; empty for one rate, and before
            `initialize_gates`.
        left_out: how many rows of a source, by its path, have nothing to train on within a row's
            length.

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
        self.sources, self._embedded = sources, embedded_tokens(model.config)
        self.left_out: Counter[str] = Counter()
        super().__init__(
            model=model,
            args=args,
            train_dataset=sources[0].rows,
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
        self.learning_rates: dict[int, float] = {}
        self._are_gates_initialized = False
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

    def calibrate(self, documents: int = 64) -> Calibration:
        """Reads the calibration from about the first `documents` documents of the data.

        The main rank reads it and sends it to the others, so that it does not depend on the number
        of ranks.
        """
        calibrations: list[Calibration | None] = [None]
        if self.accelerator.is_main_process:
            # On some CPUs, a forward in eval mode makes bitsandbytes repack 4-bit weights into a
            # form that has no backward.
            self.model.train()
            calibrations = [calibrate(self.model, self._first_batches(documents)).cpu()]
        (calibration,) = broadcast_object_list(calibrations)
        return calibration

    def initialize_gates(self, resumed: bool = False) -> list[str]:
        """Sets what the recipe leaves to calibration: the layers that get a projection, the
        constants of the gates, and the learning rates.

        Args:
            resumed: whether the constants come from a checkpoint instead.

        Returns:
            What calibration chose and found, in lines.

        Raises:
            UserError: if no text is long enough to fit sink logits on.
        """
        self._are_gates_initialized = True
        gate, has_auto_rate = self.recipe.gate, self.recipe.train.learning_rate == "auto"
        needs_constants = (gate.centered or gate.sinks != "none") and not resumed
        if not (has_auto_rate or gate.chooses_projection_layers or needs_constants):
            return []
        calibration, lines = self.calibrate(), []
        if gate.chooses_projection_layers:
            lines += self._choose_projection_layers(calibration.projection_layers)
        if needs_constants:
            if gate.sinks != "none" and not calibration.sink_logits:
                raise UserError(
                    "data: of the first 64 documents none has two tokens beyond its 64th, which "
                    "sink logits are fitted on; train on longer texts, or set gate.sinks to none"
                )
            calibration.initialize_gates(self.model)
            if summary := calibration.summary():
                lines.append(f"gates start from what the texts show: {summary}")
        if has_auto_rate:
            self.learning_rates = calibration.learning_rates
        return lines

    def _choose_projection_layers(self, layers: list[int]) -> list[str]:
        self.model.base_model.choose_projection_layers(self.model.active_adapter, layers)
        named = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        return [f"a projection instead of sink logits in {named}"] if layers else []

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trains, from gates that calibration has initialized."""
        if not self._are_gates_initialized:
            self.initialize_gates(resumed=bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, **kwargs)

    def _first_batches(self, documents: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the first batches of a run on one rank, until they hold `documents` documents."""
        loader = prepare_data_loader(
            DataLoader(
                self.train_dataset,
                self.args.train_batch_size,
                sampler=self._get_train_sampler(),
                collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            ),
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )
        documents_read = 0
        for batch in loader:
            position_ids = _position_ids(batch)
            yield {"input_ids": batch["input_ids"], "position_ids": position_ids}
            documents_read += count_documents(position_ids)
            if documents_read >= documents:
                break

    def _get_dataloader(self, dataset, *args, **kwargs):
        if isinstance(dataset, IterableDataset):
            dataset = _UndividedStream(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def create_optimizer(self, model=None):
        """Makes the Trainer's optimizer, with one rate for each layer in `learning_rates`."""
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.learning_rates and not exists:
            layers = gate_layers(self.model if model is None else model)
            decay = self.args.weight_decay
            optimizer.param_groups.clear()
            for index, rate in self.learning_rates.items():
                weights, constants = weights_and_constants(layers[index])
                for parameters, lr in ((weights, rate), (constants, CONSTANTS_RATE)):
                    if parameters:
                        optimizer.add_param_group(
                            {"params": parameters, "lr": lr, "weight_decay": decay}
                        )
        return optimizer

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, name):
        """Tokenizes and packs each source by TRL's rules for its format, then mixes their rows."""
        prepared = []
        for source in self.sources:
            self.completion_only_loss = source.completion_only
            with naming_source(source.path), writing(Path(HF_DATASETS_CACHE)):
                rows = self._tokenized(source, processing_class, args, packing, name)
            check_any_left(rows, source.path)
            if not packing and isinstance(rows, Dataset) and len(rows) < len(source.rows):
                self.left_out[source.path] += len(source.rows) - len(rows)
            prepared.append(check_rows_of_tokens(rows, processing_class, self._embedded))
        mixed = mix(prepared, [source.weight for source in self.sources], args.seed)
        self._check_length(mixed, args, packing)
        return mixed

    def _tokenized(
        self, source: LoadedSource, processing_class, args: SFTConfig, packing: bool, name: str
    ):
        """Tokenizes and packs a source by TRL's rules, but for plain texts that are longer than a
        row."""
        prepare, rows = super()._prepare_dataset, source.rows
        begins_with_bos = prepended_token(processing_class) is not None
        is_text = "text" in next(iter(rows))
        if is_text and (begins_with_bos or not packing):
            whole = copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            rows = prepare(rows, processing_class, whole, False, None, name)
            bos_token_id = processing_class.bos_token_id if begins_with_bos else None
            rows = split_rows(rows, args.max_length, bos_token_id)
        rows = prepare(rows, processing_class, args, packing, None, name)
        return rows if packing else rows.select_columns(["input_ids", "labels"])

    def _check_length(self, rows, args: SFTConfig, packing: bool) -> None:
        if not hasattr(rows, "__len__"):  # a stream
            return
        needed = rows_per_step(args)
        if len(rows) < needed:
            packed = f" of {args.max_length} tokens" if packing else ""
            raise UserError(
                f"data: too short: {len(rows)} rows{packed}, and one step takes {needed}; add "
                "text, or lower data.sequence_length or train.batch_size"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.layer_losses:
            progress = self.state.global_step / self.state.max_steps
            scale = 1 / self.current_gradient_accumulation_steps
            self.layer_losses.prepare(_position_ids(inputs), progress, scale)
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

    @property
    def highest_rate(self) -> float:
        """The highest learning rate of any gate."""
        return max(self.learning_rates.values(), default=self.args.learning_rate)

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


def weights_and_constants(layer: GateLayer) -> tuple[list, list]:
    """Returns the parameters of a layer that multiply its input, and those that do not."""
    parameters = list(layer.named_parameters())
    is_constant = [
        name.endswith((".sink_odds", ".key_bias", ".first_key_off")) for name, _ in parameters
    ]
    split: tuple[list, list] = ([], [])
    for constant, (_, parameter) in zip(is_constant, parameters, strict=True):
        split[constant].append(parameter)
    return split


class _UndividedStream(torch.utils.data.IterableDataset):
    """A stream that every rank reads whole, to take its own rows from.

    accelerate would divide the stream's files among the ranks instead, and then the rows of a step
    would depend on the number of ranks.
    """

    def __init__(self, rows: IterableDataset):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def set_epoch(self, epoch: int):
        self.rows.set_epoch(epoch)


def _takes_lengths(model: PreTrainedModel) -> bool:
    """Returns whether the attention kernel takes the lengths of packed documents."""
    return "flash" in model.config._attn_implementation


def _position_ids(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns positions in each document, `[batch, T]`, negative for padding."""
    if "position_ids" in inputs:
        return inputs["position_ids"]
    mask = inputs["attention_mask"]
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)


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


def count_documents(position_ids: torch.Tensor) -> int:
    """Counts the documents of packed rows, without those that `data.first_tokens` makes.

    Those have one or two tokens, so a document counts if it has three.
    """
    return int((position_ids == 2).sum())
