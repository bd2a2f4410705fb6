"""The verdict is the arithmetic that it claims to be, and the report a page that stands alone."""

import json
import math
import re
import shutil
import statistics
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from results import synthetic_result

from retrofit.report import write_report
from retrofit.report.verdict import Difference, paired, verdict
from retrofit.report.wording import size

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


def copied(model, **metrics):
    model = json.loads(json.dumps(model))
    model["metrics"] |= metrics
    return model


def small(result, *parts):
    """The same without the parts that are not named: quick to draw."""
    result = json.loads(json.dumps(result))
    for model in result["models"]:
        for part in EVALUATIONS:
            if part not in parts:
                del model[part]
    return result


def of(findings, subject):
    return {each.outcome: each.text for each in findings if each.subject == subject}


# The verdict.


def test_paired_differences_against_their_formula():
    base, model = [3.0, 2.5, 4.0, 3.5], [3.1, 2.5, 4.3, 3.4]
    differences = [0.1, 0.0, 0.3, -0.1]
    mean = sum(differences) / 4
    variance = sum((each - mean) ** 2 for each in differences) / 3
    found = paired(base, model)
    assert found.value == pytest.approx(mean)
    assert found.stderr == pytest.approx(math.sqrt(variance / 4))
    assert paired([3.0], [3.5]) == Difference(0.5, None)
    with pytest.raises(ValueError):
        paired([3.0], [3.0, 3.0])


@pytest.mark.parametrize(
    ("value", "stderr", "noise"),
    [(0.1, 0.051, True), (-0.1, 0.051, True), (0.1, 0.049, False), (0.1, None, False)],
)
def test_noise_is_less_than_two_standard_errors(value, stderr, noise):
    assert Difference(value, stderr).is_noise is noise


@pytest.mark.parametrize(
    ("shift", "spread", "outcome", "told"),
    [
        (0.10, 0.01, "worse", "(+10.5%), log +0.1000 ± "),
        (-0.10, 0.01, "better", "(-9.5%), log -0.1000 ± "),
        (0.005, 0.0001, "same", "(unchanged), log +0.0050 ± 0.0000"),
        (0.10, 0.5, "same", "within noise"),
    ],
)
def test_perplexity_by_windows(result, shift, spread, outcome, told):
    base = copied(result["models"][0])
    count = len(base["nll_by_window"])
    noise = [spread * (-1) ** window for window in range(count)]
    model = copied(base, perplexity=base["metrics"]["perplexity"] * math.exp(shift))
    model["nll_by_window"] = [
        nll + shift + each for nll, each in zip(base["nll_by_window"], noise, strict=True)
    ]
    text = of(verdict(base, model), "perplexity")
    assert list(text) == [outcome] and told in text[outcome]
    stderr = statistics.stdev(noise) / math.sqrt(count)
    assert f"± {stderr:.4f}" in text[outcome]


def test_one_window_has_no_noise_to_tell(result):
    base, model = (copied(each) for each in result["models"][:2])
    base["nll_by_window"], model["nll_by_window"] = [3.0], [3.5]
    assert "±" not in "".join(of(verdict(base, model), "perplexity").values())


def test_the_sink_and_the_largest_activation(result):
    base = copied(result["models"][0], peak_column_share=0.2, max_activation=100.0)
    base["metrics"]["peak_column_position"] = 0
    model = copied(base, peak_column_share=0.3, max_activation=104.0, peak_column_position=7)
    findings = verdict(base, model)
    assert of(findings, "sink") == {"worse": "0.200 -> 0.300 (+50.0%), now at position 7"}
    assert of(findings, "largest activation") == {"same": "100 -> 104 (unchanged)"}
    assert [each.subject for each in findings[:4]] == [
        "sink", "largest activation", "perplexity", "copied text",
    ]  # fmt: skip


def test_streaming_is_paired_by_window(result):
    base, model = (copied(each) for each in result["models"][:2])
    found = of(verdict(base, model), "streaming")["better"]
    nll = [each["streaming"]["nll_by_window"] for each in (base, model)]
    costs = [[w - f for w, f in zip(n["window"], n["full"], strict=True)] for n in nll]
    differences = [after - before for before, after in zip(*costs, strict=True)]
    mean = sum(differences) / len(differences)
    stderr = statistics.stdev(differences) / math.sqrt(len(differences))
    assert f"last 512 tokens only 33.8x higher -> +2.9%, log {mean:+.3f} ± {stderr:.3f}" in found


