"""YAML of which nothing is lost silently.

The parser refuses a key that is there twice, and a comment after the value of an override.
"""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number, where YAML 1.1 reads it as text."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                problem = f"{key.value!r} is there twice"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            keys.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes whatever text the loader would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def dump(value: Any) -> str:
    """Returns a YAML text of a value, from which `parse` reads the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse(text: str) -> Any:
    """Returns the value of a YAML text.

    Raises:
        YAMLError: if the text is not YAML, or a key is there twice.
    """
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # an impossible date, or a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def parse_value(text: str) -> Any:
    """Returns the value of an override.

    A command line has no comments, so a `#` and what follows it are part of a text.

    Raises:
        YAMLError: if the value is empty or not YAML, or if a comment follows a value that is not
            a text.
    """
    if not text.strip():  # YAML would read it as null
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
