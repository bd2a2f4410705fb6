"""The files that travel with a remote-code checkpoint import nothing that older transformers lack.

vLLM's environment (`scripts/vllm_env.py`) has transformers 5.19, where none of them can be mended
once a checkpoint is out.
"""

import ast

import pytest

from retrofit.adapters import supported_model_types
from retrofit.export.remote_code import code_of

# What transformers 5.19 has, as tried there.
IN_5_19 = {
    "transformers",
    "transformers.PreTrainedConfig",
    "transformers.PreTrainedModel",
    "transformers.cache_utils.Cache",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
    "transformers.integrations.sdpa_attention.repeat_kv",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward",
    "transformers.integrations.sdpa_attention.use_gqa_in_sdpa",
    "transformers.models.llama.modeling_llama.LlamaAttention",
    *(
        f"transformers.models.{family}.modeling_{family}"
        for family in ("gemma3", "gpt_oss", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
    ),
}
# What may be missing, so that the import has to be tried.
TRIED = {
    "transformers.integrations.sdpa_attention.pack_gqa": "5.19 repeats the keys for one query too",
    "transformers.conversion_mapping": "transformers 4 keeps experts as they are stored",
}
ELSEWHERE = {"torch", "inspect", "collections", "dataclasses", "functools", "typing"}


def imports(node: ast.AST) -> set[str]:
    """Every name that is imported inside, by the module it comes from; the files' own left out."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            found |= {alias.name for alias in each.names}
        elif isinstance(each, ast.ImportFrom) and not each.level:
            found |= {f"{each.module}.{alias.name}" for alias in each.names}
    return {name for name in found if name.split(".")[0] not in ELSEWHERE}


def tried_imports(code: str) -> set[str]:
    """Those for which an `except ImportError` stands in."""
    found = set()
    for each in ast.walk(ast.parse(code)):
        if isinstance(each, ast.Try) and any(
            isinstance(handler.type, ast.Name) and handler.type.id == "ImportError"
            for handler in each.handlers
        ):
            found |= set().union(*map(imports, each.body))
    return found


@pytest.mark.parametrize("family", supported_model_types())
def test_files_of_a_checkpoint_import_what_an_older_transformers_has(family):
    for name, code in code_of(family).items():
        tried = tried_imports(code)
        assert tried <= TRIED.keys(), name
        assert imports(ast.parse(code)) - tried <= IN_5_19, name


@pytest.mark.parametrize("family", supported_model_types())
def test_files_of_a_checkpoint_import_one_another_and_none_is_left_out_or_unused(family):
    code = code_of(family)
    imported = {
        f"{each.module}.py"
        for text in code.values()
        for each in ast.walk(ast.parse(text))
        if isinstance(each, ast.ImportFrom) and each.level == 1
    }
    assert imported | {"modeling_gated.py"} == code.keys()


@pytest.mark.parametrize("name", sorted(TRIED))
def test_a_name_that_may_be_missing_is_tried(name):
    assert any(name in tried_imports(code) for code in code_of("llama").values())


def test_an_import_that_is_not_listed_is_found():
    code = "from transformers.integrations.sdpa_attention import pack_gqa"
    assert imports(ast.parse(code)) - tried_imports(code) - IN_5_19 == TRIED.keys() - {
        "transformers.conversion_mapping"
    }
