"""Loads a GGUF file in llama.cpp, in a fresh process, and compares it with the reference.

It runs as a plain script:

    python llama_server.py FILE REFERENCE RESULT

It imports xllamacpp, a wheel that contains llama.cpp, and nothing of this package.
"""

import json
import math
import os
from pathlib import Path

import torch
import xllamacpp
from command_line import parse_arguments
from reference import Reference, compare, summarize

POSITIONS = 16  # compared positions of each window, spread over it; each needs a prompt of its own
LISTED_TOKENS = 100  # most probable tokens that the server lists; a longer list is slow


def start_server(path: Path, threads: int) -> xllamacpp.Server:
    """Starts llama.cpp's server in this process, with a float32 cache so that it rounds little."""
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
    """Asks the server for the most probable tokens after a prompt.

    Args:
        server: the server.
        prompt: the text or the token ids of the prompt.
        cache: whether to reuse the cache of the previous prompt. Without it, the same tokens give
            the same bits.

    Returns:
        The number of tokens in the prompt, and the log probabilities of the most probable next
        tokens by id. These are empty if the most probable token is a part of a character, for which
        the server returns none.
    """
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": LISTED_TOKENS}
    answer = server.handle_completions(request | {"ignore_eos": True, "cache_prompt": cache})
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp answers {answer}")
    logprobs = answer["choices"][0]["logprobs"]
    listed = logprobs["content"][0]["top_logprobs"] if logprobs else []
    # JSON has no NaN, so a log probability that is not finite arrives as null.
    logprobs_by_id = {
        entry["id"]: math.nan if entry["logprob"] is None else entry["logprob"] for entry in listed
    }
    return answer["usage"]["prompt_tokens"], logprobs_by_id


def check(path: Path, reference: Path) -> dict:
    """Returns the figures of a GGUF file against a reference."""
    trained = Reference.load(reference)
    server = start_server(path, threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    length = len(trained.input_ids[0])
    ends = torch.linspace(length / POSITIONS, length, POSITIONS).int().tolist()
    without_gates = trained.logprobs if trained.ungated is None else trained.ungated
    positions, ungated_positions = [], []
    for window, ids in enumerate(trained.input_ids):
        for end in ends:
            if measured := request_next_token(server, ids[:end])[1]:
                tokens, expected, ungated = (
                    part[window][end - 1]
                    for part in (trained.tokens, trained.logprobs, without_gates)
                )
                positions.append(compare(tokens, expected, measured))
                ungated_positions.append(compare(tokens, ungated, measured))
    # The server's own tokenizer splits the text; the ids are from the trained model's tokenizer.
    from_text, from_ids = (
        request_next_token(server, prompt, cache=False)
        for prompt in (trained.head, trained.head_ids)
    )
    return {
        "same_tokens": from_text == from_ids,
        **summarize(positions),
        "kl_to_ungated": summarize(ungated_positions)["kl"],
        "greedy_until": greedy_until(server, trained),
    }


def greedy_until(server: xllamacpp.Server, trained: Reference) -> int | None:
    """Returns the index of the first greedy token that differs from the trained model's, if any."""
    for index in range(len(trained.greedy[0])):
        for ids, continuation in zip(trained.input_ids, trained.greedy, strict=True):
            _, logprobs = request_next_token(server, ids + continuation[:index])
            if logprobs and max(logprobs, key=logprobs.__getitem__) != continuation[index]:
                return index
    return None


def main() -> None:
    arguments = parse_arguments()
    figures = check(arguments.checkpoint, arguments.reference)
    arguments.result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
