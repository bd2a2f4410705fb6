"""A merged checkpoint is finished only when a fresh process finds it equal to the trained model."""

import gc
import json
import os
import subprocess
import sys
import tempfile
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
    torch.float32: (1e-7, 1e-2),
    torch.bfloat16: (1e-4, float("inf")),
    torch.float16: (1e-4, float("inf")),
}


def trained_outputs(base: Path, adapter: Path, text: str, dtype: torch.dtype, path: Path) -> float:
    """Run the trained model, in float32, and write what `check_checkpoint.check` compares with.

    The base is read from its unquantized weights, also where the gates were trained in 4 bits.

    Returns:
        Mean KL in nats from the trained model to itself with every weight rounded to `dtype`: the
        part of the difference that is the price of the dtype.

    Raises:
        UserError: if `text` is too short to be compared on.
    """
    input_ids = _windows(base, text)
    untrained = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True
    )
    model = PeftModel.from_pretrained(untrained, adapter).eval()
    trained = check_checkpoint.observe(model, input_ids)
    save_file({"input_ids": input_ids, **trained}, path, metadata={"text": text})
    if dtype == torch.float32:
        return 0.0
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return check_checkpoint.compare(trained, check_checkpoint.observe(model, input_ids))["kl"]


def verify(
    checkpoint: Path,
    reference: Path,
    dtype: torch.dtype,
    rounding_kl: float,
    *,
    import_retrofit: bool,
) -> dict:
    """Compare `checkpoint` with `trained_outputs` in a process of its own.

    Args:
        dtype: in which the checkpoint is stored; it sets the tolerance.
        rounding_kl: what `trained_outputs` returned.
        import_retrofit: whether the checkpoint needs this package to load.

    Returns:
        The figures of `check_checkpoint.check`.

    Raises:
        MergeMismatchError: if the checkpoint does not load or differs beyond the tolerance.
    """
    figures = {"rounding_kl": rounding_kl, **_run_check(checkpoint, reference, import_retrofit)}
    kl, max_logprob_difference = _TOLERANCE[dtype]
    within = (
        figures["kl"] <= kl + 2 * rounding_kl
        and figures["max_logprob_difference"] <= max_logprob_difference
        and figures["same_tokens"]
        and not figures["missing"]
        and not figures["unexpected"]
    )
    if not within:
        raise MergeMismatchError(f"the merged checkpoint differs from the trained model: {figures}")
    return figures


def _windows(base: Path, text: str) -> torch.Tensor:
    input_ids = check_checkpoint.windows(AutoTokenizer.from_pretrained(base), text)
    if input_ids.shape[1] < 2 * check_checkpoint.STEPS:
        raise UserError(
            f"the text to verify on gives {input_ids.numel()} tokens; "
            f"it needs {4 * check_checkpoint.STEPS} or more"
        )
    return input_ids


def _run_check(checkpoint: Path, reference: Path, import_retrofit: bool) -> dict:
    gc.collect()  # the trained model must not stand beside the merged one
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        # -P: the folder of the script, a part of this package, stays off the path.
        command = [sys.executable, "-P", check_checkpoint.__file__]
        command += [str(checkpoint), str(reference), str(result)]
        command += ["--import-retrofit"] if import_retrofit else []
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=offline)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise MergeMismatchError(f"the merged checkpoint does not load: {reason}")
        return json.loads(result.read_text())
