"""The tuner, which gives each attention module its family's gated class and adds a gate to it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from types import MethodType
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from retrofit.adapters import family_of, supported_model_types
from retrofit.gates.ablations import ablated_attention
from retrofit.gates.config import GateConfig
from retrofit.gates.layer import GateLayer
from retrofit.gates.rope import turns_in_context
from retrofit.stored_names import by_current_name
from retrofit.utils.errors import UserError


class GateModel(BaseTuner):
    """PEFT's tuner for `GateConfig`, which leaves the keys of the base's state dict as they are.

    An attention module keeps its parameters. Only its class changes, to the gated one, whose
    forward calls the child `attn_gate`. So the class that is trained is also the class that runs
    and is exported.
    """

    # PEFT and transformers rename checkpoint keys by this prefix, so it must be the exact name of
    # the module that holds the adapters.
    prefix = "attn_gate.g_proj"
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
        if peft_config.base_model_type is None:
            peft_config.base_model_type = model_type
            peft_config.family_is_found = True
        return super()._prepare_adapter_config(peft_config, model_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Insert the gates of an adapter. They keep the caller's config object, as PEFT promises,
        unless it already belongs to gates of another family: then they get a copy."""
        config = self.peft_config[adapter_name]
        model_type = self.get_model_config(model)["model_type"]
        if config.family_is_found and config.base_model_type != model_type:
            self.peft_config[adapter_name] = config = copy(config)
            config.base_model_type = None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _check_gated(model, adapter_name, config.projection_layers or ())

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Without PEFT's autocast, cast gates, which are created in float32, to the dtype of their
        base, which the weights of every other method have too."""
        if not autocast_adapter_dtype:
            gated = [module for module in self.model.modules() if _has_gate(module)]
            for attention in gated:
                dtype = attention.o_proj.weight.dtype
                if adapter_name in attention.attn_gate.g_proj and dtype.is_floating_point:
                    attention.attn_gate.g_proj[adapter_name].to(dtype)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        family = family_of(peft_config.base_model_type)
        if not isinstance(target, family.gated):
            turns = turns_in_context(self.model.get_decoder(), target.layer_idx)
            _insert_gate(target, family, current_key, turns)
        # The model may have moved to another device since its first gates were inserted.
        target.attn_gate.device = _device_of(target.o_proj)
        if peft_config.position != "G1":
            _set_class(target, ablated_attention(family.model_type))
        target.attn_gate.update_layer(adapter_name, peft_config.of_layer(target.layer_idx))

    def choose_projection_layers(self, adapter_name: str, layers: list[int]) -> None:
        """Give these layers of an adapter the projection instead of sink logits, and the others
        sink logits alone. The gates are made anew, as untrained ones.

        Args:
            adapter_name: name of an adapter whose config has both kinds of gates.
            layers: indices of gated layers. Without any, the adapter has only sink logits.

        Raises:
            UserError: if one of these layers has no gate of the adapter, or the config lacks one of
                the kinds.
        """
        _check_gated(self.model, adapter_name, layers)
        config = copy(self.peft_config[adapter_name])  # the caller's may serve another model
        if config.sinks == "none" or config.granularity == "none":
            raise UserError(
                "a choice of projection layers takes a config with both kinds of gates: set sinks, "
                "and a granularity other than none"
            )
        self.peft_config[adapter_name] = config
        config.projection_layers = layers or None
        if not layers:
            config.granularity = "none"
        for index, layer in gate_layers(self.model).items():
            if adapter_name in layer.g_proj:
                # The gates may have moved to another device since they were inserted.
                layer.device = next(layer.g_proj[adapter_name].parameters()).device
                layer.update_layer(adapter_name, config.of_layer(index))

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Overrides PEFT's method, so that adapters with former names load too."""
        return super()._remap_adapter_state_dict_for_load(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=by_current_name(state_dict),
        )

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        """Overrides the method by which PEFT's `unload` replaces a tuner layer by its base layer. A
        gate is deleted instead, and its parent gets its original class back. PEFT's wrappers for
        `modules_to_save` are replaced as in every method."""
        if not isinstance(child, GateLayer):
            return super()._replace_module(parent, child_name, new_module, child)
        delattr(parent, child_name)
        _set_class(parent, family_of(parent.config.model_type).attention)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **kwargs) -> Iterator[None]:
        """Overrides the method by which a PEFT method runs another adapter for each row of a batch.

        Raises:
            ValueError: if that is asked for.
        """
        if adapter_names is not None:
            raise ValueError(
                "all rows of a batch run with the same gates; call the model once for each adapter "
                "in `adapter_names`, after `set_adapter` or within `disable_adapter`"
            )
        yield

    def _check_merge_allowed(self):
        raise ValueError(
            "gates cannot be merged into base weights; `retrofit merge` writes a gated checkpoint"
        )


