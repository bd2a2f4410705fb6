"""Find the tokens of the whole vocabulary that carry a massive activation when they come first.

    python scripts/first_tokens.py BASE [RUN ...] --text c4-heldout.jsonl

The first token of a text attends only to itself, so its state depends on nothing but the token, and
each token can be tested by itself. Each model's row has the largest activation of its median token
and the share of tokens above `--above`, both of the vocabulary and of all places in the text, since
a window may begin at any of them. A merged checkpoint scales its residual stream, so name the run
instead.
"""

import argparse
from pathlib import Path

import torch

from retrofit.measure import names, read_documents
from retrofit.models.loading import load_model
from retrofit.models.run_folder import opened_as_trained
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
    opened = opened_as_trained(options.models)
    for name, source in zip(names(options.models), options.models, strict=True):
        model, tokenizer = load_model(source, options.dtype, **opened[source])
        single_tokens = torch.arange(model.config.vocab_size).unsqueeze(1)  # [vocab_size, 1]
        largest = largest_activations(model, single_tokens).squeeze(1)  # [vocab_size]
        counts = frequencies(tokenizer, options.text, len(largest))
        massive = largest > options.above
        share = (counts * massive).sum() / counts.sum()
        frequent_ids = (counts * massive).topk(SHOWN).indices.tolist()
        frequent = " ".join(repr(tokenizer.decode([i])) for i in frequent_ids if massive[i])
        print(
            f"| {name} | {largest.median():,.0f} | {massive.float().mean():.2%} | {share:.2%} | "
            f"{frequent} |",
            flush=True,
        )


def frequencies(tokenizer, text: Path, vocab_size: int) -> torch.Tensor:
    """Returns how often each token occurs in the text, `[vocab_size]`."""
    counts = torch.zeros(vocab_size)
    for document in read_documents(text):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab_size)
    return counts


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
