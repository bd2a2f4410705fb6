"""A served model and its base in one engine: prefill and decoding of both, in turns.

In transformers both phases are timed around the model; llama.cpp tells its own times; vLLM's
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

Seconds = tuple[float, float]  # of the prefill, and of decoding
Arm = Callable[[], Seconds]


@dataclass(frozen=True)
class Compared:
    """Runs of a served model and of its base, side by side.

    Attributes:
        how: what both ran on, where the engine has several ways; of the model / of the base.
        prompt: tokens of it.
        own: seconds of each run of the model.
        base: seconds of each run of the base, in the same turns.
        sizes: bytes of the weights of both.
    """

    how: str
    prompt: int
    own: list[Seconds]
    base: list[Seconds]
    sizes: tuple[int, int]


def in_transformers(served: Path, dtype: Dtype, options: Namespace, _: Path) -> Iterator[Compared]:
    """A checkpoint or an adapter beside the base under its default attention, and beside the base
    under the attention of the model, where that is another."""
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
    # The code, if any, is what the merge just wrote.
    return load_base(Model(base=str(served), dtype=dtype, trust_remote_code=True))


def bases_beside(own: PreTrainedModel, base: str, dtype: Dtype) -> dict[str, PreTrainedModel]:
    """The base by attention: with the model's first, then with its own default."""
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
    """Random tokens, `[1, tokens]`."""
    config = AutoConfig.from_pretrained(Path(base).expanduser())
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (1, tokens), generator=generator)


def in_llama_cpp(served: Path, kind: str, options: Namespace, folder: Path) -> Iterator[Compared]:
    """A GGUF file beside that of the base, of the same kind."""
    from base_gguf import write_base_gguf  # the extra `gguf`

    base = folder / f"base-{kind}.gguf"
    if not base.is_file():
        write_base_gguf(Path(options.base).expanduser(), base, kind)
    own = next(served.glob("*.gguf"))
    context = max(options.prompt) + options.new_tokens
    servers = {"own": llama_server(own, context), "base": llama_server(base, context)}
    for tokens in options.prompt:
        prompt = prompt_of(options.base, tokens)[0].tolist()
        timers: dict[str, Arm] = {
            name: partial(told_by, server, prompt, options.new_tokens)
            for name, server in servers.items()
        }
        seconds = collected(timers, options.repeats)
        sizes = own.stat().st_size, base.stat().st_size
        yield Compared(kind, tokens, seconds["own"], seconds["base"], sizes)


def llama_server(file: Path, tokens: int):
    """llama.cpp's server in this process, at its defaults but for one request at a time."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = tokens + 1, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = 0
    return xllamacpp.Server(params)


def told_by(server, prompt: list[int], new_tokens: int) -> Seconds:
    request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions(request | {"cache_prompt": False})
    if "timings" not in answer:
        raise SystemExit(f"llama.cpp answers {answer}")
    told = answer["timings"]
    # The first new token comes with the prompt.
    return told["prompt_ms"] / 1e3, told["predicted_per_token_ms"] * new_tokens / 1e3


def in_vllm(served: Path, dtype: str, options: Namespace, folder: Path) -> Iterator[Compared]:
    """A checkpoint beside the base, by a Python that has vLLM."""
    folders = served, Path(options.base).expanduser()
    request = {
        "folders": [str(each) for each in folders],
        "prompts": [prompt_of(options.base, tokens)[0].tolist() for tokens in options.prompt],
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "dtype": dtype,
    }
    turns = turns_in_vllm(request, options.vllm, folder)
    own, base = (turns[str(each)] for each in folders)
    sizes = stored_bytes(folders[0], dtype), stored_bytes(folders[1], dtype)
    for index, tokens in enumerate(options.prompt):
        yield Compared("", tokens, own[index], base[index], sizes)


def turns_in_vllm(request: dict, python: str, folder: Path) -> dict[str, list[list[Seconds]]]:
    """What `vllm_turns.py` answers: by folder and prompt, the seconds of each run."""
    asked, told = folder / "request.json", folder / "result.json"
    write_json(asked, request)
    script = Path(__file__).with_name("vllm_turns.py")
    # -P: its neighbours are no modules of that Python. What it prints is vLLM's log.
    subprocess.run(
        [python, "-P", str(script), str(asked), str(told)],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        stdout=sys.stderr,
        check=True,
    )
    return read_json(told)


def stored_bytes(folder: Path, dtype: str) -> int:
    """Of the weights of a checkpoint once they are held in `dtype`."""
    stored = StoredWeights(folder)
    return sum(math.prod(stored.shape(name)) for name in stored) * getattr(torch, dtype).itemsize


TIMED: dict[str, Callable[..., Iterator[Compared]]] = {
    "transformers": in_transformers,
    "llama.cpp": in_llama_cpp,
    "vllm": in_vllm,
}
