"""`retrofit train` on tiny models: what it writes, what it learns from, and that it can resume."""

import errno
import io
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from former_names import rename_gates
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from retrofit.adapters import family_of
from retrofit.data.mixture import mix
from retrofit.data.sources import load_sources
from retrofit.gates import GateLayer, gate_layers
from retrofit.recipe import Data, Recipe
from retrofit.training import callbacks
from retrofit.training.callbacks import DeadGateError, GradientCheck, Interrupt
from retrofit.training.divergence import DivergedError
from retrofit.training.run import gate_trainer, train
from retrofit.training.trainer import GateTrainer
from retrofit.training.trainer_state import accumulation_steps
from retrofit.utils.errors import UserError

WORDS = "the sink token head gate layer draws all attention to first last union people".split()


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(count)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(120)))
    return path


@pytest.fixture
def make_recipe(tiny_base, text, tmp_path):
    """A recipe on a tiny model; keyword arguments replace whole sections' keys."""

    def make(model_type="llama", name="run", sources=None, **sections) -> Recipe:
        settings = {
            "output_dir": str(tmp_path / name),
            "model": {"base": str(tiny_base(model_type))},
            "data": {
                "sources": sources or [{"path": str(text)}],
                "sequence_length": 64,
                "packing": family_of(model_type).packs,
            },
            "train": {"max_steps": 4, "save_steps": 2, "batch_size": 2, "report_to": []},
        }
        for section, keys in sections.items():
            settings[section] = settings.get(section, {}) | keys
        return Recipe.model_validate(settings)

    return make


def adapter_of(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_the_balance_of_heads_does_not_change_what_gates_are_said_to_do(make_recipe):
    def movement(**objective):
        name = "-".join(objective) or "plain"
        recipe = make_recipe(
            name=name,
            data={"sequence_length": 128},
            gate={"sinks": "none", "key_bias": False, "granularity": "headwise"},
            objective={"lm": 1.0, **objective},
            train={"learning_rate": 0.1},
        )
        figures = json.loads((train(recipe) / "run.json").read_text())
        return figures["last"]["gate_movement"]

    assert movement(balance=1e-9) == pytest.approx(movement(), rel=1e-3)


def test_a_log_file_has_a_line_for_each_step(make_recipe):
    log = io.StringIO()
    train(make_recipe(objective={"kl": 1.0}), console=Console(file=log, width=40))
    steps = [line for line in log.getvalue().splitlines() if "step" in line]
    assert len(steps) == 4
    for number, line in enumerate(steps, 1):
        assert line.startswith(f"step {number}/4 loss ") and line.endswith(" s left")


def test_a_run_folder_holds_what_it_promises(family, granularity, make_recipe, tiny_base):
    recipe = make_recipe(family, gate={"granularity": granularity}, objective={"kl": 0.5})
    run = train(recipe)
    assert yaml.safe_load((run / "recipe.resolved.yaml").read_text()) == recipe.model_dump()
    summary = json.loads((run / "run.json").read_text())
    assert summary["base"]["weights_sha256"] == summary["base_weights_sha256_after"]
    assert summary["base"]["model_type"] == family
    assert summary["steps"] == 4
    assert 4 * 64 < summary["tokens"] <= 4 * 2 * 64
    assert summary["first"]["gate_movement"] == 0.0
    assert summary["last"]["gate_movement"] > 0.0
    assert summary["first"]["kl"] < 1e-6 < summary["last"]["kl"]
    base = AutoModelForCausalLM.from_pretrained(tiny_base(family))
    gates = gate_layers(PeftModel.from_pretrained(base, run / "adapter"))
    assert all(layer.g_proj["default"].weight.abs().max() > 0 for layer in gates.values())


def test_nothing_is_pickled(make_recipe):
    run = train(make_recipe())
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".yaml", ".md", ".jinja"}
    assert (run / "checkpoints" / "checkpoint-2" / "optimizer.safetensors").is_file()


