"""A plugin that runs checkpoints of `retrofit merge --format remote-code` on vLLM's own models.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. Of
the rest of this package, the plugin imports only `retrofit.stored_names`. So the package can be
installed in vLLM's environment without its dependencies: vLLM needs an older transformers than
training does.

    pip install --no-deps PATH_TO_RETROFIT
    vllm serve CHECKPOINT
"""

__all__ = ["register"]


def register() -> None:
    """Register the configs with transformers, and with vLLM the module of each model, which vLLM
    imports when that model is asked for."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from retrofit.vllm_plugin.configs import CONFIGS

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        name = config.architecture
        ModelRegistry.register_model(name, f"retrofit.vllm_plugin.models:{name}")
