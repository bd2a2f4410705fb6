"""retrofit: train attention gates into a pretrained LLM whose own weights stay frozen.

`import retrofit` is enough to make the gates known to PEFT. It does not import PEFT, so the command
line answers at once: the registration runs when PEFT is first imported.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from retrofit.gates import GateConfig

__all__ = ["GateConfig", "__version__"]

__version__ = version("gate-retrofit")


@wrapt.when_imported("peft")
def _register_peft_method(_peft):
    import_module("retrofit.gates")


def __getattr__(name: str):
    if name == "GateConfig":
        return import_module("retrofit.gates").GateConfig
    raise AttributeError(f"module 'retrofit' has no attribute {name!r}")
