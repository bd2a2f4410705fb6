"""What works for which family, found by doing it on a tiny random model of each.

    python tests/family_table.py                  # the table of docs/families.md, and its reasons
    python tests/family_table.py --vllm PYTHON    # what vLLM makes of each, half a minute a cell
    python tests/family_table.py --plugin PYTHON  # the same of a Python whose vLLM has our plugin

`test_family_table.py` holds the document to the first.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import get_peft_model
from tiny import LLAMA3, write_tiny
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.export.merge import merge
from retrofit.export.verify.verify import verify
from retrofit.measure import measure
from retrofit.recipe import Recipe
from retrofit.training.run import train
from retrofit.utils.errors import CheckError, UserError

FAMILIES: dict[str, tuple[str, dict]] = {
    "Llama 1, 2, 3; SmolLM, TinyLlama, Yi": ("llama", {}),
    "Llama 3.1, 3.2, 3.3": ("llama", {"rope_parameters": LLAMA3}),
    "Mistral": ("mistral", {}),
    "Mistral with a sliding window": ("mistral", {"sliding_window": 16}),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Gemma 3, text": ("gemma3_text", {}),
    "gpt-oss": ("gpt_oss", {}),
}
SINKS = {"sinks": "constant", "key_bias": True, "granularity": "none"}
PROJECTION = {"sinks": "none", "key_bias": False, "granularity": "headwise"}
# The formats of gates that read the input, where they are not those of sinks.
OF_PROJECTION = {"native, projection": "native", "gguf, projection": "gguf",
                 "gated-attention, projection": "gated-attention"}  # fmt: skip
# What no stock architecture holds for every family, and what none does for any.
OF_PLUGIN = {
    "sinks, key bias, centers": SINKS | {"centered": True},
    "elementwise, centers": {"granularity": "elementwise", "centered": True},
    "sinks, key bias, headwise, centers": SINKS | {"granularity": "headwise", "centered": True},
    "the same, headwise in one layer instead": SINKS
    | {"granularity": "headwise", "centered": True, "projection_layers": [0]},
}
COLUMNS = (
    "`model_type`",
    "train",
    "packed rows",
    "measure",
    "native",
    "gguf",
    "remote-code",
    *OF_PROJECTION,
)


def cells(name: str) -> dict[str, str]:
    """Of one family: what came of each column, `no: REASON` if it was refused."""
    model_type, overrides = FAMILIES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, text = folder / "base", folder / "text.txt"
        text.write_text("The spouter inn, its sign, and its landlord. " * 60)
        write_tiny(base, model_type, **overrides)
        # gpt-oss has sinks of its own, and no stock form of both those and centers.
        sinks = SINKS | {"centered": model_type != "gpt_oss"}
        packs = _done(lambda: train(_recipe(base, text, folder / "packed", sinks, packing=True)))
        run, other = folder / ("packed" if packs == "yes" else "run"), folder / "projection"
        recipe = _recipe(base, text, run, sinks, packing=False)
        trained = packs if packs == "yes" else _done(lambda: train(recipe))
        train(_recipe(base, text, other, PROJECTION, packing=False))
        sources = [str(base), str(run)]
        return {
            "`model_type`": f"`{model_type}`",
            "train": trained,
            "packed rows": packs,
            "measure": _done(lambda: measure(sources, text, length=192, windows=1, progress=False)),
            **{format: _merged(run, folder, format) for format in COLUMNS[4:7]},
            **{name: _merged(other, folder / name, form) for name, form in OF_PROJECTION.items()},
        }


def cells_of_vllm(name: str, python: str) -> dict[str, str]:
    """Of one family: the largest difference of a log probability in vLLM, whose attention wants
    heads of 32 channels. Its Transformers backend, which runs code, takes no sinks."""
    model_type, overrides = FAMILIES[name]
    found = {}
    sinks = SINKS | {"centered": model_type != "gpt_oss"}
    kinds = {"native": ("native", sinks), "native, projection": ("native", PROJECTION),
             "remote-code, projection": ("remote-code", PROJECTION)}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tiny(folder / "base", model_type, **overrides, head_dim=32)
        for column, (format, gate) in kinds.items():
            found[column] = _in_vllm(folder, column, format, gate, python)
    return found


def _in_vllm(folder: Path, column: str, format: str, gate: dict, python: str) -> str:
    """Merge the base of a folder with random gates, and see what vLLM makes of it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    gates = GateConfig(init_weights=False, task_type="CAUSAL_LM", **gate)
    adapter, out = folder / "adapter" / column, folder / column
    get_peft_model(model, gates).save_pretrained(str(adapter))
    try:
        report = merge(adapter, out, format=format)
        figures = verify(report, out, "vllm", python)
    except (UserError, CheckError) as error:
        return f"no: {error}"
    until = figures["greedy_until"]
    greedy = "" if until is None else f", greedy text the same for {until} tokens"
    return f"{figures['max_logprob_difference']:.1e}{greedy}"


