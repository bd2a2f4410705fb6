"""The report is a page that stands alone."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from results import synthetic_result

from retrofit.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
EVALUATIONS = ("streaming", "quantization", "long_context", "heads", "cost", "examples", "tasks")
# What the page tells of itself to the test: the report has no script of its own.
PROBE = """<script>
const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const drawings = [...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  return [box.width, box.height];
});
parent.document.body.insertAdjacentHTML("beforeend", "<pre id=told>" + JSON.stringify({
  width: innerWidth, overflow, drawings,
  first: document.querySelector("section").innerText,
  requests: performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:")),
}).replaceAll("&", "&amp;").replaceAll("<", "&lt;") + "</pre>");
</script>"""


@pytest.fixture(scope="module")
def result():
    return synthetic_result("gates-a", "gates-b")


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(result, path)
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    return path


def small(result, *parts):
    """The same without the parts that are not named: quick to draw."""
    result = json.loads(json.dumps(result))
    for model in result["models"]:
        for part in EVALUATIONS:
            if part not in parts:
                del model[part]
    return result


# The page, as text.


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "http" not in text and "@import" not in text
    reader = Reader(text)
    assert "script" not in {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_marks_stand_where_the_figures_are(page, result):
    """Each row has an axis of its own that begins at 0, so that lengths are proportional."""
    text = page.read_text()
    row = text[text.index("Attention sink, the share of the most attended token</th>") :]
    places = [float(left) for left in re.findall(r'left:([-0-9.]+)%"></span>', row)[:3]]
    before, after = (each["metrics"]["peak_column_share"] for each in result["models"][:2])
    assert places == [0.0, 100.0, pytest.approx(100 * after / before, abs=0.06)]
    assert row[: row.index("</tr>")].endswith('<td class="word">▲ better</td>\n')


def test_ids_are_unique_and_what_refers_to_them_finds_them(page):
    text = page.read_text()
    ids = [attributes["id"] for _, attributes in Reader(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="|url\()#([^")]*)', text)
    assert referred and set(referred) <= set(ids)


def test_drawings_and_tables_are_told_to_those_who_do_not_see_them(page):
    tags = Reader(page.read_text()).tags
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawings) > 20
    for attributes in drawings:
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 30
    assert all(attributes.get("scope") for tag, attributes in tags if tag == "th")


def test_text_of_drawings_is_text_in_the_page_s_font_and_colors(page):
    text = page.read_text()
    assert "largest |hidden state|</text>" in text and "DejaVu" not in text
    assert not re.search("#0?10?[12]0", text), "every color of ours has become the page's"
    assert "var(--series-1)" in text


def test_the_same_result_gives_the_same_page(result, tmp_path):
    for name in ("one.html", "two.html"):
        write_report(small(result, "heads", "quantization"), tmp_path / name)
    assert (tmp_path / "one.html").read_text() == (tmp_path / "two.html").read_text()


def test_sections_stand_in_order(page):
    tags = Reader(page.read_text()).tags
    assert [attributes["id"] for tag, attributes in tags if tag == "section"] == [
        "verdict", "settings", "metrics", "attention", "activations", "gates", "loads",
        "streaming", "quantization", "long-context", "long-perplexity", "heads", "tasks", "cost",
        "maps", "generations",
    ]  # fmt: skip


def test_a_part_without_figures_has_no_section(result, tmp_path):
    bare = small(result)
    del bare["models"][1:]
    write_report(bare, tmp_path / "bare.html")
    tags = Reader((tmp_path / "bare.html").read_text()).tags
    assert [attributes["id"] for tag, attributes in tags if tag == "section"] == [
        "settings", "metrics", "attention", "activations", "loads",
    ]  # fmt: skip


def test_sink_logits_are_shown_of_the_models_that_have_them(result, tmp_path):
    sinking = small(result)
    model = sinking["models"][1]
    model["per_layer"]["sink_share"] = [None, 0.5, 0.25, 0.5, 0.25, 0.5]
    model["metrics"]["sink_share"] = 0.4
    write_report(sinking, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    row = re.search('<th scope="row">taken by sink logits .share.</th>(.*?)</tr>', text, re.DOTALL)
    assert re.findall("<td>(.*?)</td>", row.group(1)) == ["-", "0.400", "-"]
    section = text.partition('<section id="sinks"')[2].partition("</section>")[0]
    assert "gates-a from 0.250 to 0.500" in section and "gates-b" not in section


def test_what_models_are_called_and_write_is_not_markup(tmp_path):
    result = small(synthetic_result('<img src="x">"&$a$'), "examples", "cost")
    for model in result["models"]:
        del model["examples"]["maps"]
    write_report(result, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "img" not in {tag for tag, _ in Reader(text).tags}
    assert "&amp;$a$</text>" in text, "nor is it mathematics, in a drawing"
    assert "for &lt;b&gt; &amp; &lt;/b&gt; in range(3):" in text


def test_nats_of_the_answers_have_a_table(result, tmp_path):
    write_report(small(result, "long_context"), tmp_path / "page.html")
    section = (tmp_path / "page.html").read_text().partition('<section id="long-context"')[2]
    row = re.search("niah_multikey, 16,384 tokens</th>(.*?)</tr>", section, re.DOTALL).group(1)
    assert re.findall("<td>(.*?)</td>", row) == ["0.800", "0.300", "0.300"]


def test_what_may_be_missing(result, tmp_path):
    models = small(result, "long_context", "quantization", "cost")["models"]
    for model in models:
        for scores in model["long_context"]["tasks"].values():
            scores["2048"]["stderr"] = None  # of one sample
    del models[1]["quantization"]["schemes"]["nf4"], models[2]["cost"]
    path = tmp_path / "page.html"
    write_report({"models": models, "settings": result["settings"]}, path)
    quantization = path.read_text().partition('<section id="quantization"')[2]
    nf4 = re.search('<th scope="row">nf4</th>(.*?)</tr>', quantization, re.DOTALL).group(1)
    assert re.findall("<td>(.).*?</td>", nf4) == ["2", "-", "2"]
    assert 'aria-label="Time. prefill, gates-a 1.03 (1.01 to 1.05);' in path.read_text()


def test_colors_come_again_after_six_models(tmp_path):
    result = small(synthetic_result(*(f"gates-{number}" for number in range(8))), "heads")
    for model in result["models"]:
        for metric in ("column_share", "head_load", "gate_histogram"):
            del model["per_layer"][metric]
    write_report(result, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert re.findall('swatch series-(.)" aria-hidden="true"></span>gates-', text)[:8] == list(
        "12345612"
    )
    assert "var(--series-6)" in text and "#0102" not in text


# The page, in a browser.


def chromium(page, *options):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={page.parent / 'profile'}", *options, f"file://{page}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it(page, width, tmp_path):
    # In a frame, because a window has a least width.
    framed = escape(page.read_text().replace("</body>", f"{PROBE}</body>"))
    probed = tmp_path / "probed.html"
    frame = f'<iframe width={width} height=900 frameborder=0 srcdoc="{framed}">'
    probed.write_text(f'<meta charset="utf-8"><body>{frame}')
    shown = chromium(probed, "--dump-dom", "--window-size=1400,1000")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    told = re.search('<pre id="told">(.*?)</pre>', shown.stdout, re.DOTALL)
    told = json.loads(unescape(told.group(1)))
    assert told["width"] == width and told["overflow"] == 0
    assert told["requests"] == []
    assert len(told["drawings"]) > 20
    assert all(wide > 150 and high > 50 for wide, high in told["drawings"])
    assert told["first"].startswith("Verdict")
    assert "gates-a" in told["first"] and "0.340 → 0.0111 (30.6x lower)" in told["first"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
def test_a_browser_draws_it(page, tmp_path):
    picture = tmp_path / "page.png"
    shown = chromium(page, f"--screenshot={picture}", "--window-size=1280,1000")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000
    assert "CONSOLE" not in shown.stderr
