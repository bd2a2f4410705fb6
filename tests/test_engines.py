"""Real models in real engines: `make engines`, which builds what vLLM needs first."""

import os
from pathlib import Path

import pytest

import assets
import engines
from retrofit.recipe import load_recipe
from retrofit.training.run import train

pytestmark = pytest.mark.engines


SINKS, PROJECTION = "smollm2-135m-cpu", "scripts/ablations/recipes/elementwise.yaml"


@pytest.fixture(
    scope="module",
    params=[("smollm2", SINKS), ("smollm2", PROJECTION), ("qwen2.5-coder", SINKS)],
    ids=lambda param: f"{param[0]}-{'sinks' if param[1] == SINKS else 'projection'}",
)
def run(request, tmp_path_factory) -> Path:
    """Gates that a few steps on real text have moved."""
    folder, texts = tmp_path_factory.mktemp("engines"), assets.ensure("texts")
    base, name = request.param
    recipe = load_recipe(
        name,
        [
            f"output_dir={folder / 'run'}",
            f"model.base={assets.ensure(base)}",
            f"data.sources=[{{path: {texts / 'c4-train.jsonl'}}}]",
            "data.sequence_length=192",
            "data.first_tokens=64",
            "train.learning_rate=auto",
            "train.max_steps=4",
            "train.report_to=[]",
            "measure=null",
        ],
    )
    return train(recipe)


def test_every_engine_says_what_the_trained_model_says(run):
    vllm = os.environ["RETROFIT_VLLM"]
    rows = list(engines.engines(run, vllm, plugin=True))
    print(engines.table(rows))
    engines_run = {row["engine"] for row in rows}
    if "qwen" in rows[0]["base"]:  # a few layers have projections, for which only vLLM has a plugin
        assert engines_run == {"transformers", "vllm"}
    else:
        assert engines_run == {"transformers", "vllm", "llama.cpp"}
    for row in rows:
        if row["stored"] == "float32":
            assert row["kl"] < 1e-7 and row["max_logprob_difference"] < 1e-2, row
            assert row["greedy_until"] is None, row
