"""The benchmarks time what they say they time."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from made_runs import SINKS, make_run
from safetensors.torch import save_file
from tiny import DENSE, tiny_model, tiny_tokenizer, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

import gguf_quantization
import levers
import llm_compressor
import packing
import paired
import serving
import serving_engines
import serving_shapes
import startup
import training
from base_gguf import write_base_gguf
from retrofit.export.granite_swa import granite_config
from retrofit.export.qwen3_5 import native_config
from retrofit.utils.files import read_json


def test_arms_take_turns_and_the_first_turn_is_left_out():
    calls = []

    def arm(name):
        return lambda: calls.append(name) or len(calls)

    results = paired.collected({"a": arm("a"), "b": arm("b")}, repeats=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert results == {"a": [3, 6], "b": [4, 5]}
    seconds = paired.in_turns({"a": arm("a")}, repeats=3)
    assert len(seconds["a"]) == 3 and min(seconds["a"]) > 0


def test_a_ratio_is_of_pairs():
    row = paired.ratio("x", own=[1.0, 9.0, 4.0], other=[2.0, 3.0, 4.0], goal=1.1)
    assert (row.low, row.median, row.high) == (0.75, 1.0, 2.0)  # of 0.5, 1 and 3
    assert row.met
    slow = paired.Ratio("rate", 3.0, 2.5, 2.0, 2.8, at_least=True)
    assert slow.met is False
    assert "| rate | **2.5** | 2 to 2.8 | >= 3 |" in paired.table([row, slow])


@pytest.mark.parametrize("arm", startup.ARMS)
def test_both_first_steps_are_the_same_loss_down_to_the_embeddings(arm, tiny_base):
    options = Namespace(base=str(tiny_base("llama")), dtype="float32", length=32)
    model = startup.ARMS[arm](options)
    reached = []

    def watch(_module, _args, output):
        if output.requires_grad:
            output.register_hook(reached.append)

    model.get_input_embeddings().register_forward_hook(watch)
    loss = startup.first_step(model, options.length)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, (1, 32), generator=generator)
    with torch.no_grad():
        logits = tiny_model("llama")(input_ids).logits
    assert loss == pytest.approx(F.cross_entropy(logits[0, :-1], input_ids[0, 1:]).item(), rel=1e-4)
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    if arm == "plain":
        assert not trained and reached[0].abs().max() > 0
    else:
        assert len(trained) == 3 and all(".attn_gate." in name for name in trained)


def test_a_start_is_told_in_parts_by_a_process_of_its_own(tiny_base, capsys, monkeypatch):
    base = str(tiny_base("llama"))
    monkeypatch.setattr(sys, "argv", ["startup.py", base, "--length", "32", "--arm", "gated"])
    startup.main()
    parts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(parts) == {"trace", "load", "hash", "step"} and min(parts.values()) > 0


@pytest.fixture
def training_options(tiny_base, tmp_path) -> Namespace:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"sink {i} " * 90}) + "\n" for i in range(80)))
    shape = {"length": 128, "rows": 1, "text": str(text), "dtype": "float32"}
    return Namespace(base=str(tiny_base("llama")), **shape)


@pytest.fixture
def batch(training_options, tmp_path) -> Path:
    save_file(training.first_batch(training_options, tmp_path), tmp_path / "batch.safetensors")
    return tmp_path / "batch.safetensors"


def test_all_arms_take_the_same_loss_of_the_same_batch(training_options, batch, tmp_path):
    arms = (*training.GATES, *training.TRL, "LoRA, ours", "floor")
    losses = {
        arm: float(training.build(arm, training_options, tmp_path / arm, batch)()) for arm in arms
    }
    assert losses == {arm: pytest.approx(losses["floor"], rel=1e-4) for arm in arms}


def test_memory_is_what_a_step_adds(training_options, batch, tmp_path):
    training_options.peak = ("gates", str(batch))
    assert abs(training.added_memory(training_options, tmp_path)) < 1  # GB


@pytest.mark.parametrize("lever", [name for name in levers.LEVERS if "compiled" not in name])
def test_a_lever_changes_no_loss(lever, training_options, batch, tmp_path, monkeypatch):
    chosen = levers.LEVERS[lever]
    if "layers" in chosen.recipe.get("gate", {}):
        chosen = replace(chosen, recipe={"gate": {"layers": [1, 2]}})
    on, off = (
        levers.build(chosen, state, training_options, tmp_path / str(state), batch)
        for state in (True, False)
    )
    for _ in range(2):
        assert float(on()) == pytest.approx(float(off()), rel=1e-4)


@pytest.fixture
def chats(tmp_path) -> Path:
    rows = [
        {
            "context": f"Question: {'why ' * (index % 7)}?\nAnswer:",
            "choices": ["no", "yes"],
            "gold": 1,
        }
        for index in range(24)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": packing.messages(row)}) for row in rows))
    return path


def test_both_trainings_count_every_token_that_is_predicted_and_no_other(
    chats, tiny_base, tmp_path
):
    options = Namespace(base=str(tiny_base("llama")), dtype="float32", length=128, batch_size=2)
    counted = {}
    for name, packed in packing.ARMS.items():
        arm = packing.arm_of(packing.recipe(options, chats, packed, tmp_path / name), tokens=1)
        rows = arm.trainer.train_dataset
        assert arm.trainer.args.max_steps == 1
        arm.trainer.args.max_steps = math.ceil(len(rows) / options.batch_size)  # all of it once
        assert arm.rate() > 0
        counted[name] = arm.labelled
        if not packed:
            assert len(rows) == 24
            assert counted[name] == sum(len(ids) - 1 for ids in rows["input_ids"])
    assert counted["packed"] == counted["padded"]


def test_a_question_and_its_answer_are_a_chat():
    row = {
        "context": "Goal: To dry: a dish\nAnswer:",
        "choices": ["Wet it.", "Wipe it."],
        "gold": 1,
    }
    assert packing.messages(row) == [
        {"role": "user", "content": "To dry: a dish"},
        {"role": "assistant", "content": "Wipe it."},
    ]


@pytest.mark.parametrize("centered", [False, True])
def test_the_weights_that_a_gate_adds_are_those_of_its_formula(tiny_base, centered):
    config = AutoConfig.from_pretrained(tiny_base("llama"))
    width, heads, groups, layers = 64 * 16, 4, 2, 3
    expected = layers * heads * width  # twice the queries
    if centered:
        expected += layers * width * (2 + 3 * groups)
    added = serving_shapes.added_weights(config)
    assert added["native, centered" if centered else "native"] == expected
    assert added["narrow"] == layers * heads * 64
    written = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**native_config(config, centered=centered))
    )
    matrices = [p.numel() for p in written.model.layers.parameters() if p.ndim > 1]
    assert sum(matrices) == serving_shapes.passed(config)[0] + expected


def test_sink_logits_add_no_matrix(tiny_base):
    config = AutoConfig.from_pretrained(tiny_base("llama"))
    merged = AutoConfig.for_model(**granite_config(config, biased=True))
    assert serving_shapes.passed(merged) == serving_shapes.passed(config)


def test_a_prompt_is_read_once_and_each_new_token_alone():
    model = tiny_model("llama")
    widths = []
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prefill, decoding = serving_engines.prefill_and_decode(
        model, torch.arange(20)[None], new_tokens=3
    )
    assert widths == [20, 1, 1, 1]
    assert prefill > 0 and decoding > 0


@pytest.fixture
def serve(tmp_path, in_process, monkeypatch, capfd):
    """Runs the benchmark on little, and gives its ratios by name."""

    def run(*arguments: str) -> dict[str, dict]:
        out = tmp_path / "out.json"
        command = ["serving.py", *arguments, "--repeats", "2", "--new-tokens", "2"]
        monkeypatch.setattr(sys, "argv", [*command, "--json", str(out)])
        serving.main()
        assert "tokens/s" in capfd.readouterr().out
        rows = {row["name"]: row for row in read_json(out)["ratios"]}
        assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows.values())
        return rows

    return run


@pytest.fixture
def run_with_sinks(tmp_path) -> Path:
    """Constant sinks with key biases and centers, as the recipes train them."""
    write_tiny(tmp_path / "base", "llama")
    return make_run(tmp_path / "run", tmp_path / "base", centered=True, **SINKS)


def phases(*prompts: int) -> list[str]:
    return [each for n in prompts for each in (f"prefill of {n}", f"decoding after {n}")]


def test_a_merged_model_and_a_run_are_timed_beside_the_base(tiny_base, serve):
    rows = serve(
        *(str(tiny_base("llama")), "--engines", "transformers", "--prompt", "16"),
        *("--variants", "native", "run (PEFT)"),
    )
    assert set(rows) == {
        f"transformers, {variant}, sdpa / sdpa, {phase}"
        for variant in ("native", "run (PEFT)")
        for phase in phases(16)
    }
    assert rows["transformers, native, sdpa / sdpa, prefill of 16"]["goal"] == serving.GOAL
    assert rows["transformers, run (PEFT), sdpa / sdpa, prefill of 16"]["goal"] is None


def test_sinks_are_timed_beside_the_base_under_both_attentions(run_with_sinks, serve):
    given = ("--run", str(run_with_sinks), "--engines", "transformers", "--prompt", "16", "24")
    assert set(serve(*given, "--variants", "native")) == {
        f"transformers, native, eager / {attention}, {phase}"
        for attention in ("eager", "sdpa")
        for phase in phases(16, 24)
    }


def test_sinks_are_timed_in_llama_cpp_in_each_kind_of_weights(run_with_sinks, serve):
    given = ("--run", str(run_with_sinks), "--engines", "llama.cpp", "--prompt", "32")
    assert set(serve(*given, "--gguf", "float32", "q8_0")) == {
        f"llama.cpp, gguf, {kind}, {phase}" for kind in ("float32", "q8_0") for phase in phases(32)
    }


VLLM = """
import json
import pathlib
import time

