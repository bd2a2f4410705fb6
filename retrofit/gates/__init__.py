"""Gates as a PEFT method: `GateConfig`, the tuner `GateModel` and its layer `GateLayer`.

The layout and the registration follow PEFT's own tuners. PEFT keeps its methods in a closed enum,
so `_peft_type.py` first adds a member to it.
"""

# This import comes first, so that the import hook in `retrofit/__init__.py`, which it triggers,
# finds that this package is already being imported.
import peft
from peft.utils import register_peft_method

from retrofit.gates._former_names import read_former_names_in_transformers
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
    read_former_names_in_transformers()
