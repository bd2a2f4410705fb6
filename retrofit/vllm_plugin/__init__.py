"""vLLM's plugin: checkpoints of `retrofit merge --format remote-code` on vLLM's own model classes.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. Of
the rest of this package only `retrofit.stored_names` is imported there, so that it may be installed
without what the others need: vLLM wants an older transformers than training does.

    pip install --no-deps gate-retrofit
    vllm serve CHECKPOINT
"""

__all__ = ["register"]


def register() -> None:
    """Tell transformers the configs, and vLLM where the models are, which it imports when asked for
    one."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from retrofit.vllm_plugin.configs import CONFIGS

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        name = config.architecture
        ModelRegistry.register_model(name, f"retrofit.vllm_plugin.models:{name}")
