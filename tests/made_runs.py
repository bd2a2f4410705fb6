"""Run folders as `retrofit train` leaves them behind, without the training."""

import json
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.models.fingerprint import base_weights, weights_sha256

WINDOWED = {"sliding_window": 16}
SINKS = {"granularity": "none", "sinks": "constant", "key_bias": True}
BY_LAYER = {"sinks": "constant", "key_bias": True, "projection_layers": [0, 1]}
MIXED = {"sinks": "input", "key_bias": True}


def make_run(
    run: Path, base: Path, granularity: Any = "headwise", centered: bool = False, **gates: Any
) -> Path:
    """What `retrofit train` leaves behind, with random gates."""
    model = AutoModelForCausalLM.from_pretrained(base)
    facts = {
        "name_or_path": str(base),
        "revision": None,
        "model_type": model.config.model_type,
        "dtype": "float32",
        "quantization": None,
        "weights_sha256": weights_sha256(base_weights(model)),
    }
    gates = {"granularity": granularity, "centered": centered} | gates
    config = GateConfig(init_weights=False, task_type="CAUSAL_LM", **gates)
    get_peft_model(model, config).save_pretrained(str(run / "adapter"))
    (run / "run.json").write_text(json.dumps({"base": facts, "steps": 3, "tokens": 3000}))
    recipe = {"output_dir": str(run), "model": {"base": str(base)}}
    recipe["data"] = {"sources": [{"path": "gone.jsonl"}]}
    (run / "recipe.resolved.yaml").write_text(json.dumps(recipe))
    metrics = {"perplexity": 20.5, "peak_column_share": 0.33, "kl_to_base": None}
    models = [{"name": "base", "metrics": metrics}, {"name": "gated", "metrics": metrics}]
    settings = {"text": "wiki.jsonl", "length": 512, "tokens": 8192}
    (run / "measure.json").write_text(json.dumps({"models": models, "settings": settings}))
    return run
