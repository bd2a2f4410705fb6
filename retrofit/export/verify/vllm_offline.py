"""Loads a merged checkpoint in vLLM and compares it with the reference.

It runs as a plain script, with a Python that has vLLM, which needs its own environment:

    python vllm_offline.py CHECKPOINT REFERENCE RESULT [--trust-remote-code]

It imports vLLM and nothing of this package. If that Python has `retrofit.vllm_plugin`, vLLM loads
the plugin, whose classes then run the model instead of the code in the checkpoint.
"""

import json
import os
from pathlib import Path

# These settings for CPUs must be made before vLLM is imported: GiB of cache, and unbound threads.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from command_line import parse_arguments
from reference import CANDIDATES, STEPS, Reference, compare, summarize, windows
from transformers import CONFIG_MAPPING
from vllm import LLM, SamplingParams
from vllm.plugins import load_general_plugins


def check(checkpoint: Path, reference: Path, trust_remote_code: bool) -> dict:
    """Returns the figures over every position of the reference, and of greedy continuations."""
    trained = Reference.load(reference)
    trust_remote_code = trust_remote_code and not is_known(checkpoint)
    input_ids = torch.tensor(trained.input_ids)
    engine = LLM(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=input_ids.shape[1] + 2 * STEPS,
        max_num_seqs=len(input_ids),
        max_logprobs=CANDIDATES,
        trust_remote_code=trust_remote_code,
        # vLLM itself has no architecture that needs code from a checkpoint.
        model_impl="transformers" if trust_remote_code else "auto",
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=STEPS, ignore_eos=True, prompt_logprobs=CANDIDATES
    )
    answers = engine.generate([{"prompt_token_ids": ids} for ids in trained.input_ids], sampling)
    positions, continuations = [], []
    for tokens, logprobs, answer in zip(trained.tokens, trained.logprobs, answers, strict=True):
        # vLLM lists at each token the predictions from the token before it.
        for candidates, expected, listed in zip(
            tokens, logprobs, answer.prompt_logprobs[1:], strict=False
        ):
            measured = {token: logprob.logprob for token, logprob in listed.items()}
            positions.append(compare(candidates, expected, measured))
        continuations.append(list(answer.outputs[0].token_ids))
    return {
        "same_tokens": torch.equal(windows(engine.get_tokenizer(), trained.text), input_ids),
        **summarize(positions),
        "greedy_until": greedy_until(trained.greedy, continuations),
    }


def is_known(checkpoint: Path) -> bool:
    """Tells whether a plugin has registered the type of the model."""
    load_general_plugins()
    return json.loads((checkpoint / "config.json").read_text())["model_type"] in CONFIG_MAPPING


def greedy_until(expected: list[list[int]], measured: list[list[int]]) -> int | None:
    """Returns the index of the first greedy token that differs from the trained model's, if any."""
    steps = zip(zip(*expected, strict=True), zip(*measured, strict=True), strict=False)
    return next((index for index, (a, b) in enumerate(steps) if a != b), None)


def main() -> None:
    arguments = parse_arguments("--trust-remote-code")
    figures = check(arguments.checkpoint, arguments.reference, arguments.trust_remote_code)
    arguments.result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
