"""A Hugging Face tokenizer as the fields of a GGUF file.

llama.cpp cuts text with rules of its own, known by name (`tokenizer.ggml.pre`), so a tokenizer is
carried over only if its rules are recognized. Byte-level BPE alone: that of SmolLM, Llama 3, Qwen
and Mistral's tekken.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from retrofit.errors import UserError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe", _TEKKEN: "tekken"}


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """`tokenizer.json` of a model folder.

    Raises:
        UserError: if there is none, or llama.cpp has no name for its rules.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder.name} has no tokenizer.json, which a GGUF file is made from")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if rules_of(tokenizer) is None:
        raise UserError(
            f"the tokenizer of {folder.name} is not one that can be named to llama.cpp (byte-level "
            "BPE as in SmolLM, Llama 3, Qwen or Mistral's tekken)"
        )
    return tokenizer


def rules_of(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a `tokenizer.json` cuts text before BPE; `None` if it has none."""
    steps = tokenizer["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if tokenizer["model"]["type"] != "BPE" or "ByteLevel" not in kinds:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2" if steps[0]["use_regex"] else None
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm" if steps[0]["individual_digits"] and steps[1]["use_regex"] else None
    if kinds == ["Split", "ByteLevel"]:
        return _RULES.get(steps[0]["pattern"].get("Regex"))
    return None


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Add vocabulary, merges, special tokens and chat template.

    Args:
        folder: of the model.
        size: of the vocabulary; models have more rows than tokenizers have tokens.
    """
    tokenizer = read_tokenizer(folder)
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        special = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(rules_of(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
