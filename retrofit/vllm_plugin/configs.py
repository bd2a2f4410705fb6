"""The configs of gated checkpoints: the base's, what gates need, and the name of a vLLM class.

In the checkpoints `GatedForCausalLM` stands for the model of every family, and `model_type` says
which one is meant.
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


def gated(base: type, name: str) -> Any:
    """The config of a family, `Gated{name}Config`, with the arguments that
    `adapters/modeling_gated.py` describes.

    Raises:
        NotImplementedError: when built for gates that vLLM's attention cannot have. vLLM would
            wrap a `ValueError` in several lines.
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
            gated_layers: list[int] | None = None,
            **kwargs,
        ):
            super().__init__(**kwargs)
            if reason := _refusal(gate_sinks, kwargs):
                raise NotImplementedError(reason)
            self.gate_granularity = gate_granularity
            self.gate_sinks = gate_sinks
            self.gate_key_bias = gate_key_bias
            self.gate_centered = gate_centered
            self.gated_layers = gated_layers or []
            self.architectures = [self.architecture]

    # vLLM sends configs to its processes, which find the class by its name.
    GatedConfig.__name__ = GatedConfig.__qualname__ = f"Gated{name}Config"
    return GatedConfig


def _refusal(sinks: str, others: dict) -> str | None:
    if sinks not in ("none", "constant"):
        return (
            f"gates with sinks={sinks!r} do not run in vLLM, whose attention takes constant sinks; "
            "transformers runs them, with trust_remote_code"
        )
    if sinks != "none" and others.get("dual_chunk_attention_config"):
        return "vLLM has no dual chunk attention with sinks; drop dual_chunk_attention_config"
    return None


GatedGemma3TextConfig = gated(Gemma3TextConfig, "Gemma3Text")
GatedLlamaConfig = gated(LlamaConfig, "Llama")
GatedMistralConfig = gated(MistralConfig, "Mistral")
GatedQwen2Config = gated(Qwen2Config, "Qwen2")
GatedQwen3Config = gated(Qwen3Config, "Qwen3")
GatedQwen3MoeConfig = gated(Qwen3MoeConfig, "Qwen3Moe")

CONFIGS = (
    GatedGemma3TextConfig,
    GatedLlamaConfig,
    GatedMistralConfig,
    GatedQwen2Config,
    GatedQwen3Config,
    GatedQwen3MoeConfig,
)
