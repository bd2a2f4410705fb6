"""A merged checkpoint is finished only when a fresh process finds it equal to the trained model."""

import gc
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from retrofit.export.checkpoint_format import CheckpointFormat, MergeMismatchError
from retrofit.export.registry import format_of
from retrofit.export.verify import streamed
from retrofit.export.verify.reference import (
    REFERENCE_FILE,
    STEPS,
    kl_divergence,
    make_reference,
    observe,
    windows,
)
from retrofit.models.adapter_config import check_adapter_files, read_adapter_config
from retrofit.models.loading import load_adapter
from retrofit.models.opening import check_complete
from retrofit.models.pickles import pickles_in, refuse_pickles
from retrofit.models.safetensors_io import refuse_other_weights
from retrofit.models.tokenizer_file import check_tokenizer
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.files import temporary_folder

# The engines, and the script that runs each.
_ENGINES = {
    "transformers": "stock_transformers.py",
    "llama.cpp": "llama_server.py",
    "vllm": "vllm_offline.py",
}
# The module that each needs, and where it comes from.
_NEEDS = {
    "transformers": ("transformers", "pip install gate-retrofit"),
    "llama.cpp": ("xllamacpp", "pip install 'gate-retrofit[gguf]'"),
    "vllm": ("vllm", "name a Python that has it with --python"),
}
# By engine and kind of weights: mean KL(trained || merged) in nats beyond twice what rounding
# costs, and the largest difference of a log probability. Measured on SmolLM2-135M in transformers:
# 1e-11 and 7e-5 in float32, 2e-8 in bfloat16, but 4e-5 where norm weights of q and k spread over
# [0.1, 30], whose `w - 1` rounds. In llama.cpp, with gates that have hardly moved, so that the
# massive activation is still there: 5e-3 to 6e-3 in bfloat16 and 1.2e-2 in q8_0, where rounding
# weights and inputs costs 9e-3 and 1.5e-2.
_TOLERANCE = {
    "transformers": {
        "float32": (1e-7, 1e-2),
        "bfloat16": (1e-4, math.inf),
        "float16": (1e-4, math.inf),
    },
    "vllm": {
        "float32": (1e-6, 1e-2),
        "bfloat16": (1e-3, math.inf),
        "float16": (1e-3, math.inf),
    },
    "llama.cpp": {
        "float32": (1e-6, 1e-2),
        "bfloat16": (1e-3, math.inf),
        "float16": (1e-3, math.inf),
        "q8_0": (1e-2, math.inf),
    },
}