class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, **_):
        self.model = model

    def generate(self, prompts, asked, **_):
        call = [self.model, len(prompts[0]["prompt_token_ids"]), asked.max_tokens]
        with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
            print(json.dumps(call), file=calls)
        time.sleep(0.01 * asked.max_tokens)
"""


def test_sinks_take_turns_with_the_base_in_vllm(run_with_sinks, serve, tmp_path, monkeypatch):
    """A stand-in for vLLM writes down what it is asked for."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    given = ("--run", str(run_with_sinks), "--engines", "vllm", "--vllm", sys.executable)
    rows = serve(*given, "--prompt", "16", "24")
    forms = ("native", "remote-code")
    assert set(rows) == {f"vllm, {form}, {phase}" for form in forms for phase in phases(16, 24)}
    calls = [json.loads(line) for line in (tmp_path / "site/calls").read_text().splitlines()]
    one_form = 6 * [[16, 1], [16, 3]] + 6 * [[24, 1], [24, 3]]
    assert [call[1:] for call in calls] == 2 * one_form
    own, base = calls[0][0], str(tmp_path / "base")
    assert [call[0] for call in calls[:12:2]] == [own, base, own, base, base, own]


def test_vllm_has_to_be_named(serve, capfd):
    with pytest.raises(SystemExit):
        serve("--engines", "vllm")
    assert "name its Python with --vllm" in capfd.readouterr().err