def test_checkpoints_hold_adapters_alone(make_recipe):
    run = train(make_recipe())
    tensors = load_file(run / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(".attn_gate.g_proj." in name for name in tensors)
    final = adapter_of(run)
    assert all(torch.equal(tensors[name], final[name]) for name in final)


def test_two_runs_of_one_seed_are_bitwise_equal_and_another_seed_is_not(make_recipe):
    first = adapter_of(train(make_recipe(name="a")))
    again = adapter_of(train(make_recipe(name="b")))
    other = adapter_of(train(make_recipe(name="c", train={"seed": 1})))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


class StopAt(GradientCheck):
    """Presses Ctrl-C at a step: raises the process's own signal."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_interrupted_and_resumed_equals_uninterrupted_bitwise(make_recipe, monkeypatch, tmp_path):
    from retrofit.training import run as module

    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": " ".join(sentences(120))}) + "\n")
    settings = {
        "sources": [{"path": str(path)}],
        "data": {"sequence_length": 136, "first_tokens": 8},
        "objective": {"pressure": 5.0, "activation": 1.0},  # pressure draws random rows each step
        "train": {"max_steps": 6, "save_steps": 100, "gradient_accumulation_steps": 2},
    }
    handler = signal.getsignal(signal.SIGINT)  # the default's, or none in a shell's background
    whole = adapter_of(train(make_recipe(name="whole", **settings)))
    recipe = make_recipe(name="halves", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(module, "GradientCheck", lambda: StopAt(2))
        with pytest.raises(module.Interrupted, match="stopped at step 3"):
            train(recipe)
    assert signal.getsignal(signal.SIGINT) is handler
    run = train(recipe, resume=True)
    halves = adapter_of(run)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert json.loads((run / "run.json").read_text())["steps"] == 6


def test_what_a_run_says_of_itself_is_of_all_its_parts(make_recipe, monkeypatch):
    from retrofit.training import run as module

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    settings = {"train": {"max_steps": 4, "save_steps": 1, "report_to": ["tensorboard"]}}
    recipe = make_recipe(name="first", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(module, "GradientCheck", lambda: StopAt(1))
        with pytest.raises(module.Interrupted):
            train(recipe)
    run = Path(recipe.output_dir)
    step = run / "checkpoints" / "checkpoint-2" / "step.json"
    step.write_text(json.dumps(json.loads(step.read_text()) | {"seconds": 1000.0}))
    train(recipe, resume=True)
    assert 1000 < json.loads((run / "run.json").read_text())["seconds"] < 1100
    second = train(make_recipe(name="second", **settings))
    assert list((run / "tensorboard").rglob("events*"))
    assert list((second / "tensorboard").rglob("events*"))


def test_a_run_whose_checkpoint_has_the_former_names_of_gates_goes_on_bitwise(make_recipe):
    recipe = make_recipe()
    run = train(recipe)
    whole = adapter_of(run)
    shutil.rmtree(run / "adapter")
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    rename_gates(run / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    resumed = adapter_of(train(recipe, resume=True))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(whole[name], gate) for name, gate in resumed.items())


def test_a_signal_during_the_exchange_between_ranks_is_not_forgotten(monkeypatch):
    args, control = SimpleNamespace(world_size=2, device="cpu"), SimpleNamespace()
    interrupt = Interrupt(Console(quiet=True))

    def signalled_meanwhile(asked, _):
        interrupt._request(signal.SIGINT, None)
        return asked

    monkeypatch.setattr(callbacks, "reduce", signalled_meanwhile)
    interrupt.on_step_end(args, None, control)
    assert not interrupt.stopped and not vars(control)
    monkeypatch.setattr(callbacks, "reduce", lambda asked, _: asked)
    interrupt.on_step_end(args, None, control)
    assert interrupt.stopped and control.should_save and control.should_training_stop


def test_a_step_that_the_ranks_cannot_share_is_refused(tmp_path):
    (tmp_path / "step.json").write_text('{"rows": 12}')
    assert accumulation_steps(tmp_path, batch_size=2, ranks=3) == 2
    with pytest.raises(UserError, match="a number of ranks that divides 6"):
        accumulation_steps(tmp_path, batch_size=2, ranks=4)


def test_zero_3_is_refused(make_recipe):
    trainer = gate_trainer(make_recipe())
    plugin = SimpleNamespace(zero_stage=3)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(UserError, match="ZeRO-3 is not supported"):
        trainer._check_engine()


def test_a_half_written_checkpoint_is_passed_over(make_recipe, monkeypatch):
    from retrofit.training import run as module

    recipe = make_recipe(train={"max_steps": 6, "save_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(module, "GradientCheck", lambda: StopAt(4))
        with pytest.raises(module.Interrupted):
            train(recipe)
    newest = Path(recipe.output_dir) / "checkpoints" / "checkpoint-5"
    (newest / "trainer_state.json").unlink()
    assert json.loads((train(recipe, resume=True) / "run.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_saves_says_how_to_go_on_and_exits_130(make_recipe, tmp_path):
    recipe = make_recipe(train={"max_steps": 5000})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-c", "from retrofit.cli import main; main()", "train", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    while not (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: retrofit train {path} --resume" in stderr
    assert "Traceback" not in stderr


def test_every_gate_must_get_a_gradient_or_the_run_stops_and_names_it(make_recipe, monkeypatch):
    forward = GateLayer.forward

    def bypassed(self, states, *args):
        gated = forward(self, states, *args)
        return states if self.bypass else gated

    monkeypatch.setattr(GateLayer, "bypass", False, raising=False)
    monkeypatch.setattr(GateLayer, "forward", bypassed)
    trainer = gate_trainer(make_recipe(), callbacks=[GradientCheck()])
    gate_layers(trainer.model)[1].bypass = True
    with pytest.raises(DeadGateError, match=r"1 of 3 gates.*layers\.1\.self_attn\.attn_gate"):
        trainer.train()


def poisoned(monkeypatch, name, value, at):
    """Let the loss, or its gradient, be `value` at one step."""
    from retrofit.training.trainer import GateTrainer

    original = GateTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step != at:
            return loss
        if name == "loss":
            return loss + value
        loss.register_hook(lambda grad: grad * value)
        return loss * 1.0

    monkeypatch.setattr(GateTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("name", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2])
def test_a_run_whose_loss_or_gradient_is_no_number_stops_at_once(
    make_recipe, monkeypatch, tmp_path, name, value, at
):
    poisoned(monkeypatch, name, value, at)
    with pytest.raises(DivergedError) as raised:
        train(make_recipe(train={"save_steps": 1}))
    message = str(raised.value)
    assert f"the {name} is " in message and "\n" not in message
    assert ("at the first step" if at == 0 else "at step 3; lower train.learning_rate") in message
    assert not (tmp_path / "run" / "run.json").exists()
    assert len(list((tmp_path / "run").glob("checkpoints/checkpoint-*"))) == at


def test_a_learning_rate_that_is_far_too_high_is_told(make_recipe, tmp_path):
    recipe = make_recipe(
        gate={"activation": "linear"},
        train={"learning_rate": 1e37, "max_steps": 20, "schedule": "constant_with_warmup"},
    )
    with pytest.raises(DivergedError, match=r"lower train.learning_rate \(it is 1e\+37"):
        train(recipe)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_changed_base_weight_fails_the_run(make_recipe, monkeypatch):
    from retrofit.training import run as module

    class Vandal(GradientCheck):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.get_base_model().model.layers[0].mlp.up_proj.weight.data[0, 0] += 1

    monkeypatch.setattr(module, "GradientCheck", Vandal)
    recipe = make_recipe()
    with pytest.raises(module.BaseChangedError):
        train(recipe)
    assert not (Path(recipe.output_dir) / "run.json").exists()


def test_accumulation_equals_one_large_batch(make_recipe):
    """With rows of unequal numbers of labels: the mean is over tokens, not over batches."""
    data = {"packing": False}
    one = make_recipe(name="one", data=data, train={"max_steps": 1, "batch_size": 4})
    four = make_recipe(
        name="four",
        data=data,
        train={"max_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 4},
    )
    trainers = [gate_trainer(one), gate_trainer(four)]
    for trainer in trainers:
        trainer.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    norms = [trainer.state.log_history[0]["grad_norm"] for trainer in trainers]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_packed_documents_do_not_see_each_other(make_recipe, family):
    """Every packed document's hidden states equal those it has alone."""
    if not family_of(family).packs:
        pytest.skip("its documents cannot share a row")
    trainer = gate_trainer(make_recipe(family))
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    model = trainer.model.get_base_model().eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    documents = 0
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, positions, packed in zip(
            batch["input_ids"], batch["position_ids"], logits, strict=True
        ):
            starts = (positions == 0).nonzero().flatten().tolist()
            documents += len(starts)
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                alone = model(row[None, start:end]).logits[0]
                torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-4)
    assert documents > 4


