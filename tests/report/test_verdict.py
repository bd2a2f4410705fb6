"""The verdict is the arithmetic that it claims to be."""

import json
import math
import statistics

import pytest
from results import synthetic_result

from retrofit.report.findings import Difference, paired
from retrofit.report.result import typed_model
from retrofit.report.verdict import verdict

EVALUATIONS = ("streaming", "quantization", "long_context", "heads", "cost", "examples", "tasks")


@pytest.fixture(scope="module")
def result():
    return synthetic_result("gates-a", "gates-b")


def copied(model, **metrics):
    model = json.loads(json.dumps(model))
    model["metrics"] |= metrics
    return model


def judged(base, model):
    return verdict(typed_model(base), typed_model(model))


def of(findings, subject):
    return {each.outcome: each.text for each in findings if each.subject == subject}


def test_paired_differences_against_their_formula():
    base, model = [3.0, 2.5, 4.0, 3.5], [3.1, 2.5, 4.3, 3.4]
    differences = [0.1, 0.0, 0.3, -0.1]
    mean = sum(differences) / 4
    variance = sum((each - mean) ** 2 for each in differences) / 3
    found = paired(base, model)
    assert found.value == pytest.approx(mean)
    assert found.stderr == pytest.approx(math.sqrt(variance / 4))
    single = paired([3.0], [3.5])
    assert single == Difference(0.5, None, 1)
    assert single.is_noise and "noise is not known" in single.formatted(2), "of a single window"
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
    text = of(judged(base, model), "perplexity")
    assert list(text) == [outcome] and told in text[outcome]
    stderr = statistics.stdev(noise) / math.sqrt(count)
    assert f"± {stderr:.4f}" in text[outcome]


def test_one_window_has_no_noise_to_tell(result):
    base, model = (copied(each) for each in result["models"][:2])
    base["nll_by_window"], model["nll_by_window"] = [3.0], [3.5]
    assert "±" not in "".join(of(judged(base, model), "perplexity").values())


def test_the_sink_and_the_largest_activation(result):
    base = copied(result["models"][0], peak_column_share=0.2, max_activation=100.0)
    base["metrics"]["peak_column_position"] = 0
    model = copied(base, peak_column_share=0.3, max_activation=104.0, peak_column_position=7)
    findings = judged(base, model)
    assert of(findings, "sink") == {"worse": "0.200 -> 0.300 (+50.0%), now at position 7"}
    assert of(findings, "largest activation") == {"same": "100 -> 104 (unchanged)"}
    assert [each.subject for each in findings[:4]] == [
        "sink", "largest activation", "perplexity", "copied text",
    ]  # fmt: skip


def test_streaming_is_paired_by_window(result):
    base, model = (copied(each) for each in result["models"][:2])
    found = of(judged(base, model), "streaming")["better"]
    nll = [each["streaming"]["nll_by_window"] for each in (base, model)]
    costs = [[w - f for w, f in zip(n["window"], n["full"], strict=True)] for n in nll]
    differences = [after - before for before, after in zip(*costs, strict=True)]
    mean = sum(differences) / len(differences)
    stderr = statistics.stdev(differences) / math.sqrt(len(differences))
    assert f"last 512 tokens only 33.8x higher -> +2.9%, log {mean:+.3f} ± {stderr:.3f}" in found


def test_a_long_text_is_compared_as_it_is(result):
    base, model = (copied(each) for each in result["models"][:2])
    for each, nll, added in ((base, [3.0, 3.2], 0.5), (model, [3.1, 3.31], 0.5)):
        by_window = {"full": nll, "window": [x + added for x in nll], "kept_sinks": nll}
        each["streaming"]["nll_by_window"] = by_window
        means = {kind: sum(values) / 2 for kind, values in by_window.items()}
        each["streaming"]["perplexity"] = {kind: math.exp(x) for kind, x in means.items()}
    found = of(judged(base, model), "streaming")
    assert (
        found["worse"]
        == "all of a long text in the cache 22.2 -> 24.7 (+11.1%), log +0.1050 ± 0.0050"
    )
    assert "last 512 tokens only +64.9% -> +64.9%, log +0.000 ± 0.000" in found["same"]


