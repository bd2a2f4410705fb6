"""Long context: figures are those of naive computations."""

import json
import math
import statistics
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_rope_scaling import LONG, stretched_from_the_start
from test_ruler import DOCUMENTS
from tiny import tiny_model, tiny_tokenizer

from retrofit import GateConfig
from retrofit.measure import cut_windows, measure
from retrofit.measure.evaluation import MeasuredModel
from retrofit.measure.long_context import LongContext
from retrofit.measure.registry import chosen_evaluations
from retrofit.measure.ruler import Ruler
from retrofit.utils.errors import UserError


def opened(model, documents=DOCUMENTS) -> MeasuredModel:
    return MeasuredModel("a", "a", model, tiny_tokenizer(), documents, reload=None)  # type: ignore[arg-type]


def untracked(sequence, doing):
    return sequence


def only_perplexity(model, monkeypatch, **settings) -> dict[str, Any]:
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: input_ids)
    part = LongContext(samples=1, tasks=("niah_single",), **settings)
    return part.measure(opened(model), untracked).model_dump()


def test_perplexity_by_position_equals_that_of_full_logits(monkeypatch):
    model = tiny_model("llama")
    found = only_perplexity(model, monkeypatch, lengths=(500, LONG), documents=3)
    assert found["rope"] == {"500": "as trained", str(LONG): "yarn x3"}
    for length in (500, LONG):
        windows = cut_windows(DOCUMENTS, tiny_tokenizer(), length, 3)
        plain = model if length == 500 else stretched_from_the_start("llama", "yarn")
        with torch.no_grad():
            log_p = plain(windows).logits.double().log_softmax(-1)
        figures = found["perplexity"][str(length)]
        assert figures["windows"] == 3
        by_bin = _bins(length)
        for positions, center, perplexity in zip(
            by_bin, figures["positions"], figures["perplexity"], strict=True
        ):
            nll = [
                -log_p[row, position - 1, windows[row, position]].item()
                for row in range(3)
                for position in positions
            ]
            assert center == statistics.fmean(positions)
            assert perplexity == pytest.approx(math.exp(statistics.fmean(nll)), rel=1e-5)


def _bins(length: int) -> list[list[int]]:
    """16 runs of the positions from 1 on, the first ones longer by one where it does not divide."""
    size, longer = divmod(length - 1, 16)
    sizes = [size + (index < longer) for index in range(16)]
    return [
        [1 + sum(sizes[:index]) + step for step in range(each)] for index, each in enumerate(sizes)
    ]


def speaking(model, monkeypatch, words):
    """A model that goes on with `words(sample)` and counts how it is asked."""
    ruler = Ruler(tiny_tokenizer(), DOCUMENTS)
    samples = [
        ruler.sample(task, length, index)
        for length in (2500, 3000)
        for task in TASKS
        for index in range(3)
    ]
    by_prompt = {sample.prompt: (index, sample) for index, sample in enumerate(samples)}
    seen = []

    def generate(input_ids, attention_mask, generation_config, **_):
        said = []
        for prompt in (row[kept] for row, kept in zip(input_ids, attention_mask == 1, strict=True)):
            index, sample = by_prompt[tiny_tokenizer().decode(prompt)]
            seen.append(index)
            assert generation_config.max_new_tokens == sample.max_new_tokens
            assert len(prompt) + sample.max_new_tokens <= 3000
            said.append(words(index, sample))
        longest = max(map(len, said))  # one token a character
        spoken = tiny_tokenizer()([text.ljust(longest) for text in said], return_tensors="pt")
        return torch.cat([input_ids, spoken["input_ids"]], 1)

    monkeypatch.setattr(model, "generate", generate)
    return seen


TASKS = ("niah_multiquery", "variable_tracking", "frequent_words")


def asked_of(model, track=untracked, **settings) -> dict[str, Any]:
    part = LongContext(lengths=(2500, 3000), samples=3, tasks=TASKS, documents=1, **settings)
    return part.measure(opened(model), track).model_dump()


