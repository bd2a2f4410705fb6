"""Chat data: in TRL's words, and through the chat template of a tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml
from trl.chat_template_utils import has_generation_markers

from retrofit.data.rows import Problem
from retrofit.utils.errors import UserError, one_line


def in_chatml(rows: Dataset | IterableDataset, first: dict) -> Dataset | IterableDataset:
    """Chats whose messages have a role and a content, not a `from` and a `value`.

    Args:
        rows: of chat data.
        first: its first row, as it was read.
    """
    chats = [first[name] for name in ("messages", "conversations", "prompt") if name in first]
    messages: list[Any] = next(filter(None, chats), [{}])
    is_sharegpt = isinstance(messages[0], dict) and "from" in messages[0]
    return rows.map(maybe_convert_to_chatml) if is_sharegpt else rows


def chat_template(tokenizer: PreTrainedTokenizerBase, assistant_only: bool) -> str:
    """The template that TRL lets chats go through.

    Raises:
        UserError: if the tokenizer has none, or none that marks the assistant's turns.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "data: chats need a chat template, and the base's tokenizer has none; take a base that "
            "was tuned on chats, put a chat_template.jinja beside it, or train on text"
        ) from None
    if not assistant_only or has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        raise UserError(
            "data.assistant_only_loss: the chat template of the base's tokenizer does not mark the "
            "assistant's turns; put {% generation %} and {% endgeneration %} around them, or set "
            "it to false"
        ) from None


@contextmanager
def assistant_found(path: str) -> Iterator[None]:
    """
    Raises:
        UserError: for a row in which TRL finds nothing of the assistant, which it cannot name.
    """
    try:
        yield
    except RuntimeError as error:
        if "assistant_only_loss" not in str(error):
            raise
        raise UserError(
            f"data.assistant_only_loss: the chat template marks nothing in a row of {path}, whose "
            "assistant may have said nothing; take it out, or set assistant_only_loss to false"
        ) from None


def template_problem(tokenizer: PreTrainedTokenizerBase, template: str) -> Problem:
    """Says why a chat template makes no text of a row, if it does not."""

    def problem(row: Any) -> str | None:
        try:
            text = _render(tokenizer, row, template)
        # What a template does to a row that it was not written for can be anything of these.
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = one_line(error) or type(error).__name__
            return f"the chat template of the base's tokenizer fails: {reason}"
        return None if text.strip() else "the chat template of the base's tokenizer makes it empty"

    return problem


def _render(tokenizer: PreTrainedTokenizerBase, row: Any, template: str) -> str:
    """As TRL does it."""
    tools = row.get("tools")
    text = tokenizer.apply_chat_template(
        row["messages"] if "messages" in row else row["prompt"] + row["completion"],
        tokenize=False,
        chat_template=template,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **row.get("chat_template_kwargs", {}),
    )
    return str(text)
