"""Figures in words."""

import pytest

from retrofit.report.wording import size


@pytest.mark.parametrize(
    ("count", "told"),
    [(999, "999 bytes"), (46_080, "46.1 kB"), (2_500_000, "2.50 MB"), (7e9, "7.00 GB")],
)
def test_sizes(count, told):
    assert size(count) == told
