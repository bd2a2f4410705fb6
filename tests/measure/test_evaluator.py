"""`measure`: what it returns, what it refuses, and how people read it."""

import gc
import hashlib
import json
import shutil
import weakref
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO

import pytest
import torch
from peft import get_peft_model
from pydantic import BaseModel
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from retrofit import GateConfig
from retrofit.measure import cut_windows, evaluator, measure, names
from retrofit.measure.registry import chosen_evaluations
from retrofit.models.loading import load_model
from retrofit.report import metrics, plot, table
from retrofit.utils.errors import UserError

METRICS = {
    "f_attn",
    "peak_column_share",
    "peak_column_position",
    "peak_share_per_head",
    "sink_ratio",
    "max_activation",
    "max_activation_first_token",
    "max_activation_any_window",
    "kurtosis",
    "outlier_share",
    "gate_score",
    "gate_below_0.1",
    "head_load_cv",
    "perplexity",
    "perplexity_far",
    "kl_to_base",
    "copied_nats",
    "down_proj_max_activation",
    "down_proj_kurtosis",
}
PER_LAYER = {
    "f_attn",
    "peak_column_share",
    "max_activation",
    "gate_score",
    "gate_histogram",
    "head_load_cv",
    "head_load",
    "kurtosis",
    "outlier_share",
    "down_proj_max_activation",
    "down_proj_kurtosis",
    "column_share",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Five documents of 700 bytes, each of its own letters."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = [bytes(97 + (i * (d + 3)) % 26 for i in range(700)).decode() for d in range(5)]
    path.write_text("\n".join(json.dumps({"text": d}) for d in documents) + "\n")
    return path


@pytest.fixture(scope="module")
def sources(tiny_base, tmp_path_factory):
    """A base folder and an adapter folder."""
    base = tiny_base("llama")
    adapter = tmp_path_factory.mktemp("gates")
    torch.manual_seed(0)
    config = GateConfig(init_weights=False, layers_to_transform=[1, 2])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    return [str(base), str(adapter)]


@pytest.fixture(scope="module")
def result(sources, text):
    return measure(sources, text, length=256, windows=4, batch_size=2, progress=False)


def opening(**models):
    """A `load` of models that are already there."""
    return lambda source, dtype: (models[source], tiny_tokenizer())


def test_the_result_has_the_documented_shape(result, text):
    assert set(result) == {"models", "settings"}
    for model in result["models"]:
        assert set(model) == {
            "name", "metrics", "per_layer", "nll_by_window", "copied_nats_by_window"
        }  # fmt: skip
        assert set(model["metrics"]) == METRICS <= set(metrics.METRICS), "each has a name"
        assert set(model["per_layer"]) == PER_LAYER
        assert all(len(values) == 3 for values in model["per_layer"].values())
        assert all(len(shares) == 32 for shares in model["per_layer"]["column_share"])
    settings = result["settings"]
    assert settings["text"] == text.name
    assert settings["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (settings["length"], settings["windows"], settings["tokens"]) == (256, 4, 1024)
    assert (settings["first_token"], settings["dtype"]) == (None, "float32")
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_base_has_no_gates_and_no_distance_to_itself(result):
    base, gated = (model["metrics"] for model in result["models"])
    assert base["gate_score"] is None and base["gate_below_0.1"] is None
    assert base["kl_to_base"] == 0.0
    assert 0 < gated["gate_score"] < 1
    assert gated["kl_to_base"] > 0


class Counted(BaseModel):
    parameters: int


@dataclass(init=False)
class Counting:
    """A part without settings, which notes what it was asked, and fails on one model."""

    name = "counting"

    def __init__(self, fails_on: str = "", asked: list | None = None):
        self.fails_on, self.asked = fails_on, [] if asked is None else asked

    def measure(self, subject, track):
        self.asked.append(subject.name)
        if subject.name == self.fails_on:
            raise KeyboardInterrupt
        return Counted(
            parameters=sum(1 for _ in track(list(subject.model.parameters()), "counting"))
        )


def test_an_interrupted_measurement_goes_on_where_it_was(sources, text, tmp_path):
    def go(part, length=256, load=load_model):
        return measure(
            sources, text, length=length, windows=2, evaluations=[part], load=load,
            resume=tmp_path / "kept", progress=False,
        )  # fmt: skip

    opened = []

    def load(source, dtype, **options):
        opened.append(source)
        return load_model(source, dtype, **options)

    _, gated = names(sources)
    with pytest.raises(KeyboardInterrupt):
        go(Counting(fails_on=gated))
    part = Counting()
    assert (tmp_path / "kept").is_dir()
    resumed = go(part, load=load)
    assert part.asked == [gated] and opened == [sources[1]], "only what was missing is measured"
    part = Counting()
    assert go(part) == resumed and part.asked == [], "all of it is kept"


def test_what_was_kept_of_another_measurement_is_not_used(sources, text, tmp_path):
    base, gated = names(sources)
    asked = []
    for length, fails_on in ((256, gated), (192, "")):
        with suppress(KeyboardInterrupt):
            part = Counting(fails_on, asked)
            measure(sources, text, length=length, windows=2, evaluations=[part],
                    resume=tmp_path / "kept", progress=False)  # fmt: skip
    assert asked == [base, gated, base, gated]


def test_measuring_twice_gives_the_same_json(result, sources, text):
    again = measure(sources, text, length=256, windows=4, batch_size=2, progress=False)
    assert json.dumps(again) == json.dumps(result)


def test_perplexity_and_kl_equal_those_of_full_logits(text):
    base, other = tiny_model("llama", seed=0), tiny_model("qwen3", seed=1)
    load = opening(base=base, other=other)
    result = measure(["base", "other"], text, length=300, windows=3, load=load, progress=False)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    input_ids = cut_windows(documents, tiny_tokenizer(), 300, 3)
    with torch.no_grad():
        log_q, log_p = (
            model(input_ids).logits.double().log_softmax(-1)[:, :-1] for model in (base, other)
        )
    nll = -log_p.gather(-1, input_ids[:, 1:, None])
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    metrics = result["models"][1]["metrics"]
    assert metrics["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert metrics["perplexity_far"] == pytest.approx(nll[:, 63:].mean().exp().item(), rel=1e-5)
    assert metrics["kl_to_base"] == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_copied_text_is_scored_where_it_comes_again(text, bos):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    result = measure(["a"], text, length=301, windows=12, batch_size=3, progress=False,
                     load=lambda *_: (model, tokenizer))["models"][0]  # fmt: skip
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    expected = []
    for row in cut_windows(documents, tokenizer, 301, 12)[:8].tolist():
        passage = row[1:151] if bos else row[:150]
        twice = torch.tensor([row[:1] * bos + passage + passage])
        with torch.no_grad():
            log_p = model(twice).logits.double().log_softmax(-1)[0, :-1]
        nll = -log_p.gather(-1, twice[0, 1:, None]).squeeze(-1)
        expected.append(nll[-150:].mean().item())
    assert result["copied_nats_by_window"] == pytest.approx(expected, rel=1e-5)
    assert result["metrics"]["copied_nats"] == pytest.approx(sum(expected) / len(expected))


def test_kl_between_different_vocabularies_does_not_apply(text):
    load = opening(base=tiny_model("llama"), larger=tiny_model("llama", vocab_size=320))
    result = measure(["base", "larger"], text, length=192, load=load, progress=False)
    assert result["models"][1]["metrics"]["kl_to_base"] is None


def test_zero_gates_measure_as_their_base(text):
    gated = get_peft_model(tiny_model("qwen3"), GateConfig()).eval()
    load = opening(base=tiny_model("qwen3"), gated=gated)
    result = measure(["base", "gated"], text, length=192, load=load, progress=False)
    base, gated = (model["metrics"] for model in result["models"])
    assert gated.pop("gate_score") == 0.5 and gated.pop("gate_below_0.1") == 0
    assert gated.items() <= base.items()


def test_a_model_is_released_before_the_next_is_opened(text):
    opened = []

    def load(source, dtype):
        gc.collect()
        assert all(reference() is None for reference in opened)
        model = get_peft_model(tiny_model("llama"), GateConfig()).eval()
        opened.append(weakref.ref(model.get_base_model().model.layers[0].mlp))
        return model, tiny_tokenizer()

    measure(["a", "b", "c"], text, length=192, load=load, progress=False)
    assert len(opened) == 3


def test_all_models_run_in_the_dtype_of_the_base(text):
    asked = []

    def load(source, dtype):
        asked.append(dtype)
        return tiny_model("llama").to(torch.bfloat16), tiny_tokenizer()

    result = measure(["a", "b"], text, length=192, load=load, progress=False)
    assert asked == ["auto", "bfloat16"]
    assert result["settings"]["dtype"] == "bfloat16"


def test_a_model_that_is_opened_again_has_the_dtype_of_all_others(text):
    """bitsandbytes computes in bfloat16 if it is told `auto`, whatever the others compute in."""
    asked = []

    class Nothing(BaseModel):
        pass

    @dataclass
    class OpenAgain:
        name = "opened"

        def measure(self, measured, track):
            measured.reload()
            return Nothing()

    def load(source, dtype):
        asked.append((source, dtype))
        return tiny_model("llama"), tiny_tokenizer()

    options = {"length": 192, "load": load, "progress": False}
    measure(["a", "b"], text, evaluations=[OpenAgain()], **options)
    assert asked == [("a", "auto"), *[(name, "float32") for name in ("a", "b", "b")]]


def test_names_are_short_where_that_is_clear(text):
    def load(source, dtype):
        return tiny_model("llama"), tiny_tokenizer()

    sources = ["org/base", "runs/a/merged", "runs/b/merged"]
    result = measure(sources, text, length=192, windows=1, load=load, progress=False)
    names = [model["name"] for model in result["models"]]
    assert names == ["base", "runs/a/merged", "runs/b/merged"]


def test_windows_come_from_as_many_documents_as_possible():
    documents = ["a" * 30, "b" * 10, "c" * 45, "d" * 21]
    rows = cut_windows(documents, tiny_tokenizer(), 20, 4)
    assert tiny_tokenizer().batch_decode(rows) == ["a" * 20, "c" * 20, "d" * 20, "c" * 20]


def test_short_documents_are_joined():
    rows = cut_windows(["a" * 15, "b" * 30], tiny_tokenizer(), 20, 4)
    assert tiny_tokenizer().batch_decode(rows) == ["a" * 15 + "b" * 5, "b" * 20]


def test_every_window_starts_with_bos_where_the_tokenizer_prepends_it(text):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    rows = cut_windows(["a" * 100], tokenizer, 20, 4)
    assert rows.shape == (4, 20)
    assert set(rows[:, 0].tolist()) == {256} and not (rows[:, 1:] == 256).any()
    result = measure(
        ["a"], text, length=192, load=lambda *_: (tiny_model("llama"), tokenizer), progress=False
    )
    assert result["settings"]["first_token"] == "<s>"


def test_line_separators_inside_a_document_do_not_end_it(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b" * 100}, ensure_ascii=False))
    load = opening(base=tiny_model("llama"))
    assert (
        measure(["base"], path, length=192, load=load, progress=False)["settings"]["windows"] == 2
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no text file at"),
        ("empty.txt", " \n", "is empty"),
        ("empty.jsonl", "", "is empty"),
        ("bad.jsonl", '{"text": "a"}\n{"body": "b"}', "every line must be"),
        ("bad.jsonl", "not json", "line 1 is not JSON"),
        ("text.csv", "text", "must be a .txt or .jsonl file"),
        ("short.txt", "a" * 191, "the text has 191 tokens, less than one window of 192"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        measure(
            ["base"],
            tmp_path / name,
            length=192,
            load=opening(base=tiny_model("llama")),
            progress=False,
        )
    assert "\n" not in str(error.value)


def test_lengths_that_cannot_be_measured_are_refused(text):
    load = opening(base=tiny_model("llama"))
    with pytest.raises(UserError, match="at least 192 tokens, not 191"):
        measure(["base"], text, length=191, load=load)
    with pytest.raises(UserError, match="base has 512 positions, fewer than .* --length"):
        measure(["base"], text, length=513, load=load, progress=False)


def test_different_tokenizers_are_refused(text):
    other = tiny_tokenizer()
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizers = {"a": tiny_tokenizer(), "b": other}
    with pytest.raises(UserError, match="b and a tokenize the text differently"):
        measure(
            ["a", "b"],
            text,
            length=192,
            load=lambda source, _: (tiny_model("llama"), tokenizers[source]),
            progress=False,
        )


def test_predictions_that_are_not_finite_are_refused(text):
    model = get_peft_model(tiny_model("llama"), GateConfig())
    torch.nn.init.constant_(model.get_base_model().model.embed_tokens.weight, torch.nan)
    with pytest.raises(UserError, match="predictions of base are not finite in float32"):
        measure(["base"], text, length=192, load=opening(base=model), progress=False)


def printed(result) -> str:
    console = Console(width=200, file=StringIO())
    console.print(table(result))
    return " ".join(console.file.getvalue().split())


def test_the_table_says_what_moved(result):
    base, model = json.loads(json.dumps(result["models"]))
    base["metrics"] |= {"peak_column_share": 0.332, "peak_column_position": 0, "perplexity": 20.0}
    model["metrics"] |= {"peak_column_share": 0.181, "peak_column_position": 1, "perplexity": 20.1}
    base["metrics"]["max_activation"], model["metrics"]["max_activation"] = 14161.0, 868.0
    output = printed({**result, "models": [base, model]})
    assert f"{model['name']}: sink 0.332 -> 0.181 (-45.5%), now at position 1" in output
    assert "largest activation 14,200 -> 868 (16.3x lower)" in output
    assert "perplexity 20.0 -> 20.1 (unchanged)" in output


def test_the_table_of_a_base_alone_has_no_verdict(result):
    output = printed({**result, "models": result["models"][:1]})
    assert "perplexity" in output and "unchanged" not in output


@pytest.mark.parametrize("count", [1, 2])
def test_the_picture_appears_whole(result, tmp_path, count):
    path = tmp_path / "measure.png"
    plot({**result, "models": result["models"][:count]}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["measure.png"]


def test_what_was_kept_of_a_model_of_the_same_last_name_is_not_used(text, tmp_path):
    """Models on the hub have no files by which they could be told apart."""

    def perplexity(source, seed):
        model, generator = tiny_model("llama"), torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(model.lm_head.weight, std=0.1, generator=generator)
        settings = {"length": 192, "windows": 1, "resume": tmp_path / "kept", "progress": False}
        result = measure([source], text, load=opening(**{source: model}), **settings)
        return result["models"][0]["metrics"]["perplexity"]

    first = perplexity("one/model", 1)
    assert perplexity("other/model", 2) != first
    assert perplexity("one/model", 3) == first, "kept of the same model"


def test_what_was_kept_of_a_base_in_another_form_is_not_used(sources, text, tmp_path, monkeypatch):
    """A base beside a run is opened as the run was trained."""
    asked, opened = [], []

    def go(options):
        monkeypatch.setattr(evaluator, "opened_as_trained", lambda named: {named[0]: options})
        result = measure(
            sources[:1], text, length=192, windows=1, evaluations=[Counting(asked=asked)],
            load=lambda source, dtype, **how: opened.append(how) or load_model(source, dtype),
            resume=tmp_path / "kept", progress=False,
        )  # fmt: skip
        return result["settings"].get("base_quantization")

    in_four_bits = {"quantization": "nf4"}
    assert go(in_four_bits) == "nf4"
    assert go({}) is None
    assert opened == [in_four_bits, {}] and len(asked) == 2
    assert go(in_four_bits) == "nf4" and len(asked) == 2, "kept of the same form"


def test_figures_that_are_kept_inside_a_model_do_not_change_it(sources, text, tmp_path):
    run = shutil.copytree(sources[1], tmp_path / "run")
    asked = []
    for fails_on in ("run", ""):
        with suppress(KeyboardInterrupt):
            part, kept = Counting(fails_on, asked), run / ".x.json.parts"
            measure([sources[0], str(run)], text, length=192, windows=1, evaluations=[part],
                    resume=kept, progress=False)  # fmt: skip
    assert asked == [names(sources)[0], "run", "run"]


def test_a_model_that_changes_its_logits_after_the_head_is_refused(text):
    model = tiny_model("gemma3_text", final_logit_softcapping=0.01)
    with pytest.raises(UserError, match="base changes its logits after the output head"):
        measure(["base"], text, length=192, load=opening(base=model), progress=False)


@pytest.mark.parametrize(
    ("option", "asked"),
    [
        ("quantization.length", "513 tokens of quantization.length"),
        ("cost.prompt", r"545 tokens of cost.prompt \+ cost.new_tokens"),
        ("heads.length", "513 tokens of heads.length"),
    ],
)
def test_an_evaluation_longer_than_the_model_reads_is_refused(text, option, asked):
    (evaluation,) = chosen_evaluations([option.split(".")[0]], [f"{option}=513"])
    load = opening(base=tiny_model("llama"))
    with pytest.raises(UserError, match=f"base has 512 .* {asked}; lower {option}"):
        measure(["base"], text, length=192, evaluations=[evaluation], load=load, progress=False)