def cells_of_plugin(name: str, python: str) -> dict[str, str]:
    """Of one family: the largest difference of a log probability in vLLM with our plugin."""
    model_type, overrides = FAMILIES[name]
    if model_type == "qwen2":  # vLLM divides the width by the heads
        overrides = overrides | {"hidden_size": 128}
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tiny(folder / "base", model_type, **overrides, head_dim=32)
        for column, gate in OF_PLUGIN.items():
            found[column] = _in_vllm(folder, column, "remote-code", gate, python)
    return found


def _recipe(base: Path, text: Path, run: Path, gate: dict, packing: bool) -> Recipe:
    settings = {
        "output_dir": str(run),
        "model": {"base": str(base)},
        "gate": gate,
        "data": {"sources": [{"path": str(text)}], "sequence_length": 160, "packing": packing},
        "objective": dict.fromkeys(("lm", "kl", "hidden", "pressure", "activation", "balance"), 1),
        "train": {"max_steps": 2, "batch_size": 1, "report_to": [], "learning_rate": 0.1},
    }
    return Recipe.model_validate(settings)


def _merged(run: Path, folder: Path, format: str) -> str:
    reports: list[dict] = []
    done = _done(lambda: reports.append(merge(run, folder / format, format=format)))
    model_type = reports[0]["checkpoint"]["model_type"] if reports else ""
    return f"`{model_type}`" if done == "yes" and format in ("native", "gguf") else done


def _done(act: Callable[[], object]) -> str:
    try:
        act()
    except UserError as error:
        return f"no: {error}"
    return "yes"


def table(rows: dict[str, dict[str, str]], columns: Sequence[str] = COLUMNS) -> str:
    """The rows, each `no` with the number of its reason, and the reasons."""
    reasons: list[str] = []

    def short(cell: str) -> str:
        if not cell.startswith("no: "):
            return cell
        reason = _without_names(cell.removeprefix("no: "))
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    lines = [f"| family | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(short(row[column]) for column in columns)} |")
    return "\n".join([*lines, "", *(f"{i}. {why}" for i, why in enumerate(reasons, 1))]) + "\n"


def _without_names(reason: str) -> str:
    """Where a temporary folder lies says nothing."""
    if re.match("no [a-z-]+ checkpoint of ", reason):
        reason = reason.split(": ", 1)[1]
    return reason.split("; --format")[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--plugin", metavar="PYTHON")
    options = parser.parse_args()
    if options.plugin:
        of_plugin = {name: cells_of_plugin(name, options.plugin) for name in FAMILIES}
        print(table(of_plugin, [*OF_PLUGIN]))
    elif options.vllm:
        columns = ("native", "native, projection", "remote-code, projection")
        print(table({name: cells_of_vllm(name, options.vllm) for name in FAMILIES}, columns))
    else:
        print(table({name: cells(name) for name in FAMILIES}))