def write_reference(
    base: Path, adapter: Path, text: str, kind: str, path: Path, inputs_too: bool = False
) -> float:
    """Run the trained model, in float32, and write what engines are compared with.

    The base is read from its unquantized weights, also where the gates were trained in 4 bits.

    Args:
        kind: what weights are stored as, a float dtype or `q8_0`.
        inputs_too: whether the engine rounds to `kind` what it multiplies the weights by as well,
            as llama.cpp does. Where an activation is massive, that costs more than the weights.

    Returns:
        Mean KL in nats, among the reference's candidates, from the trained model to itself with
        everything rounded to `kind` that the engine rounds: the price of `kind` by itself.

    Raises:
        UserError: if `text` is too short to be compared on, the base's files hold too much, or the
            adapter does not fit.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    check_tokenizer(tokenizer, str(base))
    input_ids = _windows(tokenizer, text)
    untrained, wrong = streamed.load(base)
    check_complete({f"{kind}_keys": names for kind, names in wrong.items()}, str(base))
    on_disk = next(untrained.parameters()).is_meta
    model = load_adapter(untrained, adapter, low_cpu_mem_usage=on_disk).eval()
    weights = _RoundedWeights(streamed.float32_weights(base))
    streams = streamed.stream_weights(untrained, weights)
    seen = observe(model, input_ids, streamed.STEPS if streams else STEPS)
    trained = make_reference(tokenizer, text, input_ids, seen)
    trained.save(path)
    if kind == "float32":
        return 0.0
    weights.kind = kind
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = _rounded(parameter.data, kind)
    if inputs_too:
        _round_inputs(model, kind)
    with torch.no_grad():
        rounded = model(input_ids, use_cache=False).logits
    # Among the candidates, as an engine's KL is taken.
    tokens = torch.tensor(trained.tokens)
    return kl_divergence(seen["prefill"].gather(-1, tokens), rounded.gather(-1, tokens))


def _round_inputs(model: torch.nn.Module, kind: str) -> None:
    """From now on every linear layer of the model rounds its input to `kind`."""

    def rounded(_module, args):
        return _rounded(args[0], kind), *args[1:]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


class _RoundedWeights(Mapping[str, torch.Tensor]):
    """Weights as they are, until `kind` says what they are to be rounded to."""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self.weights = weights
        self.kind: str | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.weights[name]
        return weight if self.kind is None else _rounded(weight, self.kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def verify(
    report: dict, folder: Path, engine: str | None = None, python: str = sys.executable
) -> dict:
    """Compare the checkpoint in a folder with the reference beside it, in a process of its own.

    Args:
        report: what `retrofit-merge.json` holds or will hold: which `checkpoint` to load and, under
            `verification`, what its dtype costs by itself.
        engine: `transformers`, `llama.cpp` or `vllm`; the format's own by default.
        python: the Python that has the engine.

    Returns:
        The figures of the engine's script.

    Raises:
        UserError: if the engine does not read the format, or is not installed.
        MergeMismatchError: if the checkpoint does not load, or differs beyond the tolerance.
    """
    checkpoint, rounding_kl = report["checkpoint"], report["verification"]["rounding_kl"]
    form = format_of(checkpoint["format"])
    engine = engine or form.engines[0]
    _check_engine(engine, form, python)
    refuse_pickles(pickles_in(folder))
    for model in _models_of(folder):
        refuse_other_weights(model)
    form.check_code(folder, report["base"]["model_type"])
    with form.loadable(folder, checkpoint.get("file")) as model:
        figures = _run(_ENGINES[engine], [model, folder / REFERENCE_FILE], form.options, python)
    kl, max_logprob_difference = _TOLERANCE[engine][checkpoint["dtype"]]
    if wrong := list(_differences(figures, kl + 2 * rounding_kl, max_logprob_difference)):
        raise MergeMismatchError(f"the checkpoint differs from the trained model: {_listed(wrong)}")
    return figures


def _models_of(folder: Path) -> Iterator[Path]:
    """The folders that an engine loads weights from: a checkpoint, or an adapter and its base."""
    yield folder
    if (folder / "adapter_config.json").is_file():
        check_adapter_files(folder)
        yield Path(read_adapter_config(folder).get("base_model_name_or_path") or folder)


def _differences(figures: dict, kl: float, max_logprob_difference: float) -> Iterator[str]:
    """What is wrong, in words, the causes before what follows from them."""
    if names := figures.get("missing"):
        yield f"it lacks {_listed(names)}"
    if names := figures.get("unexpected"):
        yield f"it holds {_listed(names)}, which the engine leaves out"
    if not figures["same_tokens"]:
        yield "its tokenizer cuts the text into other tokens"
    if names := figures.get("unused_gates"):
        yield f"the engine does not use the gates of {_listed(names)}"
    # A NaN is not below anything.
    if not figures["kl"] <= kl:
        yield f"KL {figures['kl']:.1e} where {kl:.1e} is allowed"
    if not figures["max_logprob_difference"] <= max_logprob_difference:
        yield (
            f"a log probability differs by {figures['max_logprob_difference']:.1e} where "
            f"{max_logprob_difference:.1e} is allowed"
        )


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_engine(engine: str, form: CheckpointFormat, python: str) -> None:
    if engine not in form.engines:
        raise UserError(f"{engine} does not read what is merged with --format {form.name}")
    module, how = _NEEDS[engine]
    code = f"import importlib.util; print(importlib.util.find_spec({module!r}) is not None)"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except (OSError, ValueError) as error:
        raise UserError(f"no Python at {python}: {one_line(error)}") from error
    if answer not in ("True", "False"):
        raise UserError(f"{python} is no Python; name the one that has {engine}")
    if answer == "False":
        raise UserError(f"{engine} is not installed for {python}: {how}")


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "q8_0":
        return weight.to(getattr(torch, kind)).float()
    if weight.ndim < 2 or weight.shape[-1] % 32:
        return weight
    from gguf import GGMLQuantizationType, quants  # an extra

    stored = quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType.Q8_0))


def _windows(tokenizer, text: str) -> torch.Tensor:
    input_ids = windows(tokenizer, text)
    if input_ids.shape[1] < 2 * STEPS:
        raise UserError(
            f"the base's tokenizer makes fewer than {4 * STEPS} tokens of the passage on which "
            "checkpoints are verified; download the tokenizer again"
        )
    return input_ids


def _run(
    script: str, paths: list[Path], options: Sequence[str] = (), python: str = sys.executable
) -> dict:
    gc.collect()  # the trained model must not stand beside the merged one
    with temporary_folder() as folder:
        result = folder / "figures.json"
        # The script sees only its own folder of this package.
        command = [python, Path(__file__).with_name(script), *paths, result, *options]
        # Code of a checkpoint is copied to a cache before it runs.
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder)}
        run = subprocess.run(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=offline,
        )
        if run.returncode:
            raise MergeMismatchError(f"the checkpoint does not load: {_error_line(run.stderr)}")
        return json.loads(result.read_text())


def _error_line(stderr: str) -> str:
    """The line that says what went wrong: the first error that was raised, if one was."""
    lines = stderr.strip().splitlines() or ["no message"]
    raised = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
    return (raised or lines[-1:])[0]
