"""Safetensors checkpoints on disk: read one tensor at a time, written shard by shard."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retrofit.errors import UserError
from retrofit.files import read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class StoredWeights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint folder by name; each is read when it is asked for.

    Raises:
        UserError: if the folder has no safetensors, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path, single: str = _SINGLE):
        index = folder / _INDEX
        if index.is_file() and not (folder / single).is_file():
            try:
                files = read_json(index)["weight_map"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{index} is damaged; download it again") from error
            self._files = {name: folder / file for name, file in files.items()}
        elif (folder / single).is_file():
            with _opened(folder / single) as file:
                self._files = dict.fromkeys(file.keys(), folder / single)
        elif any(folder.glob("*-of-*.safetensors")):
            raise UserError(f"{folder} has shards but no {_INDEX}; download it again")
        else:
            raise UserError(f"{folder} has no {single}; only safetensors checkpoints are read")

    def __getitem__(self, name: str) -> torch.Tensor:
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        with _opened(self._files[name]) as file:
            return tuple(file.get_slice(name).get_shape())


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} is missing or damaged; download it again ({error})") from error


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_size: int
) -> dict[str, int]:
    """Write `tensors` as transformers lays checkpoints out; at most one shard is in memory.

    Args:
        max_shard_size: bytes of a shard; only a single larger tensor exceeds it.

    Returns:
        `shards`, `bytes` and `parameters` written.
    """
    files: list[list[str]] = []
    size = parameters = 0
    for number, shard in enumerate(_shards(tensors, max_shard_size)):
        save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})
        (folder / f"shard-{number}").chmod(0o644)  # safetensors writes for its owner alone
        files.append(list(shard))
        size += sum(tensor.nbytes for tensor in shard.values())
        parameters += sum(tensor.numel() for tensor in shard.values())
        shard.clear()  # this loop would hold it while the next one is made
    _name_shards(folder, files, size)
    return {"shards": len(files), "bytes": size, "parameters": parameters}


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_size:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _name_shards(folder: Path, files: list[list[str]], size: int) -> None:
    """The final names hold the number of shards, which is known only at the end."""
    if len(files) == 1:
        (folder / "shard-0").rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
