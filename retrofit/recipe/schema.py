"""Every key of a recipe, documented once, here; `retrofit recipes show NAME` prints examples."""

import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from retrofit.gate_settings import Activation, Granularity, Position, Sinks, conflict
from retrofit.utils.paths import expanded

RESOLVED = "recipe.resolved.yaml"  # in a run folder
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Quantization = Literal["nf4", "fp4", "int8"]

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})", re.ASCII)
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 40
_FARTHEST_SHARES = 10_000  # of one source to another
_MICRO_BATCH = 2**24  # tokens; no device holds as many, and to plan for many more takes forever


def _writable(text: str) -> str:
    """
    Raises:
        ValueError: for text that no file could hold or have for a name.
    """
    if not text.strip():
        raise ValueError("is empty")
    if "\0" in text or text != text.encode(errors="ignore").decode():  # or half a surrogate pair
        raise ValueError(f"{shown(text)} holds what is no character")
    return text


def _expanded(text: str) -> str:
    """A path with the values of its variables, as a shell would have it.

    Raises:
        ValueError: for a variable that is not set, unless a file has that name.
    """
    if os.path.lexists(text):
        return text
    expanded = os.path.expandvars(text)
    if unset := _VARIABLE.search(expanded):
        raise ValueError(f"the variable {unset[0]} is not set")
    return expanded


def shown(value: Any) -> str:
    """A value as Python writes it, but no longer than a line."""
    return _REPR.repr(value)


Text = Annotated[str, AfterValidator(_writable)]
Location = Annotated[Text, AfterValidator(_expanded)]  # a path, or a hub id
Count = Annotated[int, Field(gt=0, lt=2**31)]
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a loss


class Section(BaseModel):
    # Strict: a truth value is no number, and text neither.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    base: Location  # a folder, or a hub id
    revision: Text | None = None
    dtype: Dtype = "auto"  # auto: as stored
    quantization: Quantization | None = None  # bitsandbytes; the merge uses none
    attn_implementation: Text | None = None  # sdpa where the model has it
    trust_remote_code: bool = False

    @property
    def location(self) -> str:
        """The base as libraries find it, which know no `~`."""
        return str(expanded(self.base)) if self.base.startswith("~") else self.base

    @property
    def takes_lengths(self) -> bool:
        """Whether packed rows lie end to end, for a kernel that reads where documents end."""
        return "flash" in (self.attn_implementation or "")


class Gate(Section):
    sinks: Sinks = "none"  # a logit that joins each head's softmax
    key_bias: bool = False  # added to the keys on slow RoPE pairs, so that sinks follow the query
    granularity: Granularity = "headwise"  # scores from X
    activation: Activation = "sigmoid"  # rest: ablations
    position: Position = "G1"  # before o_proj; the rest are ablations
    input_dependent: bool = True  # False, an ablation: constants instead of scores by token
    centered: bool = False  # a closed gate leaves the sink's value, read off the base, not nothing
    # Which layers to gate; all of them by default.
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _settings_go_together(self):
        if (problem := conflict(self)) is not None:
            raise ValueError(problem)
        return self


class Source(Section):
    path: Location  # a .jsonl, .json, .parquet or .txt file, or a hub id
    name: Text | None = None  # the hub dataset's configuration
    split: Text = "train"
    text_field: Text = "text"  # for plain text: the column that holds it
    weight: Annotated[float, Field(gt=0)] | None = None  # its share of the training tokens


