"""Starts a run from what calibration reads off the base: its gates, and the learning rates."""

from collections.abc import Iterator

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import Trainer

from retrofit.gates import GateLayer, gate_layers
from retrofit.recipe import Recipe
from retrofit.training.calibration import Calibration, calibrate
from retrofit.utils.errors import UserError

# The learning rate of sink logits and key biases. They are stored in tens of nats, so a step moves
# them by up to 0.2.
CONSTANTS_RATE = 2e-2


class CalibratedStart(Trainer):
    """A mixin, placed before a Trainer, that calibrates before the first step.

    Attributes:
        recipe: says what is left to calibration. The subclass sets it.
        learning_rates: the rate of each layer; empty for one rate, and before `initialize_gates`.
    """

    recipe: Recipe

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learning_rates: dict[int, float] = {}
        self._are_gates_initialized = False

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
        self._are_gates_initialized = True
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
            position_ids = position_ids_of(batch)
            yield {"input_ids": batch["input_ids"], "position_ids": position_ids}
            documents_read += count_documents(position_ids)
            if documents_read >= documents:
                break

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

    @property
    def highest_rate(self) -> float:
        """The highest learning rate of any gate."""
        return max(self.learning_rates.values(), default=self.args.learning_rate)


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


def position_ids_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns positions in each document, `[batch, T]`, negative for padding."""
    if "position_ids" in inputs:
        return inputs["position_ids"]
    mask = inputs["attention_mask"]
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)


def count_documents(position_ids: torch.Tensor) -> int:
    """Counts the documents of packed rows, without those that `data.first_tokens` makes.

    Those have one or two tokens, so a document counts if it has three.
    """
    return int((position_ids == 2).sum())
