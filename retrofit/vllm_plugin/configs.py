"""The configs of gated checkpoints: the base's config, the gates' settings and a vLLM class name.

In the checkpoints, the architecture of every family is called `GatedForCausalLM`, and `model_type`
tells the families apart.
"""

from typing import Any

from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


def gated_config(base: type, name: str) -> Any:
    """Make the config class of a family, `Gated{name}Config`, whose arguments
    `adapters/modeling_gated.py` describes.

    An instance raises NotImplementedError if vLLM's attention cannot run its gates. vLLM would wrap
    a ValueError in several lines.

    Args:
        base: the config class of the base.
        name: the family's name in the names of the classes.
    """

    class GatedConfig(base):  # type: ignore[misc, valid-type]
        model_type = f"gated_{base.model_type}"  # type: ignore[attr-defined]
        architecture = f"Gated{name}ForCausalLM"

        def __init__(
            self,
            gate_granularity: str = "headwise",
            gate_sinks: str = "none",
            gate_key_bias: bool = False,
            gate_centered: bool = False,
            gate_projection_layers: list[int] | None = None,
            gated_layers: list[int] | None = None,
            **kwargs,
        ):
            super().__init__(**kwargs)
            if problem := _unsupported(gate_sinks, kwargs):
                raise NotImplementedError(problem)
            self.gate_granularity = gate_granularity
            self.gate_sinks = gate_sinks
            self.gate_key_bias = gate_key_bias
            self.gate_centered = gate_centered
            self.gate_projection_layers = gate_projection_layers
            self.gated_layers = gated_layers or []
            self.architectures = [self.architecture]

    # vLLM pickles configs for its processes, which find the class by its name.
    GatedConfig.__name__ = GatedConfig.__qualname__ = f"Gated{name}Config"
    return GatedConfig


def _unsupported(sinks: str, base_settings: dict) -> str | None:
    """Why vLLM's attention cannot run gates with these sinks, or `None` if it can."""
    if sinks not in ("none", "constant"):
        return (
            f"gates with sinks={sinks!r} do not run in vLLM, whose attention takes constant sinks; "
            "transformers runs them, with trust_remote_code"
        )
    if sinks != "none" and base_settings.get("dual_chunk_attention_config"):
        return "vLLM has no dual chunk attention with sinks; drop dual_chunk_attention_config"
    return None


GatedGemma3TextConfig = gated_config(Gemma3TextConfig, "Gemma3Text")
GatedLlamaConfig = gated_config(LlamaConfig, "Llama")
GatedMistralConfig = gated_config(MistralConfig, "Mistral")
GatedQwen2Config = gated_config(Qwen2Config, "Qwen2")
GatedQwen3Config = gated_config(Qwen3Config, "Qwen3")
GatedQwen3MoeConfig = gated_config(Qwen3MoeConfig, "Qwen3Moe")

CONFIGS = (
    GatedGemma3TextConfig,
    GatedLlamaConfig,
    GatedMistralConfig,
    GatedQwen2Config,
    GatedQwen3Config,
    GatedQwen3MoeConfig,
)
