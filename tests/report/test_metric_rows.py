"""docs/metrics.md has the metrics that there are, and docs/recipe.md the keys."""

from pathlib import Path

import metrics
import recipe_keys

ROOT = Path(__file__).resolve().parents[2]


def test_the_documents_have_the_tables():
    assert metrics.table() in (ROOT / "docs/metrics.md").read_text()
    assert recipe_keys.table() in (ROOT / "docs/recipe.md").read_text()