def test_a_long_text_is_compared_as_it_is(result):
    base, model = (copied(each) for each in result["models"][:2])
    for each, nll, added in ((base, [3.0, 3.2], 0.5), (model, [3.1, 3.32], 0.5)):
        by_window = {"full": nll, "window": [x + added for x in nll], "kept_sinks": nll}
        each["streaming"]["nll_by_window"] = by_window
        means = {kind: sum(values) / 2 for kind, values in by_window.items()}
        each["streaming"]["perplexity"] = {kind: math.exp(x) for kind, x in means.items()}
    found = of(verdict(base, model), "streaming")
    assert (
        found["worse"]
        == "all of a long text in the cache 22.2 -> 24.8 (+11.6%), log +0.1100 ± 0.0100"
    )
    assert "last 512 tokens only +64.9% -> +64.9%, log +0.000 ± 0.000" in found["same"]


def test_quantization_compares_what_it_costs_each(result):
    base, model = (copied(each) for each in result["models"][:2])

    def scheme(log_ratio, stderr):
        return {"perplexity": 1.0, "kl": 0.0, "log_ratio": log_ratio, "log_ratio_stderr": stderr}

    none = {"none": {"perplexity": 20.0, "kl": 0.0}}
    base["quantization"]["schemes"] = none | {
        "w8": scheme(0.5, 0.03), "w4": scheme(0.1, 0.03), "int8": scheme(0.0, 0.001),
    }  # fmt: skip
    model["quantization"]["schemes"] = none | {
        "w8": scheme(0.1, 0.04), "w4": scheme(0.15, 0.04), "nf4": scheme(0.1, 0.01),
    }  # fmt: skip
    found = of(verdict(base, model), "quantization")
    assert found == {
        "better": "w8 +64.9% -> +10.5%, log -0.400 ± 0.050",
        "same": "w4 +10.5% -> +16.2%, log +0.050 ± 0.050, within noise",
    }


def test_scores_of_long_context_are_better_when_higher(result):
    base, model = (copied(each) for each in result["models"][:2])
    scores = {"a": (0.2, 0.8, 0.03), "b": (0.8, 0.6, 0.03), "c": (0.5, 0.6, 0.1), "d": (0, 0, 0)}
    for number, each in enumerate((base, model)):
        each["long_context"] = {
            "tasks": {
                task: {"2048": {"score": told[number], "stderr": told[2], "samples": 9}}
                for task, told in scores.items()
            },
            "perplexity": {"2048": {"positions": [9], "perplexity": [20.0 + 10 * number]}},
        }
    found = of(verdict(base, model), "long context")
    assert found["better"] == "a at 2048 0.20 -> 0.80, difference +0.60 ± 0.04"
    assert found["worse"].startswith("b at 2048 0.80 -> 0.60, difference -0.20 ± 0.04; perplexity")
    assert "c at 2048" in found["same"] and "d at 2048" in found["same"]


def test_a_task_is_told_once_for_all_its_lengths(result):
    base, model = (copied(each) for each in result["models"][:2])
    for each, scores in ((base, (1.0, 0.8)), (model, (0.7, 0.3))):
        lengths = {
            length: {"score": score, "stderr": 0.1, "samples": 9}
            for length, score in zip(("1024", "2048"), scores, strict=True)
        }
        each["long_context"] = {"tasks": {"a": lengths}, "perplexity": {}}
    expected = f"difference -0.40 ± {math.sqrt(4 * 0.1**2) / 2:.2f}"
    told = of(verdict(base, model), "long context")["worse"]
    assert told == f"a at 1024, 2048 1.00, 0.80 -> 0.70, 0.30, {expected}"


def test_scores_are_paired_by_sample_where_both_saw_the_same(result):
    """The mean over the lengths of each sample, which has the same needles at all of them."""
    base, model = (copied(each) for each in result["models"][:2])
    scores = {
        "base": {"1024": [1.0, 1.0, 0.5, 0.0], "2048": [1.0, 0.5, 0.5, 0.0]},
        "model": {"1024": [1.0, 0.5, 0.5, 0.0], "2048": [0.5, 0.5, 0.0, 0.0]},
    }
    for each, lengths in zip((base, model), scores.values(), strict=True):
        tasks = {
            length: {
                "score": sum(found) / 4, "stderr": 0.2, "samples": 4, "prompts_sha256": length,
                "score_by_sample": found, "nats": 1.0, "nats_by_sample": [2 - x for x in found],
            }
            for length, found in lengths.items()
        }  # fmt: skip
        each["long_context"] = {"tasks": {"a": tasks}, "perplexity": {}}
    differences = [-0.25, -0.25, -0.25, 0.0]
    mean, stderr = sum(differences) / 4, statistics.stdev(differences) / 2
    (told,) = of(verdict(base, model), "long context").values()
    told, nats = told.split("; ")
    assert told.endswith(f"0.62, 0.50 -> 0.50, 0.25, difference {mean:+.2f} ± {stderr:.2f}")
    assert nats == (
        "a at 1024, 2048, the answers 1.44 -> 1.62 nats a token, difference "
        f"{-mean:+.3f} ± {stderr:.3f}"
    )
    model["long_context"]["tasks"]["a"]["1024"]["prompts_sha256"] = "others"
    apart = of(verdict(base, model), "long context")
    assert apart == {
        "same": told[: told.index("difference")]
        + f"difference {mean:+.2f} ± {math.sqrt(4 * 0.2**2) / 2:.2f}, within noise"
    }


