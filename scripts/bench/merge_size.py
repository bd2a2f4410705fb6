"""Measure what merging costs: its time against a copy of the files, its memory against a shard.

    python scripts/assets.py smollm2
    python scripts/bench/merge_size.py       # a random model of the shape of Llama 3.1 8B: 16 GB
    python scripts/bench/merge_size.py --layers 4
    python scripts/assets.py smollm2 texts recall
    python scripts/bench/merge_size.py --steps 2     # trains the gates instead of drawing them

The script writes a base with random weights and gates, copies it, and merges it with `retrofit
merge` in a separate process. It watches the memory of that process and of the one that verifies.
With `--steps` the gates come from `retrofit train`, with the bundled recipe for SmolLM2 in bfloat16
and rows of `--length` tokens, whose memory is compared with what `retrofit check` estimates.
Memory is what the processes hold themselves (RssAnon), since the system can drop pages of mapped
files; that of training includes the weights. The disk must have room for twice the model's size.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from paired import SMOLLM2
from retrofit.gates import GateConfig
from retrofit.memory.estimate import estimate, this_device
from retrofit.models.safetensors_io import write_shards
from retrofit.recipe import load_recipe
from retrofit.training.preflight import preflight
from retrofit.utils.files import copy_tokenizer
from retrofit.utils.output_path import refuse_existing

LLAMA_31_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHARD = 5 * 10**9
RECIPE = "smollm2-135m-cpu"
TOKENIZER = Path(SMOLLM2).expanduser()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row in training")
    parser.add_argument("--folder", type=Path, default=Path("runs/merge-size"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    refuse_existing(options.folder)  # it is removed at the end
    base, gates = options.folder / "base", options.folder / "gates"
    console = Console(stderr=True)
    with console.status("writing a base"):
        parameters = write_base(base, options.layers)
    training = {}
    if options.steps:
        training = train(base, gates, options.steps, options.length)
    else:
        write_gates(gates, base, options.layers)
    with console.status("copying it"):
        copied = copy(base, options.folder / "copy")
    with console.status("merging"):
        report, memory = merge(gates, options.folder / "merged")
    seconds = report["seconds"]
    figures = {
        "parameters": parameters,
        **training,
        "seconds": {"copy": copied} | seconds,
        "write_over_copy": seconds["write"] / copied,
        "peak_gb": memory / 1e9,
        "shard_gb": SHARD / 1e9,
        "peak_in_shards": memory / SHARD,
        "kl": report["verification"]["kl"],
        "top1_agreement": report["verification"]["top1_agreement"],
        "greedy_until": report["verification"]["greedy_until"],
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(options.folder)
    return 0


def write_base(folder: Path, layers: int) -> int:
    config = LlamaConfig(**LLAMA_31_8B, num_hidden_layers=layers, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    copy_tokenizer(TOKENIZER, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return write_shards(random_weights(model), folder, SHARD)["parameters"]


def random_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields weights that are cut from the same noise, because drawing 8 billion numbers takes
    minutes."""
    largest = max(parameter.numel() for parameter in model.parameters())
    drawn = torch.randn(2**24 + 3, dtype=torch.float32).bfloat16()
    noise = drawn.repeat(math.ceil(2 * largest / drawn.numel()))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:
            yield name, torch.full(parameter.shape, 0.5, dtype=torch.bfloat16)
        else:
            start = index * 99_991 % largest
            weight = noise[start : start + parameter.numel()].view(parameter.shape)
            yield name, weight * parameter.shape[1] ** -0.5


def write_gates(folder: Path, base: Path, layers: int) -> None:
    config = GateConfig(
        granularity="headwise",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.resolve()),
        base_model_type="llama",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    shape = LLAMA_31_8B["num_attention_heads"], LLAMA_31_8B["hidden_size"]
    name = "base_model.model.model.layers.{}.self_attn.attn_gate.g_proj.weight"
    gates = {name.format(i): torch.randn(shape) * shape[1] ** -0.5 for i in range(layers)}
    write_shards(iter(gates.items()), folder, SHARD)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def copy(folder: Path, to: Path) -> float:
    """Returns the seconds of a copy, which like a merge does not wait until all is on disk."""
    os.sync()  # so that no earlier writes slow the copy down
    start = time.perf_counter()
    shutil.copytree(folder, to)
    seconds = time.perf_counter() - start
    shutil.rmtree(to)
    return seconds


def train(base: Path, run: Path, steps: int, length: int) -> dict[str, float]:
    """Trains gates, and returns the estimate and the peak of the memory in GB, and the seconds."""
    overrides = [f"model.base={base}", f"output_dir={run}", "model.dtype=bfloat16", "measure=null"]
    overrides += [f"train.max_steps={steps}", f"data.sequence_length={length}"]
    overrides += [f"data.first_tokens={length // 4}"]
    recipe = load_recipe(RECIPE, overrides)
    estimated = estimate(recipe, preflight(recipe), this_device()).total
    start = time.perf_counter()
    peak = retrofit("train", RECIPE, *overrides)
    peak += sum(file.stat().st_size for file in base.glob("*.safetensors"))  # they stay mapped
    return {
        "training_estimate_gb": estimated / 1e9,
        "training_peak_gb": peak / 1e9,
        "training_seconds": time.perf_counter() - start,
    }


def merge(gates: Path, out: Path) -> tuple[dict, int]:
    """Returns the report, and the peak of the bytes that the process and its children held."""
    peak = retrofit("merge", str(gates), "--out", str(out))
    return json.loads((out / "retrofit-merge.json").read_text()), peak


def retrofit(verb: str, *arguments: str) -> int:
    """Runs a verb in a process, and returns the peak of the bytes that it and its children held."""
    command = "from retrofit.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", command, verb, *arguments])
    peak = [0]
    threading.Thread(target=watch, args=(psutil.Process(process.pid), peak), daemon=True).start()
    if process.wait():
        raise SystemExit(f"retrofit {verb} failed")
    return peak[0]


def watch(process: psutil.Process, peak: list[int]) -> None:
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        tree = [process, *process.children(recursive=True)]
        peak[0] = max(peak[0], sum(held_bytes(member.pid) for member in tree))
        time.sleep(0.05)


def held_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # the process has just ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(main())
