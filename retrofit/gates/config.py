"""Configuration of the gates, as PEFT stores it in `adapter_config.json`."""

from dataclasses import dataclass
from typing import Any, get_args

from peft.config import PeftConfig

from retrofit.gate_settings import Activation, Granularity, Position, Sinks, conflict
from retrofit.gates._peft_type import G1_GATE

_CHOICES: dict[str, Any] = {
    "granularity": Granularity,
    "activation": Activation,
    "position": Position,
    "sinks": Sinks,
}


@dataclass
class GateConfig(PeftConfig):
    """Gates in the attention modules. Every choice starts as the identity.

    There are two kinds, and an adapter may have both, as factors. A *projection* scales a head by a
    score read from the layer's input, `2 * sigmoid(X W)` (arXiv:2505.06708, section 2.2 and eq. 5).
    A *sink logit* joins a head's softmax without being a key, which scales the head by
    `sigmoid(LSE - s)`, how much it found (arXiv:2602.01203, section 3).

    Args:
        sinks: `none`, or what the sink logit `s` of a head is: `constant`, one number, as in
            gpt-oss; `input`, read from the layer's input as well.
        key_bias: add a constant to the keys of each key-value head, on the pairs of RoPE's channels
            that turn less than once in the context. It lets a constant sink logit follow the query,
            as that of the first token does. Needs `sinks`.
        granularity: of the projection, or `none` for no projection. `headwise` gives each head one
            score a token (`hidden_size * num_heads` weights a layer); `elementwise` one score for
            every channel of every head (`hidden_size * num_heads * (head_dim + 1)` weights);
            `shared` one for every channel, the same in all heads.
        activation: `sigmoid` scales by 0 to 2; `ns_sigmoid` ("non-sparse") by 2/3 to 4/3; `silu`
            and `linear` without bound.
        position: `G1` after attention, before `o_proj`; `G2` on the values, `G3` on the keys and
            `G4` on the queries, before RoPE; `G5` after `o_proj`.
        input_dependent: `False` makes the scores constants, the same for every token.
        centered: `v + g * (Y - v)` instead of `g * Y`, with `v` the value of the base's first
            token, a constant of each key-value head. That is also the value of a sink logit's slot.
            It is 0 until `retrofit.training.calibration` has read it off the base, which `retrofit
            train` does. Only at G1.
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
        ValueError: for an unknown granularity, activation, position or kind of sink logit; for
            gates of no kind; for a center or a sink logit beside gates elsewhere than at G1; for a
            key bias without a sink logit; for layers that would not be read as they are given.
    """

    granularity: Granularity = "headwise"
    activation: Activation = "sigmoid"
    position: Position = "G1"
    input_dependent: bool = True
    centered: bool = False
    sinks: Sinks = "none"
    key_bias: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    base_model_type: str | None = None
    # Whether `base_model_type` was found when gates were inserted, and neither given nor read.
    family_is_found = False

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = G1_GATE
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        if (problem := conflict(self)) is not None:
            raise ValueError(problem)
        self._check_layers()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def _check_layers(self) -> None:
        if self.layers_to_transform == []:
            raise ValueError("layers_to_transform names no layer; None gates all of them")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give both")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform is not read where target_modules is a pattern, which has to "
                "say itself which layers it means"
            )

    @property
    def is_mergeable(self) -> bool:
        """Whether a checkpoint can carry these gates: sink logits, and sigmoid gates of the input,
        at G1."""
        if self.granularity == "none":
            return True
        return self.activation == "sigmoid" and self.position == "G1" and self.input_dependent
