"""YAML in which nothing is dropped: no key is there twice, no override's value has a comment."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Numbers such as 1e-4 are numbers, which YAML 1.1 takes for text."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{key.value!r} is there twice"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse(text: str) -> Any:
    """
    Raises:
        YAMLError: if it is not YAML, or a key is there twice.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def parse_value(text: str) -> Any:
    """The value of an override. On a command line nobody writes comments: text with a `#` is kept.

    Raises:
        YAMLError: if it is empty, is not YAML, or something other than text is followed by a
            comment.
    """
    if not text.strip():  # to YAML it would be null
        raise yaml.YAMLError("there is nothing")
    try:
        node = yaml.compose(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    rest = text[node.end_mark.index if node else 0 :].strip()
    if not rest:
        return parse(text)
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None):
        return text.strip()
    raise yaml.YAMLError(f"{rest!r} follows the value")
