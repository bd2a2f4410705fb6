"""A merged checkpoint is finished only when a fresh process finds it equal to the trained model."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from retrofit.errors import CheckError, UserError
from retrofit.export import check_checkpoint


class MergeMismatchError(CheckError):
    """The written checkpoint does not compute what was trained. Nothing is left on disk."""


# Mean KL(trained || merged) in nats beyond what rounding the trained weights costs, and the largest
# difference of a log probability. Measured: 1e-11 and 7e-5 in float32 (SmolLM2-135M), 2e-8 in
# bfloat16, but 4e-5 where norm weights of q and k spread over [0.1, 30], whose `w - 1` rounds.
_TOLERANCE = {
    "float32": (1e-7, 1e-2),
    "bfloat16": (1e-4, float("inf")),
    "float16": (1e-4, float("inf")),
}
_GGUF_TOLERANCE = {
    "float32": (1e-6, 1e-2),
    "bfloat16": (1e-3, float("inf")),
    "float16": (1e-3, float("inf")),
    "q8_0": (1e-2, float("inf")),
}
_HEAD = 500  # characters of the text that an engine with a tokenizer of its own has to cut alike


def trained_outputs(base: Path, adapter: Path, text: str, kind: str, path: Path) -> float:
    """Run the trained model, in float32, and write what the checks compare with.

    The base is read from its unquantized weights, also where the gates were trained in 4 bits.

    Args:
        kind: what weights are stored as, a float dtype or `q8_0`.

    Returns:
        Mean KL in nats from the trained model to itself with every weight rounded to `kind`: the
        part of the difference that is the price of storing it so.

    Raises:
        UserError: if `text` is too short to be compared on.
    """
    input_ids = _windows(base, text)
    untrained = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True
    )
    model = PeftModel.from_pretrained(untrained, adapter).eval()
    trained = check_checkpoint.observe(model, input_ids)
    head = text[:_HEAD]
    head_ids = torch.tensor(AutoTokenizer.from_pretrained(base)(head)["input_ids"])
    tensors = {"input_ids": input_ids, "head_ids": head_ids, **trained}
    save_file(tensors, path, metadata={"text": text, "head": head})
    if kind == "float32":
        return 0.0
    for parameter in model.parameters():
        parameter.data = _rounded(parameter.data, kind)
    return check_checkpoint.compare(trained, check_checkpoint.observe(model, input_ids))["kl"]


def verify(
    checkpoint: Path, reference: Path, kind: str, rounding_kl: float, *, import_retrofit: bool
) -> dict:
    """Compare a checkpoint with `trained_outputs` in a process of its own.

    Args:
        kind: what its weights are stored as; it sets the tolerance.
        rounding_kl: what `trained_outputs` returned.
        import_retrofit: whether the checkpoint needs this package to load.

    Returns:
        The figures of `check_checkpoint.check`.

    Raises:
        MergeMismatchError: if the checkpoint does not load or differs beyond the tolerance.
    """
    options = ["--import-retrofit"] if import_retrofit else []
    figures = _run_check(check_checkpoint.__file__, [checkpoint, reference], options)
    kl, max_logprob_difference = _TOLERANCE[kind]
    within = (
        figures["kl"] <= kl + 2 * rounding_kl
        and figures["max_logprob_difference"] <= max_logprob_difference
        and figures["same_tokens"]
        and not figures["missing"]
        and not figures["unexpected"]
    )
    return _accepted(figures | {"rounding_kl": rounding_kl}, within)


def verify_gguf(file: Path, reference: Path, kind: str, rounding_kl: float) -> dict:
    """The same of a GGUF file, loaded by llama.cpp, which also rounds what it multiplies.

    Raises:
        MergeMismatchError: as `verify`.
    """
    script = Path(check_checkpoint.__file__).with_name("check_gguf.py")
    figures = _run_check(script, [file, reference])
    kl, max_logprob_difference = _GGUF_TOLERANCE[kind]
    within = (
        figures["kl"] <= kl + 2 * rounding_kl
        and figures["max_logprob_difference"] <= max_logprob_difference
        and figures["same_tokens"]
        and (kind != "float32" or figures["greedy_until"] is None)
    )
    return _accepted(figures | {"rounding_kl": rounding_kl}, within)


def _accepted(figures: dict, within: bool) -> dict:
    if not within:
        raise MergeMismatchError(f"the merged checkpoint differs from the trained model: {figures}")
    return figures


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "q8_0":
        return weight.to(getattr(torch, kind)).float()
    if weight.ndim < 2 or weight.shape[-1] % 32:
        return weight
    from gguf import GGMLQuantizationType, quants  # an extra

    stored = quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType.Q8_0))


def _windows(base: Path, text: str) -> torch.Tensor:
    input_ids = check_checkpoint.windows(AutoTokenizer.from_pretrained(base), text)
    if input_ids.shape[1] < 2 * check_checkpoint.STEPS:
        raise UserError(
            f"the text to verify on gives {input_ids.numel()} tokens; "
            f"it needs {4 * check_checkpoint.STEPS} or more"
        )
    return input_ids


def _run_check(script: str | Path, paths: list[Path], options: Sequence[str] = ()) -> dict:
    gc.collect()  # the trained model must not stand beside the merged one
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        # -P: the folder of the script, a part of this package, stays off the path.
        command = [sys.executable, "-P", script, *paths, result, *options]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        run = subprocess.run([*map(str, command)], capture_output=True, text=True, env=offline)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise MergeMismatchError(f"the merged checkpoint does not load: {reason}")
        return json.loads(result.read_text())
