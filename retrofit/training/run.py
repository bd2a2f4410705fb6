"""`retrofit train` trains the gates of a recipe and writes a run folder.

The folder holds `recipe.resolved.yaml` (written first), `started.json` (the base and the files that
must be the same when the run is resumed) and `checkpoints/` (to resume from). When training is done
it also holds `adapter/` (for PEFT), `run.json` (what was trained on what, and proof that the base
stayed frozen) and, if the recipe asks for them, `measure.json` and `measure.png`.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from rich.console import Console
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig

from retrofit.data.sources import LoadedSource, load_sources
from retrofit.gate_settings import GATE_SETTINGS
from retrofit.models.fingerprint import base_weights, config_values, weights_sha256
from retrofit.models.gated_model import gated_model
from retrofit.models.loading import load_base, load_tokenizer
from retrofit.models.run_folder import STARTED
from retrofit.recipe import RESOLVED, Recipe
from retrofit.training.arguments import training_arguments
from retrofit.training.callbacks import GradientCheck, HeapLimit, Interrupt, ProgressBar
from retrofit.training.checkpoints import last_checkpoint, set_aside
from retrofit.training.divergence import check_gates_finite
from retrofit.training.preflight import load_tokenizer_and_data, preflight
from retrofit.training.resuming import check_folder, check_inputs, check_weights, input_hashes
from retrofit.training.trainer import GateTrainer
from retrofit.training.trainer_state import gather_gates, rows_per_step
from retrofit.utils.console import say
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import CheckError
from retrofit.utils.files import (
    atomic_file,
    missing_parents,
    remove,
    to_json,
    write_json,
    write_text,
    writing,
)
from retrofit.utils.paths import expanded
from retrofit.utils.process import return_large_blocks

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


class BaseChangedError(CheckError):
    """A weight of the frozen base differs after training."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user stopped the run, and a checkpoint was written."""


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Trains the gates of a recipe.

    Args:
        recipe: what to train, on what, and for how long.
        resume: whether to go on from the newest checkpoint in the recipe's `output_dir`.
        console: where progress is printed.

    Returns:
        The run folder.

    Raises:
        UserError: for bad input, before anything is written.
        FinishedError: if the run that is to be resumed is trained already, with this recipe.
        Interrupted: after Ctrl-C, once the checkpoint is written.
        DivergedError: if the loss, its gradient or a gate is not finite.
        DeadGateError: if a gate got no gradient at the first step.
        BaseChangedError: if a base weight changed.
    """
    # This sets each rank's device, so it comes before anything is loaded.
    ranks = PartialState(cpu=not torch.accelerator.is_available())
    console = console or Console(quiet=not ranks.is_main_process)
    recipe = recipe.with_absolute_paths()
    run = expanded(recipe.output_dir)
    checkpoint = check_folder(run, recipe, resume, console)
    config = preflight(recipe)
    ranks.wait_for_everyone()  # the main rank writes only after all have checked the folder
    is_new = ranks.is_main_process and not run.exists()
    with _removed_on_failure(run) if is_new else nullcontext():
        return _train(recipe, config, run, checkpoint, ranks, console)


@contextmanager
def _removed_on_failure(run: Path) -> Iterator[None]:
    """Removes the folder of a run that fails before its first checkpoint.

    Such a run cannot be resumed, and its folder would be in the way of the next try.
    """
    created_parents = missing_parents(run)
    try:
        yield
    except BaseException:
        if last_checkpoint(run / "checkpoints")[0] is None:
            remove(run, created_parents)
        raise


def _train(
    recipe: Recipe,
    config: PreTrainedConfig,
    run: Path,
    checkpoint: Path | None,
    ranks: PartialState,
    console: Console,
) -> Path:
    args = training_arguments(recipe, run, checkpoint)
    if args.gradient_checkpointing:
        return_large_blocks()
    tokenizer, sources = load_tokenizer_and_data(recipe, config)  # first, as weights take longer
    inputs = input_hashes(recipe, tokenizer)
    if checkpoint:
        check_inputs(run, recipe, config, inputs)
    base = load_base(recipe.model)
    frozen = _fingerprint(base, recipe)
    if checkpoint:
        check_weights(run, frozen)
    interrupt, bar = Interrupt(console), ProgressBar(console)
    callbacks = [GradientCheck(), HeapLimit(), interrupt, bar]
    trainer = gate_trainer(recipe, args, base, tokenizer, sources, callbacks)
    for path, count in trainer.left_out.items():
        reason = "they have nothing to train on within data.sequence_length"
        say(f"data: {count} rows of {path} are left out, since {reason}", console)
    trainer.remove_callback(PrinterCallback)
    for line in trainer.initialize_gates(resumed=checkpoint is not None):
        say(line, console)
    if ranks.is_main_process:
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
            write_text(run / RESOLVED, recipe.to_yaml())
            started = {"base": frozen, **inputs, "rows_per_step": rows_per_step(args)}
            write_json(run / STARTED, started)
            for damaged in last_checkpoint(run / "checkpoints")[1]:
                set_aside(damaged)
    ranks.wait_for_everyone()
    if recipe.train.torch_compile:
        trainer.compile_layers()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.restore()
        bar.stop()
    if interrupt.stopped:
        raise Interrupted(f"stopped at step {trainer.state.global_step}")
    after = _fingerprint(trainer.model, recipe)
    # Only the weights are compared: TRL may have set output_router_logits in the config.
    if after["weights_sha256"] != frozen["weights_sha256"]:
        raise BaseChangedError("a weight of the frozen base changed during training")
    gates = gather_gates(trainer.model)
    check_gates_finite(gates, trainer.highest_rate)
    if ranks.is_main_process:
        with writing(run):
            _finish(trainer, gates, run, _summary(trainer, recipe, frozen, after))
    return run


def gate_trainer(
    recipe: Recipe,
    args: SFTConfig | None = None,
    base: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sources: list[LoadedSource] | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> GateTrainer:
    """Makes the trainer that `train` runs. What is not given is made or loaded from the recipe.

    Args:
        recipe: what to train, and on what.
        args: the settings from `training_arguments`.
        base: the base, if it is loaded already.
        tokenizer: the base's tokenizer, if it is loaded already.
        sources: the data, if it is loaded already.
        callbacks: callbacks beside the Trainer's own.
    """
    tokenizer = tokenizer or load_tokenizer(recipe.model)
    # The Trainer has no argument for where TensorBoard logs, which a user's environment may name.
    default = expanded(recipe.output_dir) / "tensorboard"
    with patch_environment(**{_TENSORBOARD: os.environ.get(_TENSORBOARD, default)}):
        return GateTrainer(
            model=gated_model(base or load_base(recipe.model), recipe),
            args=args or training_arguments(recipe, Path(recipe.output_dir)),
            sources=sources or load_sources(recipe.data, tokenizer),
            processing_class=tokenizer,
            recipe=recipe,
            callbacks=callbacks,
        )


def _fingerprint(model: torch.nn.Module, recipe: Recipe) -> dict:
    """Returns what `run.json` says of the base: its name, form, weights' sha256 and config."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "name_or_path": recipe.model.base,
        "revision": recipe.model.revision,
        "model_type": base.config.model_type,
        "dtype": dtype_name(base.dtype),
        "quantization": recipe.model.quantization,
        "weights_sha256": weights_sha256(base_weights(model)),
        "config": config_values(base.config),
    }


