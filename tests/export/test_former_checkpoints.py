"""A checkpoint whose own code calls the gate's module `g1` goes on being read."""

import pytest
import torch
from former_names import rename_gates
from made_runs import make_run
from transformers import AutoModelForCausalLM

from retrofit.export import remote_code
from retrofit.export.merge import MergeMismatchError, merge
from retrofit.export.verify import verify
from retrofit.export.verify.report import read_report
from retrofit.measure.attention_hooks import collect_layer_statistics
from retrofit.models.loading import load_model

INPUT_IDS = torch.arange(200)[None] % 250


@pytest.fixture
def checkpoint(tmp_path, tiny_base, in_process):
    """Such a checkpoint, and the logits that it had under today's names."""
    out = tmp_path / "out"
    merge(make_run(tmp_path / "run", tiny_base("llama")), out, format="remote-code")
    with torch.no_grad():
        trusted = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        logits = trusted(INPUT_IDS).logits
    for path in out.glob("*.py"):
        path.write_text(path.read_text().replace("attn_gate", "g1"))
    rename_gates(out / "model.safetensors")
    return out, logits


def test_it_loads_with_its_own_code_and_is_measured(checkpoint):
    folder, expected = checkpoint
    model, _ = load_model(str(folder), trust_remote_code=True)
    with collect_layer_statistics(model) as layers, torch.no_grad():
        model(INPUT_IDS)
    assert all(layer.gate is not None for layer in layers)
    with torch.no_grad():
        assert torch.equal(model(INPUT_IDS).logits, expected)


def test_it_is_verified_if_it_has_the_code_that_was_written_then(checkpoint, monkeypatch):
    folder, _ = checkpoint
    code = remote_code._code_in(folder)
    monkeypatch.setitem(remote_code._FORMER_CODE, "llama", [remote_code._digest(code)])
    assert verify.verify(read_report(folder), folder)["unused_gates"] == []
    with (folder / "llama.py").open("a") as file:
        file.write("raise SystemExit('run')\n")
    with pytest.raises(MergeMismatchError, match="is not the file that this version"):
        verify.verify(read_report(folder), folder)
