"""Which tokens carry a massive activation when they come first: every one of the vocabulary.

    python scripts/first_tokens.py BASE [RUN ...] --text c4-heldout.jsonl

The first token of a text attends to itself alone, so its state depends on nothing but which token
it is, and each can be looked at by itself. A model is listed with the largest activation of its
median token, and the share of tokens above `--above`: of the vocabulary, and of all places in the
text, any of which may be where a window begins. A merged checkpoint scales its residual stream:
name the run instead.
"""

import argparse
from pathlib import Path

import torch

from retrofit.measure import names, read_documents
from retrofit.models.loading import load_model
from retrofit.utils.process import prepare_process
from short_windows import largest_activations

SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="the base; then runs")
    parser.add_argument("--text", type=Path, required=True, help="how often each token occurs")
    parser.add_argument("--above", type=float, default=5000, help="a massive activation")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    print(f"| model | median | vocabulary above {options.above:,.0f} | text | most frequent |")
    print("|---|---|---|---|---|")
    for name, source in zip(names(options.models), options.models, strict=True):
        model, tokenizer = load_model(source, options.dtype)
        # Each token by itself, over layers and channels of the residual stream.
        alone = torch.arange(model.config.vocab_size).unsqueeze(1)
        largest = largest_activations(model, alone).squeeze(1)
        counts = frequencies(tokenizer, options.text, len(largest))
        massive = largest > options.above
        share = (counts * massive).sum() / counts.sum()
        often = (counts * massive).topk(SHOWN).indices
        shown = " ".join(repr(tokenizer.decode([i])) for i in often.tolist() if massive[i])
        print(
            f"| {name} | {largest.median():,.0f} | {massive.float().mean():.2%} | {share:.2%} | "
            f"{shown} |",
            flush=True,
        )


def frequencies(tokenizer, text: Path, vocab_size: int) -> torch.Tensor:
    """`[vocab_size]`: how often each token occurs."""
    counts = torch.zeros(vocab_size)
    for document in read_documents(text):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab_size)
    return counts


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
