"""Times prefill and decoding of a served model and its base in one engine, in turns.

In transformers both phases are timed around the model. llama.cpp reports its own times. vLLM's
prefill is the time to the first token.
"""

import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from paired import collected
from retrofit.measure.cost import prefill_and_decode
from retrofit.models.loading import load_base, load_model
from retrofit.models.safetensors_io import StoredWeights
from retrofit.recipe import Dtype, Model
from retrofit.utils.files import read_json, write_json

Seconds = tuple[float, float]  # the seconds of the prefill and of decoding
Arm = Callable[[], Seconds]


@dataclass(frozen=True)
class Compared:
    """The runs of a served model and of its base.

    Attributes:
        how: how the model / the base ran, if the engine has several ways.
        prompt: how many tokens the prompt has.
        own: the seconds of each run of the model.
        base: the seconds of each run of the base, in the same turns.
        sizes: the bytes of the weights of both.
    """

    how: str
    prompt: int
    own: list[Seconds]
    base: list[Seconds]
    sizes: tuple[int, int]


def in_transformers(served: Path, dtype: Dtype, options: Namespace, _: Path) -> Iterator[Compared]:
    """Compares a checkpoint or an adapter with the base under the base's default attention, and
    under the model's attention if that is another."""
    own = open_served(served, dtype)
    bases = bases_beside(own, options.base, dtype)
    arms = {"own": own, **bases}
    for tokens in options.prompt:
        input_ids = prompt_of(options.base, tokens)
        timers: dict[str, Arm] = {
            name: partial(prefill_and_decode, model, input_ids, options.new_tokens)
            for name, model in arms.items()
        }
        seconds = collected(timers, options.repeats)
        for attention, base in bases.items():
            how = f"{attention_of(own)} / {attention}"
            sizes = weight_bytes(own), weight_bytes(base)
            yield Compared(how, tokens, seconds["own"], seconds[attention], sizes)


def open_served(served: Path, dtype: Dtype) -> PreTrainedModel:
    if (served / "adapter_config.json").is_file() or (served / "run.json").is_file():
        return load_model(str(served), dtype=dtype)[0]
    # Any code in the folder is what the merge has just written.
    return load_base(Model(base=str(served), dtype=dtype, trust_remote_code=True))


def bases_beside(own: PreTrainedModel, base: str, dtype: Dtype) -> dict[str, PreTrainedModel]:
    """Opens the base with the attention of the model, and with its own default if that is another;
    returns the bases by attention."""
    default = load_base(Model(base=base, dtype=dtype))
    wanted = attention_of(own)
    if wanted == attention_of(default):
        return {wanted: default}
    same = load_base(Model(base=base, dtype=dtype, attn_implementation=wanted))
    return {attention_of(same): same, attention_of(default): default}


def attention_of(model: PreTrainedModel) -> str:
    return model.config._attn_implementation


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def prompt_of(base: str, tokens: int) -> torch.Tensor:
    """Returns random tokens, `[1, tokens]`."""
    config = AutoConfig.from_pretrained(Path(base).expanduser())
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (1, tokens), generator=generator)


def in_llama_cpp(served: Path, kind: str, options: Namespace, folder: Path) -> Iterator[Compared]:
    """Compares a GGUF file with one of the base of the same kind."""
    from base_gguf import write_base_gguf  # needs the extra `gguf`

    base = folder / f"base-{kind}.gguf"
    if not base.is_file():
        write_base_gguf(Path(options.base).expanduser(), base, kind)
    own = next(served.glob("*.gguf"))
    context = max(options.prompt) + options.new_tokens
    servers = {"own": llama_server(own, context), "base": llama_server(base, context)}
    for tokens in options.prompt:
        prompt = prompt_of(options.base, tokens)[0].tolist()
        timers: dict[str, Arm] = {
            name: partial(llama_cpp_seconds, server, prompt, options.new_tokens)
            for name, server in servers.items()
        }
        seconds = collected(timers, options.repeats)
        sizes = own.stat().st_size, base.stat().st_size
        yield Compared(kind, tokens, seconds["own"], seconds["base"], sizes)


def llama_server(file: Path, tokens: int):
    """Starts llama.cpp's server in this process, with its defaults except for one request at a
    time."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = tokens + 1, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = 0
    return xllamacpp.Server(params)


def llama_cpp_seconds(server, prompt: list[int], new_tokens: int) -> Seconds:
    """Runs one request, and returns the times that llama.cpp reports."""
    request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(request | {"cache_prompt": False})
    if "timings" not in answer:
        raise SystemExit(f"llama.cpp answers {answer}")
    timings = answer["timings"]
    # The prefill yields the first new token, so decoding is scaled up to `new_tokens`.
    return timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"] * new_tokens / 1e3


def in_vllm(served: Path, dtype: str, options: Namespace, folder: Path) -> Iterator[Compared]:
    """Compares a checkpoint with the base, in a Python that has vLLM."""
    folders = served, Path(options.base).expanduser()
    request = {
        "folders": [str(path) for path in folders],
        "prompts": [prompt_of(options.base, tokens)[0].tolist() for tokens in options.prompt],
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "dtype": dtype,
    }
    turns = turns_in_vllm(request, options.vllm, folder)
    own, base = (turns[str(path)] for path in folders)
    sizes = stored_bytes(folders[0], dtype), stored_bytes(folders[1], dtype)
    for index, tokens in enumerate(options.prompt):
        yield Compared("", tokens, own[index], base[index], sizes)


def turns_in_vllm(request: dict, python: str, folder: Path) -> dict[str, list[list[Seconds]]]:
    """Runs `vllm_turns.py`, and returns the seconds of each run by folder and prompt."""
    request_file, result_file = folder / "request.json", folder / "result.json"
    write_json(request_file, request)
    script = Path(__file__).with_name("vllm_turns.py")
    # -P keeps that Python from importing the script's neighbours. Its output is vLLM's log.
    subprocess.run(
        [python, "-P", str(script), str(request_file), str(result_file)],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        stdout=sys.stderr,
        check=True,
    )
    return read_json(result_file)


def stored_bytes(folder: Path, dtype: str) -> int:
    """Returns the bytes of a checkpoint's weights when they are held in `dtype`."""
    stored = StoredWeights(folder)
    return sum(math.prod(stored.shape(name)) for name in stored) * getattr(torch, dtype).itemsize


TIMED: dict[str, Callable[..., Iterator[Compared]]] = {
    "transformers": in_transformers,
    "llama.cpp": in_llama_cpp,
    "vllm": in_vllm,
}
