"""retrofit trains attention gates into a pretrained LLM whose own weights stay frozen.

`import retrofit` is enough to register the gates with PEFT. It does not import PEFT itself, so that
the command line answers at once: the registration runs when PEFT is first imported.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrofit.gates import GateConfig

__all__ = ["GateConfig", "__version__"]


def _register_peft_method(_peft):
    import_module("retrofit.gates")


# vLLM's environment has this package only for the plugin, and may lack its dependencies.
if find_spec("wrapt"):
    import_module("wrapt").when_imported("peft")(_register_peft_method)


def __getattr__(name: str):
    if name == "GateConfig":
        return import_module("retrofit.gates").GateConfig
    if name == "__version__":  # reading it off the installed package takes a while
        return import_module("importlib.metadata").version("gate-retrofit")
    raise AttributeError(f"module 'retrofit' has no attribute {name!r}")
