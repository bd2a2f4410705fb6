"""Converts rows to the columns and names that TRL reads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Features, Json, List, Value

_TEMPLATE_INPUTS = ("tools", "chat_template_kwargs")  # what a template gets beside messages


@dataclass(frozen=True)
class Form:
    """Converts rows of text, or of prompts and completions as text.

    Attributes:
        names: TRL's name for each column that is read.
    """

    names: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read where a row has them."""
        return tuple(self.names)

    @property
    def features(self) -> Features:
        """The types of the converted columns in a `Dataset`."""
        return Features(dict.fromkeys(self.names.values(), Value("large_string")))

    def __call__(self, row: Mapping) -> dict:
        """Returns a row with TRL's columns."""
        return {name: row[column] for column, name in self.names.items()}


@dataclass(frozen=True)
class ChatForm(Form):
    """Converts rows of chats, in which each message gets a role and a content.

    Attributes:
        names: TRL's name for each column that holds chats.
        stored: whether values become JSON text, which a `Dataset` keeps unchanged. Otherwise Arrow
            would give every message the keys of all messages, and ujson would round numbers.
    """

    stored: bool

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.names, *_TEMPLATE_INPUTS)

    @property
    def features(self) -> Features:
        chats = dict.fromkeys(self.names.values(), List(Json()))
        return Features(chats | dict.fromkeys(_TEMPLATE_INPUTS, Json()))

    def __call__(self, row: Mapping) -> dict:
        chats = {
            name: [self._storable(_to_chatml(message)) for message in row[column]]
            for column, name in self.names.items()
        }
        tools, settings = row.get("tools"), row.get("chat_template_kwargs")
        return chats | {
            "tools": self._storable(json.loads(tools) if isinstance(tools, str) else tools),
            "chat_template_kwargs": self._storable({} if settings is None else settings),
        }

    def _storable(self, value: Any) -> Any:
        # A parquet file may hold values that JSON does not have, such as dates; they become text.
        text = json.dumps(value, default=str)
        return text if self.stored else json.loads(text)


def _to_chatml(message: Mapping) -> dict:
    """Returns a message with `role` and `content`, which may be spelled `from` and `value`."""
    if message.get("role") is not None:
        return dict(message)
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return others | {"role": message["from"], "content": message.get("value")}
