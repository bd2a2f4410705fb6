"""What a run that goes on is held to: its folder, its recipe, and what it was started with."""

from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from retrofit.models.fingerprint import file_sha256, tokenizer_sha256
from retrofit.models.run_folder import check_config, facts_of
from retrofit.recipe import RESOLVED, Recipe, load_recipe
from retrofit.training.checkpoints import last_checkpoint
from retrofit.utils.console import say
from retrofit.utils.errors import UserError
from retrofit.utils.output_path import refuse_existing, refuse_unwritable
from retrofit.utils.paths import expanded

RUN_EXISTS = "choose another output_dir, or go on with retrofit train --resume"


class FinishedError(UserError):
    """There is nothing to resume, because the run is trained."""


def check_folder(run: Path, recipe: Recipe, resume: bool, console: Console) -> Path | None:
    """Checks the run folder, and returns the checkpoint to resume from.

    Returns:
        `None` if the run starts from the beginning.

    Raises:
        UserError: if the folder exists and `resume` is not set, or holds no run that can be
            resumed with this recipe.
        FinishedError: if the run is trained already.
    """
    if not resume:
        refuse_existing(run, RUN_EXISTS)
        return None
    resolved = run / RESOLVED
    if _has_no_files(run):
        return None
    # A merged checkpoint has the recipe, too.
    if not resolved.is_file() or not any(
        (run / name).exists() for name in ("checkpoints", "run.json")
    ):
        raise UserError(f"nothing to resume: {run} holds no run")
    started = load_recipe(str(resolved)).with_absolute_paths().model_dump()
    given = recipe.model_dump(exclude={"measure", "output_dir"})  # the folder may have been moved
    changed = [key for key, value in given.items() if started[key] != value]
    if changed:
        raise UserError(
            f"{run} was started with another recipe (its {', '.join(changed)} differ); resume with "
            f"{resolved}"
        )
    if (run / "run.json").is_file():
        raise FinishedError(f"{run} is finished; there is nothing to resume")
    refuse_unwritable(resolved)
    checkpoint, damaged = last_checkpoint(run / "checkpoints")
    for path, problem in damaged.items():
        say(f"{path} is passed over: {problem}", console)
    if checkpoint is None:
        say(f"{run} has no whole checkpoint: it starts from the beginning", console)
    return checkpoint


def _has_no_files(run: Path) -> bool:
    """Returns whether a folder exists without any files, as a run leaves it if killed early."""
    return run.is_dir() and not any(path.is_file() for path in run.rglob("*"))


def input_hashes(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns what `started.json` has of the inputs beside the base: in `files` the sha256 of each
    local file of the data by its path, and `tokenizer_sha256`."""
    paths = (expanded(source.path) for source in recipe.data.sources)
    files = {str(path): file_sha256(path) for path in paths if path.is_file()}
    return {"files": files, "tokenizer_sha256": tokenizer_sha256(tokenizer)}


def check_inputs(
    run: Path, recipe: Recipe, config: PreTrainedConfig, inputs: dict[str, Any]
) -> None:
    """Checks that a resumed run finds the data, the tokenizer and the config that it was started
    with.

    What the `started.json` of an early version does not have is not checked.

    Args:
        run: the run folder.
        recipe: what is trained.
        config: the config of its base.
        inputs: the result of `input_hashes` now.

    Raises:
        UserError: if a file of the data, the tokenizer or the base's config has changed.
    """
    started = inputs | facts_of(run)
    # Files may have been moved, and are told apart by their order.
    before = [*started["files"].values()]
    changed = [
        path
        for place, (path, sha256) in enumerate(inputs["files"].items())
        if before[place : place + 1] != [sha256]
    ]
    if len(before) > len(inputs["files"]):
        changed.append(f"the data of {run / RESOLVED}")
    if started["tokenizer_sha256"] != inputs["tokenizer_sha256"]:
        changed.append(f"the tokenizer of {recipe.model.base}")
    if changed:
        raise UserError(
            f"{changed[0]} is not what {run} was started with (its sha256 differs); put the "
            "original back, or start another run"
        )
    check_config(config, recipe.model.base, run, started)


def check_weights(run: Path, frozen: dict) -> None:
    """Checks that a resumed run finds the base weights that it was started with.

    Raises:
        UserError: if the weights are others.
    """
    started = facts_of(run).get("base", frozen)
    if started["weights_sha256"] != frozen["weights_sha256"]:
        raise UserError(
            f"the weights in {frozen['name_or_path']} are not those that {run} was started with "
            "(their sha256 differs); put the original back, or start another run"
        )
