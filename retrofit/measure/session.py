"""Several models side by side, on the same windows of one text. The first is the base."""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from retrofit.errors import UserError
from retrofit.files import read_json, write_json
from retrofit.measure.sinks import measure_sinks
from retrofit.measure.subject import Part, Subject, Track
from retrofit.measure.texts import cut_windows, prepended_token, read_documents
from retrofit.metrics import NEAR, TAIL, PredictionStatistics
from retrofit.models import load_model

_SINKS = "sinks"  # what is always measured


def measure(
    sources: Sequence[str],
    text: Path,
    *,
    length: int = 512,
    windows: int = 16,
    batch_size: int = 4,
    dtype: str = "auto",
    parts: Sequence[Part] = (),
    load: Callable = load_model,
    progress: bool = True,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Measure models on the same text, with one of them in memory at a time.

    Args:
        sources: what `load_model` opens; the first is the base that the others are compared with.
        text: a .txt file, which is one document, or a .jsonl file with a `text` in each line.
        length: tokens in a window, with the BOS token where the tokenizer prepends one.
        windows: how many windows at most, from as many documents as possible.
        batch_size: windows in a forward pass.
        dtype: of all base weights; `auto` is the one that the first source is stored in.
        parts: what to measure besides.
        load: opens a source in a dtype, as a model and its tokenizer.
        progress: show a progress bar on stderr.
        resume: a folder that keeps what is done until all of it is. The same call goes on from
            there; another one starts over.

    Returns:
        `{"models": [{"name", "metrics", "per_layer", "nll_by_window"}], "settings"}`, ready for
        JSON: `None` for what a model does not have. Lists in `per_layer` have an entry for each
        decoder layer. `retrofit.metrics` defines the metrics. Each part adds its figures to the
        models and its settings to the settings, under its name.

    Raises:
        UserError: if the text is missing, empty or too short, the length is too short for the
            metrics or too long for a model, tokenizers differ, or outputs are not finite.
    """
    if length < NEAR + TAIL:
        raise UserError(f"length must be at least {NEAR + TAIL} tokens, not {length}")
    documents = read_documents(text)
    asked = {
        "sources": list(sources),
        "text": text.name,
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "length": length,
        "windows": windows,
        "asked_dtype": dtype,
        **{part.name: asdict(part) for part in parts},  # type: ignore[call-overload]
        "versions": {name: version(name) for name in ("torch", "transformers", "gate-retrofit")},
    }
    done = Done(resume, asked | {"states": [_state(source) for source in sources]})
    base: PredictionStatistics | None = None
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        for name, source in zip(names(sources), sources, strict=True):
            todo = _todo(name, names(sources), parts, done)
            if not todo:
                continue
            settings = done.get("settings") or {}
            held = settings.get("dtype", dtype)
            model, tokenizer = load(source, held)
            subject = Subject(
                name, source, model, tokenizer, documents, partial(load, source, held)
            )
            _check_positions(subject, length)
            input_ids = cut_windows(documents, tokenizer, length, windows)
            _check_same_tokens(subject, input_ids, settings, names(sources)[0])
            if not settings:
                done.put("settings", _settings(asked, subject, input_ids))
            if _SINKS in todo:
                track = _track(bar, name)
                found, predictions = measure_sinks(subject, input_ids, batch_size, base, track)
                done.put(f"{name}.{_SINKS}", found)
                base = base or predictions
                del predictions
            for part in parts:
                if part.name in todo:
                    found = part.measure(subject, _track(bar, name))
                    done.put(f"{name}.{part.name}", {part.name: found})
            del model, subject  # before the next one is loaded
            gc.collect()
    result = _result(names(sources), parts, done)
    done.forget()
    return result


def names(sources: Sequence[str]) -> list[str]:
    """The last part of each path or hub id, or the whole where that is ambiguous."""
    short = [Path(source).name or source for source in sources]
    return [
        name if short.count(name) == 1 else source
        for name, source in zip(short, sources, strict=True)
    ]


class Done:
    """Figures that were measured already, by name: in memory, and in a folder where one is given.

    Args:
        folder: where they are kept for another try.
        identity: what they depend on; a folder with figures of something else is emptied.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]):
        self._folder = folder
        self._figures: dict[str, Any] = {}
        if folder is None:
            return
        identity = json.loads(json.dumps(identity))
        if folder.is_dir():
            kept = {path.stem: read_json(path) for path in folder.glob("*.json")}
            if kept.pop("identity", None) == identity:
                self._figures = {figures["name"]: figures["value"] for figures in kept.values()}
                return
        self.forget()
        folder.mkdir(parents=True)
        write_json(folder / "identity.json", identity)

    def get(self, name: str) -> Any:
        return self._figures.get(name)

    def put(self, name: str, value: Any) -> None:
        # A round through JSON, so that what is returned does not depend on whether it was kept.
        self._figures[name] = json.loads(json.dumps(value))
        if self._folder:
            file = hashlib.sha256(name.encode()).hexdigest()[:16]  # names may be paths
            write_json(self._folder / f"{file}.json", {"name": name, "value": value})

    def forget(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _todo(name: str, everybody: list[str], parts: Sequence[Part], done: Done) -> set[str]:
    """What is missing of one model. What others are compared with is measured again for them."""
    missing = {part.name for part in parts if done.get(f"{name}.{part.name}") is None}
    waiting = everybody if name == everybody[0] else [name]
    if any(done.get(f"{each}.{_SINKS}") is None for each in waiting):
        missing.add(_SINKS)
    return missing


def _state(source: str) -> list:
    """Changes when the files of a local source do."""
    files = sorted(path for path in Path(source).expanduser().rglob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _track(bar: Progress, name: str) -> Track:
    return lambda sequence, doing: bar.track(sequence, description=f"{name}: {doing}")


def _result(everybody: list[str], parts: Sequence[Part], done: Done) -> dict[str, Any]:
    models = []
    for name in everybody:
        model = {"name": name}
        for key in (_SINKS, *(part.name for part in parts)):
            model |= done.get(f"{name}.{key}")
        models.append(model)
    return {"models": models, "settings": done.get("settings")}


def _check_positions(subject: Subject, length: int) -> None:
    limit = getattr(subject.inner.config, "max_position_embeddings", length)
    if length > limit:
        raise UserError(f"{subject.name} has {limit} positions, fewer than the length of {length}")


def _check_same_tokens(
    subject: Subject, input_ids: torch.Tensor, settings: dict, base: str
) -> None:
    if settings and settings["tokens_sha256"] != _sha256(input_ids):
        raise UserError(f"{subject.name} and {base} tokenize the text differently")


def _settings(asked: dict, subject: Subject, input_ids: torch.Tensor) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if name != "asked_dtype"} | {
        "windows": input_ids.shape[0],
        "tokens": input_ids.numel(),
        "tokens_sha256": _sha256(input_ids),
        "first_token": prepended_token(subject.tokenizer),
        "dtype": subject.dtype,
        "device": subject.device.type,
        "attn_implementation": "sdpa",
    }


def _sha256(input_ids: torch.Tensor) -> str:
    return hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()