def test_long_documents_are_split_not_cut_off(make_recipe, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": " ".join(sentences(60))}) + "\n")
    trainer = gate_trainer(make_recipe(sources=[{"path": str(path)}]))
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert tokens == len(json.loads(path.read_text())["text"]) + 1  # bytes, and the end of text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_local_files_of_every_kind_train(make_recipe, tmp_path, suffix):
    path, lines = tmp_path / f"data{suffix}", sentences(60)
    if suffix == ".parquet":
        Dataset.from_dict({"body": lines}).to_parquet(str(path))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    else:
        path.write_text("\n".join(lines))
    source = {"path": str(path), "text_field": "text" if suffix == ".txt" else "body"}
    run = train(make_recipe(sources=[source], train={"max_steps": 2}))
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["[12]", "*", "?", "**", "{a,1}", "a!b", "[!1]"])
def test_a_path_is_the_file_of_that_name_and_no_pattern(tmp_path, name, streaming):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "right"}) + "\n")
    for other in ("1", "2", "a"):
        (tmp_path / f"{other}.jsonl").write_text(json.dumps({"text": "wrong"}) + "\n")
    for folder in (tmp_path, tmp_path / name):
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.jsonl"
        path.write_text(json.dumps({"text": "right"}) + "\n")
        data = Data.model_validate({"sources": [{"path": str(path)}], "streaming": streaming})
        (source,) = load_sources(data, tiny_tokenizer())
        assert [row["text"] for row in source.rows] == ["right"]


