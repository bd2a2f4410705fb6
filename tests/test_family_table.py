"""docs/families.md says what is so."""

from pathlib import Path

import family_table
import llama_server
import pytest
import stock_transformers

from retrofit.proof import verify

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/families.md"


@pytest.mark.slow
def test_the_table_of_families_is_what_happens(monkeypatch):
    """Verified without a process of its own for each merge, which takes seconds."""

    def check(script, paths, options, _python):
        if script == "llama_server.py":
            return llama_server.check(*paths)
        return stock_transformers.check(*paths, trust_remote_code="--trust-remote-code" in options)

    monkeypatch.setattr(verify, "_run", check)
    rows = {name: family_table.cells(name) for name in family_table.FAMILIES}
    assert family_table.table(rows) in DOCUMENT.read_text()