def test_weights_are_counted_as_they_are_held(tmp_path):
    model = tiny_model("llama")
    model.bfloat16().save_pretrained(tmp_path)
    held = serving_engines.weight_bytes(model.float())
    assert serving_engines.stored_bytes(tmp_path, "float32") == held


@pytest.mark.parametrize("family", DENSE)
def test_llama_cpp_runs_the_base_itself(family, tmp_path):
    import llama_server

    write_tiny(tmp_path / "base", family)
    write_base_gguf(tmp_path / "base", tmp_path / "base.gguf", "float32")
    input_ids = list(range(60, 90))
    with torch.no_grad():
        ours = tiny_model(family)(torch.tensor([input_ids])).logits[0, -1].log_softmax(-1)
    _, theirs = llama_server.request_next_token(
        llama_server.start_server(tmp_path / "base.gguf", 1), input_ids
    )
    assert len(theirs) > 50
    assert all(abs(ours[token] - told) < 1e-3 for token, told in theirs.items())


def test_llama_cpp_tells_the_times_of_prompt_and_new_tokens(tmp_path):
    write_tiny(tmp_path / "base", "llama")
    write_base_gguf(tmp_path / "base", tmp_path / "base.gguf", "bfloat16")
    server = serving_engines.llama_server(tmp_path / "base.gguf", 40)
    for _ in range(2):  # the prompt is read again each time
        prefill, decoding = serving_engines.llama_cpp_seconds(server, list(range(60, 92)), 4)
        assert prefill > 0 and decoding > 0


