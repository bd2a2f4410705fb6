"""The penalty on massive activations, and the rows that let many tokens come first."""

import math

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model

from retrofit import GateConfig
from retrofit.adapters import family_of
from retrofit.data.collator import PackedRows
from retrofit.losses.massive_activations import MARGIN, excess_activation
from retrofit.training.calibrated_start import count_documents

POSITION_IDS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, -1, -1, -1]])


def hidden_states(**spikes: float) -> torch.Tensor:
    """Ones, but for `rROW_cCOLUMN=height`."""
    states = torch.ones(2, 8, 6)
    for place, height in spikes.items():
        row, column = (int(part[1:]) for part in place.split("_"))
        states[row, column, 3] = height
    return states


def test_only_what_stands_out_costs_by_the_logarithm_of_its_height():
    assert excess_activation(hidden_states(), POSITION_IDS) == 0
    assert excess_activation(hidden_states(r0_c2=MARGIN), POSITION_IDS) == 0
    high = excess_activation(hidden_states(r0_c2=-MARGIN * math.e**3), POSITION_IDS)
    torch.testing.assert_close(high, torch.tensor(3 / 2 / 2))  # documents, rows
    both = hidden_states(r0_c0=MARGIN * math.e**3, r1_c4=MARGIN * math.e**6)
    torch.testing.assert_close(excess_activation(both, POSITION_IDS), torch.tensor((3 / 2 + 6) / 2))


def test_padding_costs_nothing_and_scale_does_not_matter():
    assert excess_activation(hidden_states(r1_c6=1e6), POSITION_IDS) == 0
    states = hidden_states(r0_c5=1e4)
    cost = excess_activation(states, POSITION_IDS)
    assert cost > 0
    torch.testing.assert_close(excess_activation(1000 * states, POSITION_IDS), cost)


@pytest.mark.parametrize("height", [1e2, 1e5])
def test_the_pull_is_one_part_of_the_height_however_high(height):
    states = hidden_states(r0_c0=height).requires_grad_()
    excess_activation(states, POSITION_IDS).backward()
    torch.testing.assert_close(states.grad[0, 0, 3] * height, torch.tensor(1 / 2 / 2))
    assert states.grad.count_nonzero() == 1


@pytest.mark.parametrize("end_to_end", [True, False])
def test_the_end_of_a_row_becomes_documents_of_one_token_and_of_two(end_to_end):
    rows = [
        {"input_ids": list(range(10, 20)), "seq_lengths": [4, 3, 3]},
        {"input_ids": list(range(20, 30)), "seq_lengths": [10]},
    ]
    batch = PackedRows(0, end_to_end, first_tokens=4)(rows)
    positions = [[0, 1, 2, 3, 0, 1, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0, 0, 0, 1]]
    assert batch["position_ids"].view(2, 10).tolist() == positions
    assert batch["input_ids"].flatten().tolist() == list(range(10, 30))
    assert count_documents(batch["position_ids"]) == 2, "pairs are no texts to calibrate on"
    labelled = batch["labels"].view(2, 10) != -100
    assert torch.equal(labelled[:, :6], torch.tensor(positions)[:, :6] > 0)
    assert not labelled[:, 6:].any()
    assert rows[1]["seq_lengths"] == [10]
    assert PackedRows(0, end_to_end)(rows)["position_ids"].flatten().tolist() == [
        *[0, 1, 2, 3, 0, 1, 2, 0, 1, 2],
        *range(10),
    ]


def test_a_token_alone_is_what_it_is_at_the_start_of_a_text(family):
    """The reason for such rows: what comes later, and its gates, cannot reach the first tokens."""
    if not family_of(family).packs:
        pytest.skip("its documents cannot share a row")
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(family), GateConfig(init_weights=False)).eval()
    rows = [{"input_ids": [7, 8, 9, 10, 11, 12], "seq_lengths": [6]}]
    batch = PackedRows(0, end_to_end=False, first_tokens=5)(rows)
    del batch["labels"]
    with torch.no_grad():
        packed = model(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1][0, 1:]
        for start in ([8], [9], [10], [11, 12]):
            text = torch.tensor([[*start, 40, 41]])
            alone = model(text, output_hidden_states=True).hidden_states[-1][0, : len(start)]
            own, packed = packed.split([len(start), len(packed) - len(start)])
            torch.testing.assert_close(own, alone)
