"""A merged checkpoint cuts text as its base does, whatever class transformers reads it with."""

import json
import string

import pytest
from made_runs import SINKS, make_run
from tiny import tiny_model
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer

from retrofit.export.merge import merge

TEXTS = (" hi  the", "[INST] hi [/INST] hi</s>", "<s>[INST]hi[/INST]hi</s>hi", "\nhi")


def write_sentencepiece(folder, **config) -> int:
    """Writes a tokenizer of Mistral's and Llama 2's kind; returns the size of its vocabulary."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:94]]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("h", "i"), ("▁", "hi"), ("▁", "▁")]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return len(vocabulary)


@pytest.mark.parametrize("format", ["native", "remote-code"])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mistral", "LlamaTokenizer"),
        ("mistral", "GPT2Tokenizer"),
        ("llama", "LlamaTokenizer"),
        ("llama", "PreTrainedTokenizerFast"),
    ],
)
def test_a_merged_checkpoint_cuts_text_as_its_base(tmp_path, model_type, format, name):
    """As Mistral's and its base, whose `tokenizer_class` transformers heeds in one of them only."""
    base = tmp_path / "base"
    base.mkdir()
    size = write_sentencepiece(base, tokenizer_class=name)
    model = tiny_model(model_type, vocab_size=size, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(base)
    expected = AutoTokenizer.from_pretrained(base)
    merge(make_run(tmp_path / "run", base, **SINKS), tmp_path / "merged", format=format)
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found(list(TEXTS))["input_ids"] == expected(list(TEXTS))["input_ids"]


def test_a_tokenizer_that_brings_code_is_merged_without_it(tmp_path, tiny_base):
    """transformers has a class for it, so the code was not run in training either."""
    base = tiny_base("qwen3")
    path = base / "tokenizer_config.json"
    code = {"AutoTokenizer": [None, "tokenization_mine.MyTokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": code}))
    merge(make_run(tmp_path / "run", base), tmp_path / "merged", format="remote-code")
    merged = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert "auto_map" not in merged