def test_prompt_completion_data_trains_on_completions_and_learns_where_they_end(
    make_recipe, tmp_path
):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{line}:", "completion": " a sink"} for line in sentences(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(sources=[{"path": str(path)}], data={"packing": False})
    trainer = gate_trainer(recipe)
    row = trainer.train_dataset[0]
    labelled = [label for label in row["labels"] if label != -100]
    assert trainer.processing_class.decode(labelled) == " a sink</s>"
    assert len(labelled) < len(row["labels"])


def test_chat_data_goes_through_the_chat_template(make_recipe, tmp_path):
    path = tmp_path / "chat.jsonl"
    message = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    }
    path.write_text((json.dumps(message) + "\n") * 40)
    recipe = make_recipe(sources=[{"path": str(path)}], data={"packing": False})
    trainer = gate_trainer(recipe)
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text == "<s>user\nhi</s>\n<s>assistant\nyo</s>\n"


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("prepends", [True, False])
def test_a_long_text_loses_no_token(make_recipe, tmp_path, packing, prepends, streaming):
    """Where a tokenizer puts a BOS token first, every piece of a text begins with it, as do the
    windows that are measured."""
    text = string.printable[:94] * 5
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    data = {"packing": packing, "streaming": streaming}
    recipe = make_recipe(sources=[{"path": str(path)}], data=data, train={"max_steps": 1})
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token_id
    if prepends:
        template = TemplateProcessing("<s> $0", "<s> $A $B", [("<s>", bos)])
        tokenizer.backend_tokenizer.post_processor = template
    expected = tokenizer(text)["input_ids"]
    trainer = gate_trainer(recipe, tokenizer=tokenizer)
    rows = list(islice(iter(trainer.train_dataset), 20))
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    assert all((row["input_ids"][0] == bos) == prepends for row in rows)
    rest = [token for row in rows for token in row["input_ids"] if token != bos]
    assert sorted(rest) == sorted([*expected[prepends:], tokenizer.eos_token_id])


