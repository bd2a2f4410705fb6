"""A checkpoint that brings its own code is measured as the run that it was merged from."""

from functools import partial

import pytest
from made_runs import MIXED, SINKS, make_run
from torch import nn

from retrofit.export.merge import merge
from retrofit.measure import measure
from retrofit.measure.registry import chosen_evaluations
from retrofit.models.loading import load_model


@pytest.mark.parametrize("gates", [SINKS, MIXED], ids=["sinks", "mixed"])
def test_it_gives_the_figures_of_the_run(gates, tiny_base, text, tmp_path, in_process):
    base = tiny_base("llama")
    run = make_run(tmp_path / "run", base, **gates)
    merge(run, tmp_path / "merged", format="remote-code")
    streaming = chosen_evaluations(
        ["streaming"], ["streaming.cache=64", "streaming.length=192", "streaming.windows=1"]
    )
    result = measure(
        [str(base), str(run), str(tmp_path / "merged")],
        text,
        length=192,
        windows=2,
        evaluations=streaming,
        load=partial(load_model, trust_remote_code=True),
        progress=False,
    )
    _, trained, merged = result["models"]
    assert trained["metrics"]["sink_share"] > 0.01
    for name, value in trained["metrics"].items():
        expected = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)
        assert merged["metrics"][name] == expected, name
    assert merged["streaming"]["perplexity"] == pytest.approx(
        trained["streaming"]["perplexity"], rel=1e-4
    )


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_its_gates_are_not_quantized_with_its_weights(
    quantization, tiny_base, tmp_path, in_process
):
    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path / "run", tiny_base("llama"), **MIXED)
    merge(run, tmp_path / "merged", format="remote-code")
    merged = str(tmp_path / "merged")
    model, _ = load_model(merged, quantization=quantization, trust_remote_code=True)
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is not nn.Linear
    assert type(attention.attn_gate.g_proj) is type(attention.attn_gate.sinks_proj) is nn.Linear
