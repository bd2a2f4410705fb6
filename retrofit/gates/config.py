"""Configuration of the gates, as PEFT stores it in `adapter_config.json`."""

from dataclasses import dataclass
from typing import Literal, get_args

from peft.config import PeftConfig

from retrofit.gates._peft_type import G1_GATE

Granularity = Literal["headwise", "elementwise"]


@dataclass
class GateConfig(PeftConfig):
    """Gates on each attention head's output, before `o_proj` (G1 of arXiv:2505.06708, eq. 5).

    Args:
        granularity: `headwise` gives each head one score a token (`hidden_size * num_heads`
            weights a layer); `elementwise` one score for every channel of every head
            (`hidden_size * num_heads * head_dim` weights a layer).
        layers_to_transform: indices of the layers to gate; `None` gates all of them.
        layers_pattern: name of the `ModuleList` that holds the layers, where it is not the first
            numbered one.
        target_modules: the attention modules, `self_attn` where `None`.
        exclude_modules: names, or a regex, of attention modules to leave alone.
        init_weights: `True` starts at zero, where the gated model equals its base bit for bit.
            `False` draws small random weights, for tests.
        modules_to_save: further modules to train and save whole, as in every PEFT method.
        base_model_type: `model_type` of the base, written when gates are inserted; an adapter is
            refused on another family.

    Raises:
        ValueError: for an unknown granularity.
    """

    granularity: Granularity = "headwise"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    base_model_type: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = G1_GATE
        if self.granularity not in get_args(Granularity):
            choices = " or ".join(get_args(Granularity))
            raise ValueError(f"granularity must be {choices}, not {self.granularity!r}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
