"""`retrofit merge`: a run in, a checkpoint out that computes what was trained, or nothing at all.

Bases that have a native form (`retrofit.export.native`) become a checkpoint that stock software
runs; the others keep their family's code and need `import retrofit` (`retrofit.gated_models`).
"""

import importlib
import importlib.util
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import GenerationConfig

from retrofit.card import model_card
from retrofit.errors import UserError
from retrofit.export.native import native_config, native_tensors, refusal
from retrofit.export.shards import write_shards
from retrofit.export.source import Source, read_source
from retrofit.files import write_json
from retrofit.gated_models import gated_config
from retrofit.proof.passage import PASSAGE
from retrofit.proof.reference import FILE
from retrofit.proof.verify import REPORT, MergeMismatchError, trained_reference, verify

__all__ = ["MergeMismatchError", "merge"]

# Verbatim from the base: saving a loaded tokenizer again would rewrite its class and drop files.
_TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json",
              "special_tokens_map.json", "chat_template*")  # fmt: skip
_TERMS = ("LICENSE*", "NOTICE*")


def merge(
    run: str | Path,
    out: str | Path,
    *,
    format: Literal["native", "gguf"] = "native",
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    text: str = PASSAGE,
) -> dict:
    """Write base + gates as one checkpoint, verified against the trained model.

    Args:
        run: a run folder, or a bare PEFT adapter folder.
        out: the checkpoint folder; it appears only when it is whole and verified.
        format: `native` is a checkpoint for transformers and vLLM, `gguf` a file for llama.cpp.
        base: the base model where it is not the one that the run names.
        dtype: of the stored weights, as the base's by default; for GGUF also `q8_0`.
        max_shard_size: bytes, or a string such as "5GB".
        text: what trained and merged model are compared on.

    Returns:
        What `retrofit-merge.json` holds: `checkpoint`, `base`, `gate`, `verification`, `versions`.

    Raises:
        UserError: if the input is missing, damaged or does not belong together.
        MergeMismatchError: if the checkpoint does not compute what was trained.
    """
    run, out = Path(run).expanduser(), Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another folder")
    llama_cpp = _llama_cpp() if format == "gguf" else None
    source = read_source(run, base)
    kind, max_bytes = _stored_as(source, dtype, format), _bytes(max_shard_size)
    if llama_cpp:
        llama_cpp.check(source)
    with _appearing_whole(out) as folder:
        rounding_kl = trained_reference(source.base, source.adapter, text, kind, folder / FILE)
        about = _about_checkpoint(source, kind, format)
        if llama_cpp:
            file = folder / f"{out.name}-{llama_cpp.KINDS[kind][0].name}.gguf"
            about |= {"file": file.name} | llama_cpp.write_gguf(source, file, kind)
        else:
            about |= _write_weights(source, getattr(torch, kind), folder, max_bytes)
            _copy(source.base, folder, *_TOKENIZER)
            _write_generation_config(source, folder)
        report = _report(source, about, rounding_kl)
        report["verification"] |= verify(report, folder)
        _copy(source.base, folder, *_TERMS)
        _copy(source.folder, folder, "recipe.resolved.yaml", "measure.json")
        write_json(folder / REPORT, report)
        model_card(report, source.base, folder).save(folder / "README.md")
    return report


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name at the end, or vanishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes folders private
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stored_as(source: Source, dtype: str | None, format: str) -> str:
    name = dtype or _name(source.weights["model.layers.0.self_attn.o_proj.weight"].dtype)
    allowed = ["bfloat16", "float32", "float16", *(["q8_0"] if format == "gguf" else [])]
    if name not in allowed:
        raise UserError(f"cannot store weights as {name}; dtype must be {', '.join(allowed)}")
    if name == "float16" and format == "native" and refusal(source.config) is None:
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


def _write_weights(source: Source, dtype: torch.dtype, folder: Path, max_bytes: int) -> dict:
    if refusal(source.config) is None:
        centered = bool(source.centers)
        config = native_config(source.config, centered) | {"dtype": _name(dtype)}
        write_json(folder / "config.json", config)
        tensors = native_tensors(source.config, source.weights, source.gates, source.centers, dtype)
    else:
        granularity = "headwise" if source.granularity == "headwise" else "elementwise"
        layers, centered = sorted(source.gates), bool(source.centers)
        gated = gated_config(source.config, granularity, layers, centered)
        gated.dtype = dtype
        gated.save_pretrained(folder)
        tensors = _gated_tensors(source, dtype)
    return write_shards(tensors, folder, max_bytes)


def _gated_tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source.shapes:
        yield name, source.weights[name].to(dtype)
    for layer, weight in source.gates.items():
        yield f"model.layers.{layer}.self_attn.g1.g_proj.weight", weight.to(dtype)
    for layer, center in source.centers.items():
        yield f"model.layers.{layer}.self_attn.g1.center", center.to(dtype)


def _copy(source: Path, folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)


def _write_generation_config(source: Source, folder: Path) -> None:
    _copy(source.base, folder, "generation_config.json")
    if not (folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(source.config).save_pretrained(folder)


def _report(source: Source, about: dict, rounding_kl: float) -> dict:
    return {
        "checkpoint": about,
        "base": _about_base(source),
        "gate": {
            "granularity": source.granularity,
            "centered": bool(source.centers),
            "layers": len(source.gates),
            "of_layers": source.config.num_hidden_layers,
            "parameters": sum(weight.numel() for weight in source.gates.values()),
        },
        "training": {key: source.facts[key] for key in ("steps", "tokens") if key in source.facts},
        "verification": {"rounding_kl": rounding_kl},
        "versions": {n: version(n) for n in ("gate-retrofit", "torch", "transformers", "peft")},
    }


def _about_checkpoint(source: Source, kind: str, format: str) -> dict:
    config, reason = source.config, refusal(source.config)
    written = native_config(config, bool(source.centers)) if reason is None else {}
    return {
        "format": format,
        "native": reason is None,
        "why_not_native": reason,
        "model_type": written.get("model_type", f"gated_{config.model_type}"),
        "untied": config.tie_word_embeddings and not written.get("tie_word_embeddings", True),
        "constant_heads": written.get("retrofit_constant_heads", 0),
        "heads": written.get("num_attention_heads", config.num_attention_heads),
        "kv_heads": written.get("num_key_value_heads", config.num_key_value_heads),
        "dtype": kind,
    }


def _about_base(source: Source) -> dict:
    trained_on = source.facts.get("base", {})
    is_local = Path(source.base_name).expanduser().is_dir()
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
