"""Proves in a fresh process that a merged checkpoint equals the trained model."""

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
from peft import PeftModel
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
from retrofit.gates import gates_off
from retrofit.models.adapter_config import check_adapter_files, read_adapter_config
from retrofit.models.loading import load_adapter
from retrofit.models.opening import check_complete, opening
from retrofit.models.pickles import pickles_in, refuse_pickles
from retrofit.models.safetensors_io import refuse_other_weights
from retrofit.models.tokenizer_file import check_tokenizer
from retrofit.utils.errors import UserError, one_line
from retrofit.utils.files import temporary_folder

# The script that loads a checkpoint in each engine.
_ENGINES = {
    "transformers": "stock_transformers.py",
    "llama.cpp": "llama_server.py",
    "vllm": "vllm_offline.py",
}
# The module that each engine needs, and how to install it.
_REQUIRED_MODULES = {
    "transformers": ("transformers", "pip install transformers"),
    "llama.cpp": ("xllamacpp", "pip install gguf xllamacpp"),
    "vllm": ("vllm", "name a Python that has it with --python"),
}
# The tolerances by engine and kind of weights: the mean KL(trained || merged) in nats beyond twice
# the cost of rounding, and the largest difference of a log probability. In transformers,
# SmolLM2-135M has 1e-11 and 7e-5 in float32 and 2e-8 in bfloat16, but 4e-5 if norm weights of q and
# k spread over [0.1, 30], for which `w - 1` rounds. In llama.cpp it has 5e-3 to 6e-3 in bfloat16
# and 1.2e-2 in q8_0 with nearly untrained gates, which leave the massive activation in place;
# there, rounding weights and inputs costs 9e-3 and 1.5e-2.
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
# An engine that adds up in another order may break a tie between two experts in another way, and
# then it predicts something else after that token. So for float32 weights with experts, the limit
# on the KL holds for the median position, and the mean has this one.
_MEAN_KL_WITH_EXPERTS = 1e-2
_IN_WORDS = {
    "kl": "KL",
    "median_kl": "KL at the median position",
    "max_logprob_difference": "a log probability differs by",
}


def write_reference(
    base: Path, adapter: Path, text: str, kind: str, path: Path, inputs_too: bool = False
) -> float:
    """Runs the trained model in float32 and writes the reference that engines are compared with.

    The base has its unquantized weights, even if the gates were trained on a 4-bit base.

    Args:
        base: the folder of the base.
        adapter: the folder of the adapter.
        text: the text to run the model on.
        kind: the kind of the stored weights, a float dtype or `q8_0`.
        path: the file to write the reference to.
        inputs_too: whether the engine also rounds the inputs of linear layers to `kind`, as
            llama.cpp does. With massive activations that costs more than rounding the weights.

    Returns:
        The cost of rounding to `kind` by itself: the mean KL in nats, over the reference's
        candidates, from the trained model to the same model with everything rounded that the
        engine rounds.

    Raises:
        UserError: if `text` is too short, the base's files lack tensors or hold too many, or the
            adapter does not fit the base.
    """
    with opening(str(base)):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        check_tokenizer(tokenizer, str(base))
    input_ids = _windows(tokenizer, text)
    untrained, wrong = streamed.load(base)
    check_complete({f"{kind}_keys": names for kind, names in wrong.items()}, str(base))
    on_disk = next(untrained.parameters()).is_meta
    model = load_adapter(untrained, adapter, low_cpu_mem_usage=on_disk).eval()
    weights = _RoundedWeights(streamed.float32_weights(base))
    streams = streamed.stream_weights(untrained, weights)
    observed = observe(model, input_ids, streamed.STEPS if streams else STEPS)
    trained = make_reference(
        tokenizer, text, input_ids, observed, _ungated_logits(model, input_ids)
    )
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
    # An engine's KL is also taken over the candidates.
    tokens = torch.tensor(trained.tokens)
    return kl_divergence(observed["prefill"].gather(-1, tokens), rounded.gather(-1, tokens))


def _round_inputs(model: torch.nn.Module, kind: str) -> None:
    """Makes every linear layer of the model round its input to `kind`."""

    def rounded(_module, args):
        return _rounded(args[0], kind), *args[1:]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


@torch.no_grad()
def _ungated_logits(model: PeftModel, input_ids: torch.Tensor) -> torch.Tensor:
    with gates_off(model):
        return model(input_ids, use_cache=False).logits


