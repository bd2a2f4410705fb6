"""Puts the gates of a recipe into its base."""

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from retrofit.gates.recipe import gate_config
from retrofit.recipe import Recipe


def gated_model(base: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Puts the gates of a recipe into its base.

    Args:
        base: the base, loaded or on the meta device.
        recipe: what is trained.

    Raises:
        UserError: if the base cannot be gated.
    """
    if recipe.train.gradient_checkpointing != "reentrant":
        # PEFT, TRL and transformers each call this, and then gradients flow through layers without
        # gates to the embeddings. Only reentrant checkpointing needs that.
        base.enable_input_require_grads = lambda: None
    return get_peft_model(base, gate_config(recipe))
