"""Opens models of every kind: bases, runs, adapters, merged checkpoints, and models that were
published with gates."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from pydantic import ValidationError
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from retrofit.data.vocabulary import check_vocabulary, embedded_tokens
from retrofit.models.adapter_config import check_adapter_files, read_adapter_config
from retrofit.models.base_config import check_gateable, read_config
from retrofit.models.foreign_code import with_consent
from retrofit.models.opening import DAMAGES, check_complete, checked_weights, one_line, opening
from retrofit.models.pickles import refuse_pickled_weights
from retrofit.models.published import unpack
from retrofit.models.run_folder import (
    check_base,
    check_config,
    check_gates,
    facts_of,
    run_and_adapter,
)
from retrofit.models.safetensors_io import StoredWeights, read_index, weights_file
from retrofit.models.source import check_ungated, has_published_gates, local_copy
from retrofit.models.tokenizer_file import check_tokenizer
from retrofit.recipe import RESOLVED, Dtype, Model, Quantization, load_recipe
from retrofit.stored_names import current_name
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import temporary_folder
from retrofit.utils.paths import expanded


def load_base(spec: Model) -> PreTrainedModel:
    """Loads the base of a recipe, in eval mode, on the GPU if there is one.

    Raises:
        UserError: if the base cannot be found, is damaged, lacks a weight or has one too many, has
            a NaN or an infinity, is stored in pickles, or would be quantized twice or without
            bitsandbytes.
    """
    config = load_config(spec)
    check_ungated(config, spec.base)
    check_files(spec, config)
    if hasattr(config, "attention_dropout"):
        config.attention_dropout = 0.0  # it belongs to the training of the base itself
    kwargs: dict[str, Any] = {}
    if spec.quantization:
        kwargs["quantization_config"] = _quantization(spec, config)
    if torch.cuda.is_available():
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    if spec.attn_implementation:
        kwargs["attn_implementation"] = spec.attn_implementation
    with opening(spec.base):
        model, loading = AutoModelForCausalLM.from_pretrained(
            spec.location,
            config=config,
            revision=spec.revision,
            dtype=spec.dtype,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_complete reports them
            **kwargs,
        )
    check_complete(loading, spec.base)
    for _ in checked_weights(model.named_parameters(), spec.base):
        pass
    return model.eval()


def load_config(spec: Model) -> PreTrainedConfig:
    """Reads and checks the config of a base.

    Raises:
        UserError: if there is no such folder or hub id, or the config is damaged or has values that
            no model can have.
    """
    return read_config(spec.location, spec.base, spec.revision, spec.trust_remote_code)


def load_tokenizer(spec: Model) -> PreTrainedTokenizerBase:
    """Loads and checks the tokenizer of a base.

    Raises:
        UserError: if there is none, it is damaged, transformers cuts text otherwise than its file
            says, or the model has no embedding for some of its tokens.
    """
    config = load_config(spec)
    with opening(spec.base):
        tokenizer = AutoTokenizer.from_pretrained(
            spec.location, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
        check_tokenizer(tokenizer, spec.location, spec.revision)
        check_vocabulary(tokenizer, config, spec.base)
    # A padding token is often added without an embedding. Any token can serve in its place.
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= embedded_tokens(config):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_files(spec: Model, config: PreTrainedConfig) -> None:
    """Checks the files of a base before any of them is loaded.

    Raises:
        UserError: if the base's files are pickles, missing, damaged, or those of an adapter.
    """
    folder, file = Path(spec.location), weights_file(config, spec.base)
    refuse_pickled_weights(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{spec.base} holds an adapter, which transformers would put on it; name a folder "
            "without adapter_config.json as the base"
        )
    if folder.is_dir():
        stored = StoredWeights(folder, file)
        _check_packed(stored, config, spec.base)
        if not getattr(config, "quantization_config", None):
            stored.refuse_other_dtypes()
    else:
        _check_index(spec, file)


def _check_index(spec: Model, file: str) -> None:
    """Checks that an index on the hub names only safetensors, before weights are downloaded."""
    with opening(spec.base):
        index = cached_file(
            spec.location,
            file if file.endswith(".json") else SAFE_WEIGHTS_INDEX_NAME,
            revision=spec.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if index:
        read_index(Path(index))


def _check_packed(stored: StoredWeights, config: PreTrainedConfig, base: str) -> None:
    """Checks that the weights are packed if the config says that bitsandbytes packed them."""
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method", "bitsandbytes") if quantization else None
    says_packed = method == "bitsandbytes"
    if says_packed and not any(name.endswith((".absmax", ".SCB")) for name in stored):
        raise UserError(
            f"the config.json of {base} says that bitsandbytes packed its weights, and they are "
            "not packed; take quantization_config out of it"
        )


def load_model(
    source: str,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Opens any model that `retrofit measure` takes, with its tokenizer.

    Args:
        source: a run folder, an adapter folder, a checkpoint folder or a hub id.
        dtype: the dtype of the base weights; `auto` keeps that of the run, or the stored one.
        trust_remote_code: whether to run the code that a checkpoint brings.
        quantization: the form of the base weights, if not the one that the run names.
        revision: a branch, tag or commit of a hub id; a run names that of its base.

    Raises:
        UserError: if there is no model, it is damaged, or the adapter does not fit its base.
    """
    folder, adapter = run_and_adapter(expanded(source))
    if not (adapter / "adapter_config.json").is_file():
        if (folder / "recipe.resolved.yaml").is_file() and not (folder / "config.json").is_file():
            raise UserError(f"{source} is an unfinished run; finish it with --resume")
        spec = _spec_of(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            quantization=quantization,
            revision=revision,
        )
        if has_published_gates(load_config(spec)):
            return _load_published(spec)
        return load_base(spec), load_tokenizer(spec)
    check_adapter_files(adapter)
    adapter_config = read_adapter_config(adapter)
    spec = _base_of(folder, adapter, trust_remote_code)
    config, facts = load_config(spec), facts_of(folder)
    chosen = (adapter_config.get(key) for key in ("layers_to_transform", "projection_layers"))
    check_gateable(config, spec.base, *chosen)
    check_config(config, spec.base, folder, facts)
    check_gates(adapter_config, adapter, facts)
    if dtype != "auto":
        spec = spec.model_copy(update={"dtype": dtype})
    if quantization:
        spec = spec.model_copy(update={"quantization": quantization})
    base = load_base(spec)
    stored = None
    if dtype != "auto" or quantization is not None:
        stored = StoredWeights(_local_folder(spec), weights_file(base.config, spec.base))
    check_base(base, folder, spec.quantization, stored)
    return load_adapter(base, adapter).eval(), load_tokenizer(spec)


