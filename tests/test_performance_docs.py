"""The tables in docs/performance.md are those that the benchmarks' file gives."""

import sys
from pathlib import Path

from retrofit.utils.files import read_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts/bench"))

from ratios import tables  # noqa: E402


def test_the_tables_are_made_from_the_file():
    text = (ROOT / "docs/performance.md").read_text()
    begin = "<!-- python scripts/bench/ratios.py --table docs/ratios-cpu.json -->\n"
    shown = text[text.index(begin) + len(begin) : text.index("<!-- end -->")]
    assert shown.strip() == tables(read_json(ROOT / "docs/ratios-cpu.json")).strip()
