"""Measures several models on the same windows of one text. The first model is the base."""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from rich.markup import escape
from rich.progress import Progress

from retrofit.data.vocabulary import check_texts, embedded_tokens, prepended_token
from retrofit.measure.evaluation import Evaluation, MeasuredModel, Track, unwrapped
from retrofit.measure.metrics import NEAR, TAIL, PredictionStatistics
from retrofit.measure.predictions import predictions_of
from retrofit.measure.sinks import measure_sinks
from retrofit.measure.texts import cut_windows, read_documents
from retrofit.models.loading import load_model
from retrofit.models.run_folder import opened_as_trained
from retrofit.utils.console import PlainConsole
from retrofit.utils.dtypes import dtype_name
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import read_json, write_json, writing
from retrofit.utils.paths import expanded

_SINKS = "sinks"  # what is always measured
_FEW_TOKENS = 8  # of which the logits are checked
_SAME_LOGITS = 0.02  # the largest difference that rounding could make, relative to the logits


def measure(
    sources: Sequence[str],
    text: str | Path,
    *,
    length: int = 512,
    windows: int = 16,
    batch_size: int = 4,
    dtype: str = "auto",
    evaluations: Sequence[Evaluation] = (),
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
        dtype: the dtype of all base weights; `auto` is the one that the first source is stored in.
        evaluations: what to measure besides sinks.
        load: opens a source in a dtype, beside runs with the `quantization` and the `revision` that
            these were trained on, and returns the model and its tokenizer.
        progress: whether to show a progress bar on stderr.
        resume: a folder that keeps finished figures, so that the same call can go on from there.
            The caller removes it once the result is safe.

    Returns:
        `{"models": [{"name", "metrics", "per_layer", "nll_by_window", "copied_nats_by_window"}],
        "settings"}`, ready for JSON, with `None` for what a model does not have. Lists in
        `per_layer` have an entry for each decoder layer. `retrofit.measure.metrics` defines the
        metrics, and `retrofit.measure.copied` the one of copied text. Each evaluation adds its
        figures to each model and its settings to the settings, under its name.

    Raises:
        UserError: if a model is named twice, two runs were trained on different forms of a base,
            the text is missing, empty or too short, a length is too short for the metrics or too
            long for a model, tokenizers differ, the text holds a token that a model has no
            embedding for, a model changes its logits after the head, or outputs are not finite.
    """
    _check_arguments(sources, length, windows, batch_size)
    opened = opened_as_trained(sources)
    text = expanded(text)
    documents = read_documents(text)
    identity = _identity(text, length, windows, dtype)
    plan = _Plan(sources, evaluations, KeptFigures(resume, identity), opened)
    base: PredictionStatistics | None = None
    with Progress(console=PlainConsole(stderr=True), disable=not progress) as bar:
        for name, source in plan.named.items():
            if not (todo := plan.todo(name)):
                continue
            openers = {each: partial(load, each, **opened[each]) for each in (source, sources[0])}
            measured = _open(name, plan.settings.get("dtype", dtype), openers, documents)
            _check_positions(measured, {"--length": length, **_tokens_read(evaluations)})
            input_ids = cut_windows(documents, measured.tokenizer, length, windows)
            _check_same_tokens(measured, input_ids, plan)
            _check_logits(measured, input_ids[:1, :_FEW_TOKENS])
            if not plan.settings:
                plan.settings = _settings(identity, measured, input_ids, opened[source])
            track = _track(bar, name)
            if _SINKS in todo:
                with _finite_figures_expected(_SINKS, name):
                    sinks, predictions = measure_sinks(measured, input_ids, batch_size, base, track)
                plan.put(name, _SINKS, _ready_for_json(sinks))
                base = base or predictions
                del predictions
            for evaluation in evaluations:
                if evaluation.name in todo:
                    with _finite_figures_expected(evaluation.name, name):
                        figures = evaluation.measure(measured, track)
                    plan.put(name, evaluation.name, {evaluation.name: _ready_for_json(figures)})
            del measured  # before the next one is loaded
            gc.collect()
    return plan.result()


def _check_arguments(sources: Sequence[str], length: int, windows: int, batch_size: int) -> None:
    if length < NEAR + TAIL:
        raise UserError(f"length must be at least {NEAR + TAIL} tokens, not {length}")
    for name, count in (("windows", windows), ("batch_size", batch_size)):
        if count < 1:
            raise UserError(f"{name} must be at least 1, not {count}")
    if any(not source.strip() for source in sources):
        raise UserError("the name of a model is empty; give its folder or its hub id")
    if len(set(sources)) < len(sources):
        raise UserError(f"{max(sources, key=sources.count)} is named twice")


def _identity(text: Path, length: int, windows: int, dtype: str) -> dict[str, Any]:
    """Returns what all figures depend on, beside the models and the settings of an evaluation."""
    return {
        "text": text.name,
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "length": length,
        "windows": windows,
        "asked_dtype": dtype,
        "versions": {name: version(name) for name in ("torch", "transformers", "gate-retrofit")},
    }


def _open(
    name: str, dtype: str, openers: Mapping[str, Callable], documents: Sequence[str]
) -> MeasuredModel:
    """Opens the source that `openers` has first. If it has another one, that is the base."""
    source, *base = openers
    model, tokenizer = openers[source](dtype)
    check_texts(tokenizer, embedded_tokens(unwrapped(model).config), documents)
    # What is opened again has the dtype that `auto` stood for, as all other models have.
    again = {each: partial(opener, dtype_name(model.dtype)) for each, opener in openers.items()}
    open_base = again[base[0]] if base else None
    return MeasuredModel(name, source, model, tokenizer, documents, again[source], open_base)


@contextmanager
def _finite_figures_expected(evaluation: str, name: str) -> Iterator[None]:
    """Turn a validation error into a `UserError`: a broken model, such as one in int8, may give
    infinities."""
    try:
        yield
    except ValidationError as error:
        problem = validation_problem(error)
        raise UserError(f"{evaluation} of {name} gives what is no figure ({problem})") from error


def _ready_for_json(figures: BaseModel) -> dict[str, Any]:
    """Returns the figures that were measured, without the fields that were left at a default."""
    return figures.model_dump(exclude_unset=True)


def names(sources: Sequence[str]) -> list[str]:
    """Returns the last part of each path or hub id, or the whole where that part is ambiguous."""
    short = [Path(source).name or source for source in sources]
    return [
        name if short.count(name) == 1 else source
        for name, source in zip(short, sources, strict=True)
    ]


class KeptFigures:
    """Keeps figures that are already measured: in memory, and in a folder if one is given.

    Args:
        folder: the folder that keeps the figures for another try.
        identity: what all figures depend on. Figures that were kept under another identity are not
            found.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]):
        self._folder, self._identity = folder, identity
        self._figures: dict[str, Any] = {}
        if folder and folder.is_dir():
            self._figures = dict(_readable(folder))

    def get(self, *key: Any) -> Any:
        return self._figures.get(self._file(key))

    def put(self, value: Any, *key: Any) -> None:
        # A round trip through JSON makes fresh figures equal to those read from the folder.
        self._figures[self._file(key)] = json.loads(json.dumps(value))
        if self._folder:
            with writing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(self._folder / f"{self._file(key)}.json", value)

    def _file(self, key: tuple) -> str:
        return hashlib.sha256(json.dumps([self._identity, *key]).encode()).hexdigest()[:16]


