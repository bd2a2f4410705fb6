"""The base's final hidden states on disk, for data that is seen more than once."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_INPUTS = ("input_ids", "position_ids", "attention_mask")


class TeacherCache:
    """Hidden states of rows that the base has seen, one file a row, in the dtype they come in: the
    loss is the same to the bit.

    Args:
        folder: where they lie, `hidden_size` numbers for each token that has a label.
    """

    def __init__(self, folder: Path):
        self.folder = folder

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
        if all(file.is_file() for file in files):
            rows = [load_file(file)["hidden_states"] for file in files]
            return torch.cat(rows).to(labels.device)
        hidden_states = run()
        counts = (labels[:, 1:] != -100).sum(-1).tolist()
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, states in zip(files, hidden_states.split(counts), strict=True):
            _save(states, file)
        return hidden_states


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


def _save(states: torch.Tensor, file: Path) -> None:
    if not file.is_file():
        partial = file.with_suffix(f".partial-{os.getpid()}")
        # A slice would be written with all that it is a slice of.
        save_file({"hidden_states": states.cpu().clone()}, partial)
        partial.replace(file)