def test_quantization_compares_what_it_costs_each_by_window(result):
    base, model = (copied(each) for each in result["models"][:2])

    def scheme(added, noise=0.0):
        # Windows differ much more from each other than rounding changes them.
        nll = [5.0 + added - noise, 1.0 + added, 3.0 + added + noise]
        return {"perplexity": 1.0, "kl": 0.0, "nll_by_window": nll}

    base["quantization"]["schemes"] = {
        "none": scheme(0.0), "w8": scheme(0.5), "w4": scheme(0.1), "int8": scheme(0.0),
    }  # fmt: skip
    model["quantization"]["schemes"] = {
        "none": scheme(0.1), "w8": scheme(0.2, 0.05), "w4": scheme(0.25, 0.05), "nf4": scheme(0.1),
    }  # fmt: skip
    found = of(judged(base, model), "quantization")
    assert found == {
        "better": "w8 +64.9% -> +10.5%, log -0.400 ± 0.029",
        "same": "w4 +10.5% -> +16.2%, log +0.050 ± 0.029, within noise",
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
    found = of(judged(base, model), "long context")
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
    told = of(judged(base, model), "long context")["worse"]
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
    (told,) = of(judged(base, model), "long context").values()
    told, nats = told.split("; ")
    noise = f"{mean:+.2f} ± {stderr:.2f}, within noise"  # of four samples
    assert told.endswith(f"0.62, 0.50 -> 0.50, 0.25, difference {noise}")
    assert nats == (
        "a at 1024, 2048, the answers 1.44 -> 1.62 nats a token, difference "
        f"{-mean:+.3f} ± {stderr:.3f}, within noise"
    )
    model["long_context"]["tasks"]["a"]["1024"]["prompts_sha256"] = "others"
    apart = of(judged(base, model), "long context")
    assert apart == {
        "same": told[: told.index("difference")]
        + f"difference {mean:+.2f} ± {math.sqrt(4 * 0.2**2) / 2:.2f}, within noise"
    }


def test_a_few_samples_of_other_prompts_have_the_noise_of_few(result):
    base, model = (copied(each) for each in result["models"][:2])
    for each, score, samples in ((base, 0.8, 9), (model, 0.5, 3)):
        scores = {"1024": {"score": score, "stderr": 0.1, "samples": samples}}
        each["long_context"] = {"tasks": {"a": scores}, "perplexity": {}}
    (told,) = of(judged(base, model), "long context").values()
    assert told.endswith("difference -0.30 ± 0.14, within noise"), "4.3 of them hold 95%"


@pytest.mark.parametrize(
    ("after", "outcome"),
    [([0.5, 0.9], "better"), ([0.05, 0.1], "worse"), ([0.5, 0.1], "same"), ([0.3, 0.6], "same")],
)
def test_heads_that_are_missed_more_share_the_work(result, after, outcome):
    base, model = (copied(each) for each in result["models"][:2])
    for each, least in ((base, [0.2, 0.4]), (model, after)):
        zeroed = {"least_used": least, "random": [1.0, 2.0]}
        each["heads"] = {"shares": [0.1, 0.5], "perplexity": 20.0} | {
            order: {"kl": kl, "perplexity": [21.0, 22.0]} for order, kl in zeroed.items()
        }
    assert list(of(judged(base, model), "zeroed heads")) == [outcome]


def test_cost_is_worse_only_where_the_interval_says_so(result):
    base, model = (copied(each) for each in result["models"][:2])
    model["cost"] |= {
        "prefill_ratio": {"value": 1.03, "low": 1.01, "high": 1.05},
        "decode_ratio": {"value": 0.9, "low": 0.85, "high": 0.95},
        "weight_bytes": base["cost"]["weight_bytes"] * 1.5,
    }
    found = of(judged(base, model), "cost")
    assert found["better"] == "decode takes 0.90 times as long (0.85 to 0.95)"
    assert "prefill takes 1.03" in found["worse"] and "weights 538 MB -> 807 MB" in found["worse"]
    assert "cache a token" in found["same"]
    model["cost"]["prefill_ratio"] = {"value": 1.002, "low": 1.001, "high": 1.003}
    assert "prefill takes 1.00" in of(judged(base, model), "cost")["same"], "it is within 1%"


def test_a_part_that_one_of_them_lacks_is_not_compared(result):
    base, model = (copied(each) for each in result["models"][:2])
    for part in EVALUATIONS:
        base.pop(part), model.pop(part, None)
    assert len(judged(base, model)) == 5
    del base["copied_nats_by_window"], base["metrics"]["down_proj_max_activation"]
    assert len(judged(base, model)) == 3, "as an older version wrote it"


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
    text = of(judged(base, model), "copied text")
    assert list(text) == [outcome] and told in text[outcome]


def test_outliers_that_moved_to_the_inputs_of_down_proj_are_told(result):
    base = copied(result["models"][0], down_proj_max_activation=1440.0)
    model = copied(base, down_proj_max_activation=5216.0)
    told = of(judged(base, model), "inputs of down_proj")
    assert told == {"worse": "largest 1,440 -> 5,220 (3.62x higher)"}


@pytest.mark.parametrize(("after", "outcome"), [(0.0, "same"), (0.1, "worse")])
def test_a_base_whose_windows_are_too_narrow_for_a_sink_is_compared(result, after, outcome):
    base = copied(result["models"][0], peak_column_share=0.0, peak_column_position=0)
    model = copied(base, peak_column_share=after)
    assert list(of(judged(base, model), "sink")) == [outcome]


def test_every_figure_of_the_verdict_has_marks_where_the_models_are(result):
    base, model = (copied(each) for each in result["models"][:2])
    findings = judged(base, model)
    assert all(len(finding.marks) == len(finding.items) for finding in findings)
    marks = {mark.name: mark for finding in findings for mark in finding.marks}
    sink = marks["Attention sink, the share of the most attended token"]
    shares = [each["metrics"]["peak_column_share"] for each in (base, model)]
    assert [sink.base, sink.model] == shares and sink.low == sink.high == sink.model
    perplexity = marks["Perplexity"]
    differences = [
        after - before
        for before, after in zip(base["nll_by_window"], model["nll_by_window"], strict=True)
    ]
    difference = paired(base["nll_by_window"], model["nll_by_window"])
    assert difference.stderr == pytest.approx(
        statistics.stdev(differences) / math.sqrt(len(differences))
    )
    after = model["metrics"]["perplexity"]
    assert (perplexity.base, perplexity.model) == (base["metrics"]["perplexity"], after)
    assert perplexity.high - after == pytest.approx(difference.noise * after)
    accuracy = marks["Accuracy in hellaswag"]
    assert (accuracy.base, accuracy.model) == pytest.approx((0.40, 0.36))
    assert accuracy.values == "0.400 -> 0.360 (-0.040)"


def test_noise_is_wider_where_it_is_known_from_few_samples():
    few, many = [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0] * 10
    shifted = [[value + shift for value, shift in zip(of, of, strict=True)] for of in (few, many)]
    of_few, of_many = paired(few, shifted[0]), paired(many, shifted[1])
    assert of_few.value == of_many.value == 1.5
    assert of_few.stderr == pytest.approx(0.6455, abs=1e-4)
    assert of_few.is_noise and of_few.noise == pytest.approx(3.18 * of_few.stderr)
    assert not of_many.is_noise and of_many.noise == pytest.approx(2 * of_many.stderr)
