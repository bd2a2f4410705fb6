"""retrofit: train attention gates into a pretrained LLM whose own weights stay frozen.

`import retrofit` is enough to make the gates known to PEFT and the gated checkpoints known to
transformers. It imports neither, so the command line answers at once: the registrations run when
those libraries are first imported.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

import wrapt

from retrofit.adapters import supported_model_types

if TYPE_CHECKING:
    from retrofit.gates import GateConfig

__all__ = ["GateConfig", "__version__"]

__version__ = version("gate-retrofit")

_CONFIG_MODULES = tuple(
    f"transformers.models.{model_type}.configuration_{model_type}"
    for model_type in supported_model_types()
)


@wrapt.when_imported("peft")
def _register_peft_method(_peft):
    import_module("retrofit.gates")


# In two steps, because a config may be what imports the auto classes: those bring in the configs
# that are not on their way yet, and each config is registered when it is whole.
@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _import_configs(_modeling_auto):
    for module in _CONFIG_MODULES:
        import_module(module)


def _register_gated_config(configuration):
    (name,) = configuration.__all__
    import_module("retrofit.gated_config").register(getattr(configuration, name))


for _module in _CONFIG_MODULES:
    wrapt.register_post_import_hook(_register_gated_config, _module)


def __getattr__(name: str):
    if name == "GateConfig":
        return import_module("retrofit.gates").GateConfig
    raise AttributeError(f"module 'retrofit' has no attribute {name!r}")
