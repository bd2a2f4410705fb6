"""Maps gpt-oss with sink logits to plain gpt-oss by merging each pair of sinks into one.

The `exp` of the base's own sink and the `exp` of the gate's sink add up in the denominator of the
same softmax. The bias of the keys takes the key bias of the gate. Nothing else changes.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

# The base's own sinks take weight from the values, and so from a center subtracted from them.
NO_CENTER = "where a base has sinks of its own, no bias gives back what a center takes away"


def gpt_oss_tensors(
    names: Iterable[str],
    base: Mapping[str, torch.Tensor],
    sinks: Mapping[int, torch.Tensor],
    key_biases: Mapping[int, torch.Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of the native checkpoint by name.

    Args:
        names: the names of the base's parameters.
        base: the base's tensors by name, each read when it is asked for.
        sinks: the sink logits by layer, `[num_heads]`.
        key_biases: the key biases by layer, `[num_key_value_heads, head_dim]`; empty for gates
            without them.
        dtype: the dtype of the result.
    """
    sinks_by_name = {f"model.layers.{i}.self_attn.sinks": sink for i, sink in sinks.items()}
    biases_by_name = {
        f"model.layers.{i}.self_attn.k_proj.bias": bias.flatten() for i, bias in key_biases.items()
    }
    for name in names:
        tensor = base[name]
        if name in sinks_by_name:
            tensor = torch.logaddexp(tensor.float(), sinks_by_name[name])
        elif name in biases_by_name:
            tensor = tensor.float() + biases_by_name[name]
        yield name, tensor.to(dtype)
