"""Compare a training step of gates with one of LoRA, and with the least that a step could cost.

    python scripts/bench/training.py [BASE] [--length 1024] [--rows 1] [--dtype bfloat16] [--json F]

All arms take the same packed batch of real text, in one process, in turns:

- `gates`: the step of `retrofit train` with the sink logits of the bundled recipes and only the
  next-token loss;
- `projections`: the same with headwise gates that read the layer's input instead;
- `LoRA`: TRL's unchanged `SFTTrainer` with PEFT's LoRA, r=16 on all linear layers, at its defaults
  (gradient checkpointing on) and at its best (off; in bfloat16, adapters in bfloat16 as well). Its
  loss has a kernel on CUDA, and on a CPU a plain stand-in that is slower and larger;
- `LoRA, ours`: the same adapters with our loss and our attention, so that only the adapters differ;
- `floor`: the frozen base with our loss and attention, gradients down to the embeddings and no
  weight to train;
- `all`: gates with `kl`, `pressure` and `balance`;
- `recipe`: gates with the losses of the recipe for SmolLM2.

Memory is the peak of two steps in a separate process, less what the process holds before it loads
the model. Text, tokenizer and settings are read before that in every arm.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from paired import CACHE, Ratio, forget_peak, fresh, held_gb, in_turns, parser, ratio, report
from retrofit.data.sources import load_sources
from retrofit.losses.distillation import add_objectives
from retrofit.models.document_attention import attend_by_document
from retrofit.models.loading import load_base, load_config, load_tokenizer
from retrofit.recipe import Objective, Recipe, load_recipe
from retrofit.training.run import gate_trainer
from retrofit.utils.process import prepare_process

TEXT = f"{CACHE}/texts/c4-train.jsonl"
RECIPE = load_recipe("smollm2-135m-cpu")
# No layer's form is chosen by calibration here: all have sink logits, or all have projections.
GATES = {
    "gates": RECIPE.gate.model_dump() | {"granularity": "none", "projection_layers": None},
    "projections": {"granularity": "headwise"},
}
OBJECTIVES = {
    "all": {"kl": 1.0, "pressure": 60.0, "balance": 0.01},
    "recipe": RECIPE.objective.model_dump(),
}
TRL = {"LoRA, defaults": True, "LoRA, best": False}  # whether gradient checkpointing is on
ARMS = (*GATES, *TRL, "LoRA, ours", "floor", "all", "recipe")
# The largest ratios asked for, of time and of memory, by what gates are compared with.
GOALS = {"projections": None, "LoRA, best": 0.75, "LoRA, defaults": None, "LoRA, ours": 0.75}
MEMORY_GOALS = GOALS | {"LoRA, best": 0.7, "LoRA, ours": 0.7, "floor": None}
Step = Callable[[], torch.Tensor]  # runs a step and returns its loss


def main() -> None:
    options_of = parser(__doc__.splitlines()[0])
    options_of.add_argument("--length", type=int, default=1024)
    options_of.add_argument("--rows", type=int, default=1)
    options_of.add_argument("--text", default=TEXT)
    options_of.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options_of.add_argument("--peak", nargs=2, metavar=("ARM", "BATCH"), help=argparse.SUPPRESS)
    options = options_of.parse_args()
    prepare_process(keep_freed_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.peak:
            print(added_memory(options, Path(folder)))
            return
        batch = Path(folder) / "batch.safetensors"
        save_file(first_batch(options, Path(folder)), batch)
        ratios = [*time_ratios(times(options, Path(folder), batch))]
        ratios += memory_ratios(options, batch)
    report(ratios, options)


def first_batch(options: argparse.Namespace, folder: Path) -> dict[str, torch.Tensor]:
    """Returns a batch of real text, packed as by `retrofit train`."""
    trainer = gate_trainer(recipe_of(options, folder))
    return next(iter(trainer.get_train_dataloader()))


def times(options: argparse.Namespace, folder: Path, batch: Path) -> dict[str, list[float]]:
    steps = {name: build(name, options, folder / name, batch) for name in options.arms}
    return in_turns(steps, options.repeats)


def time_ratios(seconds: dict[str, list[float]]) -> Iterator[Ratio]:
    own = seconds["gates"]
    for name, goal in {**GOALS, "floor": 1.05}.items():
        if name in seconds:
            yield ratio(f"step time, gates / {name}", own, seconds[name], goal)
    if "all" in seconds:
        yield ratio("step time, kl + pressure + balance / lm", seconds["all"], own, 1.6)
    if "recipe" in seconds:
        yield ratio("step time, the recipes' losses / lm", seconds["recipe"], own)


def memory_ratios(options: argparse.Namespace, batch: Path) -> Iterator[Ratio]:
    """Yields the ratios of peak memory, each arm in a process of its own."""
    if not GOALS.keys() & set(options.arms):
        return
    flags = [f"--{name}={getattr(options, name)}" for name in ("dtype", "length", "rows", "text")]
    gigabytes = {
        name: float(fresh(__file__, options.base, *flags, "--peak", name, str(batch)))
        for name in options.arms
    }
    own = gigabytes["gates"]
    for name, goal in MEMORY_GOALS.items():
        if name in gigabytes:
            other = gigabytes[name]
            detail = f"{own:.2f} GB / {other:.2f} GB"
            value = own / other
            yield Ratio(f"peak memory, gates / {name}", goal, value, value, value, detail)


def build(name: str, options: argparse.Namespace, folder: Path, batch: Path) -> Step:
    gate, objective = GATES.get(name, GATES["gates"]), OBJECTIVES.get(name, {})
    recipe = recipe_of(options, folder, gate, objective)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = load_file(batch, device=device)
    if name in TRL:
        return trl_step(recipe, tensors, checkpointing=TRL[name])
    if name in ("floor", "LoRA, ours"):
        return bare_step(recipe, tensors, adapters=name != "floor")
    trainer = gate_trainer(recipe)
    trainer.state.max_steps = recipe.train.max_steps
    return step_of(trainer, tensors)


def recipe_of(
    options: argparse.Namespace,
    folder: Path,
    gate: dict | None = None,
    objective: dict | None = None,
) -> Recipe:
    """Returns a recipe, by default of headwise gates and next-token loss."""
    return Recipe.model_validate(
        {
            "gate": gate or {},
            "output_dir": str(folder),
            "model": {"base": options.base, "dtype": options.dtype},
            "data": {"sources": [{"path": options.text}], "sequence_length": options.length},
            "objective": objective or {},
            "train": {
                "batch_size": options.rows,
                "max_steps": 1000,
                "gradient_checkpointing": "none",
                "report_to": [],
            },
        }
    )


def trl_step(recipe: Recipe, batch: dict[str, torch.Tensor], checkpointing: bool) -> Step:
    half = recipe.model.dtype != "float32"
    model = load_base(recipe.model)
    if half and not checkpointing:
        model = get_peft_model(model, lora(), autocast_adapter_dtype=False)
    tokenizer = load_tokenizer(recipe.model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=recipe.output_dir,
            per_device_train_batch_size=recipe.train.batch_size,
            gradient_checkpointing=checkpointing,
            bf16=half and checkpointing,
            use_cpu=not torch.cuda.is_available(),
            max_length=recipe.data.sequence_length,
            report_to=[],
        ),
        train_dataset=load_sources(recipe.data, tokenizer)[0].rows.select(range(64)),
        processing_class=tokenizer,
        peft_config=None if half and not checkpointing else lora(),
    )
    if checkpointing:  # as the trainer's `train` would do first
        kwargs = trainer.args.gradient_checkpointing_kwargs
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return step_of(trainer, batch)


def lora() -> LoraConfig:
    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def step_of(trainer: SFTTrainer, batch: dict[str, torch.Tensor]) -> Step:
    """Returns the step that a trainer and its optimizer do for each batch."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare(trainer.model)
    tokens = (batch["labels"][:, 1:] != -100).sum()

    def step() -> torch.Tensor:
        loss = trainer.training_step(model, batch, tokens)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss

    return step


