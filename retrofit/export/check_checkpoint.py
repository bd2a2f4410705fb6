"""Load a merged checkpoint in a fresh process and compare it with the trained model.

Run as a plain script:

    python -P check_checkpoint.py CHECKPOINT REFERENCE RESULT [--import-retrofit]

It imports stock transformers and nothing of this package, as its users will, unless told to.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# One window is short enough for any context and long enough that RoPE mistakes show.
MAX_WINDOW = 256
STEPS = 16


def windows(tokenizer, text: str) -> torch.Tensor:
    """The text as two windows of token ids `[2, seq_len]`."""
    input_ids = torch.tensor(tokenizer(text)["input_ids"])
    length = min(len(input_ids) // 2, MAX_WINDOW)
    return input_ids[: 2 * length].view(2, length)


@torch.no_grad()
def observe(model, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model says of `input_ids` `[batch, seq_len]`, in the three ways it is run.

    Returns:
        `prefill`: logits `[batch, seq_len, vocab_size]` of one forward.
        `cached`: logits `[batch, 16, vocab_size]` of the last 16 tokens, one by one.
        `greedy`: the 16 tokens `[batch, 16]` that follow.
    """
    prefill = model(input_ids, use_cache=False).logits
    cache = model(input_ids[:, :-STEPS], use_cache=True).past_key_values
    cached, greedy = [], []
    for token in input_ids[:, -STEPS:].split(1, dim=1):
        cached.append(model(token, past_key_values=cache).logits)
    token = cached[-1].argmax(-1)
    for _ in range(STEPS):
        greedy.append(token)
        token = model(token, past_key_values=cache).logits.argmax(-1)
    return {"prefill": prefill, "cached": torch.cat(cached, 1), "greedy": torch.cat(greedy, 1)}


def compare(trained: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> dict:
    """Figures over all positions of `prefill` and `cached`; `kl` is the mean of KL(trained||merged)
    in nats and `greedy_until` the first token that differs, `None` if none does."""
    kl, largest, agree = [], 0.0, []
    for name in ("prefill", "cached"):
        pairs = zip(trained[name].flatten(0, 1), merged[name].flatten(0, 1), strict=True)
        for ours, theirs in pairs:
            p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum().item())
            # max() of Python would drop a NaN.
            largest = torch.maximum(torch.tensor(largest), (p - q).abs().max()).item()
            agree.append(p.argmax() == q.argmax())
    differs = (trained["greedy"] != merged["greedy"]).any(0).nonzero()
    return {
        "positions": len(kl),
        "kl": sum(kl) / len(kl),
        "max_logprob_difference": largest,
        "top1_agreement": torch.stack(agree).float().mean().item(),
        "greedy_until": differs[0].item() if len(differs) else None,
    }


def check(checkpoint: Path, reference: Path) -> dict:
    """The figures of `compare`, and what loading says of missing and unexpected tensors.

    Weights are upcast to float32, so that what differs is what was stored, not how it is computed.
    """
    trained = load_file(reference)
    with safe_open(reference, framework="pt") as file:
        text = file.metadata()["text"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    model, loading = loaded
    input_ids = windows(AutoTokenizer.from_pretrained(checkpoint), text)
    return {
        "missing": sorted(loading["missing_keys"]),
        "unexpected": sorted(loading["unexpected_keys"]),
        "same_tokens": torch.equal(input_ids, trained["input_ids"]),
        **compare(trained, observe(model.eval(), trained["input_ids"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--import-retrofit", action="store_true")
    arguments = parser.parse_args()
    if arguments.import_retrofit:
        import retrofit  # noqa: F401
    figures = check(arguments.checkpoint, arguments.reference)
    if not arguments.import_retrofit:
        assert not {"retrofit", "peft"} & set(sys.modules), "the check must run on stock software"
    arguments.result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
