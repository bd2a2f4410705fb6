"""What is read off the base: the values of first tokens, kept, and the size of the gates' input."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.adapters import family_of
from retrofit.recipe import load_recipe
from retrofit.training.calibration import STEP, Calibration, calibrate
from retrofit.training.run import train


def test_values_are_those_of_first_tokens_of_documents(family):
    if not family_of(family).packs:
        pytest.skip("its documents cannot share a row")
    base = tiny_model(family)
    documents = [torch.tensor([5, 9, 11]), torch.tensor([7, 30]), torch.tensor([5, 8, 1, 2])]
    seen = []
    projection = base.model.layers[1].self_attn.v_proj
    handle = projection.register_forward_hook(lambda _m, _a, out: seen.append(out[0, 0]))
    with torch.no_grad():
        for document in documents:
            base(document[None])
    handle.remove()
    model = get_peft_model(base, GateConfig(init_weights=False))
    packed = torch.cat([*documents, torch.tensor([258, 258])])[None]  # and padding
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 0]])
    shown = calibrate(model, [{"input_ids": packed, "position_ids": position_ids}])
    assert sorted(shown.values) == [0, 1, 2]
    torch.testing.assert_close(shown.values[1], torch.stack(seen).mean(0).view(2, 16))


def test_heads_that_pay_no_sink_have_no_value(family, monkeypatch):
    base = tiny_model(family)
    input_ids = torch.randint(5, 250, (2, 90), generator=torch.Generator().manual_seed(0))
    fast = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = base(input_ids, output_attentions=True).attentions
    base.set_attn_implementation(fast)
    paid = torch.stack([a[:, :, 64:, 0].mean((0, 2)).view(2, -1).mean(-1) for a in attentions])
    threshold = paid.median().item() + 1e-5
    monkeypatch.setattr("retrofit.training.calibration.SINK_SHARE", threshold)
    model = get_peft_model(base, GateConfig(init_weights=False))
    # A row of short texts has nothing to tell, and must not be counted for the room it takes.
    input_ids = torch.cat([input_ids, input_ids[:1]])
    position_ids = torch.stack([torch.arange(90), torch.arange(90), torch.arange(90) % 45])
    values = calibrate(model, [{"input_ids": input_ids, "position_ids": position_ids}]).values
    kept = torch.stack([values[index].any(-1) for index in range(3)])
    assert kept.equal(paid > threshold) and kept.any() and not kept.all()
    assert all(layer.self_attn.observer is None for layer in base.model.layers)


def test_input_size_is_the_sum_of_what_a_gate_reads(family):
    base = tiny_model(family)
    input_ids = torch.tensor([[5, 9, 11, 7], [30, 1, 2, 3]])
    norms = [layer.input_layernorm for layer in base.model.layers]
    seen = []
    handles = [norm.register_forward_hook(lambda _m, _a, out: seen.append(out)) for norm in norms]
    with torch.no_grad():
        base(input_ids)
    for handle in handles:
        handle.remove()
    model = get_peft_model(base, GateConfig(init_weights=False))
    batch = {"input_ids": input_ids, "position_ids": torch.arange(4).expand(2, 4)}
    sizes = calibrate(model, [batch]).input_sizes
    assert sizes == {
        index: pytest.approx(states.abs().sum(-1).mean().item())
        for index, states in enumerate(seen)
    }


def test_the_summary_says_how_much_the_base_pays_its_first_token():
    base = tiny_model("llama")
    input_ids = torch.randint(5, 250, (2, 90), generator=torch.Generator().manual_seed(0))
    model = get_peft_model(base, GateConfig(init_weights=False))
    batch = {"input_ids": input_ids, "position_ids": torch.arange(90).expand(2, -1)}
    shown = calibrate(model, [batch])
    base.set_attn_implementation("eager")
    with torch.no_grad(), model.disable_adapter():
        attentions = base(input_ids, output_attentions=True).attentions
    paid = torch.stack([layer[:, :, 64:, 0].mean((0, 2)) for layer in attentions])
    assert f"{paid.mean():.2f} of its attention" in shown.summary()
    assert f"{paid.mean(1).max():.2f} in layer {paid.mean(1).argmax()}" in shown.summary()
    assert f"{(paid > 0.1).sum()} of 12 heads" in shown.summary()
    short = {"input_ids": input_ids[:, :9], "position_ids": torch.arange(9).expand(2, -1)}
    assert calibrate(model, [short]).summary() == ""


def test_no_step_moves_a_logit_further_than_it_says():
    """Adam's first step moves every weight by the rate: with signs that agree, the whole step."""
    states = torch.randn(64, generator=torch.Generator().manual_seed(0))
    sizes = {0: states.abs().sum().item()}
    rate = Calibration({}, {}, {}, {}, {}, {}, sizes).learning_rates[0]
    weight = torch.zeros(64, requires_grad=True)
    (weight @ states).backward()
    torch.optim.AdamW([weight], lr=rate).step()
    assert abs((weight @ states).item()) == pytest.approx(STEP, rel=1e-4)


def test_a_run_reads_its_centers_keeps_them_and_resumes_with_them(tiny_base, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"the sink draws {i} tokens " * 9}) + "\n" for i in range(40)]
    text.write_text("".join(lines))
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"base": str(tiny_base("qwen2"))},
        "gate": {"centered": True},
        "data": {"sources": [{"path": str(text)}], "sequence_length": 64},
        "train": {"max_steps": 2, "report_to": [], "save_steps": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    run = train(load_recipe(str(path)))
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    centers = {name: tensor for name, tensor in final.items() if name.endswith(".center")}
    assert len(centers) == 3 and all(center.abs().sum() > 0 for center in centers.values())
    rates = json.loads((run / "run.json").read_text())["learning_rate"]
    assert sorted(rates) == ["0", "1", "2"] and all(0 < rate < 0.1 for rate in rates.values())
    state = json.loads((run / "checkpoints" / "checkpoint-1" / "state.json").read_text())
    assert [group["initial_lr"] for group in state["param_groups"]] == list(rates.values())
    first = load_file(run / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], center) for name, center in centers.items())