def load_adapter(base: PreTrainedModel, adapter: Path, **options: Any) -> PeftModel:
    """Puts trained gates on their base.

    Args:
        base: the base.
        adapter: the folder of the adapter.
        options: further arguments of `PeftModel.from_pretrained`.

    Raises:
        UserError: if the gates were trained on another family or shape, or their file is damaged or
            a pickle.
    """
    check_adapter_files(adapter)
    read_adapter_config(adapter)
    try:
        model = PeftModel.from_pretrained(base, str(adapter), **options)
        # PEFT only warns of a missing weight, and its gate would remain the identity.
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            stored = {current_name(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        unmatched = stored ^ set(get_peft_model_state_dict(model))
    except (UserError, torch.OutOfMemoryError):
        raise
    except DAMAGES as error:
        raise UserError(
            f"the adapter in {adapter} does not fit its base: {one_line(error, 300)}"
        ) from None
    if unmatched:
        raise UserError(
            f"the adapter in {adapter} does not fit its base: {min(unmatched)} is in only one of "
            "them"
        )
    return model


def _load_published(spec: Model) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Opens a model that was published with gates, without running the code that it brings.

    It is unpacked into a base and an adapter on disk, which are removed once they are open.
    """
    with temporary_folder() as temporary:
        unpacked = temporary / "unpacked"
        unpack(_local_folder(spec), unpacked)
        base = {"base": str(unpacked / "base"), "revision": None, "trust_remote_code": False}
        spec = spec.model_copy(update=base)
        return load_adapter(load_base(spec), unpacked / "adapter").eval(), load_tokenizer(spec)


def _local_folder(spec: Model) -> Path:
    """Returns the local folder of a checkpoint, which is downloaded if it is a hub id."""
    with opening(spec.base):
        return local_copy(spec.base, spec.revision)


def _base_of(folder: Path, adapter: Path, trusted: bool) -> Model:
    """Returns the base of a run as its recipe names it, or of a bare adapter as its config does."""
    if (resolved := folder / RESOLVED).is_file():
        spec = load_recipe(str(resolved)).model
        _check_there(spec.base, f"model.base in {resolved}")
        with opening(spec.base):
            return with_consent(spec, trusted)
    adapter_config = read_adapter_config(adapter)
    if not (base := adapter_config.get("base_model_name_or_path")):
        raise UserError(f"{adapter} does not say which base its gates were trained on")
    _check_there(base, f"base_model_name_or_path in {adapter / 'adapter_config.json'}")
    return _spec_of(base, revision=adapter_config.get("revision"), trust_remote_code=trusted)


def _check_there(base: str, where: str) -> None:
    """Refuses the path of a base that has moved since gates were trained on it."""
    if base.startswith(("/", "~")) and not expanded(base).exists():
        raise UserError(f"the base of these gates is no longer at {base}; change {where}")


def _spec_of(base: str, **settings: Any) -> Model:
    """Returns the spec of a base that the user named.

    Raises:
        UserError: if the name cannot be that of a model, such as one with an unset variable.
    """
    try:
        return Model(base=base, **settings)
    except ValidationError as error:
        raise UserError(f"{base!r} names no model: {validation_problem(error)}") from None


def _quantization(spec: Model, config: PreTrainedConfig) -> BitsAndBytesConfig:
    """Returns the settings of bitsandbytes for a base.

    Raises:
        UserError: if the base is stored quantized already, or bitsandbytes is not installed.
    """
    from transformers.utils import is_bitsandbytes_available

    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{spec.base} is stored quantized already; name the unquantized original, or leave "
            "its quantization at none"
        )
    if not is_bitsandbytes_available():
        raise UserError("quantization needs bitsandbytes: pip install bitsandbytes")
    # Gates that a checkpoint has in itself stay as they are, like those of an adapter.
    is_gated = config.model_type.startswith("gated_")
    kept = ["lm_head", "g_proj", "sinks_proj"] if is_gated else None
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    compute_dtype = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
    )