def bare_step(recipe: Recipe, batch: dict[str, torch.Tensor], adapters: bool) -> Step:
    """Returns a step with our loss and attention on the base, with LoRA or nothing to train."""
    base = load_base(recipe.model).train().requires_grad_(False)
    attend_by_document(base)
    add_objectives(base, Objective())
    tokens = (batch["labels"][:, 1:] != -100).sum()
    if adapters:
        half = recipe.model.dtype != "float32"
        model = get_peft_model(base, lora(), autocast_adapter_dtype=not half)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    else:
        base.enable_input_require_grads()

    def step() -> torch.Tensor:
        loss = base(**batch, objectives=True).loss / tokens
        loss.backward()
        if adapters:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def read_all(options: argparse.Namespace, folder: Path) -> None:
    """Reads, with a minimal model, the files that some arms read and others do not."""
    recipe = recipe_of(options, folder)
    config = load_config(recipe.model)
    config.num_hidden_layers = config.num_attention_heads = config.num_key_value_heads = 1
    config.hidden_size = config.head_dim = 64
    trainer = gate_trainer(recipe, base=AutoModelForCausalLM.from_config(config))
    next(iter(trainer.get_train_dataloader()))


def added_memory(options: argparse.Namespace, folder: Path) -> float:
    """Returns the peak GB of this process in two steps, less what it held without a model."""
    arm, batch = options.peak
    read_all(options, folder)
    before = held_gb()
    step = build(arm, options, folder, Path(batch))
    forget_peak()  # leaves out the peak of loading
    for _ in range(2):
        step()
    return held_gb(peak=True) - before


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
