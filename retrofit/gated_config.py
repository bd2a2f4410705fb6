"""Configs of gated checkpoints: a family's own fields, the granularity, and which layers are gated.

Known to `AutoConfig` after `import retrofit`. The model class follows when the first such config is
made, because transformers' modeling files cannot be imported while its auto classes are.
"""

from dataclasses import dataclass
from importlib import import_module

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


@dataclass(kw_only=True)
class GateFields:
    """Mixin before a family's config."""

    gate_granularity: str = "headwise"
    gate_centered: bool = False
    gated_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # type: ignore[misc]
        import_module("retrofit.gated_models").register(type(self))


def register(base: type[PreTrainedConfig]) -> None:
    """Make the gated twin of a family's config known to `AutoConfig`."""
    model_type = f"gated_{base.model_type}"
    names = {"model_type": model_type, "__module__": __name__}
    AutoConfig.register(model_type, type(f"Gated{base.__name__}", (GateFields, base), names))
