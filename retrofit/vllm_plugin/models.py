"""vLLM's model classes with gates, one for each family. vLLM imports this file itself."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from retrofit.stored_names import current_name
from retrofit.vllm_plugin.attention import GatedAttention


class Gated(nn.Module):
    """A mixin that comes before a model class of vLLM and adds gates to the layers that the config
    names."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        decoder = self.model
        # If the layers are spread over devices, those of other devices are placeholders here.
        local_layers = range(decoder.start_layer, decoder.end_layer)
        for index in vllm_config.model_config.hf_config.gated_layers:
            if index in local_layers:
                layer = decoder.layers[index]
                name = f"{maybe_prefix(prefix, 'model')}.layers.{index}.self_attn"
                layer.self_attn = GatedAttention(layer.self_attn, index, vllm_config, name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Overrides vLLM's method, so that checkpoints with former names load too."""
        return super().load_weights((current_name(name), tensor) for name, tensor in weights)


class GatedGemma3TextForCausalLM(Gated, Gemma3ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if vllm_config.model_config.dtype == torch.float16:  # vLLM refuses the base by its name
            raise ValueError("Gemma 3 is not stable in float16: set dtype to bfloat16 or float32")
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class GatedLlamaForCausalLM(Gated, LlamaForCausalLM):
    pass


class GatedMistralForCausalLM(Gated, MistralForCausalLM):
    pass


class GatedQwen2ForCausalLM(Gated, Qwen2ForCausalLM):
    pass


class GatedQwen3ForCausalLM(Gated, Qwen3ForCausalLM):
    pass


class GatedQwen3MoeForCausalLM(Gated, Qwen3MoeForCausalLM):
    pass
