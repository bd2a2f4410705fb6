"""Reads safetensors checkpoints one tensor at a time, and writes them shard by shard."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retrofit.utils.errors import UserError, one_line
from retrofit.utils.files import read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")


class StoredWeights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint folder by name, each of which is read when it is asked for.

    Args:
        folder: the checkpoint folder.
        single: the file that holds all tensors, or an index of shards. If the default file is not
            there, the default index is read.

    Raises:
        UserError: if the folder has no safetensors, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path, single: str = _SINGLE):
        path, index = folder / single, folder / _INDEX
        self._stored_names: dict[str, str] = {}  # of tensors that `named_as` has renamed
        if single == _SINGLE and not path.is_file() and index.is_file():
            path = index
        if path.is_file() and path.suffix == ".json":
            self._files = _indexed(path)
        elif path.is_file():
            self._files = dict.fromkeys(_names_in(path), path)
        elif any(folder.glob("*-of-*.safetensors")):
            raise UserError(f"{folder} has shards but no {_INDEX}; download it again")
        else:
            raise UserError(f"{folder} has no {single}; only safetensors checkpoints are read")

    def __getitem__(self, name: str) -> torch.Tensor:
        with _opened(self._files[name]) as file:
            return file.get_tensor(self._stored_names.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading the tensor."""
        with _opened(self._files[name]) as file:
            return tuple(file.get_slice(self._stored_names.get(name, name)).get_shape())

    def refuse_other_dtypes(self) -> None:
        """Refuses tensors that are not floating-point numbers, which transformers would convert.

        Raises:
            UserError: if the header of a file says that a tensor has another dtype.
        """
        for path in sorted(set(self._files.values())):
            with _opened(path) as file:
                stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            if refused := sorted(name for name in stored if stored[name] not in _FLOAT_DTYPES):
                raise UserError(
                    f"{path} stores {refused[0]} as {stored[refused[0]]}, and weights are "
                    f"{', '.join(_FLOAT_DTYPES)}; download it again, or take one that is stored so"
                )

    def named_as(self, names: Iterable[str]) -> "StoredWeights":
        """Gives tensors the names of a whole model if they are stored without its head.

        A tensor that is stored as `layers.0...` is then found as `model.layers.0...`, as it is in
        transformers.

        Args:
            names: the names of the whole model.

        Returns:
            This object.
        """
        for name in names:
            bare = name.removeprefix("model.")
            if name not in self._files and bare in self._files:
                self._files[name] = self._files.pop(bare)
                self._stored_names[name] = bare
        return self


class _Index(BaseModel):
    """The field of an index that is read."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def read_index(index: Path) -> dict[str, str]:
    """Reads an index, and returns the name of each tensor's shard.

    Raises:
        UserError: if the index is damaged, or names a file that is not safetensors beside it.
    """
    try:
        files = _Index.model_validate(read_json(index)).weight_map
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{index} is damaged; download it again ({one_line(error)})") from None
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index} names {file!r}, which is no safetensors file beside it")
    return files


def weights_file(config: Any, base: str) -> str:
    """Returns the weights file, or the index, that transformers opens in a base's folder.

    Args:
        config: the config of the base, which may name another file than the usual one.
        base: the base as the user named it.

    Raises:
        UserError: if the config names a file that is not safetensors or not in the folder.
    """
    file = getattr(config, "transformers_weights", None)
    if file is None:
        return _SINGLE
    if not str(file).endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"the config.json of {base} names {file}, which is no safetensors")
    if Path(str(file)).name != file:
        raise UserError(f"the config.json of {base} names {file}, outside of its folder")
    return file


def refuse_other_weights(folder: Path) -> None:
    """Refuses a model's folder from which transformers would load other files than safetensors.

    Raises:
        UserError: if its config names other weights, or its index other files.
    """
    path, index = folder / "config.json", folder / _INDEX
    try:
        config = read_json(path) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    if isinstance(config, dict) and config.get("transformers_weights") is not None:
        raise UserError(
            f"{path} names other weights than {_SINGLE} (transformers_weights); take that out of it"
        )
    if index.is_file() and not (folder / _SINGLE).is_file():
        read_index(index)


def _indexed(index: Path) -> dict[str, Path]:
    """Returns the path of each tensor's shard.

    Raises:
        UserError: if the index or a shard is damaged, a shard lacks a tensor, or two have the same.
    """
    files = read_index(index)
    paths: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        shard = index.with_name(file)
        names = _names_in(shard)
        if duplicates := paths.keys() & names:
            first = min(duplicates)
            raise UserError(f"{paths[first]} and {file} both hold {first}; download it again")
        paths |= dict.fromkeys(names, shard)
    for name, file in files.items():
        if name not in paths:
            raise UserError(f"{index.with_name(file)} lacks the tensor {name}; download it again")
    return paths


def _names_in(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file; download it again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged; download it again ({error})") from error


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_size: int
) -> dict[str, int]:
    """Writes tensors in the layout of transformers, with at most one shard in memory.

    Args:
        tensors: the tensors by name.
        folder: the folder to write to.
        max_shard_size: the most bytes of a shard; only a single tensor that is larger exceeds it.

    Returns:
        How many `shards`, `bytes` and `parameters` were written.
    """
    files: list[list[str]] = []
    size = parameters = 0
    for number, shard in enumerate(_shards(tensors, max_shard_size)):
        save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})
        (folder / f"shard-{number}").chmod(0o644)  # safetensors lets only the owner read
        files.append(list(shard))
        size += sum(tensor.nbytes for tensor in shard.values())
        parameters += sum(tensor.numel() for tensor in shard.values())
        shard.clear()  # otherwise it would stay in memory while the next one is made
    _name_shards(folder, files, size)
    return {"shards": len(files), "bytes": size, "parameters": parameters}


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Groups tensors into shards."""
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
    """Gives shards their final names, which hold the number of shards, and writes the index."""
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
