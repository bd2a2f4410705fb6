"""Gates as a PEFT method: `GateConfig`, the tuner `GateModel` and its layer `GateLayer`.

Layout and registration follow PEFT's own tuners. PEFT keeps its methods in a closed enum, so one
member is added to it first.
"""

# First, so that the import hook in `retrofit/__init__.py` finds this package already on its way.
import peft
from peft.utils import register_peft_method

from retrofit.gates._former_names import rename_in_transformers
from retrofit.gates._peft_type import G1_GATE
from retrofit.gates.ablations import new_projection
from retrofit.gates.config import GateConfig
from retrofit.gates.layer import GateLayer
from retrofit.gates.model import GateModel, gate_layers, gates_off
from retrofit.gates.projection import GateProjection

__all__ = [
    "GateConfig",
    "GateLayer",
    "GateModel",
    "GateProjection",
    "gate_layers",
    "gates_off",
    "new_projection",
]

if G1_GATE not in peft.PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name=G1_GATE.lower(), config_cls=GateConfig, model_cls=GateModel, prefix=GateModel.prefix
    )
    rename_in_transformers()
