"""The formats of checkpoints by name. A new one is a module with a `FORMAT`, and a line here."""

from importlib import import_module
from typing import TYPE_CHECKING, Literal

# Modules of this folder. They are imported when they are asked for, so that the command line has
# the names without waiting for torch.
MODULES = {
    "native": "native",
    "gguf": "gguf",
    "remote-code": "remote_code",
    "adapter": "adapter",
    "gated-attention": "gated_attention",
}

if TYPE_CHECKING:
    from retrofit.export.checkpoint_format import CheckpointFormat

    FormatName = str
else:
    FormatName = Literal[tuple(MODULES)]


def format_of(name: str) -> "CheckpointFormat":
    """The format of that name."""
    return import_module(f"retrofit.export.{MODULES[name]}").FORMAT
