"""Load a merged checkpoint in a fresh process and compare it with the reference.

Run as a plain script:

    python stock_transformers.py CHECKPOINT REFERENCE RESULT [OPTION]

It imports stock transformers and nothing of this package, as its users will. The options are for
what needs more: `--trust-remote-code` runs the code in the folder, `--import-retrofit` is for an
adapter, which transformers gives to PEFT.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from reference import STEPS, Reference, compare, observe, summarize, windows
from transformers import AutoModelForCausalLM, AutoTokenizer


def check(checkpoint: Path, reference: Path, trust_remote_code: bool = False) -> dict:
    """The figures, and what loading says of missing and unexpected tensors.

    Weights are upcast to float32, so that what differs is what was stored, not how it is computed.
    `unused_gates` are those whose absence changes no logit.
    """
    trained = Reference.load(reference)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    model, loading = loaded[0].eval(), loaded[1]
    input_ids = torch.tensor(trained.input_ids)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    seen = observe(model, input_ids)
    return {
        "missing": sorted(loading["missing_keys"]),
        "unexpected": sorted(loading["unexpected_keys"]),
        "same_tokens": torch.equal(windows(tokenizer, trained.text), input_ids),
        **against(trained, seen),
        "unused_gates": unused_gates(model, input_ids[:1, :STEPS]),
    }


def against(trained: Reference, seen: dict[str, torch.Tensor]) -> dict:
    """Figures over all positions of a forward, and the last ones again, token by token."""
    tokens, ours = torch.tensor(trained.tokens), torch.tensor(trained.logprobs)
    positions = []
    for name, start in (("prefill", 0), ("cached", -STEPS)):
        theirs = seen[name].double().log_softmax(-1)
        rows = zip(
            tokens[:, start:].flatten(0, 1),
            ours[:, start:].flatten(0, 1),
            theirs.flatten(0, 1),
            strict=True,
        )
        for candidates, mine, row in rows:
            top = torch.cat([candidates, row.argmax()[None]]).tolist()
            yours = dict(zip(top, row[top].tolist(), strict=True))
            positions.append(compare(candidates.tolist(), mine.tolist(), yours))
    differs = (torch.tensor(trained.greedy) != seen["greedy"]).any(0).nonzero()
    until = differs[0].item() if len(differs) else None
    return summarize(positions) | {"greedy_until": until}


@torch.no_grad()
def unused_gates(model, input_ids: torch.Tensor) -> list[str]:
    """Gates that no logit depends on: change each in turn, and look.

    By much: zeroing a gate that training has hardly moved may change no bit.
    """
    before, unused = model(input_ids).logits, []
    for name, gate in gates(model):
        if gate.any():  # else there was none, or training left it at zero
            kept = gate.clone()
            gate.mul_(-1000)
            if torch.equal(model(input_ids).logits, before):
                unused.append(name)
            gate.copy_(kept)
    return unused


def gates(model) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of each layer's gate, a view."""
    for name, module in model.named_modules():
        if hasattr(module, "g1"):
            projection = module.g1.g_proj
            yield name, getattr(projection, "default", projection).weight  # of PEFT's, or ours
        elif hasattr(module, "q_proj") and hasattr(module, "q_norm"):
            # `[query; gate]` a head.
            yield name, module.q_proj.weight.unflatten(0, (-1, 2, module.head_dim))[:, 1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--import-retrofit", action="store_true")
    arguments = parser.parse_args()
    if arguments.import_retrofit:
        import retrofit  # noqa: F401
    figures = check(arguments.checkpoint, arguments.reference, arguments.trust_remote_code)
    if not arguments.import_retrofit:
        assert not {"retrofit", "peft"} & set(sys.modules), "the check must run on stock software"
    arguments.result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
