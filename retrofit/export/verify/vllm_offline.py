"""Load a merged checkpoint in vLLM and compare it with the reference.

Run as a plain script, by a Python that has vLLM, which wants an environment of its own:

    python vllm_offline.py CHECKPOINT REFERENCE RESULT [--trust-remote-code]

It imports vLLM and nothing of this package. But if that Python has `retrofit.vllm_plugin`, vLLM
loads it, and its own classes run what otherwise the code in the checkpoint does.
"""

import json
import os
from pathlib import Path

# Before vLLM is imported. On a CPU: GiB of cache, and threads that the system may place.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from command_line import parse_arguments
from reference import CANDIDATES, STEPS, Reference, compare, summarize, windows
from transformers import CONFIG_MAPPING
from vllm import LLM, SamplingParams
from vllm.plugins import load_general_plugins


def check(checkpoint: Path, reference: Path, trust_remote_code: bool) -> dict:
    """The figures of every position of the reference, and of greedy text."""
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
        # What needs code of its own is no architecture of vLLM's.
        model_impl="transformers" if trust_remote_code else "auto",
    )
    asked = SamplingParams(
        temperature=0, max_tokens=STEPS, ignore_eos=True, prompt_logprobs=CANDIDATES
    )
    answers = engine.generate([{"prompt_token_ids": ids} for ids in trained.input_ids], asked)
    positions, continued = [], []
    for tokens, ours, answer in zip(trained.tokens, trained.logprobs, answers, strict=True):
        # What is told of a token is how likely it was where the one before it stood.
        for candidates, mine, listed in zip(tokens, ours, answer.prompt_logprobs[1:], strict=False):
            theirs = {token: logprob.logprob for token, logprob in listed.items()}
            positions.append(compare(candidates, mine, theirs))
        continued.append(list(answer.outputs[0].token_ids))
    return {
        "same_tokens": torch.equal(windows(engine.get_tokenizer(), trained.text), input_ids),
        **summarize(positions),
        "greedy_until": greedy_until(trained.greedy, continued),
    }


def is_known(checkpoint: Path) -> bool:
    """Whether a plugin has told the type of the model."""
    load_general_plugins()
    return json.loads((checkpoint / "config.json").read_text())["model_type"] in CONFIG_MAPPING


def greedy_until(ours: list[list[int]], theirs: list[list[int]]) -> int | None:
    """The first token at which a greedy continuation leaves that of the trained model."""
    steps = zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=False)
    return next((index for index, (mine, yours) in enumerate(steps) if mine != yours), None)


def main() -> None:
    arguments = parse_arguments("--trust-remote-code")
    figures = check(arguments.checkpoint, arguments.reference, arguments.trust_remote_code)
    arguments.result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
