"""Chat data: in TRL's words, and through the chat template of a tokenizer."""

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
from retrofit.data.rows import Problem, kind
from retrofit.utils.errors import UserError, one_line

_OF_TEMPLATES = (
    TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
_TAKEN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents"  # the others say how a template is used, which is the same for all rows
}


def beside_problem(row: Any) -> str | None:
    """Says what is wrong with the tools of a row, or with what it sets for the chat template."""
    settings = row.get("chat_template_kwargs")
    if not isinstance(settings, Mapping | None):
        return f"chat_template_kwargs is {kind(settings)}, not an object"
    if taken := sorted(_TAKEN & set(settings or ())):
        return f"chat_template_kwargs sets {taken[0]}, which is not for a row to set"
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
        return f"tools is {kind(tools)}, not a list of objects"
    other = next((tool for tool in tools if not isinstance(tool, Mapping)), tools)
    return None if other is tools else f"tools holds {kind(other)}, not an object"


def json_problem(form: ChatForm) -> Problem:
    """Says whether a row holds what cannot be kept, though nothing is wrong with its words."""

    def problem(row: Any) -> str | None:
        try:
            for kept in replace(form, stored=True)(row).values():
                for text in kept if isinstance(kept, list) else [kept]:
                    Json().decode_example(text)
        except (ValueError, RecursionError) as error:
            return f"holds a number or a nesting past what is kept: {one_line(error, 100)}"
        return None

    return problem


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
def naming_source(path: str) -> Iterator[None]:
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


def template_problem(tokenizer: PreTrainedTokenizerBase, template: str, form: ChatForm) -> Problem:
    """Says why a chat template makes no text of a row, if it does not."""

    def problem(row: Any) -> str | None:
        try:
            text = _render(tokenizer, replace(form, stored=False)(row), template)
        # What a template does to a row that it was not written for can be anything of these.
        except _OF_TEMPLATES as error:
            reason = one_line(error) or type(error).__name__
            return f"the chat template of the base's tokenizer fails: {reason}"
        return None if text.strip() else "the chat template of the base's tokenizer makes it empty"

    return problem


def _render(tokenizer: PreTrainedTokenizerBase, row: dict, template: str) -> str:
    """As TRL does it."""
    text = tokenizer.apply_chat_template(
        row["messages"] if "messages" in row else row["prompt"] + row["completion"],
        tokenize=False,
        chat_template=template,
        tools=row["tools"],
        **row["chat_template_kwargs"],
    )
    return str(text)
