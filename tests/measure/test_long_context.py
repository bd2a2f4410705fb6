"""Long context: RoPE is stretched and put back, and figures are those of naive computations."""

import json
import math
import statistics
from typing import Any

import pytest
import torch
from native_checkpoints import as_native, trained
from peft import get_peft_model
from test_ruler import DOCUMENTS
from tiny import LLAMA3, SHAPE, tiny_model, tiny_tokenizer
from transformers import DynamicCache

from retrofit import GateConfig
from retrofit.measure import cut_windows, measure
from retrofit.measure.evaluation import MeasuredModel
from retrofit.measure.long_context import LongContext, answer, answer_nats, rope_scaled
from retrofit.measure.registry import chosen_evaluations
from retrofit.measure.ruler import Ruler, Sample
from retrofit.utils.errors import UserError

TRAINED = SHAPE["max_position_embeddings"]
LONG = 3 * TRAINED
FULL = {
    "layer_types": ["full_attention"] * 3,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,  # as merged
    },
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
OWN: dict[str, dict] = {"qwen3_5_text": FULL, "qwen3_next": FULL | EXPERTS}
STRETCHED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_next")
INPUT_IDS = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(0))


def opened(model, documents=DOCUMENTS) -> MeasuredModel:
    return MeasuredModel("a", "a", model, tiny_tokenizer(), documents, reload=None)  # type: ignore[arg-type]


def untracked(sequence, doing):
    return sequence


def scaling(family: str, kind: str) -> dict[str, Any]:
    """What a user writes into a config to read `LONG` tokens."""
    default = {"rope_theta": 10000.0}
    rope = OWN.get(family, {}).get("rope_parameters", default) | {"rope_type": kind, "factor": 3.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = TRAINED
    return OWN.get(family, {}) | {"rope_parameters": rope, "max_position_embeddings": LONG}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(INPUT_IDS).logits


def stretched_from_the_start(family: str, kind: str):
    return tiny_model(family, **scaling(family, kind))


@pytest.mark.parametrize("kind", ["yarn", "linear"])
@pytest.mark.parametrize("family", STRETCHED)
def test_a_stretched_model_is_one_that_was_loaded_so_and_is_put_back(family, kind):
    model = tiny_model(family, **OWN.get(family, {}))
    rotary, config, before = model.model.rotary_emb, model.config.to_dict(), logits(model)
    inv_freq = rotary.inv_freq.clone()
    expected = stretched_from_the_start(family, kind)
    with rope_scaled(model, LONG, kind):
        inside = logits(model)
        assert torch.equal(model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
        assert model.config.to_dict() == expected.config.to_dict()
    assert torch.equal(inside, logits(expected))
    assert not torch.allclose(inside, before, atol=1e-2), "stretching must matter"
    assert model.model.rotary_emb is rotary and torch.equal(rotary.inv_freq, inv_freq)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_frequencies_are_those_of_the_papers(kind):
    """Linear: all divided by the factor. YaRN: those that turn more than 32 times in the trained
    length stay, those that turn less than once are divided, and attention is sharper."""
    model = tiny_model("llama")
    before = model.model.rotary_emb.inv_freq
    with rope_scaled(model, LONG, kind):
        rotary = model.model.rotary_emb
    if kind == "linear":
        torch.testing.assert_close(rotary.inv_freq, before / 3)
        assert rotary.attention_scaling == 1
        return
    turns = TRAINED * before / (2 * math.pi)
    assert (turns > 32).any() and (turns < 1).any()
    torch.testing.assert_close(rotary.inv_freq[turns > 32], before[turns > 32])
    torch.testing.assert_close(rotary.inv_freq[turns < 1], before[turns < 1] / 3)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(3) + 1)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_gates_stay_where_they_are(kind):
    def gated(model):
        torch.manual_seed(0)
        return get_peft_model(model, GateConfig(init_weights=False)).eval()

    model = gated(tiny_model("qwen3"))
    before = logits(model)
    with rope_scaled(model.get_base_model(), LONG, kind):
        inside = logits(model)
    assert torch.equal(inside, logits(gated(stretched_from_the_start("qwen3", kind))))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_merged_model_stretches_as_the_gated_one_does(family, kind, tmp_path):
    model = trained(family, centered=True)
    merged = as_native(model, tmp_path, torch.float32)
    with rope_scaled(model.get_base_model(), LONG, kind), rope_scaled(merged, LONG, kind):
        torch.testing.assert_close(
            logits(model).log_softmax(-1), logits(merged).log_softmax(-1), rtol=0, atol=1e-3
        )


def test_a_length_within_the_trained_one_changes_nothing():
    model = tiny_model("llama")
    rotary, rope = model.model.rotary_emb, model.config.rope_parameters
    for length in (300, TRAINED):
        with rope_scaled(model, length, "yarn"):
            assert model.model.rotary_emb is rotary and model.config.rope_parameters is rope
            assert model.config.max_position_embeddings == TRAINED


def test_an_error_inside_puts_the_model_back():
    model = tiny_model("llama")
    rotary, config = model.model.rotary_emb, model.config.to_dict()
    with pytest.raises(KeyboardInterrupt), rope_scaled(model, LONG, "yarn"):
        raise KeyboardInterrupt
    assert model.model.rotary_emb is rotary and model.config.to_dict() == config


@pytest.mark.parametrize(
    ("family", "overrides", "reads", "reason"),
    [
        ("llama", {"rope_parameters": LLAMA3}, TRAINED, "stretched already (llama3)"),
        ("gemma3_text", {}, TRAINED, "a RoPE each"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 2.0,
                    "original_max_position_embeddings": TRAINED,
                }
            },
            2 * TRAINED,
            "stretched already (yarn)",
        ),
    ],
)
def test_what_cannot_be_stretched_is_refused_beyond_what_it_reads(family, overrides, reads, reason):
    model = tiny_model(family, **overrides)
    with rope_scaled(model, reads, "yarn"):
        pass
    message = f"reads {reads} tokens, fewer than {reads + 1}, and .*"
    with pytest.raises(UserError, match=message) as error, rope_scaled(model, reads + 1, "yarn"):
        pass
    assert reason in str(error.value) and f"up to {reads}" in str(error.value)


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

    def generate(input_ids, generation_config, **_):
        index, sample = by_prompt[tiny_tokenizer().decode(input_ids[0])]
        seen.append(index)
        assert generation_config.max_new_tokens == sample.max_new_tokens
        assert len(input_ids[0]) + sample.max_new_tokens <= 3000
        said = tiny_tokenizer()(words(index, sample))["input_ids"]
        return torch.cat([input_ids, torch.tensor([said], dtype=input_ids.dtype)], 1)

    monkeypatch.setattr(model, "generate", generate)
    return seen


