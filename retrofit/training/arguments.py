"""Translates a recipe into the settings of TRL's trainer."""

from pathlib import Path

import torch
from accelerate import PartialState
from trl import SFTConfig

from retrofit.memory.estimate import choose_checkpointing
from retrofit.recipe import Recipe
from retrofit.training.trainer_state import accumulation_steps


def training_arguments(recipe: Recipe, run: Path, checkpoint: Path | None = None) -> SFTConfig:
    """Returns TRL's settings for a recipe.

    Args:
        recipe: what is trained.
        run: the run folder.
        checkpoint: the checkpoint that the run goes on from, if it does. Accumulation is then set
            so that a step takes as many rows as before, on however many ranks there are now.
    """
    train, data = recipe.train, recipe.data
    checkpointing = choose_checkpointing(recipe)
    accumulation = train.gradient_accumulation_steps
    if checkpoint:
        ranks = PartialState().num_processes
        accumulation = accumulation_steps(checkpoint, train.batch_size, ranks)
    return SFTConfig(
        output_dir=str(run / "checkpoints"),
        max_steps=train.max_steps or -1,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0 if train.learning_rate == "auto" else train.learning_rate,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_steps,
        lr_scheduler_type=train.schedule,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=checkpointing != "none",
        gradient_checkpointing_kwargs={
            "use_reentrant": checkpointing == "reentrant",
            "selective": checkpointing == "selective",
        },
        use_cpu=not torch.accelerator.is_available(),
        # No autocast: the base computes in the dtype it was loaded in, and the gates follow it.
        bf16=False,
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=train.save_steps,
        save_total_limit=2,
        report_to=train.report_to,
        run_name=run.name,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        include_num_input_tokens_seen="all",
        max_length=data.sequence_length,
        packing=data.packing,
        # A long text is split into rows, not cut off; `GateTrainer` does so where this does not.
        packing_strategy="bfd_split",
        shuffle_dataset=True,
        assistant_only_loss=data.assistant_only_loss,
    )
