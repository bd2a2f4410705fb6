"""Open a model, whatever it is: a base, a run of ours, an adapter, a merged checkpoint, or a model
that was published with gates."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
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
from retrofit.models.opening import DAMAGES, check_complete, finite, one_line, opening
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
from retrofit.models.source import check_ungated, has_published_gates
from retrofit.models.tokenizer_file import check_tokenizer
from retrofit.recipe import Dtype, Model, Quantization, load_recipe
from retrofit.stored_names import current_name
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import temporary_folder
from retrofit.utils.paths import expanded


def load_base(spec: Model) -> PreTrainedModel:
    """The base model of a recipe, in eval mode, on the GPU if there is one.

    Raises:
        UserError: if it cannot be found, is damaged, lacks a weight or has one too many, has one
            that is no number, is stored in pickles, or is quantized twice or without bitsandbytes.
    """
    config = load_config(spec)
    check_ungated(config, spec.base)
    check_files(spec, config)
    if hasattr(config, "attention_dropout"):
        config.attention_dropout = 0.0  # of its own training, in which it is not any more
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
            ignore_mismatched_sizes=True,  # they are told of below
            **kwargs,
        )
    check_complete(loading, spec.base)
    for _ in finite(model.named_parameters(), spec.base):
        pass
    return model.eval()


def load_config(spec: Model) -> PreTrainedConfig:
    """The base's config.

    Raises:
        UserError: if there is no such folder or hub id, it is damaged, or it says what no model
            can be.
    """
    return read_config(spec.location, spec.base, spec.revision, spec.trust_remote_code)


def load_tokenizer(spec: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        UserError: if there is none, it is damaged, transformers makes another one of it, or the
            model has no embedding for some of its tokens.
    """
    config = load_config(spec)
    with opening(spec.base):
        tokenizer = AutoTokenizer.from_pretrained(
            spec.location, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
        check_tokenizer(tokenizer, spec.location, spec.revision)
        check_vocabulary(tokenizer, config, spec.base)
    # A token of its own for padding is often added without an embedding; any token serves.
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= embedded_tokens(config):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_files(spec: Model, config: PreTrainedConfig) -> None:
    """No pickle is opened, and no other model stands in for the one that is named.

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
        # A file that is missing or damaged is told of before any is loaded.
        stored = StoredWeights(folder, file)
        _check_packed(stored, config, spec.base)
        if not getattr(config, "quantization_config", None):
            stored.refuse_other_kinds()
    else:
        _check_index(spec, file)


def _check_index(spec: Model, file: str) -> None:
    """What an index on the hub names is safetensors as well, before it is downloaded."""
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
    """Weights that bitsandbytes did not pack are not those of a config that says so."""
    how = getattr(config, "quantization_config", None) or {}
    says_packed = how.get("quant_method", "bitsandbytes") == "bitsandbytes" if how else False
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
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Open anything `retrofit measure` can be pointed at.

    Args:
        source: a run folder, an adapter folder, a checkpoint folder or a hub id.
        dtype: of the base weights; `auto` keeps a run's, or the stored one.
        trust_remote_code: run the code that a checkpoint brings.
        quantization: hold the base weights in this form instead of the one that a run names.

    Raises:
        UserError: if there is nothing there, or the adapter does not fit its base.
    """
    folder, adapter = run_and_adapter(expanded(source))
    if not (adapter / "adapter_config.json").is_file():
        if (folder / "recipe.resolved.yaml").is_file() and not (folder / "config.json").is_file():
            raise UserError(f"{source} is an unfinished run; finish it with --resume")
        spec = _named(
            source, dtype=dtype, trust_remote_code=trust_remote_code, quantization=quantization
        )
        if has_published_gates(load_config(spec)):
            return _load_published(spec)
        return load_base(spec), load_tokenizer(spec)
    check_adapter_files(adapter)
    adapter_config = read_adapter_config(adapter)
    spec = _base_of(folder, adapter, trust_remote_code)
    config, facts = load_config(spec), facts_of(folder)
    check_gateable(config, spec.base, adapter_config.get("layers_to_transform"))
    check_config(config, spec.base, folder, facts)
    check_gates(adapter_config, adapter, facts)
    if dtype != "auto":
        spec = spec.model_copy(update={"dtype": dtype})
    if quantization:
        spec = spec.model_copy(update={"quantization": quantization})
    base = load_base(spec)
    asked = dtype != "auto" or quantization is not None
    stored = (
        StoredWeights(_folder_of(spec), weights_file(base.config, spec.base)) if asked else None
    )
    check_base(base, folder, spec.quantization, stored)
    return load_adapter(base, adapter).eval(), load_tokenizer(spec)


def load_adapter(base: PreTrainedModel, adapter: Path, **options: Any) -> PeftModel:
    """Put trained gates on their base.

    Args:
        options: for PEFT besides.

    Raises:
        UserError: if they were trained on another family or shape, or the file is damaged or a
            pickle.
    """
    check_adapter_files(adapter)
    read_adapter_config(adapter)
    try:
        model = PeftModel.from_pretrained(base, str(adapter), **options)
        # PEFT only warns of a missing weight, and the gate would stay the identity.
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            stored = {current_name(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        wrong = stored ^ set(get_peft_model_state_dict(model))
    except (UserError, torch.OutOfMemoryError):
        raise
    except DAMAGES as error:
        raise UserError(
            f"the adapter in {adapter} does not fit its base: {one_line(error, 300)}"
        ) from None
    if wrong:
        raise UserError(
            f"the adapter in {adapter} does not fit its base: {min(wrong)} is in one alone"
        )
    return model


def _load_published(spec: Model) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Its base and its gates, taken apart on disk for as long as it takes to open them, so that
    none of the code it brings is run."""
    with temporary_folder() as temporary:
        apart = temporary / "apart"
        unpack(_folder_of(spec), apart)
        stock = {"base": str(apart / "base"), "revision": None, "trust_remote_code": False}
        spec = spec.model_copy(update=stock)
        return load_adapter(load_base(spec), apart / "adapter").eval(), load_tokenizer(spec)


def _folder_of(spec: Model) -> Path:
    """The checkpoint on this machine; a hub id is downloaded."""
    folder = Path(spec.location)
    if folder.is_dir():
        return folder
    with opening(spec.base):
        snapshot = snapshot_download(
            spec.base,
            revision=spec.revision,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"],
            ignore_patterns=["*/*"],  # other models of the same repository
        )
    return Path(snapshot)


def _base_of(folder: Path, adapter: Path, trusted: bool) -> Model:
    if (resolved := folder / "recipe.resolved.yaml").is_file():
        spec = load_recipe(str(resolved)).model
        with opening(spec.base):
            return with_consent(spec, trusted)
    adapter_config = read_adapter_config(adapter)
    if not (base := adapter_config.get("base_model_name_or_path")):
        raise UserError(f"{adapter} does not say which base its gates were trained on")
    return _named(base, revision=adapter_config.get("revision"), trust_remote_code=trusted)


def _named(base: str, **settings: Any) -> Model:
    """
    Raises:
        UserError: if that is no name of a model, such as one with a variable that is not set.
    """
    try:
        return Model(base=base, **settings)
    except ValidationError as error:
        raise UserError(f"{base!r} names no model: {validation_problem(error)}") from None


def _quantization(spec: Model, config: PreTrainedConfig) -> BitsAndBytesConfig:
    from transformers.utils import is_bitsandbytes_available

    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{spec.base} is stored quantized already; set quantization to none, or name the "
            "unquantized original"
        )
    if not is_bitsandbytes_available():
        raise UserError('quantization needs bitsandbytes: pip install "gate-retrofit[bnb]"')
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=True,
    )
