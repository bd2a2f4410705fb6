"""`retrofit merge`: a run in, a checkpoint out that computes what was trained, or nothing at all.

Each format has a module beside this one. How a checkpoint is proved stands in `verify/`.
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
from retrofit.export.verify.passage import PASSAGE
from retrofit.export.verify.reference import REFERENCE_FILE
from retrofit.export.verify.report import REPORT_FILE
from retrofit.export.verify.verify import verify, write_reference
from retrofit.models.source import MergeSource, read_source
from retrofit.recipe import RESOLVED, load_recipe
from retrofit.utils.errors import UserError
from retrofit.utils.files import (
    atomic_folder,
    copy,
    copy_tokenizer,
    refuse_existing,
    write_json,
    write_text,
)
from retrofit.utils.paths import expanded

__all__ = ["MergeMismatchError", "merge"]

_TERMS = ("LICENSE*", "NOTICE*")


def merge(
    run: str | Path,
    out: str | Path,
    *,
    format: FormatName = "native",
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    repo_id: str | None = None,
) -> dict:
    """Write base + gates as one checkpoint, verified against the trained model.

    Args:
        run: a run folder, or a bare PEFT adapter folder.
        out: the checkpoint folder; it appears only when it is whole and verified.
        format: one of `retrofit.export.registry.FORMATS`, which says what each of them is.
        base: the base model where it is not the one that the run names.
        dtype: of the stored weights, as the base's by default; for GGUF also `q8_0`.
        max_shard_size: bytes, or a string such as "5GB".
        repo_id: the name that it will have on the hub, for the card.

    Returns:
        What `retrofit-merge.json` holds: `checkpoint`, `base`, `gate`, `verification`, `seconds`,
            `versions`.

    Raises:
        UserError: if the input is missing, damaged or does not belong together.
        MergeMismatchError: if the checkpoint does not compute what was trained.
    """
    run, out, form = expanded(run), expanded(out), format_of(format)
    refuse_existing(out)
    form.check_installed()
    source = read_source(run, base)
    stored, max_bytes = form.dtype(source, dtype), _bytes(max_shard_size)
    if reason := form.refusal(source):
        raise UserError(
            f"no {format} checkpoint of {source.base_name!r}: {reason}; --format remote-code holds "
            "any base that can be gated"
        )
    form.check(source)
    check_card_inputs(source.folder)
    seconds: dict[str, float] = {}
    with atomic_folder(out) as folder:
        with _timed(seconds, "reference"):
            rounding_kl = write_reference(
                source.base,
                source.adapter,
                PASSAGE,
                stored,
                folder / REFERENCE_FILE,
                form.rounds_inputs,
            )
        about = {"format": format, "dtype": stored, "untied": False}
        with _timed(seconds, "write"):
            about |= form.write(source, folder, stored, max_bytes, out.name)
            if form.has_tokenizer_files:
                copy_tokenizer(source.base, folder)
                if form.is_model:
                    _write_generation_config(source, folder)
        report = _report(source, about, rounding_kl)
        with _timed(seconds, "verify"):
            report["verification"] |= verify(report, folder)
        report["seconds"] = seconds
        copy(source.base, folder, *_TERMS)
        copy(source.folder, folder, "measure.json")
        _write_recipe(source, folder)
        write_json(folder / REPORT_FILE, report)
        card = model_card(report, source.base, folder, repo_id or "path/to/this")
        card.save(folder / "README.md")
    return report


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[phase] = round(perf_counter() - start, 1)


def _bytes(size: int | str) -> int:
    try:
        return convert_file_size_to_int(size)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{size!r} is not a size; write one like 5GB or 500MB") from error


def _write_generation_config(source: MergeSource, folder: Path) -> None:
    copy(source.base, folder, "generation_config.json")
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(source.config).save_pretrained(folder)


def _write_recipe(source: MergeSource, folder: Path) -> None:
    """A damaged one is left out: it has no part in what was merged."""
    with suppress(ValueError, OSError):
        recipe = load_recipe(str(source.folder / RESOLVED))
        write_text(folder / RESOLVED, recipe.without_folders().to_yaml())


def _report(source: MergeSource, about: dict, rounding_kl: float) -> dict:
    return {
        "checkpoint": about,
        "base": _about_base(source),
        "gate": {
            "granularity": source.gates.granularity,
            "sinks": source.gates.sink_form,
            "key_bias": bool(source.gates.key_biases),
            "centered": bool(source.gates.centers),
            "layers": len(source.gates.layers),
            "of_layers": source.config.num_hidden_layers,
            "parameters": source.gates.parameters,
        },
        "training": {key: source.facts[key] for key in ("steps", "tokens") if key in source.facts},
        "verification": {"rounding_kl": rounding_kl},
        "versions": {n: version(n) for n in ("gate-retrofit", "torch", "transformers", "peft")},
    }


def _about_base(source: MergeSource) -> dict:
    trained_on = source.facts.get("base", {})
    is_local = source.base_is_local
    biases = {name.split(".")[-2] for name in source.shapes if name.endswith("proj.bias")}
    return {
        # Where a folder lies is nobody's business.
        "name": source.base.name if is_local else source.base_name,
        "is_local": is_local,
        "revision": trained_on.get("revision"),
        "model_type": source.config.model_type,
        "parameters": sum(math.prod(shape) for shape in source.shapes.values()),
        "biases": sorted(biases),
        "quantization": trained_on.get("quantization"),
    }