@pytest.mark.parametrize(
    ("words", "score"),
    [
        (lambda index, sample: " " + ", ".join(sample.answers).upper(), 1.0),
        (lambda index, sample: " the grass is green, 0000000 and XXXXX", 0.0),
    ],
)
def test_a_model_that_knows_scores_1_and_noise_scores_0(monkeypatch, words, score):
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=4096)
    seen = speaking(model, monkeypatch, words)
    found = asked_of(model)
    expected = {"score": score, "stderr": 0.0, "samples": 3, "score_by_sample": [score] * 3}
    for task in TASKS:
        for length in ("2500", "3000"):
            assert found["tasks"][task][length].items() >= expected.items()
    assert seen == list(range(18))


def test_scores_are_the_mean_share_with_its_standard_error(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=4096)
    speaking(model, monkeypatch, lambda index, sample: " ".join(sample.answers[: index % 3]))
    found = asked_of(model)
    for task, answers in zip(TASKS, (4, 5, 3), strict=True):
        figures = found["tasks"][task]["3000"]
        shares = [0, 1 / answers, 2 / answers]
        mean = sum(shares) / 3
        variance = sum((share - mean) ** 2 for share in shares) / 2
        assert figures["score"] == pytest.approx(mean)
        assert figures["stderr"] == pytest.approx((variance / 3) ** 0.5)
        assert figures["score_by_sample"] == pytest.approx(shares)


@pytest.mark.parametrize(("cached_tokens", "batches"), [(None, 18), (5999, 15), (9000, 6)])
def test_progress_counts_every_prompt_batch_and_window(cached_tokens, batches, monkeypatch):
    """The cache holds two samples of 2,500 tokens in 5,999, but only one of 3,000."""
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=4096)
    speaking(model, monkeypatch, lambda index, sample: "")
    steps = []

    def track(sequence, doing):
        steps.append((doing.rpartition(" ")[2], len(sequence)))
        return sequence

    asked_of(model, track, cached_tokens=cached_tokens)
    assert steps == [("prompts", 18), ("tasks", batches), ("perplexity", 2)]


def test_two_models_see_the_same_prompts_and_another_seed_others(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=4096)
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: input_ids)

    def prompts(**settings):
        part = LongContext(
            lengths=(900,), samples=2, tasks=("niah_multikey",), documents=1, **settings
        )
        return part.measure(opened(model), untracked).tasks["niah_multikey"]["900"]

    assert prompts() == prompts()
    assert prompts().prompts_sha256 != prompts(seed=1).prompts_sha256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (255,)}, "at least 256 tokens"),
        ({"lengths": ()}, "at least 256 tokens"),
        ({"tasks": ("niah",)}, "no task 'niah'; there are niah_single"),
        ({"lengths": (300, 400, 300)}, "300, 400, 300 must all differ"),
        ({"tasks": ("niah_single",) * 2}, "must all differ"),
        ({"lengths": (300, 10**6)}, "the text has .* tokens, less than one window of 1000000"),
        ({"lengths": (300,)}, "niah_single takes .* tokens at least, more than a length of 300"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(settings, message, monkeypatch):
    model = tiny_model("llama", max_position_embeddings=2_000_000)
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(UserError, match=message):
        LongContext(**settings).measure(opened(model), untracked)


@pytest.mark.parametrize("setting", ["samples=0", "documents=0", "scaling=ntk", "lengths=[many]"])
def test_settings_are_checked(setting):
    with pytest.raises(UserError, match=f"--set long_context.{setting.partition('=')[0]}"):
        chosen_evaluations(["long_context"], [f"long_context.{setting}"])


def test_it_is_a_part_of_measure(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    models = {
        "base": tiny_model("llama"),
        "gated": get_peft_model(tiny_model("llama"), GateConfig()).eval(),
    }
    part = LongContext(lengths=(500, 768), samples=1, tasks=("niah_single",), documents=1)
    result = measure(
        list(models), path, length=192, windows=1, evaluations=[part],
        load=lambda source, _: (models[source], tiny_tokenizer()), progress=False,
    )  # fmt: skip
    base, gated = (model["long_context"] for model in result["models"])
    assert set(base) == {"lengths", "rope", "tasks", "perplexity"}
    assert base["rope"] == {"500": "as trained", "768": "yarn x1.5"}
    assert base["tasks"]["niah_single"]["768"]["stderr"] is None
    assert gated == base, "zero gates are the identity"
    assert result["settings"]["long_context"]["lengths"] == [500, 768]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