def _readable(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yields the name and the figures of each readable file.

    A file that a power failure damaged is skipped, and its figures are measured again.
    """
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError):
            yield path.stem, read_json(path)


class _Plan:
    """Knows what to measure of each model, and which of these figures are there already."""

    def __init__(
        self,
        sources: Sequence[str],
        evaluations: Sequence[Evaluation],
        done: KeptFigures,
        opened: dict[str, dict[str, Any]],
    ):
        self.named = dict(zip(names(sources), sources, strict=True))
        self.base = next(iter(self.named))
        self.done = done
        options = {part.name: asdict(part) for part in evaluations}  # type: ignore[call-overload]
        self._options = json.loads(json.dumps(options))
        # The figures of a model depend on its files and how it is opened, and on those of the base.
        self._states = {
            name: [*_state(source), opened[source]] for name, source in self.named.items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        return self.done.get(self._states[self.base]) or {}

    @settings.setter
    def settings(self, value: dict[str, Any]) -> None:
        self.done.put(value, self._states[self.base])

    def put(self, name: str, evaluation: str, value: dict[str, Any]) -> None:
        self.done.put(value, *self._key(name, evaluation))

    def todo(self, name: str) -> set[str]:
        """Returns the evaluations that are missing for one model.

        The base's sinks are measured again if those of any other model are missing, because that
        model is compared with the base's predictions.
        """
        missing = {
            evaluation
            for evaluation in self._options
            if self.done.get(*self._key(name, evaluation)) is None
        }
        compared = self.named if name == self.base else [name]
        if any(self.done.get(*self._key(other, _SINKS)) is None for other in compared):
            missing.add(_SINKS)
        return missing

    def result(self) -> dict[str, Any]:
        models = []
        for name in self.named:
            model = {"name": name}
            for evaluation in (_SINKS, *self._options):
                model |= self.done.get(*self._key(name, evaluation))
            models.append(model)
        sources = {"sources": list(self.named.values())}
        return {"models": models, "settings": sources | self.settings | self._options}

    def _key(self, name: str, evaluation: str) -> tuple:
        options = self._options.get(evaluation)
        return name, evaluation, options, self._states[self.base], self._states[name]


def _state(source: str) -> list:
    """Returns the name of a source and, if it is local, the names, sizes and times of its files,
    which change as the files do. Hidden folders, such as that of kept figures, do not count."""
    folder = expanded(source)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return [source, files]


def _track(bar: Progress, name: str) -> Track:
    return lambda sequence, doing: bar.track(sequence, description=escape(f"{name}: {doing}"))


def _check_positions(measured: MeasuredModel, lengths: dict[str, int]) -> None:
    """Check that a model reads as many tokens as the options with the given names ask for."""
    limit = getattr(measured.inner.config, "max_position_embeddings", None)
    for option, length in lengths.items():
        if limit is not None and length > limit:
            raise UserError(
                f"{measured.name} has {limit} positions, fewer than the {length} tokens of "
                f"{option}; lower {option}"
            )


def _tokens_read(evaluations: Sequence[Evaluation]) -> dict[str, int]:
    """Returns how many tokens each evaluation has in a model's context at once, by the names of the
    options that ask for them; evaluations without such options check it themselves."""
    read: dict[str, int] = {}
    for evaluation in evaluations:
        for options in (("length",), ("tokens",), ("prompt", "new_tokens")):
            if hasattr(evaluation, options[0]):
                names = " + ".join(f"{evaluation.name}.{option}" for option in options)
                read[names] = sum(getattr(evaluation, option) for option in options)
    return read


def _check_logits(measured: MeasuredModel, input_ids: torch.Tensor) -> None:
    """Check that the logits of a model are what is computed of its hidden states here."""
    model = measured.inner
    input_ids = input_ids.to(measured.device)
    with torch.inference_mode():
        expected = model(input_ids, use_cache=False).logits.float()
        hidden_states = model.get_decoder()(input_ids, use_cache=False).last_hidden_state
        logits = predictions_of(model).logits(hidden_states)
    if (logits - expected).abs().max() > _SAME_LOGITS * expected.abs().max():
        raise UserError(
            f"{measured.name} changes its logits after the output head, as by scaling or capping "
            "them, which the figures would ignore"
        )


def _check_same_tokens(measured: MeasuredModel, input_ids: torch.Tensor, plan: _Plan) -> None:
    if plan.settings and plan.settings["tokens_sha256"] != _sha256(input_ids):
        raise UserError(f"{measured.name} and {plan.base} tokenize the text differently")


def _settings(
    identity: dict, measured: MeasuredModel, input_ids: torch.Tensor, opened: dict[str, Any]
) -> dict[str, Any]:
    """Returns the settings of a measurement, whose base was opened with the options `opened`."""
    known = {name: value for name, value in identity.items() if name != "asked_dtype"}
    return (
        known
        | {f"base_{option}": value for option, value in opened.items()}
        | {
            "windows": input_ids.shape[0],
            "tokens": input_ids.numel(),
            "tokens_sha256": _sha256(input_ids),
            "first_token": prepended_token(measured.tokenizer),
            "dtype": measured.dtype,
            "device": measured.device.type,
            "attn_implementation": "sdpa",
        }
    )


def _sha256(input_ids: torch.Tensor) -> str:
    return hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()