def _finish(trainer: GateTrainer, gates: dict[str, torch.Tensor], run: Path, facts: dict) -> None:
    """Writes `adapter/` and `run.json`, both under temporary names at first.

    `run.json` gets its name last, and a run without it resumes from its last checkpoint.
    """
    adapter, hidden = run / "adapter", run / ".adapter.partial"
    for leftover in (hidden, adapter):  # a process that was killed may have left them
        shutil.rmtree(leftover, ignore_errors=True)
    with atomic_file(run / "run.json") as partial:
        partial.write_text(to_json(facts), encoding="utf-8")
        trainer.model.save_pretrained(str(hidden), state_dict=gates)
        (hidden / "README.md").unlink(missing_ok=True)  # PEFT's empty card template
        hidden.replace(adapter)


def _summary(trainer: GateTrainer, recipe: Recipe, before: dict, after: dict) -> dict:
    """Returns what `run.json` holds.

    Args:
        trainer: the trainer, when it is done.
        recipe: what it has trained.
        before: the base's fingerprint before training.
        after: the base's fingerprint after training.
    """
    config = trainer.model.peft_config[trainer.model.active_adapter]
    settings = {name: getattr(config, name) for name in GATE_SETTINGS}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    layer_losses = ("pressure", "activation", "hidden", "balance")
    keys = ("loss", "lm", "kl", *layer_losses, "gate_movement", "sink_share")
    return {
        "base": before,
        "base_weights_sha256_after": after["weights_sha256"],
        "gate": {**settings, "layers": recipe.gate.layers, "weights": weights},
        "learning_rate": trainer.learning_rates or trainer.args.learning_rate,
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "seconds": round(trainer.seconds, 1),
        "first": {key: logged[0][key] for key in keys if key in logged[0]},
        "last": {key: logged[-1][key] for key in keys if key in logged[-1]},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {
            name: version(name)
            for name in ("gate-retrofit", "torch", "transformers", "peft", "trl", "datasets")
        },
    }
