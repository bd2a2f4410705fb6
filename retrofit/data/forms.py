"""What TRL reads of a row, under its names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Features, Json, List, Value

_BESIDE = ("tools", "chat_template_kwargs")  # what a chat template is given besides


@dataclass(frozen=True)
class Form:
    """Text, or prompts and completions of text, under TRL's names.

    Args:
        names: TRL's name for each column.
    """

    names: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a row, if it is there."""
        return tuple(self.names)

    @property
    def features(self) -> Features:
        return Features(dict.fromkeys(self.names.values(), Value("large_string")))

    def __call__(self, row: Mapping) -> dict:
        return {name: row[column] for column, name in self.names.items()}


@dataclass(frozen=True)
class ChatForm(Form):
    """Chats under TRL's names, each message with a role and a content, however it was spelled.

    Args:
        names: TRL's name for each column that holds chats.
        stored: whether values are text of JSON, in which a `Dataset` keeps them as they are. Arrow
            would give every message the keys of all, and ujson round their numbers.
    """

    stored: bool

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.names, *_BESIDE)

    @property
    def features(self) -> Features:
        chats = dict.fromkeys(self.names.values(), List(Json()))
        return Features(chats | dict.fromkeys(_BESIDE, Json()))

    def __call__(self, row: Mapping) -> dict:
        chats = {
            name: [self._kept(_in_chatml(message)) for message in row[column]]
            for column, name in self.names.items()
        }
        tools, settings = row.get("tools"), row.get("chat_template_kwargs")
        return chats | {
            "tools": self._kept(json.loads(tools) if isinstance(tools, str) else tools),
            "chat_template_kwargs": self._kept({} if settings is None else settings),
        }

    def _kept(self, value: Any) -> Any:
        text = json.dumps(value, default=str)  # dates, say, beside the words in a parquet file
        return text if self.stored else json.loads(text)


def _in_chatml(message: Mapping) -> dict:
    if message.get("role") is not None:
        return dict(message)
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return others | {"role": message["from"], "content": message.get("value")}
