"""Identifies a base by a hash of its weights, a hash of its tokenizer and the values of its config.

They are written before and after training, and checked when gates are put on a base.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from retrofit.utils.fsdp import full_tensor

_THREADS = min(8, os.cpu_count() or 1)
_WAITING_BYTES = 2 * 2**30  # the most that tensors waiting to be hashed may take
# Keys of a config that do not change what the model computes: names, versions, and how weights are
# stored and results are returned.
_IGNORED = frozenset(
    ("architectures", "attention_dropout", "auto_map", "chunk_size_feed_forward", "dtype",
     "id2label", "initializer_range", "label2id", "model_type", "output_attentions",
     "output_hidden_states", "problem_type", "quantization_config", "return_dict", "torch_dtype",
     "transformers_version", "transformers_weights", "use_cache")
)  # fmt: skip


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns one sha256 over how a tokenizer cuts text, its special tokens and its chat
    template."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # These are the format's version, and what the last call set.
        rules = {name: rules[name] for name in rules.keys() - {"version", "truncation", "padding"}}
    else:
        rules = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    whole = json.dumps([rules, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the values of a config that its model computes with.

    The key of a value in a nested config has the form `part.key`.
    """
    return dict(_flat(json.loads(config.to_json_string(use_diff=False))))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name in _IGNORED or name.startswith("_") or name.endswith("_token_id"):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def weights_sha256(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Returns one sha256 over names, dtypes, shapes and bytes of tensors in any order.

    Tensors are hashed on several threads, and few of them are in memory at a time.
    """
    lines: list[str] = []
    waiting: deque[tuple[int, Future[str]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, tensor in named_tensors:
            # Threads do not gather: all ranks must gather in the same order.
            gathered = full_tensor(tensor).cpu().contiguous()
            waiting.append((gathered.nbytes, pool.submit(_line, name, gathered)))
            while len(waiting) > _THREADS or sum(size for size, _ in waiting) > _WAITING_BYTES:
                lines.append(waiting.popleft()[1].result())
        lines += [future.result() for _, future in waiting]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def base_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters of a model without its adapters, under their checkpoint names.

    Tied weights come once, as they are stored. The experts of a mixture, which transformers stacks
    when it loads them, are taken apart again.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.core_model_loading import revert_weight_conversion

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapter_prefixes = tuple(
        f"{name}." for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)
    )
    for name, parameter in base.named_parameters():
        if not name.startswith(adapter_prefixes):
            yield from revert_weight_conversion(base, {name: parameter.detach()}).items()


def _line(name: str, tensor: torch.Tensor) -> str:
    """Returns a tensor's name, dtype, shape and sha256 in one line."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
