"""The tables in docs/performance.md are those that the benchmarks' file gives."""

from pathlib import Path

from ratios import tables
from retrofit.utils.files import read_json

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_made_from_the_file():
    text = (ROOT / "docs/performance.md").read_text()
    begin = "<!-- python scripts/bench/ratios.py --table docs/ratios-cpu.json -->\n"
    shown = text[text.index(begin) + len(begin) : text.index("<!-- end -->")]
    assert shown.strip() == tables(read_json(ROOT / "docs/ratios-cpu.json")).strip()
