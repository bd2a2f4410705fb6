"""docs/families.md says what is so."""

from pathlib import Path

import family_table
import pytest

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/families.md"


@pytest.mark.slow
def test_the_table_of_families_is_what_happens(in_process):
    rows = {name: family_table.cells(name) for name in family_table.FAMILIES}
    assert family_table.table(rows) in DOCUMENT.read_text()
