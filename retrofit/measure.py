"""Several models side by side, on the same windows of one text. The first is the base."""

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit.errors import UserError
from retrofit.metrics import NEAR, TAIL, PredictionStatistics
from retrofit.models import load_model
from retrofit.probe import LayerStatistics, probe

_COLUMNS_SHOWN = 32


def measure(
    sources: Sequence[str],
    text: Path,
    *,
    length: int = 512,
    windows: int = 16,
    batch_size: int = 4,
    dtype: str = "auto",
    load: Callable = load_model,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure models on the same text, with one of them in memory at a time.

    Args:
        sources: what `load_model` opens; the first is the base that the others are compared with.
        text: a .txt file, which is one document, or a .jsonl file with a `text` in each line.
        length: tokens in a window, with the BOS token where the tokenizer prepends one.
        windows: how many windows at most, from as many documents as possible.
        batch_size: windows in a forward pass.
        dtype: of all base weights; `auto` is the one that the first source is stored in.
        load: opens a source in a dtype, as a model and its tokenizer.
        progress: show a progress bar on stderr.

    Returns:
        `{"models": [{"name", "metrics", "per_layer"}], "settings"}`, ready for JSON: `None` for
        what a model does not have. Lists in `per_layer` have an entry for each decoder layer.
        `retrofit.metrics` defines the metrics.

    Raises:
        UserError: if the text is missing, empty or too short, the length is too short for the
            metrics or too long for a model, tokenizers differ, or outputs are not finite.
    """
    if length < NEAR + TAIL:
        raise UserError(f"length must be at least {NEAR + TAIL} tokens, not {length}")
    documents = read_documents(text)
    models: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    base_ids: torch.Tensor | None = None
    base: PredictionStatistics | None = None
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        for name, source in zip(names(sources), sources, strict=True):
            model, tokenizer = load(source, settings.get("dtype", dtype))
            _check_positions(model, name, length)
            input_ids = cut_windows(documents, tokenizer, length, windows)
            if base_ids is None:
                base_ids = input_ids
                settings = _settings(text, sources, model, tokenizer, input_ids)
            elif not torch.equal(input_ids, base_ids):
                raise UserError(f"{name} and {models[0]['name']} tokenize the text differently")
            advance = partial(bar.advance, bar.add_task(name, total=len(input_ids)))
            layers, predictions = read_model(model, input_ids.split(batch_size), base, advance)
            if not math.isfinite(predictions.perplexity):
                raise UserError(f"the predictions of {name} are not finite in {settings['dtype']}")
            figures = {"metrics": summarize(layers, predictions), "per_layer": by_layer(layers)}
            models.append({"name": name, **figures})
            base = base or predictions
            del model, predictions  # before the next one is loaded
            gc.collect()
    return {"models": models, "settings": settings}


@torch.inference_mode()
def read_model(
    model: PreTrainedModel | PeftModel,
    batches: Iterable[torch.Tensor],
    base: PredictionStatistics | None,
    advance: Callable[[int], None],
) -> tuple[list[LayerStatistics], PredictionStatistics]:
    """Run a model over batches of windows `[batch, T]`, and gather what each layer shows and what
    the model predicts."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    predictions = PredictionStatistics(inner.get_output_embeddings(), base)
    with probe(inner.eval()) as layers:
        for batch in batches:
            input_ids = batch.to(inner.device)
            output = inner.get_decoder()(input_ids, use_cache=False)
            predictions.add(output.last_hidden_state, input_ids)
            advance(len(batch))
    return layers, predictions


def summarize(
    layers: list[LayerStatistics], predictions: PredictionStatistics
) -> dict[str, float | None]:
    """The figures of one model: means over the layers that have them."""
    attention = [layer.attention for layer in layers if layer.attention]
    gates = [layer.gate for layer in layers if layer.gate]
    activations = [layer.activation for layer in layers]
    column_share = torch.stack([a.column_share for a in attention]).mean(0)
    return {
        "f_attn": _mean(a.f_attn for a in attention),
        "peak_column_share": column_share.max().item(),
        "peak_column_position": int(column_share.argmax()),
        "peak_share_per_head": _mean(a.peak_share_per_head for a in attention),
        "sink_ratio": _mean(a.sink_ratio for a in attention),
        "max_activation": _mean(a.largest for a in activations),
        "max_activation_first_token": _mean(a.largest_first_token for a in activations),
        "max_activation_any_window": _mean(a.largest_of_all for a in activations),
        "gate_score": _mean(gate.score for gate in gates),
        "gate_below_0.1": _mean(gate.below_a_tenth for gate in gates),
        "head_load_cv": _mean(a.head_load_cv for a in attention),
        "perplexity": predictions.perplexity,
        "perplexity_far": predictions.perplexity_far,
        "kl_to_base": predictions.kl_to_base,
    }


def by_layer(layers: list[LayerStatistics]) -> dict[str, list]:
    """The same figures by decoder layer, `None` where a layer has no such part, and the mean share
    of the first key positions."""
    attention = [layer.attention for layer in layers]
    gates = [layer.gate for layer in layers]
    shares = torch.stack([a.column_share for a in attention if a])
    return {
        "f_attn": [a and a.f_attn for a in attention],
        "peak_column_share": [a and a.column_share.max().item() for a in attention],
        "max_activation": [layer.activation.largest for layer in layers],
        "gate_score": [gate and gate.score for gate in gates],
        "gate_histogram": [gate and gate.histogram for gate in gates],
        "head_load_cv": [a and a.head_load_cv for a in attention],
        "column_share": shares.mean(0)[:_COLUMNS_SHOWN].tolist(),
    }


def read_documents(path: Path) -> list[str]:
    """The documents of a .txt file (one) or a .jsonl file (the `text` of each line).

    Raises:
        UserError: if it is missing, of another kind, or has no text.
    """
    if not path.is_file():
        raise UserError(f"no text file at {path}")
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        try:
            documents = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'every line of {path} must be {{"text": ...}}') from None
    elif path.suffix == ".txt":
        documents = [content]
    else:
        raise UserError(f"{path} must be a .txt or .jsonl file")
    if not any(document.strip() for document in documents):
        raise UserError(f"{path} is empty")
    return documents