def test_pairs_and_chats_mix_unpacked(make_recipe, tmp_path):
    pair = {"prompt": "hi", "completion": " yo"}
    chat = {
        name: [{"role": role, "content": content}]
        for name, role, content in (("prompt", "user", "hi"), ("completion", "assistant", "yo"))
    }
    sources = []
    for name, row in {"pairs": pair, "chats": chat}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text((json.dumps(row) + "\n") * 10)
        sources.append({"path": str(path)})
    trainer = gate_trainer(make_recipe(sources=sources, data={"packing": False}))
    assert set(trainer.train_dataset.column_names) == {"input_ids", "labels"}
    assert len(trainer.train_dataset) == 20


def test_what_is_logged_is_a_mean_over_tokens_however_they_are_split(make_recipe, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "hi", "completion": "yo" * (1 + 9 * (index % 2))} for index in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logged = []
    for rows, batches in ((4, 1), (1, 4)):
        split = {"batch_size": rows, "gradient_accumulation_steps": batches, "max_steps": 1}
        data, objective = {"packing": False}, {"lm": 1.0, "kl": 1.0}
        recipe = make_recipe(
            name=f"by-{rows}", sources=[{"path": str(path)}], data=data, objective=objective,
            train=split,
        )  # fmt: skip
        trainer = gate_trainer(recipe)
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[0]["lm"] == pytest.approx(logged[1]["lm"], rel=1e-5)
    assert logged[1]["lm"] + logged[1]["kl"] == pytest.approx(logged[1]["loss"], abs=1e-4)


def test_a_full_disk_under_the_rows_is_one_line(make_recipe, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(GateTrainer, "_tokenized", full)
    with pytest.raises(UserError, match="datasets cannot be written: No space left on device"):
        train(make_recipe())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("packing", [True, False])
def test_sources_of_two_formats_mix_in_the_given_shares(make_recipe, tmp_path, text, packing):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Q" * 20, "completion": "A" * 30} for _ in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(text), "weight": 1.0}, {"path": str(path), "weight": 3.0}]
    trainer = gate_trainer(make_recipe(sources=sources, data={"packing": packing}))
    letters = trainer.processing_class("QA")["input_ids"]
    of_pairs = [row["input_ids"][0] in letters for row in trainer.train_dataset]
    tokens = [len(row["input_ids"]) for row in trainer.train_dataset]
    in_pairs = sum(n for n, pair in zip(tokens, of_pairs, strict=True) if pair)
    assert in_pairs / sum(tokens) == pytest.approx(0.75, abs=0.005)
    assert all(
        label in (-100, letters[1], 257)
        for row, pair in zip(trainer.train_dataset, of_pairs, strict=True)
        if pair
        for label in row["labels"]
    )


def test_mix_keeps_every_row_when_no_weights_are_given():
    parts = [Dataset.from_dict({"x": [1] * 5}), Dataset.from_dict({"x": [2] * 7})]
    assert sorted(mix(parts, [None, None], seed=0)["x"]) == [1] * 5 + [2] * 7


def documents(length, count, token):
    return Dataset.from_dict({"input_ids": [[token] * length] * count})


def share_of(token, rows, first=None):
    tokens = [t for row in islice(iter(rows), first) for t in row["input_ids"]]
    return tokens.count(token) / len(tokens)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.03])
@pytest.mark.parametrize("lengths", [(2, 64), (64, 2), (7, 7)])
def test_a_weight_is_a_share_of_tokens_and_no_row_is_left_out(share, lengths):
    parts = [documents(lengths[0], 150, 1), documents(lengths[1], 100, 2)]
    mixed = mix(parts, [share, 1 - share], seed=0)
    assert share_of(1, mixed) == pytest.approx(share, rel=0.02)
    rows = [row["input_ids"][0] for row in mixed]
    assert rows.count(1) >= 150 and rows.count(2) >= 100
    assert rows.count(1) == 150 or rows.count(2) == 100
    streams = [part.to_iterable_dataset() for part in parts]
    mixed = mix(streams, [share, 1 - share], seed=0)
    assert share_of(1, mixed, 8000) == pytest.approx(share, rel=0.1, abs=0.02)


def test_rows_of_unequal_length_are_taken_in_turn():
    uneven = Dataset.from_dict({"input_ids": [[1] * n for n in (1, 30, 2, 40, 3)]})
    mixed = mix([uneven, documents(10, 500, 2)], [1.0, 1.0], seed=0)
    assert share_of(1, mixed) == pytest.approx(0.5, abs=0.005)


