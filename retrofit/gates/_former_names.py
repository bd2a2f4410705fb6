"""Lets transformers load adapters that were stored under the former name of gates.

PEFT's own loader asks the tuner to map stored names to the model's, and `GateModel` does so.
transformers (`from_pretrained` of an adapter's folder, `load_adapter`) instead renames by a list
that a function of PEFT makes. For gates, a rule for the former name is put at the front of it.
"""

import re
from functools import wraps

from peft.utils import transformers_weight_conversion
from transformers.core_model_loading import WeightRenaming

from retrofit.gates._peft_type import G1_GATE
from retrofit.stored_names import CURRENT, FORMER


def read_former_names_in_transformers() -> None:
    """Let transformers read adapters whose gates have their former name."""
    build_mapping = transformers_weight_conversion.build_peft_weight_mapping

    @wraps(build_mapping)
    def build_with_former_names(weight_conversions, adapter_name, peft_config=None):
        mapping = build_mapping(weight_conversions, adapter_name, peft_config=peft_config)
        if getattr(peft_config, "peft_type", None) == G1_GATE:
            mapping.insert(0, WeightRenaming(re.escape(FORMER), CURRENT))
        return mapping

    transformers_weight_conversion.build_peft_weight_mapping = build_with_former_names
