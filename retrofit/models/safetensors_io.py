"""Safetensors checkpoints on disk: read one tensor at a time, written shard by shard."""

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
_FLOATS = ("F16", "BF16", "F32", "F64")


class StoredWeights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint folder by name; each is read when it is asked for.

    Args:
        single: the file that holds them where it is there, or an index of the files that do.

    Raises:
        UserError: if the folder has no safetensors, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path, single: str = _SINGLE):
        path, index = folder / single, folder / _INDEX
        self._bare: dict[str, str] = {}  # how a tensor is stored, where it has another name
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
            return file.get_tensor(self._bare.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        with _opened(self._files[name]) as file:
            return tuple(file.get_slice(self._bare.get(name, name)).get_shape())

    def refuse_other_kinds(self) -> None:
        """Weights are floating-point numbers; transformers makes some of whatever is stored.

        Raises:
            UserError: if a tensor is stored in something else, as the headers have it.
        """
        for path in sorted(set(self._files.values())):
            with _opened(path) as file:
                stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            if wrong := sorted(name for name in stored if stored[name] not in _FLOATS):
                raise UserError(
                    f"{path} stores {wrong[0]} as {stored[wrong[0]]}, and weights are "
                    f"{', '.join(_FLOATS)}; download it again, or take one that is stored so"
                )

    def named_as(self, names: Iterable[str]) -> "StoredWeights":
        """The same, with the names of a whole model where a base was stored without the part that
        predicts: `layers.0...` for `model.layers.0...`. transformers reads it so, too."""
        for name in names:
            bare = name.removeprefix("model.")
            if name not in self._files and bare in self._files:
                self._files[name] = self._files.pop(bare)
                self._bare[name] = bare
        return self


class _Index(BaseModel):
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def read_index(index: Path) -> dict[str, str]:
    """By tensor, the name of the shard that an index says it is in.

    Raises:
        UserError: if the index is none, or names a file that is elsewhere or no safetensors.
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
    """The file of weights, or the index of such files, that transformers opens in a base's folder.

    Args:
        config: of the base, which may name another one than the usual.
        base: as the user named it.

    Raises:
        UserError: if the config names what is no safetensors, or lies elsewhere.
    """
    named = getattr(config, "transformers_weights", None)
    if named is None:
        return _SINGLE
    if not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"the config.json of {base} names {named}, which is no safetensors")
    if Path(str(named)).name != named:
        raise UserError(f"the config.json of {base} names {named}, outside of its folder")
    return named


def refuse_other_weights(folder: Path) -> None:
    """What transformers would load of a model's folder is safetensors in it.

    Raises:
        UserError: if its config or its index names something else.
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
    """By tensor, the shard that holds it.

    Raises:
        UserError: if the index cannot be followed, or a shard lacks what it says.
    """
    files = read_index(index)
    paths: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        held = dict.fromkeys(_names_in(index.with_name(file)), index.with_name(file))
        if both := paths.keys() & held:
            raise UserError(
                f"{paths[min(both)]} and {file} both hold {min(both)}; download it again"
            )
        paths |= held
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
        (folder / f"shard-{number}").chmod(0o644)  # safetensors lets only the owner read
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
