"""gpt-oss + sink logits as gpt-oss: two logits that give no value are one.

`exp` of the base's own sink and of the gate's add up in the denominator of the same softmax. All
else is the base, but for the bias of its keys, which takes that of the gate.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

# Its own sinks take weight from the values, and from what is taken off them.
NO_CENTER = "where a base has sinks of its own, no bias gives back what a center takes away"


def gpt_oss_tensors(
    names: Iterable[str],
    base: Mapping[str, torch.Tensor],
    sinks: Mapping[int, torch.Tensor],
    key_biases: Mapping[int, torch.Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the native checkpoint.

    Args:
        names: of the base's parameters.
        base: its tensors by name, read when asked for.
        sinks: logits by layer, `[num_heads]`.
        key_biases: by layer, `[num_key_value_heads, head_dim]`; none where keys have no bias.
        dtype: of the result.
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
