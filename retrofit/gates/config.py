"""The configuration of gates, which PEFT stores in `adapter_config.json`."""

from copy import copy
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
KEY_BIAS_TURNS = 1 / 8
_FORMER_TURNS = 1.0  # of adapters that were saved before there was `key_bias_turns`


@dataclass
class GateConfig(PeftConfig):
    """The PEFT config of gates in the attention modules. Gates of every kind start as the identity.

    There are two kinds of gates, and an adapter may have both, which then multiply. A *projection*
    scales a head by a score read from the layer's input, `2 * sigmoid(X W)` (arXiv:2505.06708,
    section 2.2 and eq. 5). A *sink logit* `s` joins a head's softmax without being a key, which
    scales the head by `sigmoid(LSE - s)`: by how much the head found (arXiv:2602.01203, section 3).

    Args:
        sinks: the kind of sink logits. `constant` gives each head one number, as in gpt-oss;
            `input` adds a score read from the layer's input; `none` gives no sink logits.
        key_bias: add a constant to the keys of each key-value head, on the pairs of RoPE's channels
            that hardly turn in the context. It lets a constant sink logit follow the query, as the
            logit of the first token does. It needs `sinks`.
        key_bias_turns: how often a pair may turn in the context and still have a bias, less than
            this. In a pair that turns further, the bias moves the logits of far keys otherwise than
            those of near ones. `None` means an eighth of a turn; or one turn, in an adapter that
            was saved before there was this setting.
        granularity: the granularity of the projection. `headwise` gives each head one score per
            token (`hidden_size * num_heads` weights per layer); `elementwise` gives every channel
            of every head a score (`hidden_size * num_heads * (head_dim + 1)` weights); `shared`
            gives every channel a score that is the same in all heads; `none` gives no projection.
        activation: the function from logits to scores. `sigmoid` scales by 0 to 2, `ns_sigmoid`
            ("non-sparse") by 2/3 to 4/3, `silu` and `linear` without bound.
        position: where the projection scales. `G1` is after attention, before `o_proj`; `G2` is on
            the values, `G3` on the keys and `G4` on the queries, before RoPE; `G5` is after
            `o_proj`.
        projection_layers: indices of the layers that have the projection instead of sink logits;
            the others then have sink logits alone. `None` gives every layer both. It needs `sinks`
            and a `granularity`.
        input_dependent: whether the scores read the layer's input. `False` makes them constants,
            which are the same for every token.
        centered: compute `v + g * (Y - v)` instead of `g * Y`, with `v` the value of the base's
            first token, a constant of each key-value head. `v` is also the value of a sink logit's
            slot. It is 0 until `retrofit.training.calibration` has read it off the base, which
            `retrofit train` does. It is possible only at G1.
        layers_to_transform: indices of the layers to gate; `None` gates all of them.
        layers_pattern: name of the `ModuleList` that holds the layers, if that is not the first
            numbered one.
        target_modules: the attention modules; `None` means `self_attn`.
        exclude_modules: names of attention modules to leave alone, or a regex.
        init_weights: `True` starts at zero, where the gated model equals its base bit for bit.
            `False` draws small random weights, for tests.
        modules_to_save: further modules to train and save whole, as in every PEFT method.
        base_model_type: `model_type` of the base. It is set when gates are inserted, and an adapter
            is refused on a base of another family.

    Raises:
        ValueError: if a granularity, activation, position or kind of sink logits is unknown, or
            `key_bias_turns` not above 0; if there are neither a projection nor sink logits; if a
            center or sink logits are combined with a position other than G1; if there is a key bias
            without sink logits; if `projection_layers` is given without both kinds of gates; or if
            the arguments that choose layers would not be read as they are given.
    """

    granularity: Granularity = "headwise"
    activation: Activation = "sigmoid"
    position: Position = "G1"
    input_dependent: bool = True
    centered: bool = False
    sinks: Sinks = "none"
    key_bias: bool = False
    key_bias_turns: float | None = None
    projection_layers: list[int] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    base_model_type: str | None = None
    # Whether the insertion of gates set `base_model_type`, which was neither given nor loaded.
    family_is_found = False

    def __post_init__(self):
        if self.key_bias_turns is None:
            is_saved = self.peft_version is not None
            self.key_bias_turns = _FORMER_TURNS if is_saved else KEY_BIAS_TURNS
        super().__post_init__()
        self.peft_type = G1_GATE
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal):
                choices = ", ".join(get_args(literal))
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        if not isinstance(self.key_bias_turns, int | float) or not self.key_bias_turns > 0:
            raise ValueError(f"key_bias_turns must be above 0, not {self.key_bias_turns!r}")
        if (problem := conflict(self)) is not None:
            raise ValueError(problem)
        self._check_layers()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def _check_layers(self) -> None:
        """Refuse arguments that choose layers and that PEFT would ignore."""
        if self.layers_to_transform == []:
            raise ValueError("layers_to_transform names no layer; None gates all of them")
        if self.projection_layers == []:
            raise ValueError(
                "projection_layers names no layer; for sinks alone, set granularity none"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give both")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform is not read where target_modules is a pattern, which has to "
                "say itself which layers it means"
            )

    def of_layer(self, index: int) -> "GateConfig":
        """The config of the gate of one layer, after `projection_layers` is applied."""
        if self.projection_layers is None:
            return self
        config = copy(self)
        config.projection_layers = None
        if index in self.projection_layers:
            config.sinks, config.key_bias = "none", False
        else:
            config.granularity = "none"
        return config

    @property
    def is_mergeable(self) -> bool:
        """Whether a merged checkpoint can carry these gates. It can carry sink logits, and sigmoid
        gates at G1 that read the input."""
        if self.granularity == "none":
            return True
        return self.activation == "sigmoid" and self.position == "G1" and self.input_dependent
