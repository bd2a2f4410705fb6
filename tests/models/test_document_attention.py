"""Attention of packed rows, a document at a time, against SDPA with a mask."""

import pytest
import torch
from tiny import tiny_model

from retrofit.models.document_attention import NAME, attend_by_document

ROWS = (
    [[0, 1, 2, 3, 0, 1, 2, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]],
    [[0, 1, 0, 1, 0, 1, 2, 0, 1, 2], [0, 0, 1, 0, 1, 0, 0, 0, 1, 2]],  # runs of one length
    [list(range(10))] * 2,
)


def states_and_gradients(model, position_ids):
    embeddings = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(0))
    embeddings.requires_grad_()
    states = model(
        inputs_embeds=embeddings, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    states.square().sum().backward()
    return states.detach(), embeddings.grad


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("rows", ROWS)
def test_equals_sdpa_with_a_mask(family, rows):
    position_ids = torch.tensor(rows)
    model = tiny_model(family).base_model
    expected = states_and_gradients(model, position_ids)
    attend_by_document(model)
    assert model.config._attn_implementation == NAME
    for own, other in zip(states_and_gradients(model, position_ids), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_a_padded_batch_is_refused():
    model = tiny_model("llama").base_model
    attend_by_document(model)
    with pytest.raises(ValueError, match="no attention mask"):
        model(torch.ones(2, 4, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1, 1]] * 2))


def test_a_cache_is_refused():
    model = tiny_model("llama").base_model
    input_ids = torch.ones(1, 4, dtype=torch.long)
    filled = model(input_ids, use_cache=True).past_key_values
    attend_by_document(model)
    with pytest.raises(ValueError, match="no cache"):
        model(input_ids, position_ids=torch.arange(4)[None], past_key_values=filled)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_sliding_windows_keep_their_mask(family):
    model = tiny_model(family).base_model
    before = model.config._attn_implementation
    attend_by_document(model)
    assert model.config._attn_implementation == before
