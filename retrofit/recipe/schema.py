"""Every key of a recipe, with its documentation, which `retrofit recipes keys` prints."""

import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from retrofit.gate_settings import Activation, Granularity, Position, Sinks, conflict, has_both
from retrofit.utils.paths import expanded
from retrofit.utils.strict_yaml import dump

RESOLVED = "recipe.resolved.yaml"  # the recipe's file in a run folder
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Quantization = Literal["nf4", "fp4", "int8"]

LayerIndex = Annotated[int, Field(ge=0)]

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})", re.ASCII)
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 40
_MAX_WEIGHT_RATIO = 10_000  # between two sources
_MAX_BATCH_TOKENS = 2**24  # no device holds as many, and planning for many more takes forever


def _writable(text: str) -> str:
    """Returns a text unchanged.

    Raises:
        ValueError: if the text is blank, or no file could contain it or have it as a name.
    """
    if not text.strip():
        raise ValueError("is empty")
    if "\0" in text or text != text.encode(errors="ignore").decode():  # or half a surrogate pair
        raise ValueError(f"{short_repr(text)} holds what is no character")
    return text


def _expanded(text: str) -> str:
    """Returns a path with its environment variables replaced by their values, as a shell does.

    A text that is the path of an existing file stays as it is.

    Raises:
        ValueError: if a variable is not set.
    """
    if os.path.lexists(text):
        return text
    expanded = os.path.expandvars(text)
    if unset := _VARIABLE.search(expanded):
        raise ValueError(f"the variable {unset[0]} is not set")
    return expanded


def short_repr(value: Any) -> str:
    """Returns the `repr` of a value, shortened to a line."""
    return _REPR.repr(value)


Text = Annotated[str, AfterValidator(_writable)]
Location = Annotated[Text, AfterValidator(_expanded)]  # a path or a hub id
Count = Annotated[int, Field(gt=0, lt=2**31)]
Weight = Annotated[float, Field(ge=0, le=1e6)]  # the weight of a loss


class Section(BaseModel):
    """A section of a recipe, in which every key is known and has the right type."""

    # Strict mode takes neither a boolean nor a text for a number.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Model(Section):
    base: Location
    """The base: a folder or a hub id."""
    revision: Text | None = None
    """A branch, tag or commit of a base on the hub."""
    dtype: Dtype = "auto"
    """The dtype of the base weights; `auto` is the one that they are stored in."""
    quantization: Quantization | None = None
    """The form to which bitsandbytes quantizes the base; a merge uses the original weights."""
    attn_implementation: Text | None = None
    """The attention implementation of transformers; by default `sdpa`, where the model has it."""
    trust_remote_code: bool = False
    """Whether to run the code that the base brings."""

    @property
    def location(self) -> str:
        """The base as libraries find it: they do not expand `~`."""
        return str(expanded(self.base)) if self.base.startswith("~") else self.base

    @property
    def takes_lengths(self) -> bool:
        """Whether packed rows lie end to end, because the kernel is told the documents' lengths."""
        return "flash" in (self.attn_implementation or "")


class Gate(Section):
    sinks: Sinks = "none"
    """Whether a sink logit joins the softmax of each head: a number, or one read from the input."""
    key_bias: bool = False
    """Whether a bias on slow RoPE pairs of the keys lets sinks follow the query."""
    key_bias_turns: Annotated[float, Field(gt=0)] | None = None
    """How many turns a RoPE pair may make in the base's context (`max_position_embeddings`, or its
    sliding window) and have a bias; by default an eighth."""
    granularity: Granularity = "headwise"
    """What a score of the projection `2 * sigmoid(X W)` scales, a head or a channel; `none` for
    sinks alone."""
    projection_layers: Literal["auto"] | Annotated[list[LayerIndex], Field(min_length=1)] | None = (
        None
    )
    """The layers that have the projection instead of sinks, the others having sinks alone; `auto`
    takes those that have to prevent the sink, if the sinks of one of them could not. `null` gives
    every layer both. Without both there is nothing to choose."""
    activation: Activation = "sigmoid"
    """The activation of the projection; all but `sigmoid` are ablations."""
    position: Position = "G1"
    """Where the projection scales; all but `G1`, which is before `o_proj`, are ablations."""
    input_dependent: bool = True
    """Whether the scores of the projection read the input; `false` is an ablation."""
    centered: bool = False
    """Whether a closed gate leaves the first token's value in the base, instead of zero."""
    layers: Annotated[list[LayerIndex], Field(min_length=1)] | None = None
    """The indices of the layers to gate; by default all layers are gated."""

    @property
    def chooses_projection_layers(self) -> bool:
        """Whether the base decides which layers have the projection."""
        return self.projection_layers == "auto" and has_both(self)

    @model_validator(mode="after")
    def _settings_go_together(self):
        if (problem := conflict(self)) is not None:
            raise ValueError(problem)
        if self.key_bias_turns is not None and not self.key_bias:
            raise ValueError("key_bias_turns has no effect without key_bias: set it to true")
        return self


