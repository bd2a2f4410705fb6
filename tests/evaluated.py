"""One evaluation of a tiny model, through `measure`."""

import json

import torch
from peft import get_peft_model
from tiny import tiny_model, tiny_tokenizer

from retrofit import GateConfig
from retrofit.measure import cut_windows, measure

LENGTH = 192


def windows(text, count: int) -> torch.Tensor:
    return cut_windows([text.read_text()], tiny_tokenizer(), LENGTH, count)


def gated(family: str = "llama"):
    config = GateConfig(init_weights=False, granularity="headwise")
    return get_peft_model(tiny_model(family), config).eval()


def measured(model, text, part, **options):
    def load(source, dtype, **_):
        return model if source == "model" else options["base"], tiny_tokenizer()

    sources = ["base", "model"] if "base" in options else ["model"]
    result = measure(
        sources, text, length=LENGTH, windows=2, evaluations=[part], load=load, progress=False
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert part.name in result["settings"]
    return result["models"][-1][part.name]


def loss(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window, from full logits."""
    with torch.no_grad():
        log_p = model(input_ids).logits.double().log_softmax(-1)[:, :-1]
    return -log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1).mean(-1)