def _insert_gate(attention: nn.Module, family, name: str, turns: torch.Tensor) -> None:
    """Make an attention module of a family a gated one.

    Raises:
        UserError: if its class is not the family's, or if its forward is patched.
    """
    if type(attention) is not family.attention:
        raise UserError(
            f"{name} is a {type(attention).__name__}, not the {family.attention.__name__} that "
            f"{family.model_type} gates are written for"
        )
    if _is_patched(attention, family):
        # A patched forward would bypass the gate, without any error.
        raise UserError(f"{name}.forward is patched; insert the gates before that")
    # A quantized weight is packed, so the sizes are read from the modules, not from their weights.
    head_dim = attention.head_dim
    device = _device_of(attention.o_proj)
    _set_class(attention, family.gated)
    attention.attn_gate = GateLayer(
        hidden_size=attention.q_proj.in_features,
        num_heads=attention.o_proj.in_features // head_dim,
        num_key_value_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        turns=turns,
        device=device,
    )


def _is_patched(attention: nn.Module, family) -> bool:
    """Whether an attention module has a forward other than its class's.

    A hook of accelerate does not count. It replaces the forward and keeps the original one as
    `_old_forward`; when the hook is removed, the original one stays behind as an attribute.
    """
    attributes = vars(attention)
    forward = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    return (
        forward is not None and getattr(forward, "__func__", None) is not family.attention.forward
    )


def _set_class(attention: nn.Module, new_class: type[nn.Module]) -> None:
    """Change the class of an attention module.

    A hook of accelerate keeps the forward that it found as an attribute of the module, so that
    attribute becomes the new class's forward.
    """
    former_forward = type(attention).forward
    attention.__class__ = new_class
    for name in ("forward", "_old_forward"):
        if getattr(vars(attention).get(name), "__func__", None) is former_forward:
            setattr(attention, name, MethodType(new_class.forward, attention))


def _device_of(projection: nn.Module) -> torch.device:
    """The device on which a module computes. If accelerate offloads its weight, that is not the
    weight's device."""
    device = projection.weight.device
    if device.type == "meta" and hasattr(projection, "_hf_hook"):
        return torch.device(getattr(projection._hf_hook, "execution_device", None) or device)
    return device


def gate_layers(model: nn.Module) -> dict[int, GateLayer]:
    """The gates of a model, by layer index."""
    return {module.layer_idx: module.attn_gate for module in model.modules() if _has_gate(module)}


def _check_gated(model: nn.Module, adapter_name: str, layers: Iterable[int]) -> None:
    """Check that an adapter has a gate in each of these layers, which get a projection.

    Raises:
        UserError: if it has none in one of them.
    """
    gated = [i for i, layer in gate_layers(model).items() if adapter_name in layer.g_proj]
    if missing := set(layers).difference(gated):
        raise UserError(f"projection_layers names layer {min(missing)}, which is not gated")


def _has_gate(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn_gate", None), GateLayer)


@contextmanager
def gates_off(model: nn.Module) -> Iterator[None]:
    """Turn every adapter off in this context, so that the model runs as its base.

    PEFT's `disable_adapter` also toggles `requires_grad`, which is wasted work at every step and
    breaks torch.compile and FSDP2.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not module.disable_adapters
    ]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
