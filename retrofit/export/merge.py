"""`retrofit merge`: writes a checkpoint that provably computes what was trained, or nothing.

Each format has a module beside this one. The proof of a checkpoint is in `verify/`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

from accelerate.utils import convert_file_size_to_int
from transformers import GenerationConfig

from retrofit.export.checkpoint_format import MergeMismatchError
from retrofit.export.model_card import check_card_inputs, model_card
from retrofit.export.registry import FormatName, format_of
from retrofit.export.tokenizer_files import copy_tokenizer_of
from retrofit.export.verify.passage import PASSAGE
from retrofit.export.verify.reference import REFERENCE_FILE
from retrofit.export.verify.report import REPORT_FILE, settings_hashes
from retrofit.export.verify.verify import verify, write_reference
from retrofit.models.base_config import number_of_experts
from retrofit.models.source import MergeSource, read_source
from retrofit.recipe import RESOLVED, load_recipe
from retrofit.utils.errors import UserError
from retrofit.utils.files import (
    atomic_folder,
    copy,
    write_json,
    write_text,
)
from retrofit.utils.output_path import refuse_existing
from retrofit.utils.paths import expanded

__all__ = ["MergeMismatchError", "merge"]

_LICENSE_FILES = ("LICENSE*", "NOTICE*")
_VERSIONED = ("gate-retrofit", "torch", "transformers", "peft")


def merge(
    run: str | Path,
    out: str | Path,
    *,
    format: FormatName | None = None,
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    repo_id: str | None = None,
) -> dict:
    """Writes the base and the gates as one checkpoint, verified against the trained model.

    Args:
        run: a run folder, or the folder of a PEFT adapter.
        out: the folder of the checkpoint, which appears only when it is whole and verified.
        format: the name of a format in `retrofit.export.registry.FORMATS`, which describes each. By
            default it is `native` if a stock architecture holds the model, and else `remote-code`.
        base: the base model, if it is not the one that the run names.
        dtype: the dtype of the stored weights, by default that of the base; for GGUF also `q8_0`.
        max_shard_size: the largest size of a file, in bytes or as a string such as "5GB".
        repo_id: the name of the checkpoint on the hub, for the model card.

    Returns:
        The contents of `retrofit-merge.json`: `checkpoint`, `base`, `gate`, `training`,
        `verification`, `seconds` and `versions`.

    Raises:
        UserError: if the input is missing or damaged, or its parts do not belong together.
        MergeMismatchError: if the checkpoint does not compute what was trained.
    """
    run, out = expanded(run), expanded(out)
    refuse_existing(out)
    if format is not None:
        format_of(format).check_installed()
    source = read_source(run, base)
    if format is None:
        format = "remote-code" if format_of("native").refusal(source) else "native"
    checkpoint_format = format_of(format)
    stored_dtype = checkpoint_format.dtype(source, dtype)
    max_bytes = _bytes(max_shard_size)
    if reason := checkpoint_format.refusal(source):
        raise UserError(
            f"no {format} checkpoint of {source.base_name!r}: {reason}; --format remote-code holds "
            "any base that can be gated"
        )
    checkpoint_format.check(source)
    check_card_inputs(source.folder)
    seconds: dict[str, float] = {}
    with atomic_folder(out) as folder:
        with _timed(seconds, "reference"):
            rounding_kl = write_reference(
                source.base,
                source.adapter,
                PASSAGE,
                stored_dtype,
                folder / REFERENCE_FILE,
                checkpoint_format.rounds_inputs,
            )
        checkpoint = {"format": format, "dtype": stored_dtype, "untied": False}
        with _timed(seconds, "write"):
            checkpoint |= checkpoint_format.write(source, folder, stored_dtype, max_bytes, out.name)
            if checkpoint_format.has_tokenizer_files:
                copy_tokenizer_of(source.base, folder)
                if checkpoint_format.is_model:
                    _write_generation_config(source, folder)
        report = _report(source, checkpoint, rounding_kl)
        with _timed(seconds, "verify"):
            report["verification"] |= verify(report, folder)
        report["seconds"] = seconds
        copy(source.base, folder, *_LICENSE_FILES)
        copy(source.folder, folder, "measure.json")
        _write_recipe(source, folder)
        report["files"] = settings_hashes(folder)
        write_json(folder / REPORT_FILE, report)
        card = model_card(report, source.base, folder, repo_id or "path/to/this")
        card.save(folder / "README.md")
    return report


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the time that the `with` block takes to `seconds`, as the entry of its phase."""
    start = perf_counter()
    yield
    seconds[phase] = round(perf_counter() - start, 1)


def _bytes(size: int | str) -> int:
    """Returns a size such as "5GB" in bytes."""
    try:
        return convert_file_size_to_int(size)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{size!r} is not a size; write one like 5GB or 500MB") from error


def _write_generation_config(source: MergeSource, folder: Path) -> None:
    copy(source.base, folder, "generation_config.json")
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(source.config).save_pretrained(folder)


def _write_recipe(source: MergeSource, folder: Path) -> None:
    """Writes the recipe of the run, unless it is damaged: the merge does not depend on it."""
    with suppress(ValueError, OSError):
        recipe = load_recipe(str(source.folder / RESOLVED))
        write_text(folder / RESOLVED, recipe.without_folders().to_yaml())


def _report(source: MergeSource, checkpoint: dict, rounding_kl: float) -> dict:
    return {
        "checkpoint": checkpoint,
        "base": _describe_base(source),
        "gate": {
            "granularity": source.gates.granularity,
            "sinks": source.gates.sink_form,
            "projection_layers": source.gates.projection_layers,
            "key_bias": bool(source.gates.key_biases),
            "centered": bool(source.gates.centers),
            "layers": len(source.gates.layers),
            "of_layers": source.config.num_hidden_layers,
            "parameters": source.gates.parameters,
        },
        "training": {key: source.facts[key] for key in ("steps", "tokens") if key in source.facts},
        "verification": {"rounding_kl": rounding_kl},
        "versions": {name: version(name) for name in _VERSIONED},
    }


def _describe_base(source: MergeSource) -> dict:
    trained_on = source.facts.get("base", {})
    is_local = source.base_is_local
    biases = {name.split(".")[-2] for name in source.shapes if name.endswith("proj.bias")}
    return {
        # The card may be published, so it does not tell where the base's folder lies.
        "name": source.base.name if is_local else source.base_name,
        "is_local": is_local,
        "revision": trained_on.get("revision"),
        "model_type": source.config.model_type,
        "parameters": sum(math.prod(shape) for shape in source.shapes.values()),
        "biases": sorted(biases),
        "experts": number_of_experts(source.config),
        "quantization": trained_on.get("quantization"),
    }
