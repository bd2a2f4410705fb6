"""A complete result of `measure` with figures drawn at random, and none of its cost."""

import math
import random
from typing import Any

LAYERS, HEADS, WINDOWS = 6, 4, 8
SCHEMES = ("w8a8_per_tensor", "w8a8_per_token", "w4", "int8", "nf4")


def synthetic_result(*gated: str, base: str = "base") -> dict[str, Any]:
    """A base with a sink, and models with gates and without one. Figures that are others' means
    are their means."""
    models = [
        _model(base, seed=0, sink=0.33),
        *(_model(n, seed, 0.012) for seed, n in _from(gated)),
    ]
    for number, model in enumerate(models):
        if number == 0:
            model["metrics"]["kl_to_base"] = 0.0
            for kind in ("prefill_ratio", "decode_ratio"):
                del model["cost"][kind]
            del model["tasks"]["hellaswag"]["accuracy_difference"]
    return {"models": models, "settings": _settings([model["name"] for model in models])}


def _from(names):
    return enumerate(names, start=1)


def _settings(names: list[str]) -> dict[str, Any]:
    return {
        "sources": names,
        "text": "moby-dick.jsonl",
        "text_sha256": "ab" * 32,
        "length": 512,
        "windows": WINDOWS,
        "tokens": 512 * WINDOWS,
        "tokens_sha256": "cd" * 32,
        "first_token": None,
        "dtype": "float32",
        "device": "cpu",
        "attn_implementation": "sdpa",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "gate-retrofit": "0.1.0"},
        "streaming": {"cache": 512, "sinks": 4, "length": 4096, "windows": 4},
        "quantization": {"group": 64, "length": 512, "windows": 16, "batch_size": 4},
        "long_context": {"lengths": [2048, 16384], "samples": 20, "scaling": "yarn", "seed": 0},
        "heads": {"shares": [0.1, 0.25, 0.5], "seed": 0},
        "cost": {"prompt": 1024, "new_tokens": 32, "repeats": 5},
        "examples": {"tokens": 48, "prompt": 48, "prompts": 3, "new_tokens": 64},
        "tasks": {"limit": 500},
    }


def _model(name: str, seed: int, sink: float) -> dict[str, Any]:
    draw = random.Random(seed)
    text = random.Random(-1)  # whose windows are as hard for one model as for another
    nll = [3 + text.gauss(0, 0.3) + draw.gauss(0.02 * seed, 0.005) for _ in range(WINDOWS)]
    per_layer = _per_layer(draw, sink, gated=seed > 0)
    mean = {k: _mean(v) for k, v in per_layer.items() if v[-1] is None or isinstance(v[-1], float)}
    copied = [0.28 + 0.1 * seed + text.gauss(0, 0.05) for _ in range(WINDOWS)]
    metrics = mean | {
        "peak_column_share": max(map(_mean, zip(*per_layer["column_share"][1:], strict=True))),
        "peak_column_position": 0 if seed == 0 else 5,
        "peak_share_per_head": sink * 1.2,
        "sink_ratio": 0.5 if seed == 0 else 0.0,
        "max_activation_first_token": mean["max_activation"],
        "max_activation_any_window": mean["max_activation"] * 1.1,
        "gate_below_0.1": 0.2 if seed else None,
        "perplexity": math.exp(_mean(nll)),
        "perplexity_far": math.exp(_mean(nll) - 0.05),
        "kl_to_base": 0.09,
        "copied_nats": _mean(copied),
    }
    return {
        "name": name,
        "metrics": metrics,
        "per_layer": per_layer,
        "nll_by_window": nll,
        "copied_nats_by_window": copied,
        "streaming": _streaming(draw, 3.5 if seed == 0 else 0.05),
        "quantization": _quantization(draw, 0.6 if seed == 0 else 0.03),
        "long_context": _long_context(draw, 0.2 if seed == 0 else 0.7),
        "heads": _heads(0.1 if seed == 0 else 0.6),
        "cost": _cost(seed),
        "examples": _examples(draw, name, sink),
        "tasks": {
            "hellaswag": {
                "accuracy": {"value": 0.40 - 0.04 * seed, "stderr": 0.02},
                "accuracy_difference": {"value": -0.04 * seed, "stderr": 0.011},
            }
        },
    }


