"""Two ranks on gloo do what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import build, gradients, step
from safetensors.torch import load_file, save_file

from retrofit.recipe import Recipe

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "gates"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("llama", {"granularity": "none", "sinks": "constant", "key_bias": True}),
        ("qwen2", {"granularity": "none", "sinks": "input"}),
    ],
    ids=["llama", "qwen3", "llama-sinks", "qwen2-sinks-of-the-input"],
)
def test_two_ranks_of_fsdp2_give_the_gradients_of_one(family, gates, tiny_base, tmp_path):
    rows = torch.randint(0, 256, (2, 160), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": rows}, tmp_path / "rows.safetensors")
    model = build(str(tiny_base(family)), gates)
    step(model, rows)
    expected = gradients(model)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tiny_base(family)), str(tmp_path), json.dumps(gates)]
    subprocess.run([*command, str(WORKER), *arguments], check=True, timeout=300)
    sharded = load_file(tmp_path / "grads.safetensors")
    assert sharded.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.any(), name
        # FSDP averages over ranks what one rank sums over rows.
        torch.testing.assert_close(2 * sharded[name], grad, rtol=1e-3, atol=1e-4)


LOSSES = {"kl": 0.5, "pressure": 20.0, "hidden": 10.0, "activation": 1.0, "balance": 0.01}
TRAIN = {"max_steps": 4, "save_steps": 2, "report_to": [], "learning_rate": 0.01}


@pytest.fixture
def recipe_file(tiny_base, tmp_path):
    """Rows of 136 tokens that hold different numbers of documents."""
    words = "the sink token head gate layer draws all attention to first last union".split()
    lengths = [3, 300, 60, 7, 500, 150, 20, 400, 9, 250] * 3
    texts = [" ".join(words[(i + n) % len(words)] for n in range(long // 5 + 1))
             for i, long in enumerate(lengths)]  # fmt: skip
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))

    def write(name: str, **train) -> Path:
        recipe = Recipe.model_validate(
            {
                "output_dir": str(tmp_path / name),
                "model": {"base": str(tiny_base("llama"))},
                # Every query is looked at, so that none is drawn.
                "objective": LOSSES | {"sampled_rows": 136},
                "data": {"sources": [{"path": str(text)}], "sequence_length": 136},
                "train": TRAIN | train,
            }
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe.to_yaml())
        return path

    return write


def retrofit_train(recipe: Path, *arguments: str, ranks: int = 1) -> Path:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), "retrofit"]
    result = subprocess.run(
        [*command, "train", str(recipe), *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return recipe.with_suffix("")


def gates_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_close(own: Path, other: Path) -> None:
    expected = gates_of(other)
    assert all(tensor.abs().max() > 1e-3 for tensor in expected.values())
    for name, gate in gates_of(own).items():
        torch.testing.assert_close(gate, expected[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_train_what_one_trains_and_hand_over_to_each_other(recipe_file):
    """DDP through the command line. A step of two ranks is one of one rank that accumulates two."""
    one = retrofit_train(recipe_file("one", gradient_accumulation_steps=2))
    two = retrofit_train(recipe_file("two"), ranks=2)
    assert_close(two, one)
    summary = [json.loads((run / "run.json").read_text()) for run in (one, two)]
    assert summary[0]["tokens"] == summary[1]["tokens"]
    for name in ("loss", "lm", "hidden", "activation", "pressure"):
        first, second = (each["first"][name] for each in summary)
        assert first == pytest.approx(second, rel=0.2), name
    # Each goes on from the middle of the other's run.
    for run, ranks in ((one, 2), (two, 1)):
        whole = gates_of(run)
        for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            (run / name).unlink()
        (run / "adapter").rmdir()
        (run / "run.json").unlink()
        for file in (run / "checkpoints" / "checkpoint-4").iterdir():
            file.unlink()
        retrofit_train(run.with_suffix(".yaml"), "--resume", ranks=ranks)
        for name, gate in gates_of(run).items():
            torch.testing.assert_close(gate, whole[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_what_is_wrong_is_said_once(recipe_file):
    recipe = recipe_file("wrong", batch_size=500)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "retrofit"]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, "train", str(recipe)], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert result.stderr.count("error: data: too short") == 1
    assert not recipe.with_suffix("").exists()
