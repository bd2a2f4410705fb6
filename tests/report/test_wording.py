"""Figures in words."""

import pytest

from retrofit.report.wording import change, figure, size


@pytest.mark.parametrize(
    ("count", "told"),
    [(999, "999 bytes"), (46_080, "46.1 kB"), (2_500_000, "2.50 MB"), (7e9, "7.00 GB")],
)
def test_sizes(count, told):
    assert size(count) == told


def test_what_rounds_to_a_thousand_is_written_like_one():
    assert figure(999.7) == "1,000" and figure(999.4) == "999"
    assert change(999.7) == "1,000x higher"
