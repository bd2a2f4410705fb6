"""The formats of checkpoints by name. A new one is a module with a `FORMAT`, and a line here.

The modules are imported when they are asked for, so that the command line has the names without
waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Literal

# What each is, for the help of the command line. The module has the same name, with underscores.
FORMATS = {
    "native": "for transformers and vLLM",
    "gguf": "for llama.cpp",
    "remote-code": "the base's architecture with a modeling file",
    "adapter": "the gates alone, for PEFT",
    "gated-attention": "the layout of the paper's models",
}

if TYPE_CHECKING:
    from retrofit.export.checkpoint_format import CheckpointFormat

    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


def format_of(name: str) -> "CheckpointFormat":
    """The format of that name."""
    return import_module(f"retrofit.export.{name.replace('-', '_')}").FORMAT
