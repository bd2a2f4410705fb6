"""`retrofit merge`: a run in, a checkpoint out that computes what was trained, or nothing at all.

Each format has a module beside this one. How a checkpoint is proved stands in `verify/`.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Literal

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import GenerationConfig

from retrofit.export import forms, gated_attention
from retrofit.export.model_card import check_shown, model_card
from retrofit.export.remote_code import write_remote_code
from retrofit.export.verify.passage import PASSAGE
from retrofit.export.verify.reference import FILE
from retrofit.export.verify.report import REPORT
from retrofit.export.verify.verify import MergeMismatchError, trained_reference, verify
from retrofit.models.safetensors_io import write_shards
from retrofit.models.source import Source, read_source
from retrofit.recipe import RESOLVED, load_recipe
from retrofit.utils.errors import UserError
from retrofit.utils.files import (
    appearing_whole,
    copy,
    copy_tokenizer,
    read_json,
    refuse_existing,
    write_json,
    write_text,
)

__all__ = ["MergeMismatchError", "merge"]

_TERMS = ("LICENSE*", "NOTICE*")

Format = Literal["native", "gguf", "remote-code", "adapter", "gated-attention"]
_FLOATS = ("bfloat16", "float32", "float16")


def merge(
    run: str | Path,
    out: str | Path,
    *,
    format: Format = "native",
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    text: str = PASSAGE,
    repo_id: str | None = None,
) -> dict:
    """Write base + gates as one checkpoint, verified against the trained model.

    Args:
        run: a run folder, or a bare PEFT adapter folder.
        out: the checkpoint folder; it appears only when it is whole and verified.
        format: `native` is a checkpoint for transformers and vLLM, `gguf` a file for llama.cpp,
            `remote-code` the base's own architecture with a modeling file, `adapter` the gates
            alone, for PEFT, `gated-attention` the layout of the models published with the paper.
        base: the base model where it is not the one that the run names.
        dtype: of the stored weights, as the base's by default; for GGUF also `q8_0`.
        max_shard_size: bytes, or a string such as "5GB".
        text: what trained and merged model are compared on.
        repo_id: the name that it will have on the hub, for the card.

    Returns:
        What `retrofit-merge.json` holds: `checkpoint`, `base`, `gate`, `verification`, `seconds`,
            `versions`.

    Raises:
        UserError: if the input is missing, damaged or does not belong together.
        MergeMismatchError: if the checkpoint does not compute what was trained.
    """
    run, out = Path(run).expanduser(), Path(out).expanduser()
    refuse_existing(out)
    llama_cpp = _llama_cpp() if format == "gguf" else None
    source = read_source(run, base)
    kind, max_bytes = _stored_as(source, dtype, format), _bytes(max_shard_size)
    refusal = llama_cpp.refusal if llama_cpp else _REFUSALS.get(format)
    if refusal and (reason := refusal(source)):
        raise UserError(
            f"no {format} checkpoint of {source.base_name!r}: {reason}; --format remote-code holds "
            "any base that can be gated"
        )
    if llama_cpp:
        llama_cpp.check_tokenizer(source)
    check_shown(source.folder)
    seconds: dict[str, float] = {}
    with appearing_whole(out) as folder:
        with _timed(seconds, "reference"):
            rounding_kl = trained_reference(
                source.base, source.adapter, text, kind, folder / FILE, inputs_too=bool(llama_cpp)
            )
        about = _about_checkpoint(source, kind, format)
        with _timed(seconds, "write"):
            if llama_cpp:
                file = folder / f"{out.name}-{llama_cpp.KINDS[kind][0].name}.gguf"
                about |= {"file": file.name} | llama_cpp.write_gguf(source, file, kind)
            else:
                about |= _WRITERS[format](source, folder, getattr(torch, kind), max_bytes)
                copy_tokenizer(source.base, folder)
                if format != "adapter":
                    _write_generation_config(source, folder)
        report = _report(source, about, rounding_kl)
        with _timed(seconds, "verify"):
            report["verification"] |= verify(report, folder)
        report["seconds"] = seconds
        copy(source.base, folder, *_TERMS)
        copy(source.folder, folder, "measure.json")
        _write_recipe(source, folder)
        write_json(folder / REPORT, report)
        card = model_card(report, source.base, folder, repo_id or "path/to/this")
        card.save(folder / "README.md")
    return report


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[phase] = round(perf_counter() - start, 1)


def _stored_as(source: Source, dtype: str | None, format: str) -> str:
    name = dtype or _name(source.weights["model.layers.0.self_attn.o_proj.weight"].dtype)
    allowed = [*_FLOATS, *(["q8_0"] if format == "gguf" else [])]
    if format == "adapter":
        return "float32"
    if name not in allowed:
        raise UserError(f"cannot store weights as {name}; dtype must be {', '.join(allowed)}")
    if name == "float16" and format == "native" and not _form(source).fits_float16:
        whose = "" if dtype else f"base {source.base_name!r} is stored in float16, but "
        raise UserError(
            f"{whose}a native checkpoint exceeds the range of float16: choose --dtype bfloat16 or "
            "float32"
        )
    return name


def _llama_cpp() -> ModuleType:
    """`retrofit.export.llama_cpp`, if what it needs is installed."""
    if not all(importlib.util.find_spec(name) for name in ("gguf", "xllamacpp")):
        raise UserError(
            "a GGUF file is written by gguf, and compared with the trained model in llama.cpp "
            "before it appears: pip install 'gate-retrofit[gguf]'"
        )
    return importlib.import_module("retrofit.export.llama_cpp")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(size: int | str) -> int:
    try:
        return convert_file_size_to_int(size)
    except ValueError as error:
        raise UserError(f"{size!r} is not a size; write one like 5GB or 500MB") from error


def _form(source: Source) -> forms.Form:
    return forms.form_of(source.config.model_type, source.gates.sink_form)


def _native_refusal(source: Source) -> str | None:
    gates = source.gates
    return forms.refusal(source.config, gates.granularity, gates.sink_form, bool(gates.centers))


def _write_native(source: Source, folder: Path, dtype: torch.dtype, max_bytes: int) -> dict:
    form = _form(source)
    write_json(folder / "config.json", form.config(source) | {"dtype": _name(dtype)})
    return write_shards(form.tensors(source, dtype), folder, max_bytes)


def _write_adapter(source: Source, folder: Path, dtype: torch.dtype, max_bytes: int) -> dict:
    names = ("adapter_config.json", "adapter_model.safetensors")
    copy(source.adapter, folder, *names)
    # A local base as PEFT finds it, which knows no `~`.
    base = str(source.base.resolve()) if _is_local(source) else source.base_name
    config = read_json(folder / names[0]) | {"base_model_name_or_path": base}
    write_json(folder / names[0], config)
    return {
        "bytes": (folder / names[1]).stat().st_size,
        "parameters": source.gates.parameters,
    }


_REFUSALS = {"native": _native_refusal, "gated-attention": gated_attention.refusal}
_WRITERS = {
    "native": _write_native,
    "remote-code": write_remote_code,
    "adapter": _write_adapter,
    "gated-attention": gated_attention.write_published,
}


def _write_generation_config(source: Source, folder: Path) -> None:
    copy(source.base, folder, "generation_config.json")
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(source.config).save_pretrained(folder)


def _write_recipe(source: Source, folder: Path) -> None:
    """A damaged one is left out: it has no part in what was merged."""
    with suppress(ValueError, OSError):
        recipe = load_recipe(str(source.folder / RESOLVED))
        write_text(folder / RESOLVED, recipe.published().to_yaml())


def _report(source: Source, about: dict, rounding_kl: float) -> dict:
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


def _about_checkpoint(source: Source, kind: str, format: str) -> dict:
    config = source.config
    about = {"format": format, "dtype": kind, "model_type": config.model_type, "untied": False}
    if format == "remote-code":
        return about | {"model_type": f"gated_{config.model_type}", "constant_heads": 0}
    if format in ("adapter", "gated-attention"):
        return about | {"constant_heads": 0}
    written = _form(source).config(source)
    return about | {
        "model_type": written["model_type"],
        "architecture": written["architectures"][0],
        "untied": config.tie_word_embeddings and not written["tie_word_embeddings"],
        "constant_heads": written.get("retrofit_constant_heads", 0),
        "heads": written["num_attention_heads"],
        "kv_heads": written["num_key_value_heads"],
    }


def _is_local(source: Source) -> bool:
    return Path(source.base_name).expanduser().is_dir()


def _about_base(source: Source) -> dict:
    trained_on = source.facts.get("base", {})
    is_local = _is_local(source)
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
