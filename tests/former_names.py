"""Files with the names that earlier versions gave to gates."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rename_gates(path: Path) -> None:
    """Give the gates in a safetensors file their former name, `g1`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    former = {name.replace(".attn_gate.", ".g1."): tensor for name, tensor in tensors.items()}
    assert former.keys() != tensors.keys()
    save_file(former, path, metadata=metadata)
