"""Time checkpoints in vLLM, in turns that go back and forth. `serving.py --vllm PYTHON` runs it.

    python vllm_turns.py REQUEST RESULT

A Python that has vLLM, which needs an environment of its own, runs this as a plain script. REQUEST
is a JSON file with `folders`, `prompts` of token ids, `new_tokens`, `repeats` and `dtype`. RESULT
gets, for each folder and prompt, `[prefill, decode]` of each run in seconds.
"""

import json
import os
import sys
import time
from pathlib import Path

# vLLM reads these on a CPU when it is imported: the GiB of its cache, and that the system may place
# its threads.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import LLM, SamplingParams


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    engines = {folder: engine_of(folder, request) for folder in request["folders"]}
    turns: dict[str, list] = {folder: [] for folder in engines}
    for prompt in request["prompts"]:
        for folder, runs in in_turns(engines, prompt, request).items():
            turns[folder].append(runs)
    Path(sys.argv[2]).write_text(json.dumps(turns))


def engine_of(folder: str, request: dict) -> LLM:
    return LLM(
        model=folder,
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=max(map(len, request["prompts"])) + request["new_tokens"] + 1,
        max_num_seqs=1,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.4,
    )


def in_turns(engines: dict[str, LLM], prompt: list[int], request: dict) -> dict[str, list]:
    """Returns `[prefill, decode]` of each run, without a first run of each engine as a warm-up."""
    runs: dict[str, list] = {folder: [] for folder in engines}
    order = list(engines.items())
    for engine in engines.values():
        prefill_and_decode(engine, prompt, request["new_tokens"])
    for _ in range(request["repeats"]):
        for folder, engine in order:
            runs[folder].append(prefill_and_decode(engine, prompt, request["new_tokens"]))
        order.reverse()
    return runs


def prefill_and_decode(engine: LLM, prompt: list[int], new_tokens: int) -> list[float]:
    prefill = seconds(engine, prompt, 1)
    return [prefill, seconds(engine, prompt, 1 + new_tokens) - prefill]


def seconds(engine: LLM, prompt: list[int], new_tokens: int) -> float:
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
