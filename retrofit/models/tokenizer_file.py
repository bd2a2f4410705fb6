"""Checks that transformers cuts text as a checkpoint's `tokenizer.json` says.

For some model types, transformers replaces parts of that tokenizer by its own. Training would then
see other tokens than programs that read the file.
"""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from retrofit.utils.errors import UserError

# The text has what tokenizers treat differently: numbers, blanks, line ends, capitals, apostrophes,
# scripts, symbols, and characters that Unicode's normal forms compose, decompose or replace.
SAMPLE_TEXT = """Call me Ishmael. Some years ago, never mind how long, I'd 12 dollars, DON'T ask
In 1851 it cost $3,141.59 (or 10%); isn't that  too   much?\r\n\n\n\tdef f(x): return x+1 # y_2
“naïve café”… Größe, Жизнь, 日本語のテキスト, مرحبا, 한국어 🙂🙂 a/b\\c x.org/?q=1&r=22 \t end
e\u0301 o\u0308 \u1112\u1161\u11ab \u212b \ufb01 \u2460 \uff21 \u2026 \u0130 a\u0323\u0307 """
_PARTS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, base: str, revision: str | None = None
) -> None:
    """Compares the tokens of a sample text with those that `tokenizer.json` gives.

    Args:
        tokenizer: the tokenizer as transformers loaded it.
        base: the folder or hub id that it was loaded from.
        revision: the revision of a hub id.

    Raises:
        UserError: if the tokens differ.
    """
    file = cached_file(
        base,
        "tokenizer.json",
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None or not tokenizer.is_fast:
        return
    stored = Tokenizer.from_file(file)
    stored.no_truncation()
    stored.no_padding()
    if _tokens(stored) == _tokens(tokenizer.backend_tokenizer):
        return
    loaded_parts = json.loads(tokenizer.backend_tokenizer.to_str())
    stored_parts = json.loads(stored.to_str())
    parts = [part for part in _PARTS if loaded_parts.get(part) != stored_parts.get(part)]
    raise UserError(
        f"the tokenizer.json of {base} is not read as it stands: transformers makes a "
        f"{type(tokenizer).__name__} of it, with another {', '.join(parts) or 'way to cut text'}, "
        "which cuts text into other tokens; put the tokenizer there that belongs to this kind of "
        "model"
    )


def _tokens(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False).ids