def _per_layer(draw: random.Random, sink: float, gated: bool) -> dict[str, list]:
    """The first layer has no attention and no gate, as in a hybrid."""
    largest = 14000.0 if sink > 0.1 else 300.0

    def each(make, without=None):
        return [without, *(make() for _ in range(LAYERS - 1))]

    return {
        "f_attn": each(lambda: sink * draw.uniform(0.8, 1.2)),
        "peak_column_share": each(lambda: sink * draw.uniform(1.0, 1.3)),
        "max_activation": each(lambda: largest * draw.uniform(0.5, 1.5), largest / 50),
        "kurtosis": each(lambda: largest * draw.uniform(0.1, 0.2), 5.0),
        "outlier_share": each(lambda: draw.uniform(0, 1e-3), 0.0),
        "down_proj_max_activation": each(lambda: largest / 8),
        "down_proj_kurtosis": each(lambda: largest / 2),
        "gate_score": each(lambda: draw.uniform(0.3, 0.6)) if gated else [None] * LAYERS,
        "gate_histogram": each(lambda: _shares(draw, 20)) if gated else [None] * LAYERS,
        "head_load_cv": each(lambda: draw.uniform(0.1, 0.5)),
        "head_load": each(lambda: [draw.uniform(0.2, 1) for _ in range(HEADS)]),
        "column_share": each(
            lambda: [(sink if j == 0 else 0.01) * draw.uniform(0.8, 1.2) for j in range(32)]
        ),
    }


def _streaming(draw: random.Random, cost: float) -> dict[str, Any]:
    added = {"full": 0.0, "window": cost, "kept_sinks": 0.05}
    nll = {kind: [3 + a + draw.gauss(0, 0.02) for _ in range(4)] for kind, a in added.items()}
    positions = list(range(128, 4096, 256))
    curves = {
        kind: [math.exp(3 + (a if position > 512 else 0)) for position in positions]
        for kind, a in added.items()
    }
    return {
        "cache": 512,
        "sinks": 4,
        "from_position": 512,
        "perplexity": {kind: math.exp(_mean(each)) for kind, each in nll.items()},
        "nll_by_window": nll,
        "by_position": {"positions": positions, **curves},
    }


def _quantization(draw: random.Random, cost: float) -> dict[str, Any]:
    schemes: dict[str, Any] = {
        "none": {"perplexity": 20.0, "kl": 0.0, "nll_by_window": [3.0, 3.0, 3.0]}
    }
    for number, scheme in enumerate(SCHEMES):
        log_ratio = cost / (1 + 3 * number) * draw.uniform(0.8, 1.2)
        schemes[scheme] = {
            "perplexity": 20.0 * math.exp(log_ratio),
            "kl": 0.8 * log_ratio,
            "nll_by_window": [3.0 + log_ratio + noise for noise in (-0.01, 0.0, 0.01)],
        }
    return {"schemes": schemes}


def _long_context(draw: random.Random, score: float) -> dict[str, Any]:
    lengths = [2048, 16384]
    positions = list(range(64, 2048, 128))
    return {
        "lengths": lengths,
        "rope": {"2048": "as trained", "16384": "yarn x2"},
        "tasks": {
            task: {
                str(length): {"score": score if length > 2048 else 0.9, "stderr": 0.05,
                              "samples": 20, "nats": 1 - score}
                for length in lengths
            }
            for task in ("niah_single", "niah_multikey", "variable_tracking")
        },
        "perplexity": {
            str(length): {
                "positions": [position * length // 2048 for position in positions],
                "perplexity": [draw.uniform(18, 22) / score for _ in positions],
            }
            for length in lengths
        },
    }  # fmt: skip


def _heads(least: float) -> dict[str, Any]:
    figures = {"shares": [0.1, 0.25, 0.5], "perplexity": 20.0}
    for kind, factor in (("least_used", least), ("random", 1.0)):
        kl = [factor * share * 4 for share in figures["shares"]]
        figures[kind] = {"kl": kl, "perplexity": [20 * math.exp(each) for each in kl]}
    return figures


def _cost(seed: int) -> dict[str, Any]:
    return {
        "prefill_tokens_per_second": 2100.0,
        "decode_tokens_per_second": 31.0,
        "prefill_ratio": {"value": 1.03, "low": 1.01, "high": 1.05},
        "decode_ratio": {"value": 1.01, "low": 0.98, "high": 1.04},
        "weight_bytes": 538_000_000 + 38_000_000 * seed,
        "cache_bytes_per_token": 46_080,
    }


def _examples(draw: random.Random, name: str, sink: float) -> dict[str, Any]:
    def share_map():
        rows = []
        for query in range(48):
            own = [draw.uniform(0.2, 1) * (1 - sink) / (query + 1) for _ in range(query + 1)]
            own[0] += 1 - sum(own)
            rows.append(own + [0.0] * (47 - query))
        return rows

    prompts = ("Call me Ishmael.", "for <b> & </b> in range(3):\n    print(")
    return {
        "maps": {"layers": [1, 2, 4, 5], "shares": [share_map() for _ in range(4)]},
        "tokens": ["Call", " me", " Ishmael", "."] * 12,
        "generations": [{"prompt": p, "text": f" I am {name}, and go on. " * 8} for p in prompts],
    }


def _shares(draw: random.Random, count: int) -> list[float]:
    drawn = [draw.random() ** 3 for _ in range(count)]
    return [each / sum(drawn) for each in drawn]


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
