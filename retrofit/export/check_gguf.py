"""Load a GGUF file in llama.cpp, in a fresh process, and compare it with the trained model.

Run as a plain script:

    python -P check_gguf.py FILE REFERENCE RESULT

It imports xllamacpp, which is llama.cpp in a wheel, and nothing of this package.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
import xllamacpp
from safetensors import safe_open
from safetensors.torch import load_file

POSITIONS = 16  # of each window, spread over it
CANDIDATES = 100  # tokens that are compared at each: the server gives no more without slowing down


def serve(path: Path, threads: int) -> xllamacpp.Server:
    """llama.cpp's server in this process, with nothing rounded that the file does not round."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_gpu_layers = 1024, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 0
    return xllamacpp.Server(params)


def ask(server: xllamacpp.Server, prompt: str | list[int]) -> dict:
    """The server's answer to a prompt: one token, greedily."""
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": CANDIDATES}
    answer = server.handle_completions(request | {"ignore_eos": True})
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp answers {answer}")
    return answer


def candidates(answer: dict) -> list[dict] | None:
    """The most probable next tokens with their log probabilities; `None` where the first of them is
    a part of a character, which the server keeps to itself."""
    logprobs = answer["choices"][0]["logprobs"]
    return logprobs and logprobs["content"][0]["top_logprobs"]


def compare(trained: torch.Tensor, likely: list[dict]) -> dict[str, float]:
    """One position: logits `[vocab_size]` against llama.cpp's most probable tokens.

    `kl` is taken among those, for the server's float32 sum over the vocabulary is off by 1e-4.
    """
    ours = trained.double().log_softmax(-1)
    tokens = torch.tensor([each["id"] for each in likely])
    # JSON has no NaN: what is not finite comes as null.
    logprobs = [math.nan if each["logprob"] is None else each["logprob"] for each in likely]
    theirs = torch.tensor(logprobs).double()
    p, q = ours[tokens].log_softmax(-1), theirs.log_softmax(-1)
    return {
        "kl": (p.exp() * (p - q)).sum().item(),
        "max_logprob_difference": (ours[tokens] - theirs)[:10].abs().max().item(),
        "top1_agreement": float(tokens[0] == ours.argmax()),
    }


def prefixes(input_ids: torch.Tensor) -> list[tuple[int, int]]:
    """Window and length of what is compared."""
    length = input_ids.shape[1]
    ends = torch.linspace(length / POSITIONS, length, POSITIONS).int().tolist()
    return [(window, end) for window in range(len(input_ids)) for end in ends]


def check(path: Path, reference: Path) -> dict:
    """Means and the largest difference over prefixes of both windows, and how far greedy
    continuations agree."""
    trained = load_file(reference)
    with safe_open(reference, framework="pt") as file:
        head = file.metadata()["head"]
    server = serve(path, threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    windows = trained["input_ids"].tolist()
    figures = []
    for window, end in prefixes(trained["input_ids"]):
        if likely := candidates(ask(server, windows[window][:end])):
            figures.append(compare(trained["prefill"][window, end - 1], likely))
    by_text, by_ids = ask(server, head), ask(server, trained["head_ids"].tolist())
    return {
        "same_tokens": candidates(by_text) == candidates(by_ids)
        and by_text["usage"]["prompt_tokens"] == len(trained["head_ids"]),
        "positions": len(figures),
        "kl": sum(each["kl"] for each in figures) / len(figures),
        "max_logprob_difference": max(each["max_logprob_difference"] for each in figures),
        "top1_agreement": sum(each["top1_agreement"] for each in figures) / len(figures),
        "greedy_until": greedy_until(server, windows, trained["greedy"].tolist()),
    }


def greedy_until(server, windows: list[list[int]], greedy: list[list[int]]) -> int | None:
    """The first token at which a greedy continuation leaves that of the trained model."""
    for index in range(len(greedy[0])):
        for window, continuation in zip(windows, greedy, strict=True):
            likely = candidates(ask(server, window + continuation[:index]))
            if likely and likely[0]["id"] != continuation[index]:
                return index
    return None


def main() -> None:
    path, reference, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(check(path, reference)))


if __name__ == "__main__":
    main()
