"""retrofit: train attention gates into a pretrained LLM whose own weights stay frozen.

`import retrofit` is enough to make the gates known to PEFT and the gated checkpoints known to
transformers. It imports neither, so the command line answers at once: the registrations run when
those libraries are first imported.
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


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_gated_models(_modeling_auto):
    import_module("retrofit.gated_models").register()


def __getattr__(name: str):
    if name == "GateConfig":
        return import_module("retrofit.gates").GateConfig
    raise AttributeError(f"module 'retrofit' has no attribute {name!r}")