class Source(Section):
    path: Location
    """A .jsonl, .json, .parquet or .txt file, or a hub id."""
    name: Text | None = None
    """The configuration of a dataset on the hub."""
    split: Text = "train"
    """The split of a dataset on the hub."""
    text_field: Text | None = None
    """The column that holds plain text; by default `messages`, `conversations`, `prompt` with
    `completion`, or `text`, the first of these that is there."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """The share of the training tokens, relative to the weights of the other sources."""


class Data(Section):
    sources: Annotated[list[Source], Field(min_length=1)]
    """What is trained on."""
    sequence_length: Annotated[int, Field(ge=16)] = 1024
    """The tokens of a row. A longer text is split; a longer chat or pair is, too, if rows are
    packed, and else is cut off."""
    packing: bool = True
    """Whether a row holds several documents, none of which sees another."""
    first_tokens: Annotated[int, Field(ge=0)] = 0
    """The number of tokens at the end of each row that become documents of one or two tokens."""
    streaming: bool = False
    """Whether the data is read while training, which needs `train.max_steps`."""
    assistant_only_loss: bool = False
    """Whether only the assistant's turns of chats are trained on."""

    @model_validator(mode="after")
    def _weights_all_or_none(self):
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("give every source a weight, or none")
        weights = [source.weight for source in self.sources if source.weight is not None]
        if weights and max(weights) > _MAX_WEIGHT_RATIO * min(weights):
            raise ValueError(
                f"one source has more than {_MAX_WEIGHT_RATIO:,} times the weight of another, and "
                "would be repeated as often; bring their weights nearer, or leave one out"
            )
        return self

    @model_validator(mode="after")
    def _first_tokens_leave_room(self):
        if self.first_tokens and not self.packing:
            raise ValueError("first_tokens takes the ends of packed rows: set data.packing to true")
        if self.first_tokens > self.sequence_length // 2:
            raise ValueError("first_tokens would take more than half of data.sequence_length")
        return self


