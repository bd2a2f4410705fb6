"""Copies the tokenizer of a base into a merged checkpoint, which cuts text as the base does.

transformers chooses the class of a tokenizer by a checkpoint's model type and by the
`tokenizer_class` of its `tokenizer_config.json` together, and some classes replace parts of
`tokenizer.json`. A merge changes the model type: without further ado, a Mistral whose config names
the `LlamaTokenizer` is cut by the file before the merge, and by that class after it.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from retrofit.export.checkpoint_format import MergeMismatchError
from retrofit.models.tokenizer_file import SAMPLE_TEXT
from retrofit.utils.files import copy_tokenizer, read_json, write_json

_SPECIAL_TOKENS = 32  # special tokens around which text is cut, at most


def copy_tokenizer_of(base: Path, folder: Path) -> None:
    """Copies a base's tokenizer, names its class, and leaves out that it has code of its own, which
    a merge does not run.

    Args:
        base: the folder of the base.
        folder: the folder of the checkpoint, which has its `config.json` already.

    Raises:
        MergeMismatchError: if the checkpoint's tokenizer cuts text into other tokens.
    """
    copy_tokenizer(base, folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.pop("auto_map", None):
        write_json(path, config)
    expected = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    found = _load(folder)
    if type(found) is not type(expected):
        # The name that all versions of transformers know for a tokenizer.json as it stands.
        as_it_stands = type(expected) is TokenizersBackend
        name = "PreTrainedTokenizerFast" if as_it_stands else type(expected).__name__
        write_json(path, config | {"tokenizer_class": name})
        found = _load(folder)
    for text in _sample_texts(expected):
        if found(text)["input_ids"] != expected(text)["input_ids"]:
            raise MergeMismatchError(
                f"the checkpoint's tokenizer, a {type(found).__name__}, cuts {text[:40]!r} into "
                f"other tokens than the base's, a {type(expected).__name__}"
            )


def _load(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _sample_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield SAMPLE_TEXT
    yield f"  {SAMPLE_TEXT}"
    special = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
    for token in list(special)[:_SPECIAL_TOKENS]:
        yield f"{token} hi {token}hi\n{token}"
