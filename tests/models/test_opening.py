"""What is said of a base that cannot be opened."""

import pytest
from huggingface_hub.errors import HFValidationError

from retrofit.models.opening import opening_error


def test_the_reason_why_a_hub_id_was_not_opened_is_not_lost():
    error = ImportError("LlamaTokenizer requires the sentencepiece library")
    assert str(opening_error("meta-llama/Llama-2-7b-hf", error)) == (
        "no model at 'meta-llama/Llama-2-7b-hf': neither a folder nor a hub id within reach "
        "(LlamaTokenizer requires the sentencepiece library)"
    )


@pytest.mark.parametrize(
    ("name", "end"), [("./base", "reach"), ("~/.cache/x", "models and texts of the CPU recipes")]
)
def test_a_name_that_is_no_hub_id_needs_no_reason(name, end):
    error = OSError("Repo id must use alphanumeric chars")
    error.__cause__ = HFValidationError("Repo id must use alphanumeric chars")
    said = str(opening_error(name, error))
    assert said.startswith("no model at") and said.endswith(end)