def test_what_llama_perplexity_says_is_read():
    said = """
Mean PPL(Q)                   :  75.000000 ±   1.500000
Mean PPL(base)                :  71.905098 ±   1.400000
Mean ln(PPL(Q)/PPL(base))     :   0.059976 ±   0.015792
Mean PPL(Q)/PPL(base)         :   1.061810 ±   0.016768
Maximum KLD:   2.100000
Mean    KLD:   0.063928 ±   0.004429
"""
    row = gguf_quantization.parsed("base", "Q4_K_M", 105.4, said)
    assert row == gguf_quantization.Row(
        "base", "Q4_K_M", 105.4, 71.905098, 1.06181, 0.016768, 0.063928, 0.004429
    )
    own = replace(row, model="retrofit", ratio=1.05)
    assert "| Q4_K_M | 105 MB | +6.2% ± 1.7% | +5.0% ± 1.7% |" in gguf_quantization.table(
        [row, own]
    )
    with pytest.raises(SystemExit, match="says no"):
        gguf_quantization.parsed("base", "Q4_K_M", 105.4, "error: no such file")


def test_a_quantized_model_is_compared_with_itself_window_by_window():
    """llm-compressor has an environment of its own; what stands around it runs here as well."""
    before, after = tiny_model("llama"), tiny_model("llama")
    windows = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    same = llm_compressor.compared("base", "none", before, after, windows)
    assert (same.log_ratio, same.kl) == pytest.approx((0, 0), abs=1e-6)
    losses = torch.stack([before(w[None], labels=w[None]).loss for w in windows])
    assert same.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    with torch.no_grad():
        after.lm_head.weight.mul_(1.5)
    other = llm_compressor.compared("retrofit", "none", before, after, windows)
    changed = torch.stack([after(w[None], labels=w[None]).loss for w in windows]) - losses
    assert other.log_ratio == pytest.approx(changed.mean().item(), abs=1e-5)
    assert other.log_ratio_error == pytest.approx(changed.std().item() / 3**0.5, abs=1e-5)
    assert other.kl > 0
    rise = f"{changed.mean().expm1().item():+.1%}"
    assert f"| none | +0.0% ± 0.0% | {rise} ± " in llm_compressor.table([same, other])


def test_windows_to_quantize_with_are_the_first_of_a_file(tiny_base, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "one two"}\n{"text": "three"}\n')
    tokens = [ord(c) for c in "one twothree"]
    windows = llm_compressor.read_windows(str(tiny_base("llama")), str(file), 4, 3)
    decoded = tiny_tokenizer().decode(windows.flatten())
    assert (windows.shape, decoded) == ((3, 4), bytes(tokens).decode())
    with pytest.raises(SystemExit, match="fewer than 4 windows of 4 tokens"):
        llm_compressor.read_windows(str(tiny_base("llama")), str(file), 4, 4)
