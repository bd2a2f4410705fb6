"""Every bundled recipe passes `retrofit check` and runs to a merged checkpoint, on a tiny random
model of its architecture."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from retrofit.cli.measure import measure_run
from retrofit.export.merge import merge
from retrofit.recipe import bundled_recipes, load_recipe
from retrofit.training.check import check
from retrofit.training.run import train

ARCHITECTURE = {"smollm2": "llama", "llama": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in bundled_recipes()])
def test_recipe_checks_trains_measures_and_merges(name, tiny_base, tmp_path):
    model_type = ARCHITECTURE[name.split("/")[1].split("-")[0]]
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"the sink draws {i} tokens " * 40}) + "\n" for i in range(40)]
    text.write_text("".join(lines))
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(lines[1:]))
    recipe = load_recipe(
        name,
        [
            f"output_dir={tmp_path / 'run'}",
            f"model.base={tiny_base(model_type)}",
            f"data.sources=[{{path: {text}, weight: 1.0}}, {{path: {text}, weight: 1.0}}]",
            "data.sequence_length=192",
            "data.first_tokens=64",
            "train.max_steps=2",
            f"measure={{text: {unseen}, length: 192, windows: 2}}",
        ],
    )
    if recipe.model.quantization:
        pytest.importorskip("bitsandbytes")
    told = {line.name: line.finding for line in check(recipe)}["merge"]
    run = train(recipe)
    measure_run(recipe, run, Console(quiet=True))
    # No stock class has both sinks and Qwen3's norms of queries and keys.
    own_code = model_type == "qwen3"
    assert ("with --format remote-code" if own_code else "stock granite_swa") in told
    merge(run, tmp_path / "merged", format="remote-code" if own_code else "native")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=own_code)
    assert type(merged).__name__ == ("GatedForCausalLM" if own_code else "GraniteSWAForCausalLM")
    assert torch.isfinite(merged(torch.arange(20)[None]).logits).all()
