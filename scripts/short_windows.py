"""Find where massive activations still arise, in short windows from anywhere in a text.

    python scripts/short_windows.py BASE [RUN ...] --text tuning.jsonl

A sink is on the first tokens that a model sees, and any token of a text may come first. A few long
windows therefore say little about how many windows keep their sink. For each model, the table has
the share of windows in which some token has an activation above `--above`, and how many of 10,000
tokens at each position do.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from rich.progress import track

from retrofit.measure import names, prepended_token, read_documents
from retrofit.models.loading import load_model
from retrofit.models.run_folder import opened_as_trained
from retrofit.utils.process import prepare_process

BATCH = 4096  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="the base; then runs")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--above", type=float, default=2000, help="a massive activation")
    parser.add_argument("--windows", type=int, default=6000)
    parser.add_argument("--length", type=int, default=16, help="tokens per window")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    header = "windows of 10,000 with such an activation at position 0, 1, 2, ..."
    print(f"| model | windows above {options.above:,.0f} | {header} |")
    print("|---|--:|---|")
    opened = opened_as_trained(options.models)
    for name, source in zip(names(options.models), options.models, strict=True):
        model, tokenizer = load_model(source, options.dtype, **opened[source])
        windows = short_windows(tokenizer, options.text, options.windows, options.length)
        massive = largest_activations(model, windows) > options.above  # [windows, length]
        by_position = (10_000 * massive.float().mean(0)).round().int().tolist()
        share = massive.any(-1).float().mean()
        print(f"| {name} | {share:.2%} | {' '.join(map(str, by_position))} |", flush=True)


def short_windows(tokenizer, text: Path, windows: int, length: int) -> torch.Tensor:
    """Returns windows of token ids from anywhere in the text, `[windows, length]`, the same for
    every model of one tokenizer, which begin with its BOS token if it prepends one."""
    bos = [] if prepended_token(tokenizer) is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    ids: list[int] = []
    for document in read_documents(text):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    if not 0 < size < len(ids):
        raise SystemExit(f"error: {text} has {len(ids)} tokens; lower --length {length} to fewer")
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - size, (windows, 1), generator=generator)
    first = torch.tensor(bos, dtype=torch.long).expand(windows, -1)
    return torch.cat([first, torch.tensor(ids)[starts + torch.arange(size)]], -1)


@torch.inference_mode()
def largest_activations(model, windows: torch.Tensor) -> torch.Tensor:
    """Returns the largest activation of each token, over layers and channels of the residual
    stream, `[windows, length]`."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    largest = []
    for ids in track(windows.split(max(1, BATCH // windows.shape[1])), transient=True):
        ids = ids.to(inner.device)
        states = inner.get_decoder()(ids, use_cache=False, output_hidden_states=True).hidden_states
        largest.append(torch.stack([hidden.abs().amax(-1) for hidden in states[:-1]]).amax(0))
    return torch.cat(largest).float().cpu()


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()
