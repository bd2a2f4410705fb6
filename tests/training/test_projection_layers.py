"""Layers whose sink logits could not prevent the sink get a projection instead, by themselves."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.export.merge import merge
from retrofit.gates import gate_layers
from retrofit.models.loading import load_model
from retrofit.recipe import Recipe, load_recipe
from retrofit.training import calibration
from retrofit.training.calibration import Calibration, calibrate
from retrofit.training.run import gate_trainer, train
from retrofit.utils.errors import UserError

BOTH = {"sinks": "constant", "key_bias": True, "granularity": "headwise"}


@pytest.mark.parametrize(
    ("shares", "separations", "expected"),
    [
        ([0.002, 0.001, 0.03, 0.13, 0.4], [5.8, 4.3, 4.1, 4.4, 2.4], []),  # as in SmolLM2
        ([0.001, 0.002, 0.002, 0.27, 0.25], [-0.5, 1.7, 1.6, 0.1, 1.4], [0, 1, 2]),  # as in Qwen2.5
        ([0.001, 0.002, 0.27], [0.3, 3.1, 1.6], [0, 1]),  # the second layer alone would do without
        ([0.0, 0.07, 0.004, 0.35], [6.4, 4.9, 2.8, 2.4], []),  # as in SmolLM2, with longer rows
        ([0.3, 0.4, 0.3], [0.1, 0.1, 0.1], []),  # nothing is below the first sink
        ([0.01, 0.01, 0.01], [0.1, 0.1, 0.1], []),  # no sink
        ([], [], []),
    ],
)
def test_they_are_below_the_first_sink(shares, separations, expected):
    by_layer = {index: torch.full((4,), share) for index, share in enumerate(shares)}
    read = Calibration({}, {}, {}, {}, by_layer, dict(enumerate(separations)), {})
    assert read.projection_layers == expected


def test_the_separation_is_that_of_first_tokens_from_other_queries(monkeypatch):
    monkeypatch.setattr(calibration, "TOKENS_PER_ROW", 1)
    base = tiny_model("llama")
    model = get_peft_model(base, GateConfig(**BOTH))
    input_ids = torch.randint(5, 250, (3, 120), generator=torch.Generator().manual_seed(0))
    logits = []

    def read(attention, _hidden_states, query, key, _sink, output):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits.append(query @ key.mT * attention.scaling)
        return output

    base.model.layers[1].self_attn.observer = read
    with torch.no_grad():
        model(input_ids)
    base.model.layers[1].self_attn.observer = None
    causal = torch.ones(120, 120, dtype=torch.bool).tril()
    causal[1:, 0] = False  # other queries are read without the first key
    found = logits[0].masked_fill(~causal, -torch.inf).logsumexp(-1)
    first, others = found[..., 0], found[..., 64:].transpose(0, 1).flatten(1)
    expected = ((others.mean(1) - first.mean(0)) / others.std(1)).median().item()
    batch = {"input_ids": input_ids, "position_ids": torch.arange(120).expand(3, -1)}
    assert calibrate(model, [batch]).separations[1] == pytest.approx(expected, rel=0.05)


def test_new_gates_are_where_the_model_is_by_then():
    model = get_peft_model(tiny_model("llama"), GateConfig(**BOTH))
    for layer in gate_layers(model).values():
        layer.device = torch.device("meta")  # where the base was when its gates were inserted
    model.base_model.choose_projection_layers("default", [0])
    gates = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert gates and all(gate.device.type == "cpu" for gate in gates)


def test_a_choice_of_layers_that_are_not_gated_is_refused():
    model = get_peft_model(tiny_model("llama"), GateConfig(**BOTH))
    with pytest.raises(UserError, match="projection_layers names layer 99, which is not gated"):
        model.base_model.choose_projection_layers("default", [0, 99])
    assert model.peft_config["default"].projection_layers is None


def test_a_choice_of_layers_takes_both_kinds_of_gates_and_leaves_the_config_alone():
    config = GateConfig(**BOTH)
    for _ in range(2):  # the same config serves two models
        model = get_peft_model(tiny_model("llama"), config)
        model.base_model.choose_projection_layers("default", [])
        assert model.peft_config["default"].granularity == "none"
    assert (config.granularity, config.projection_layers) == ("headwise", None)
    with pytest.raises(UserError, match="takes a config with both kinds"):
        model.base_model.choose_projection_layers("default", [0])


@pytest.fixture
def recipe(tiny_base, tmp_path):
    text = tmp_path / "text.jsonl"
    words = torch.randint(0, 26, (40, 90), generator=torch.Generator().manual_seed(0))
    rows = [" ".join(chr(97 + letter) for letter in row) for row in words.tolist()]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    def make(name: str):
        settings = {
            "output_dir": str(tmp_path / name),
            "model": {"base": str(tiny_base("llama"))},
            "gate": {**BOTH, "projection_layers": "auto"},
            "data": {"sources": [{"path": str(text)}], "sequence_length": 128},
            "train": {"max_steps": 2, "report_to": [], "save_steps": 1, "learning_rate": "auto"},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(settings))
        return load_recipe(str(path))

    return make


def test_a_base_whose_slots_suffice_gets_no_projection_and_a_stock_checkpoint(
    recipe, tmp_path, in_process
):
    run = train(recipe("run"))
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["granularity"] == "none" and config["projection_layers"] is None
    report = merge(run, tmp_path / "out")
    assert report["checkpoint"]["model_type"] == "granite_swa"


def test_the_trainer_by_itself_starts_as_train_does(recipe):
    run = train(recipe("run"))
    trainer = gate_trainer(recipe("other"))
    trainer.train()
    assert set(trainer.learning_rates) == {0, 1, 2}
    trained = load_file(run / "adapter/adapter_model.safetensors")
    for name, tensor in get_peft_model_state_dict(trainer.model).items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=0)


def test_a_projection_in_a_layer_that_is_not_gated_is_refused(recipe):
    for chosen, beyond in (({"projection_layers": [3]}, 3), ({"layers": [1, 2]}, 0)):
        settings = recipe("run").model_dump()
        settings["gate"] |= {"projection_layers": [0]} | chosen
        with pytest.raises(UserError, match=f"a projection in layer {beyond} of .*not gated"):
            train(Recipe.model_validate(settings))


@pytest.fixture
def sink_in_the_last_layer(monkeypatch):
    """A base of which calibration reads a sink in the last layer and no slot that would do."""
    read_shares = calibration._Reader.first_share
    monkeypatch.setattr(
        calibration._Reader,
        "first_share",
        lambda reader: read_shares(reader) + (reader.attention.layer_idx == 2),
    )
    monkeypatch.setattr(calibration, "BLURRED", float("inf"))


def test_a_run_keeps_resumes_and_merges_what_its_base_chose(
    recipe, tmp_path, sink_in_the_last_layer, in_process
):
    run = train(recipe("run"))
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert config["projection_layers"] == [0, 1] and config["granularity"] == "headwise"
    facts = json.loads((run / "run.json").read_text())
    assert facts["gate"]["projection_layers"] == [0, 1]
    model, _ = load_model(str(run))
    assert isinstance(model, PeftModel)
    for index, layer in gate_layers(model).items():
        gate = layer.g_proj["default"]
        assert (gate.weight is not None) == (gate.sink_odds is None) == (index < 2)
    whole = (run / "adapter/adapter_model.safetensors").read_bytes()
    for left in ("run.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        (run / left).unlink()
    for left in (run / "checkpoints/checkpoint-2").iterdir():
        left.unlink()
    (run / "checkpoints/checkpoint-2").rmdir()
    train(recipe("run"), resume=True)
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == whole
    report = merge(run, tmp_path / "out")
    assert report["checkpoint"]["format"] == "remote-code"
    assert report["verification"]["max_logprob_difference"] < 1e-4
