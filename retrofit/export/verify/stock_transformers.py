"""Loads a merged checkpoint in a fresh process and compares it with the reference.

It runs as a plain script:

    python stock_transformers.py CHECKPOINT REFERENCE RESULT [OPTION]

It imports stock transformers and nothing of this package, as users of the checkpoint do. The option
`--trust-remote-code` runs the code in the folder. `--import-retrofit` imports this package, which
PEFT needs to load an adapter.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import parse_arguments
from reference import STEPS, Reference, compare, observe, summarize, windows
from streamed import STEPS as FEW_STEPS
from streamed import float32_weights, load, stream_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

_NO_SINK = -1000.0  # sinks below this take no weight, because all attention logits are far above


def check(checkpoint: Path, reference: Path, trust_remote_code: bool = False) -> dict:
    """Returns the figures of a checkpoint, with the names of missing and unexpected tensors.

    Weights are upcast to float32, so that differences come from the stored weights and not from the
    computation. `unused_gates` names the modules whose output does not depend on their gates.
    """
    trained = Reference.load(reference)
    model, wrong = _load(checkpoint, trust_remote_code)
    streams = stream_weights(model, float32_weights(checkpoint))
    input_ids = torch.tensor(trained.input_ids)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    observed = observe(model, input_ids, FEW_STEPS if streams else STEPS)
    return {
        **wrong,
        "same_tokens": torch.equal(windows(tokenizer, trained.text), input_ids),
        **compare_with_reference(trained, observed),
        "unused_gates": unused_gates(model, input_ids[:1, :STEPS]),
    }


def _load(checkpoint: Path, trust_remote_code: bool) -> tuple[Any, dict[str, list[str]]]:
    if (checkpoint / "config.json").is_file():
        return load(checkpoint, trust_remote_code)
    # Without a config.json it is an adapter, which names its base.
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model.eval(), {"missing": [], "unexpected": []}


def compare_with_reference(trained: Reference, observed: dict[str, torch.Tensor]) -> dict:
    """Returns the figures over all positions of one forward, and the last ones with a cache."""
    tokens, expected = torch.tensor(trained.tokens), torch.tensor(trained.logprobs)
    positions = []
    for name, start in (("prefill", 0), ("cached", -observed["cached"].shape[1])):
        logprobs = observed[name].double().log_softmax(-1)
        rows = zip(
            tokens[:, start:].flatten(0, 1),
            expected[:, start:].flatten(0, 1),
            logprobs.flatten(0, 1),
            strict=True,
        )
        for candidates, logprobs_of_candidates, row in rows:
            top = torch.cat([candidates, row.argmax()[None]]).tolist()
            measured = dict(zip(top, row[top].tolist(), strict=True))
            positions.append(
                compare(candidates.tolist(), logprobs_of_candidates.tolist(), measured)
            )
    greedy = torch.tensor(trained.greedy)
    length = min(greedy.shape[1], observed["greedy"].shape[1])
    differs = (greedy[:, :length] != observed["greedy"][:, :length]).any(0).nonzero()
    until = differs[0].item() if len(differs) else None
    return summarize(positions) | {"greedy_until": until}


@torch.no_grad()
def unused_gates(model, input_ids: torch.Tensor) -> list[str]:
    """Returns the attention modules whose output does not change as a gate nearly closes."""
    unused: list[str] = []
    watched = list(gates(model))
    if not watched:  # an empty list would mean that all gates are used
        return ["all: the model has no gates"]

    def watch(name: str, nearly_closed: AbstractContextManager):
        def compare_outputs(attention, args, kwargs, output):
            with nearly_closed:
                if torch.equal(attention.forward(*args, **kwargs)[0], output[0]):
                    unused.append(name)

        return compare_outputs

    handles = [
        attention.register_forward_hook(watch(name, nearly_closed), with_kwargs=True)
        for name, attention, nearly_closed in watched
    ]
    model(input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return unused


def gates(model) -> Iterator[tuple[str, nn.Module, AbstractContextManager]]:
    """Yields each gate as its module's name, the module, and a context manager that nearly closes
    the gate."""
    for name, module in model.named_modules():
        for nearly_closed in _gates_of(module):
            yield name, module, nearly_closed


def _gates_of(module: nn.Module) -> Iterator[AbstractContextManager]:
    gate = _gate_of(module)
    if gate is not None and isinstance(gate.g_proj, nn.ModuleDict):  # an adapter
        adapter = gate.g_proj["default"]
        if adapter.weight is not None:  # its output is the gates, not their logits
            yield _changed_output(adapter, lambda gate: gate / 100)
        if adapter.sink_odds is not None and (adapter.sink_odds > 0).any():
            yield _raised_sinks(adapter.sink_logits)
    elif gate is not None:
        if gate.g_proj is not None:
            yield _changed_output(gate.g_proj, lambda logits: logits - 5)
        yield from _sinks_of(gate)
    elif hasattr(module, "q_proj") and hasattr(module, "q_norm"):
        yield _changed_output(module.q_proj, partial(_close_packed_gate, head_dim=module.head_dim))
    elif hasattr(module, "q_proj"):
        yield from _sinks_of(module)


def _gate_of(module: nn.Module) -> Any:
    """Returns the gate of an attention module, which older checkpoints' own code calls `g1`."""
    return getattr(module, "attn_gate", None) or getattr(module, "g1", None)


def _sinks_of(module: nn.Module) -> Iterator[AbstractContextManager]:
    """Yields what raises sinks that take weight; a stock architecture has others without gates."""
    sinks = getattr(module, "sinks", None)
    if sinks is not None and (sinks > _NO_SINK).any():
        yield _raised_sinks(sinks)


@contextmanager
def _changed_output(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Changes the output of a module inside the `with` block."""
    handle = module.register_forward_hook(lambda _module, _args, output: change(output))
    yield
    handle.remove()


@contextmanager
def _raised_sinks(sinks: torch.Tensor) -> Iterator[None]:
    """Raises sink logits inside the `with` block, so that sinks take more weight."""
    before = sinks.clone()
    sinks += 5
    yield
    sinks.copy_(before)


def _close_packed_gate(query_and_gate: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Nearly closes the gates in the output of a `q_proj` that is `[query; gate]` a head."""
    query, gate = query_and_gate.unflatten(-1, (-1, 2, head_dim)).unbind(-2)
    return torch.stack([query, gate - 5], -2).flatten(-3)


def main() -> None:
    arguments = parse_arguments("--trust-remote-code", "--import-retrofit")
    if arguments.import_retrofit:
        import retrofit  # noqa: F401
    figures = check(arguments.checkpoint, arguments.reference, arguments.trust_remote_code)
    if not arguments.import_retrofit:
        assert not {"retrofit", "peft"} & set(sys.modules), "the check must run on stock software"
    arguments.result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
