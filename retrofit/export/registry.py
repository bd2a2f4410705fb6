"""The checkpoint formats by name. A new format is a module with a `FORMAT`, and a line here.

A format's module is imported only when it is needed, so that the command line can list the names
without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Literal

# The formats with their descriptions for the command line's help. The module of a format has its
# name, with underscores.
FORMATS = {
    "native": "for transformers and vLLM",
    "gguf": "for llama.cpp",
    "remote-code": "the base's architecture with a modeling file",
    "adapter": "only the gates, for PEFT",
    "gated-attention": "the layout of the paper's models",
}

if TYPE_CHECKING:
    from retrofit.export.checkpoint_format import CheckpointFormat

    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


def format_of(name: str) -> "CheckpointFormat":
    """Returns the format of this name."""
    return import_module(f"retrofit.export.{name.replace('-', '_')}").FORMAT