class Objective(Section):
    lm: Weight = 1.0
    """The weight of the next-token cross-entropy."""
    kl: Weight = 0.0
    """The weight of KL(base || gated) of the next-token distribution."""
    pressure: Weight = 0.0
    """The weight of the probability that two random queries of a head attend to the same key."""
    pressure_release: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The last part of the steps, over which the weight of `pressure` falls to 0."""
    hidden: Weight = 0.0
    """The weight of the distance of each layer's input from that of the base."""
    hidden_release: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The last part of the steps, over which the weight of `hidden` falls to 0."""
    activation: Weight = 0.0
    """The weight of the penalty on tokens whose activations dwarf those of the others."""
    balance: Weight = 0.0
    """The weight of the penalty on unequal loads of the heads of one layer."""
    balance_load: Literal["effective", "vanilla", "gated"] = "effective"
    """A head's load: `(1 - A_sink) * g` for `effective`, `1 - A_sink` for `vanilla`, `g` for
    `gated`."""
    balance_shared_heads: Annotated[int, Field(ge=0)] = 0
    """How many of the busiest heads `balance` leaves out."""
    sampled_rows: Annotated[int, Field(ge=2, le=2**16)] = 64
    """The number of queries of a sequence that `pressure` and `balance` sample."""

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_keys(cls, settings: Any) -> Any:
        """Drops keys that older versions wrote into the recipes of run folders."""
        if not isinstance(settings, dict) or "cache_teacher" not in settings:
            return settings
        if settings["cache_teacher"] is not False:
            raise ValueError(
                "cache_teacher is gone: the base's predictions are no longer kept on disk; take it "
                "out"
            )
        return {key: value for key, value in settings.items() if key != "cache_teacher"}

    @model_validator(mode="after")
    def _something_must_move_the_gates(self):
        # At zero-init the gated model equals its base, so the KL and its gradient are exactly zero.
        # No attention follows the gate of the last layer, so the pressure does not reach it.
        if self.lm < 1e-6:
            raise ValueError(
                "without lm some zero-initialized gates get no gradient: kl gives none where the "
                "gated model equals its base, and pressure none to the last layer; set "
                "objective.lm to 1e-6 or more, if only a little"
            )
        return self

    def pressure_at(self, progress: float) -> float:
        """Returns the weight of `pressure` when `progress` (0 to 1) of the steps are done."""
        return self.pressure * _decay(progress, self.pressure_release)

    def hidden_at(self, progress: float) -> float:
        """Returns the weight of `hidden` when `progress` (0 to 1) of the steps are done."""
        return self.hidden * _decay(progress, self.hidden_release)

    @property
    def reads_attention(self) -> bool:
        return bool(self.pressure or self.balance)

    @property
    def reads_layers(self) -> bool:
        return bool(self.reads_attention or self.hidden or self.activation)


def _decay(progress: float, last_part: float) -> float:
    """Returns a factor that is 1, and falls linearly to 0 over the last part of the steps."""
    return min(1.0, (1 - progress) / last_part) if last_part else 1.0


class Train(Section):
    max_steps: Count | None = None
    """The number of steps, which takes precedence over `epochs`."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """How often the data is seen."""
    batch_size: Count = 1
    """The rows of one forward pass on each device."""
    gradient_accumulation_steps: Count = 1
    """The forward passes of one step on each device."""
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """The rate of all gates; `auto` finds one for the projections of each layer, and takes 0.02 for
    sink logits and key biases."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The weight decay of AdamW."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """The steps over which the rate rises; below 1, their share of all steps."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the rate falls after that."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The norm to which the gradient is clipped."""
    gradient_checkpointing: Literal["auto", "none", "selective", "full", "reentrant"] = "auto"
    """`auto` takes the first of `none`, `selective` (which keeps attention) and `full` that fits in
    memory."""
    torch_compile: bool = False
    """Whether each layer is compiled."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of the data's order and of all draws."""
    logging_steps: Count = 1
    """A line is logged after every so many steps."""
    save_steps: Count = 100
    """A checkpoint is written after every so many steps."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """Where the logged figures go."""


class Measure(Section):
    text: Location
    """A .txt or .jsonl file that is not trained on."""
    length: Annotated[int, Field(ge=192, lt=2**31)] = 512
    """The tokens of a window."""
    windows: Count = 16
    """How many windows at most."""


class Recipe(Section):
    output_dir: Location
    """The run folder, which must not exist."""
    model: Model
    """The base."""
    gate: Gate = Gate()
    """The gates that are put into it."""
    data: Data
    """What they are trained on."""
    objective: Objective = Objective()
    """The losses."""
    train: Train = Train()
    """How training goes."""
    measure: Measure | None = None
    """How the base and the gated model are compared when training ends; `null` for not at all."""

    @model_validator(mode="after")
    def _streams_have_no_length(self):
        if self.data.streaming and self.train.max_steps is None:
            raise ValueError("a stream has no end: set train.max_steps")
        return self

    @model_validator(mode="after")
    def _a_batch_has_bounds(self):
        tokens = self.data.sequence_length * self.train.batch_size
        if tokens > _MAX_BATCH_TOKENS:
            raise ValueError(
                f"data.sequence_length times train.batch_size are {tokens:.3g} tokens at once, "
                f"more than {_MAX_BATCH_TOKENS:,}; lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _attention_needs_far_keys(self):
        # These losses need keys that are 64 tokens back. On shorter rows they would do nothing.
        text_length = self.data.sequence_length - self.data.first_tokens
        if self.objective.reads_attention and text_length < 128:
            name = "pressure" if self.objective.pressure else "balance"
            raise ValueError(
                f"objective.{name} needs data.sequence_length of 128 or more, data.first_tokens "
                "taken off"
            )
        if self.objective.balance and self.gate.position != "G1":
            raise ValueError("objective.balance reads the gates of heads: gate.position must be G1")
        return self

    def with_absolute_paths(self) -> "Recipe":
        """Returns the recipe with absolute paths to its files, so that it works from any folder."""
        return self._with_paths(_absolute)

    def without_folders(self) -> "Recipe":
        """Returns the recipe with only the names of its files, for publication."""
        recipe = self._with_paths(_file_name)
        return recipe.model_copy(update={"output_dir": _file_name(self.output_dir)})

    def _with_paths(self, change: Callable[[str], str]) -> "Recipe":
        settings = self.model_dump()
        settings["model"]["base"] = change(self.model.base)
        for source in settings["data"]["sources"]:
            source["path"] = change(source["path"])
        if self.measure:
            settings["measure"]["text"] = change(self.measure.text)
        return Recipe.model_validate(settings)

    def to_yaml(self) -> str:
        return dump(self.model_dump(mode="json"))


def _absolute(path: str) -> str:
    """Returns the absolute path of a file or folder that exists; another text is a hub id."""
    return str(Path(path).absolute()) if os.path.lexists(path) else path


def _file_name(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path
