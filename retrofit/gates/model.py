"""The tuner: swaps each attention module's class for its gated twin and adds the gate to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from retrofit.adapters import family_of, supported_model_types
from retrofit.errors import UserError
from retrofit.gates.config import GateConfig
from retrofit.gates.layer import GateLayer
from retrofit.gates.rope import slow_pairs


class GateModel(BaseTuner):
    """PEFT tuner for `GateConfig`. Base state-dict keys do not change.

    The attention module keeps its parameters; only its class becomes the gated one, whose forward
    calls the child `g1`. The class that trains is thus the class that runs and exports.
    """

    # PEFT and transformers rename checkpoint keys by this: it must name the container exactly.
    prefix = "g1.g_proj"
    tuner_layer_cls = GateLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {
        model_type: ["self_attn"] for model_type in supported_model_types()
    }

    def _prepare_adapter_config(self, peft_config: GateConfig, model_config: dict) -> GateConfig:
        model_type = model_config["model_type"]
        family_of(model_type)
        if peft_config.base_model_type not in (None, model_type):
            raise UserError(
                f"these gates were trained on a {peft_config.base_model_type!r} base and cannot be "
                f"put on a {model_type!r} one"
            )
        peft_config.base_model_type = model_type
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        family = family_of(peft_config.base_model_type)
        if not isinstance(target, family.gated):
            slow = slow_pairs(self.model.get_decoder(), target.layer_idx)
            _insert_gate(target, family, current_key, slow)
        target.g1.update_layer(adapter_name, peft_config)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        """`unload` replaces tuner layers by their base; here the gate's parent gets its class
        back."""
        delattr(parent, child_name)
        parent.__class__ = family_of(parent.config.model_type).attention

    def _check_merge_allowed(self):
        raise ValueError(
            "gates cannot be merged into base weights; `retrofit merge` writes a gated checkpoint"
        )


def _insert_gate(attention: nn.Module, family, name: str, slow_pairs: int) -> None:
    if type(attention) is not family.attention:
        raise UserError(
            f"{name} is a {type(attention).__name__}, not the {family.attention.__name__} that "
            f"{family.model_type} gates are written for"
        )
    if "forward" in vars(attention):
        # A patched instance would go on bypassing the gate without any error.
        raise UserError(f"{name}.forward is patched by a hook; insert the gates before hooks")
    # A quantized weight is packed, so shapes come from the modules, not from their weights.
    head_dim = attention.head_dim
    device = attention.o_proj.weight.device
    attention.__class__ = family.gated
    attention.g1 = GateLayer(
        hidden_size=attention.q_proj.in_features,
        num_heads=attention.o_proj.in_features // head_dim,
        num_key_value_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        slow_pairs=slow_pairs,
        device=device,
    )


def gate_layers(model: nn.Module) -> dict[int, GateLayer]:
    """The gates of a model by layer index."""
    return {
        module.layer_idx: module.g1
        for module in model.modules()
        if isinstance(getattr(module, "g1", None), GateLayer)
    }


@contextmanager
def gates_off(model: nn.Module) -> Iterator[None]:
    """Run as the base: every adapter off, and nothing else touched.

    PEFT's `disable_adapter` also toggles `requires_grad`, which is wasted work at every step and
    trips torch.compile and FSDP2.
    """
    layers = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters
    ]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