def prepended_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The BOS token where the tokenizer prepends it by default."""
    prepends = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer.bos_token if prepends else None


def cut_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, windows: int
) -> torch.Tensor:
    """Windows of exactly `length` tokens, `[windows, length]`: the first of every document that is
    long enough, then the second of each, and so on. If those are too few, the documents are joined.

    Raises:
        UserError: if there is less than one window of text.
    """
    bos = [] if prepended_token(tokenizer) is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    joined: list[int] = []
    long_enough: list[list[list[int]]] = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        joined += ids
        if len(ids) >= size:
            long_enough.append(_pieces(ids, size))
        if len(long_enough) == windows:
            break
    rows = [row for turn in zip_longest(*long_enough) for row in turn if row is not None]
    if len(rows) < windows:
        rows = _pieces(joined, size)
    if not rows:
        raise UserError(f"the text has {len(joined)} tokens, less than one window of {length}")
    return torch.tensor([bos + row for row in rows[:windows]])


def _pieces(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def names(sources: Sequence[str]) -> list[str]:
    """The last part of each path or hub id, or the whole where that is ambiguous."""
    short = [Path(source).name or source for source in sources]
    return [
        name if short.count(name) == 1 else source
        for name, source in zip(short, sources, strict=True)
    ]


def _check_positions(model: PreTrainedModel, name: str, length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", length)
    if length > limit:
        raise UserError(f"{name} has {limit} positions, fewer than the length of {length}")


def _settings(
    text: Path,
    sources: Sequence[str],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
) -> dict[str, Any]:
    return {
        "sources": list(sources),
        "text": text.name,
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "length": input_ids.shape[1],
        "windows": input_ids.shape[0],
        "tokens": input_ids.numel(),
        "first_token": prepended_token(tokenizer),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "attn_implementation": "sdpa",
        "versions": {name: version(name) for name in ("torch", "transformers", "gate-retrofit")},
    }


def _mean(values: Iterable[float]) -> float | None:
    figures = list(values)
    return sum(figures) / len(figures) if figures else None
