"""Writes a Hugging Face tokenizer as the fields of a GGUF file.

llama.cpp has two kinds of BPE. Byte-level BPE (SmolLM, Llama 3, Qwen, Mistral's tekken) splits text
by rules that llama.cpp knows by name (`tokenizer.ggml.pre`), so such a tokenizer can be written
only if its rules are recognized. SentencePiece's BPE (Llama 1 and 2, TinyLlama, Mistral 7B) joins
the pair whose result has the highest score, which is minus the rank of the merge.
"""

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import AutoTokenizer

from retrofit.utils.errors import UserError, one_line

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
    """Returns the `tokenizer.json` of a model folder.

    Raises:
        UserError: if there is none, it is damaged, or llama.cpp has no name for its rules.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder.name} has no tokenizer.json, which a GGUF file is made from")
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        has_name = pre_tokenizer_name(tokenizer) is not None or is_sentencepiece(tokenizer)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or of a kind that no GGUF file is made from: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from None
    if not has_name:
        raise UserError(
            f"the tokenizer of {folder.name} is not one that can be named to llama.cpp (byte-level "
            "BPE as in SmolLM, Llama 3, Qwen or Mistral's tekken, or SentencePiece's as in Llama 2)"
        )
    return tokenizer


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name for the pre-tokenizer of a `tokenizer.json`, or `None`.

    The result is `None` if llama.cpp has no name for the rules that split text before BPE.
    """
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


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Tells whether a `tokenizer.json` was made from a SentencePiece BPE model."""
    model = tokenizer["model"]
    return model["type"] == "BPE" and model.get("byte_fallback", False)


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Adds the vocabulary, merges or scores, special tokens and the chat template.

    Args:
        writer: the writer of the GGUF file.
        folder: the folder of the model.
        size: the rows of the model's embeddings, which may be more than the tokenizer has tokens.
    """
    tokenizer = read_tokenizer(folder)
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for token, index in tokenizer["model"]["vocab"].items():
        is_byte = is_sentencepiece(tokenizer) and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[index], types[index] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    # A token past the embeddings, such as one for padding, is in no text that a model has seen.
    for added in (token for token in tokenizer["added_tokens"] if token["id"] < size):
        token_type = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        is_unknown = added["content"] == tokenizer["model"].get("unk_token")
        types[added["id"]] = TokenType.UNKNOWN if is_unknown else token_type
        tokens[added["id"]] = added["content"]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if is_sentencepiece(tokenizer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokenizer, tokens))
        writer.add_add_space_prefix(_prepends_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(str(pre_tokenizer_name(tokenizer)))
    has_merges = not is_sentencepiece(tokenizer)
    special = SpecialVocab(folder, load_merges=has_merges, n_vocab=size)
    special.chat_template = _chat_template(folder)
    special.add_to_gguf(writer, quiet=True)


def _chat_template(folder: Path) -> str | list[dict[str, str]] | None:
    """Returns the chat template that transformers uses, which `SpecialVocab` may not.

    Where there are several templates, the result is a list of their names and texts.
    """
    template = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _scores(tokenizer: dict[str, Any], tokens: list[str]) -> list[float]:
    """Returns minus the rank of each token's merge, and the lowest score without a merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _prepends_space(tokenizer: dict[str, Any]) -> bool:
    normalizer = tokenizer["normalizer"] or {}
    kinds = [step["type"] for step in normalizer.get("normalizers", [normalizer]) if step]
    pre_tokenizer = tokenizer["pre_tokenizer"] or {}
    return "Prepend" in kinds or pre_tokenizer.get("prepend_scheme", "never") != "never"
