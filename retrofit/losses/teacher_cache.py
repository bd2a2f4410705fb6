"""The base's final hidden states on disk, for data that is seen more than once."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_INPUTS = ("input_ids", "position_ids", "attention_mask")


class TeacherCache:
    """Hidden states of rows that the base has seen, one file a row, in the dtype they come in: the
    loss is the same to the bit. What cannot be read or written is no reason to end a run.

    Args:
        folder: where they lie, `hidden_size` numbers for each token that has a label.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.writable = True

    @torch.compiler.disable
    def __call__(
        self,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        run: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Those from which a label is predicted.

        Args:
            inputs: of the model, each `[batch, T]`.
            labels: `[batch, T]`, -100 where nothing is predicted.
            run: the base's pass, called where a row is new.

        Returns:
            `[labelled tokens, hidden_size]`, row after row.
        """
        files = [self.folder / f"{name}.safetensors" for name in _names(inputs, labels)]
        rows = [row for file in files if (row := _load(file)) is not None]
        if len(rows) == len(files):
            return torch.cat(rows).to(labels.device)
        hidden_states = run()
        counts = (labels[:, 1:] != -100).sum(-1).tolist()
        for file, states in zip(files, hidden_states.split(counts), strict=True):
            self._save(states, file)
        return hidden_states

    def _save(self, states: torch.Tensor, file: Path) -> None:
        if not self.writable:
            return
        partial = file.with_suffix(f".partial-{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A slice would be written with all that it is a slice of.
            save_file({"hidden_states": states.cpu().clone()}, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            self.writable = False
            with contextlib.suppress(OSError):
                partial.unlink()
            warnings.warn(f"objective.cache_teacher keeps no more: {error}", stacklevel=2)


def _names(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Iterator[str]:
    """A hash for each row of all that its labelled tokens depend on. Padding behind the last of
    them is left out, for it changes from batch to batch."""
    tensors = [inputs[name] for name in _INPUTS if inputs.get(name) is not None]
    for index, row in enumerate(labels):
        last = max((row != -100).nonzero().flatten().tolist(), default=0)
        digest = hashlib.sha256()
        for tensor in (*tensors, labels):
            digest.update(tensor[index, : last + 1].cpu().numpy().tobytes())
        yield digest.hexdigest()


def _load(file: Path) -> torch.Tensor | None:
    try:
        return load_file(file)["hidden_states"]
    except (OSError, SafetensorError):  # not there, or cut off by a power failure
        return None
