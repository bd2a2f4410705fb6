"""docs/metrics.md has the metrics that there are."""

from pathlib import Path

import metrics

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_has_the_table():
    assert metrics.table() in (ROOT / "docs/metrics.md").read_text()