class _RoundedWeights(Mapping[str, torch.Tensor]):
    """A mapping of weights that rounds them as it returns them, once `kind` is set."""

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
    """Compares the checkpoint in a folder with the reference beside it, in a fresh process.

    Args:
        report: the contents of `retrofit-merge.json`: `checkpoint` tells what to load, and
            `verification` what rounding to its dtype costs by itself.
        folder: the folder of the checkpoint.
        engine: `transformers`, `llama.cpp` or `vllm`; by default the format's first engine.
        python: the Python that has the engine.

    Returns:
        The figures that the engine's script measured.

    Raises:
        UserError: if the engine does not read the format, or is not installed.
        MergeMismatchError: if the checkpoint does not load, or differs beyond the tolerance.
    """
    checkpoint = report["checkpoint"]
    checkpoint_format = format_of(checkpoint["format"])
    engine = engine or checkpoint_format.engines[0]
    _check_engine(engine, checkpoint_format, python)
    refuse_pickles(pickles_in(folder))
    for model in _models_of(folder):
        refuse_other_weights(model)
    checkpoint_format.check_code(folder, report["base"]["model_type"])
    with checkpoint_format.loadable(folder, checkpoint.get("file")) as model:
        figures = _run(
            _ENGINES[engine], [model, folder / REFERENCE_FILE], checkpoint_format.options, python
        )
    if wrong := list(_differences(figures, _limits(report, engine))):
        raise MergeMismatchError(f"the checkpoint differs from the trained model: {_listed(wrong)}")
    return figures


def _limits(report: dict, engine: str) -> dict[str, float]:
    """Returns the largest allowed value of each figure that has one."""
    dtype = report["checkpoint"]["dtype"]
    kl, max_logprob_difference = _TOLERANCE[engine][dtype]
    if report["base"].get("experts") and dtype == "float32":
        return {"median_kl": kl, "kl": _MEAN_KL_WITH_EXPERTS}
    kl += 2 * report["verification"]["rounding_kl"]
    return {"kl": kl, "max_logprob_difference": max_logprob_difference}


def _models_of(folder: Path) -> Iterator[Path]:
    """Yields the folders that an engine loads weights from; for an adapter also its base."""
    yield folder
    if (folder / "adapter_config.json").is_file():
        check_adapter_files(folder)
        yield Path(read_adapter_config(folder).get("base_model_name_or_path") or folder)


def _differences(figures: dict, limits: dict[str, float]) -> Iterator[str]:
    """Yields what is wrong with a checkpoint, causes before their effects."""
    if names := figures.get("missing"):
        yield f"it lacks {_listed(names)}"
    if names := figures.get("unexpected"):
        yield f"it holds {_listed(names)}, which the engine leaves out"
    if not figures["same_tokens"]:
        yield "its tokenizer cuts the text into other tokens"
    if names := figures.get("unused_gates"):
        yield f"the engine does not use the gates of {_listed(names)}"
    # The cost of rounding that is allowed may be as large as what the gates do.
    if figures.get("kl_to_ungated", math.inf) < figures["kl"] / 2:
        yield "it is nearer to the base without gates than to the trained model"
    for name, limit in limits.items():
        if not figures[name] <= limit:  # also if it is NaN
            yield f"{_IN_WORDS[name]} {figures[name]:.1e} where {limit:.1e} is allowed"


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_engine(engine: str, checkpoint_format: CheckpointFormat, python: str) -> None:
    if engine not in checkpoint_format.engines:
        raise UserError(
            f"{engine} does not read what is merged with --format {checkpoint_format.name}"
        )
    module, how_to_install = _REQUIRED_MODULES[engine]
    code = f"import importlib.util; print(importlib.util.find_spec({module!r}) is not None)"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except (OSError, ValueError) as error:
        raise UserError(f"no Python at {python}: {one_line(error)}") from error
    if answer not in ("True", "False"):
        raise UserError(f"{python} is no Python; name the one that has {engine}")
    if answer == "False":
        raise UserError(f"{engine} is not installed for {python}: {how_to_install}")


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "q8_0":
        return weight.to(getattr(torch, kind)).float()
    if weight.ndim < 2 or weight.shape[-1] % 32:
        return weight
    from gguf import GGMLQuantizationType, quants  # needs the extra `gguf`

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
    gc.collect()  # frees the trained model before the merged one is loaded
    with temporary_folder() as folder:
        result = folder / "figures.json"
        # Python puts only the script's own folder on its path, not this package.
        command = [python, Path(__file__).with_name(script), *paths, result, *options]
        # transformers copies the code of a checkpoint to this cache before it runs.
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder)}
        process = subprocess.run(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=offline,
        )
        if process.returncode:
            raise MergeMismatchError(f"the checkpoint does not load: {_error_line(process.stderr)}")
        return json.loads(result.read_text())


def _error_line(stderr: str) -> str:
    """Returns the line of the first error that was raised, else the last line."""
    lines = stderr.strip().splitlines() or ["no message"]
    errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
    return (errors or lines[-1:])[0]
