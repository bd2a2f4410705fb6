"""Load a GGUF file in llama.cpp, in a fresh process, and compare it with the reference.

Run as a plain script:

    python llama_server.py FILE REFERENCE RESULT

It imports xllamacpp, which is llama.cpp in a wheel, and nothing of this package.
"""

import json
import math
import os
from pathlib import Path

import torch
import xllamacpp
from command_line import parse_arguments
from reference import Reference, compare, summarize

POSITIONS = 16  # of each window, spread over it: each is a prompt of its own
LISTED_TOKENS = 100  # of the most probable tokens; more take the server long


def start_server(path: Path, threads: int) -> xllamacpp.Server:
    """llama.cpp's server in this process, with nothing rounded that the file does not round."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_gpu_layers = 1024, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 0
    return xllamacpp.Server(params)


def request_next_token(
    server: xllamacpp.Server, prompt: str | list[int], cache: bool = True
) -> tuple[int, dict[int, float]]:
    """The tokens of a prompt, and the most probable next ones with their log probabilities: none
    where the first of them is a part of a character, which the server keeps to itself.

    Without `cache`, nothing is kept of the prompt before, so that the same tokens give the same
    bits.
    """
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": LISTED_TOKENS}
    answer = server.handle_completions(request | {"ignore_eos": True, "cache_prompt": cache})
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp answers {answer}")
    logprobs = answer["choices"][0]["logprobs"]
    listed = logprobs["content"][0]["top_logprobs"] if logprobs else []
    # JSON has no NaN: what is not finite comes as null.
    likely = {e["id"]: math.nan if e["logprob"] is None else e["logprob"] for e in listed}
    return answer["usage"]["prompt_tokens"], likely


def check(path: Path, reference: Path) -> dict:
    trained = Reference.load(reference)
    server = start_server(path, threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    length = len(trained.input_ids[0])
    ends = torch.linspace(length / POSITIONS, length, POSITIONS).int().tolist()
    positions = []
    for ids, tokens, ours in zip(trained.input_ids, trained.tokens, trained.logprobs, strict=True):
        for end in ends:
            if theirs := request_next_token(server, ids[:end])[1]:
                positions.append(compare(tokens[end - 1], ours[end - 1], theirs))
    heads = trained.head, trained.head_ids
    cut_here, cut_there = (request_next_token(server, head, cache=False) for head in heads)
    return {
        "same_tokens": cut_here == cut_there,
        **summarize(positions),
        "greedy_until": greedy_until(server, trained),
    }


def greedy_until(server: xllamacpp.Server, trained: Reference) -> int | None:
    """The first token at which a greedy continuation leaves that of the trained model."""
    for index in range(len(trained.greedy[0])):
        for ids, continuation in zip(trained.input_ids, trained.greedy, strict=True):
            _, theirs = request_next_token(server, ids + continuation[:index])
            if theirs and max(theirs, key=theirs.__getitem__) != continuation[index]:
                return index
    return None


def main() -> None:
    arguments = parse_arguments()
    figures = check(arguments.checkpoint, arguments.reference)
    arguments.result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