def test_streaming_trains(make_recipe):
    recipe = make_recipe(data={"streaming": True}, train={"max_steps": 3})
    assert json.loads((train(recipe) / "run.json").read_text())["steps"] == 3


@pytest.mark.parametrize("mode", ["selective", "full", "reentrant"])
def test_gradient_checkpointing_trains_the_same(make_recipe, mode, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": " ".join(sentences(60))}) + "\n")
    settings = {
        "sources": [{"path": str(path)}],
        "data": {"sequence_length": 160},
        "objective": {"kl": 1.0, "pressure": 5.0},
    }
    plain = adapter_of(train(make_recipe(name="plain", **settings)))
    checkpointed = adapter_of(
        train(make_recipe(name=mode, **settings, train={"gradient_checkpointing": mode}))
    )
    unpressed = adapter_of(train(make_recipe(name="no", **settings | {"objective": {"kl": 1.0}})))
    assert any(not torch.allclose(plain[name], unpressed[name], atol=1e-4) for name in plain)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_trains_the_same(make_recipe):
    settings = {"data": {"packing": False}, "objective": {"kl": 1.0}}
    plain = adapter_of(train(make_recipe(name="plain", **settings)))
    recipe = make_recipe(name="compiled", **settings, train={"torch_compile": True})
    compiled = adapter_of(train(recipe))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_four_bit_base_trains_float32_gates(make_recipe):
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe(model={"quantization": "nf4", "dtype": "float32"}, objective={"kl": 0.5})
    run = train(recipe)
    assert all(tensor.dtype == torch.float32 for tensor in adapter_of(run).values())
    summary = json.loads((run / "run.json").read_text())
    assert summary["base"]["quantization"] == "nf4"
    assert summary["base"]["weights_sha256"] == summary["base_weights_sha256_after"]


def bad_source(tmp_path, content: str | None):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    return [{"path": str(path)}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        ("", "bad.jsonl"),
        ('{"text": \n', "cannot read"),
        ('{"body": "x"}\n', "has the columns body; expected text"),
        ('{"text": "short"}\n', "too short: 1 rows of 64 tokens, and one step takes 2"),
    ],
)
def test_bad_data_is_one_line_and_nothing_is_written(make_recipe, tmp_path, content, message):
    recipe = make_recipe(sources=bad_source(tmp_path, content))
    with pytest.raises(UserError) as raised:
        train(recipe)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_bad_models_are_one_line_and_nothing_is_written(make_recipe, tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    for base, message in {
        str(
            tmp_path / "gpt2"
        ): "cannot gate a 'gpt2' model; supported: gemma3_text, gpt_oss, llama",
        str(tmp_path / "nowhere"): "no model at",
    }.items():
        with pytest.raises(UserError, match=message):
            train(make_recipe(model={"base": base}))
        assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_one_line(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("retrofit.training.preflight.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        train(make_recipe(train={"report_to": ["wandb"]}))
    assert not (tmp_path / "run").exists()


def test_an_existing_output_folder_is_not_touched(make_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="exists; choose another output_dir, or go on with"):
        train(make_recipe())
    assert not list((tmp_path / "run").iterdir())


def test_resume_refuses_what_it_cannot_continue(make_recipe):
    recipe = make_recipe()
    with pytest.raises(UserError, match="nothing to resume"):
        train(recipe, resume=True)
    train(recipe)
    with pytest.raises(UserError, match="is finished"):
        train(recipe, resume=True)
    with pytest.raises(UserError, match="started with another recipe.*train"):
        train(make_recipe(train={"seed": 3}), resume=True)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_no_gradient_goes_below_the_lowest_gate(make_recipe, checkpointing):
    recipe = make_recipe(
        gate={"layers": [1, 2]}, train={"gradient_checkpointing": checkpointing, "max_steps": 1}
    )
    trainer = gate_trainer(recipe)
    reached = []
    layers = trainer.model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _m, _a, out, i=index: reached.append((i, out)))
    trainer.train()
    assert {i for i, out in reached if out.requires_grad} == {1, 2}
