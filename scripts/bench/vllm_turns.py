"""Time two checkpoints in vLLM, in turns. `serving.py --vllm PYTHON` runs it.

    python vllm_turns.py REQUEST RESULT

Run as a plain script, by a Python that has vLLM, which wants an environment of its own. REQUEST is
a JSON file with `folders`, `input_ids`, `new_tokens`, `repeats` and `dtype`; RESULT gets, for each
folder, `[prefill, decode]` of each run in seconds.
"""

import json
import os
import sys
import time
from pathlib import Path

# Before vLLM is imported. On a CPU: GiB of cache, and threads that the system may place.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import LLM, SamplingParams


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    engines = {
        folder: LLM(
            model=folder,
            dtype=request["dtype"],
            enforce_eager=True,
            max_model_len=len(request["input_ids"]) + request["new_tokens"] + 1,
            max_num_seqs=1,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.4,
        )
        for folder in request["folders"]
    }
    turns: dict[str, list[list[float]]] = {folder: [] for folder in engines}
    for index in range(request["repeats"] + 1):
        for folder, engine in engines.items():
            prefill = seconds(engine, request, 1)
            whole = seconds(engine, request, 1 + request["new_tokens"])
            if index:  # the first is left out
                turns[folder].append([prefill, whole - prefill])
    Path(sys.argv[2]).write_text(json.dumps(turns))


def seconds(engine: LLM, request: dict, new_tokens: int) -> float:
    asked = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    engine.generate([{"prompt_token_ids": request["input_ids"]}], asked, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