TASKS = ("niah_multiquery", "variable_tracking", "frequent_words")


def asked_of(model, track=untracked) -> dict[str, Any]:
    part = LongContext(lengths=(2500, 3000), samples=3, tasks=TASKS, documents=1)
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


def test_progress_counts_every_prompt_and_every_window(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=4096)
    speaking(model, monkeypatch, lambda index, sample: "")
    steps = []

    def track(sequence, doing):
        steps.append((doing.rpartition(" ")[2], len(sequence)))
        return sequence

    asked_of(model, track)
    assert steps == [("prompts", 18), ("tasks", 18), ("perplexity", 2)]


@torch.no_grad()
def greedy(model, tokens: list[int], count: int) -> list[int]:
    """Without a cache, and without regard to any generation config."""
    new: list[int] = []
    while len(new) < count and 257 not in new:
        new.append(int(model(torch.tensor([tokens + new])).logits[0, -1].argmax()))
    return new


def test_answers_are_greedy_whatever_the_model_asks_for():
    model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    model.generation_config.update(
        do_sample=True, temperature=3.0, top_k=3, top_p=0.5, repetition_penalty=5.0
    )
    prompt = "Where is the whale?"
    expected = greedy(model, tokenizer(prompt)["input_ids"], 40)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert answer(model, tokenizer, Sample(prompt, ("unheard",), 40, " unheard")) == text


def test_answers_end_where_the_text_does_and_when_all_are_there():
    model, tokenizer = tiny_model("llama", seed=2), tiny_tokenizer()
    prompt = "Where is the whale?"
    tokens = greedy(model, tokenizer(prompt)["input_ids"], 40)
    assert len(tokens) == 40 and len(set(tokens[:2])) == 2 and tokens.index(tokens[5]) == 5
    model.generation_config.eos_token_id = tokens[5]
    found = answer(model, tokenizer, Sample(prompt, ("unheard",), 40, " unheard"))
    assert found == tokenizer.decode(tokens[:6], skip_special_tokens=True)
    model.generation_config.eos_token_id = 257
    first = tokenizer.decode(tokens[:2])
    assert answer(model, tokenizer, Sample(prompt, (first,), 40, first)) == first


def test_a_prompt_is_read_without_full_logits():
    model, rows = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1]))
    answer(model, tiny_tokenizer(), Sample("Where is the whale?" * 10, ("unheard",), 3, ""))
    assert rows == [1, 1, 1]


HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}


@pytest.mark.parametrize(
    ("family", "overrides", "read_again"),
    [("llama", {}, False), ("gpt_oss", {}, True), ("qwen3_5_text", HYBRID, True)],
)
def test_nats_of_the_answers_equal_those_of_full_logits(family, overrides, read_again):
    """After the model went on in its own way, which must leave no trace."""
    model, tokenizer = tiny_model(family, **overrides), tiny_tokenizer()
    sample = Sample("Where is the white whale, and who has seen it?", ("Ahab",), 30, " Ahab has")
    ids = tokenizer(sample.prompt + sample.continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[0, :-1]
    expected = -log_p.gather(-1, ids[0, 1:, None])[-len(" Ahab has") :].mean().item()
    cache = DynamicCache(config=model.config)
    answer(model, tokenizer, sample, cache)
    read = []
    handle = model.model.layers[0].register_forward_hook(
        lambda _module, args, _output: read.append(args[0].shape[1])
    )
    assert answer_nats(model, tokenizer, sample, cache) == pytest.approx(expected, rel=1e-4)
    handle.remove()
    assert read == [ids.shape[1] if read_again else len(" Ahab has") + 1]


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