@pytest.mark.parametrize(
    ("after", "outcome"),
    [([0.5, 0.9], "better"), ([0.05, 0.1], "worse"), ([0.5, 0.1], "same"), ([0.3, 0.6], "same")],
)
def test_heads_that_are_missed_more_share_the_work(result, after, outcome):
    base, model = (copied(each) for each in result["models"][:2])
    for each, least in ((base, [0.2, 0.4]), (model, after)):
        each["heads"] = {"shares": [0.1, 0.5], "least_used": {"kl": least},
                         "random": {"kl": [1.0, 2.0]}}  # fmt: skip
    assert list(of(verdict(base, model), "zeroed heads")) == [outcome]


def test_cost_is_worse_only_where_the_interval_says_so(result):
    base, model = (copied(each) for each in result["models"][:2])
    model["cost"] |= {
        "prefill_ratio": {"value": 1.03, "low": 1.01, "high": 1.05},
        "decode_ratio": {"value": 0.9, "low": 0.85, "high": 0.95},
        "weight_bytes": base["cost"]["weight_bytes"] * 1.5,
    }
    found = of(verdict(base, model), "cost")
    assert found["better"] == "decode takes 0.90 times as long (0.85 to 0.95)"
    assert "prefill takes 1.03" in found["worse"] and "weights 538 MB -> 807 MB" in found["worse"]
    assert "cache a token" in found["same"]


def test_a_part_that_one_of_them_lacks_is_not_compared(result):
    base, model = (copied(each) for each in result["models"][:2])
    for part in EVALUATIONS:
        base.pop(part), model.pop(part, None)
    assert len(verdict(base, model)) == 5
    del base["copied_nats_by_window"], base["metrics"]["down_proj_max_activation"]
    assert len(verdict(base, model)) == 3, "as an older version wrote it"


@pytest.mark.parametrize(
    ("shift", "spread", "outcome", "told"),
    [
        (0.3, 0.01, "worse", "0.280 -> 0.580 nats a token, difference +0.300 ± 0.00"),
        (-0.1, 0.01, "better", "0.280 -> 0.180 nats a token, difference -0.100 ± 0.00"),
        (0.005, 0.001, "same", "difference +0.005 ± 0.001"),
        (0.1, 0.5, "same", "within noise"),
    ],
)
def test_copied_text_is_paired_by_window(result, shift, spread, outcome, told):
    base, model = (copied(each) for each in result["models"][:2])
    base["copied_nats_by_window"] = [0.18, 0.38, 0.28, 0.28]
    model["copied_nats_by_window"] = [
        nats + shift + noise * spread
        for nats, noise in zip(base["copied_nats_by_window"], (1, -1, 1, -1), strict=True)
    ]
    text = of(verdict(base, model), "copied text")
    assert list(text) == [outcome] and told in text[outcome]


def test_outliers_that_moved_to_the_inputs_of_down_proj_are_told(result):
    base = copied(result["models"][0], down_proj_max_activation=1440.0)
    model = copied(base, down_proj_max_activation=5216.0)
    told = of(verdict(base, model), "inputs of down_proj")
    assert told == {"worse": "largest 1,440 -> 5,220 (3.62x higher)"}


@pytest.mark.parametrize(
    ("count", "told"),
    [(999, "999 bytes"), (46_080, "46.1 kB"), (2_500_000, "2.50 MB"), (7e9, "7.00 GB")],
)
def test_sizes(count, told):
    assert size(count) == told


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
        "verdict", "settings", "metrics", "attention", "maps", "activations", "gates", "loads",
        "streaming", "quantization", "long-context", "long-perplexity", "heads", "tasks", "cost",
        "generations",
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
    probed.write_text(f'<body><iframe width={width} height=900 frameborder=0 srcdoc="{framed}">')
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