class Data(Section):
    sources: Annotated[list[Source], Field(min_length=1)]
    sequence_length: Annotated[int, Field(ge=16)] = 1024
    packing: bool = True  # several documents a row, none of which sees another
    first_tokens: Annotated[int, Field(ge=0)] = 0  # so many a row stand alone, as a text's first
    streaming: bool = False  # read while training; needs train.max_steps
    assistant_only_loss: bool = False  # chat data: train on the assistant's turns alone

    @model_validator(mode="after")
    def _weights_all_or_none(self):
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("give every source a weight, or none")
        weights = [source.weight for source in self.sources if source.weight is not None]
        if weights and max(weights) > _FARTHEST_SHARES * min(weights):
            raise ValueError(
                f"one source has more than {_FARTHEST_SHARES:,} times the weight of another, and "
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
    lm: Weight = 1.0  # next-token cross-entropy
    kl: Weight = 0.0  # KL(base || gated) of the next-token distribution
    pressure: Weight = 0.0  # two random queries should not share a key
    pressure_release: Annotated[float, Field(ge=0, le=1)] = 0.0  # let go over this last part
    hidden: Weight = 0.0  # distance to the base of what each layer reads
    hidden_release: Annotated[float, Field(ge=0, le=1)] = 0.0  # let go over this last part
    activation: Weight = 0.0  # no token's activations dwarf the others'
    balance: Weight = 0.0  # heads of one layer should carry equal loads
    balance_load: Literal["effective", "vanilla", "gated"] = "effective"  # (1 - A_sink) * g, or one
    balance_shared_heads: Annotated[int, Field(ge=0)] = 0  # but this many of the busiest
    # Queries of a sequence that these two look at.
    sampled_rows: Annotated[int, Field(ge=2, le=2**16)] = 64

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_keys(cls, settings: Any) -> Any:
        """Run folders of before hold a recipe with every key of its time."""
        if not isinstance(settings, dict) or "cache_teacher" not in settings:
            return settings
        if settings["cache_teacher"] is not False:
            raise ValueError(
                "cache_teacher is gone: what the base says is no longer kept on disk; take it out"
            )
        return {key: value for key, value in settings.items() if key != "cache_teacher"}

    @model_validator(mode="after")
    def _something_must_move_the_gates(self):
        # At zero-init the gated model is its base, so the KL and its gradient are exactly zero;
        # and no attention comes after the last layer's gate, so no pressure reaches it.
        if self.lm < 1e-6:
            raise ValueError(
                "without lm some zero-initialized gates get no gradient: kl gives none where the "
                "gated model equals its base, and pressure none to the last layer; set "
                "objective.lm to 1e-6 or more, if only a little"
            )
        return self

    def pressure_at(self, progress: float) -> float:
        """The weight of the pressure when `progress` (0 to 1) of the steps are done."""
        return self.pressure * _decay(progress, self.pressure_release)

    def hidden_at(self, progress: float) -> float:
        """The weight of `hidden` when `progress` (0 to 1) of the steps are done."""
        return self.hidden * _decay(progress, self.hidden_release)

    @property
    def reads_attention(self) -> bool:
        return bool(self.pressure or self.balance)

    @property
    def reads_layers(self) -> bool:
        return bool(self.reads_attention or self.hidden or self.activation)


def _decay(progress: float, last_part: float) -> float:
    """A factor that is 1, and falls in a straight line to 0 over the last part of the steps."""
    return min(1.0, (1 - progress) / last_part) if last_part else 1.0


class Train(Section):
    max_steps: Count | None = None  # else `epochs` over the data
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    batch_size: Count = 1  # rows of sequence_length a step and device
    gradient_accumulation_steps: Count = 1
    # Of the gates; nothing else trains. auto: one for each layer, see training/calibration.py.
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05  # below 1: a share of all steps
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    # auto: the first of none, selective (attention is kept) and full that fits, see memory/.
    gradient_checkpointing: Literal["auto", "none", "selective", "full", "reentrant"] = "auto"
    torch_compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # numpy takes no other
    logging_steps: Count = 1
    save_steps: Count = 100
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]


class Measure(Section):
    text: Location  # .txt or .jsonl that no source contains
    length: Annotated[int, Field(ge=192, lt=2**31)] = 512
    windows: Count = 16


class Recipe(Section):
    output_dir: Location  # the run folder; must not exist
    model: Model
    gate: Gate = Gate()
    data: Data
    objective: Objective = Objective()
    train: Train = Train()
    measure: Measure | None = None  # compare base and gated model when training ends

    @model_validator(mode="after")
    def _streams_have_no_length(self):
        if self.data.streaming and self.train.max_steps is None:
            raise ValueError("a stream has no end: set train.max_steps")
        return self

    @model_validator(mode="after")
    def _a_batch_has_bounds(self):
        tokens = self.data.sequence_length * self.train.batch_size
        if tokens > _MICRO_BATCH:
            raise ValueError(
                f"data.sequence_length times train.batch_size are {tokens:.3g} tokens at once, "
                f"more than {_MICRO_BATCH:,}; lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _attention_needs_far_keys(self):
        # Attention to the last 64 tokens is honest: shorter rows would silently press on nothing.
        text = self.data.sequence_length - self.data.first_tokens
        if self.objective.reads_attention and text < 128:
            name = "pressure" if self.objective.pressure else "balance"
            raise ValueError(
                f"objective.{name} needs data.sequence_length of 128 or more, data.first_tokens "
                "taken off"
            )
        if self.objective.balance and self.gate.position != "G1":
            raise ValueError("objective.balance reads the gates of heads: gate.position must be G1")
        return self

    def anchored(self) -> "Recipe":
        """The same, with the files that it names by relative paths named by absolute ones, so that
        it means the same from any folder."""
        return self._with_paths(_anchored)

    def published(self) -> "Recipe":
        """The same, without the folders in which its files lie, which are nobody's business."""
        named = self._with_paths(_name)
        return named.model_copy(update={"output_dir": _name(self.output_dir)})

    def _with_paths(self, change: Callable[[str], str]) -> "Recipe":
        settings = self.model_dump()
        settings["model"]["base"] = change(self.model.base)
        for source in settings["data"]["sources"]:
            source["path"] = change(source["path"])
        if self.measure:
            settings["measure"]["text"] = change(self.measure.text)
        return Recipe.model_validate(settings)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _anchored(path: str) -> str:
    """Absolute where there is such a file or folder; else it is a hub id."""
    return str(Path(path).absolute()) if os.path.lexists(path) else path


def _name(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path
