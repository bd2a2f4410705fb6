"""Checks chat data: what its rows hold, and whether the tokenizer's chat template renders them."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from datasets import Json
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from retrofit.data.forms import ChatForm
from retrofit.data.rows import Problem, describe_type
from retrofit.utils.errors import UserError, one_line

# A template may raise any of these on a row that it was not written for.
_TEMPLATE_ERRORS = (
    TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
# Arguments of `apply_chat_template` that a row must not set: they are the same for all rows.
_RESERVED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents"
}


def template_input_problem(row: Any) -> str | None:
    """Says what is wrong with the `tools` or the `chat_template_kwargs` of a row."""
    settings = row.get("chat_template_kwargs")
    if not isinstance(settings, Mapping | None):
        return f"chat_template_kwargs is {describe_type(settings)}, not an object"
    if reserved := sorted(_RESERVED & set(settings or ())):
        return f"chat_template_kwargs sets {reserved[0]}, which is not for a row to set"
    return _problem_of_tools(row.get("tools"))


def _problem_of_tools(tools: Any) -> str | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return "tools is text that is not JSON"
    if tools is None:
        return None
    if not isinstance(tools, list):
        return f"tools is {describe_type(tools)}, not a list of objects"
    wrong = next((tool for tool in tools if not isinstance(tool, Mapping)), tools)
    return None if wrong is tools else f"tools holds {describe_type(wrong)}, not an object"


def json_problem(form: ChatForm) -> Problem:
    """Makes a check that a row, whose text is usable, can be stored as JSON and read back."""

    def problem(row: Any) -> str | None:
        try:
            for stored in replace(form, stored=True)(row).values():
                for text in stored if isinstance(stored, list) else [stored]:
                    Json().decode_example(text)
        except (ValueError, RecursionError) as error:
            return f"holds a number or a nesting past what can be stored: {one_line(error, 100)}"
        return None

    return problem


def chat_template(tokenizer: PreTrainedTokenizerBase, assistant_only: bool) -> str:
    """Returns the template that TRL renders chats with.

    Args:
        tokenizer: the base's tokenizer.
        assistant_only: whether the template must mark the assistant's turns.

    Raises:
        UserError: if the tokenizer has no such template.
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
def naming_source(path: str) -> Iterator[None]:
    """Names the source in TRL's error for a row in which it finds no turn of the assistant.

    Args:
        path: the source as the recipe names it.

    Raises:
        UserError: instead of TRL's error.
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


def template_problem(tokenizer: PreTrainedTokenizerBase, template: str, form: ChatForm) -> Problem:
    """Makes a check that says why a chat template makes no text of a row."""

    def problem(row: Any) -> str | None:
        try:
            text = render(tokenizer, replace(form, stored=False)(row), template)
        except _TEMPLATE_ERRORS as error:
            reason = one_line(error) or type(error).__name__
            return f"the chat template of the base's tokenizer fails: {reason}"
        return None if text.strip() else "the chat template of the base's tokenizer makes it empty"

    return problem


def render(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str | None = None
) -> str:
    """Renders a chat, as a `ChatForm` makes it, as TRL does.

    Args:
        tokenizer: the tokenizer.
        row: the chat.
        template: the chat template; `None` for the tokenizer's own.
    """
    tools = row["tools"]
    text = tokenizer.apply_chat_template(
        row["messages"] if "messages" in row else row["prompt"] + row["completion"],
        tokenize=False,
        chat_template=template,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **(row["chat_template_kwargs"] or {}),
    )
    return str(text)
