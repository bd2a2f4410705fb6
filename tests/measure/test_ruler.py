"""RULER's tasks: the answer follows from the prompt, and the prompt has the length asked for."""

import hashlib
import re
from collections import Counter
from random import Random

import pytest
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from retrofit.measure.ruler import TASKS, Ruler, largest_that_fits, recall
from retrofit.utils.errors import UserError

LENGTHS = (2500, 8000)  # bytes: common words are repeated more often from 4096 on
NEEDLE = re.compile(r"One of the special magic numbers for (\S+) is: (\d{7})\.")


def prose(seed: str, sentences: int) -> str:
    """Sentences of seven words, of syllables drawn at random."""
    rng = Random(seed)

    def word() -> str:
        return "".join("bdfgklmnprst"[int(rng.random() * 12)] + "aeiou"[int(rng.random() * 5)]
                       for _ in range(2 + int(rng.random() * 3)))  # fmt: skip

    return " ".join(" ".join(word() for _ in range(7)).capitalize() + "." for _ in range(sentences))


DOCUMENTS = [prose("a", 300), prose("b", 200)]


@pytest.fixture(params=TASKS)
def task(request) -> str:
    return request.param


@pytest.fixture(params=LENGTHS)
def length(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def ruler() -> Ruler:
    return Ruler(tiny_tokenizer(), DOCUMENTS)


def asked_for(prompt: str) -> set[str]:
    return set(re.search(r"numbers? for ([^?]*) mentioned", prompt.rpartition("What ")[2])[1]
               .replace(",", "").replace("and ", "").split())  # fmt: skip


def needles_found(prompt: str) -> set[str]:
    asked = asked_for(prompt)
    return {value for key, value in NEEDLE.findall(prompt) if key in asked}


def variables_found(prompt: str) -> set[str]:
    prompt = prompt.rpartition("Memorize and track")[2]
    value = re.search(r"assigned the value (\d+)", prompt)[1]
    known: dict[str, str] = {}
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", prompt, re.MULTILINE):
        known[name] = known.get(source, source)
    return {name for name, its in known.items() if its == value}


def common_found(prompt: str) -> set[str]:
    counts = Counter(re.findall(r"\d+\. (\w+)", prompt.rpartition("Below is")[2]))
    (_, least), (_, most) = counts.most_common(11)[9:]
    assert least >= 6 * most
    return {word for word, _ in counts.most_common(10)}


def frequent_found(prompt: str) -> set[str]:
    counts = Counter(re.findall(r"\b[a-z]{6}\b", prompt.split("\n")[1]))
    (_, third), (_, fourth) = counts.most_common(4)[2:]
    assert third > fourth
    return {word for word, _ in counts.most_common(3)}


SOLVERS = {
    "variable_tracking": variables_found,
    "common_words": common_found,
    "frequent_words": frequent_found,
}
ANSWERS = {
    "niah_single": 1,
    "niah_multikey": 1,
    "niah_multivalue": 4,
    "niah_multiquery": 4,
    "variable_tracking": 5,
    "common_words": 10,
    "frequent_words": 3,
}


def times(task: str, length: int, size: int) -> list[int]:
    """How often each answer must stand in a prompt."""
    if task == "variable_tracking":
        return [2, 2, 2, 2, 1]
    if task == "common_words":
        return [6 if length < 4096 else 30] * 10
    return [1] * size


@pytest.mark.parametrize("index", range(3))
def test_the_answers_follow_from_the_prompt(ruler, task, length, index):
    sample = ruler.sample(task, length, index)
    assert len(set(sample.answers)) == ANSWERS[task]
    assert recall(sample.continuation, sample.answers) == 1 and sample.continuation[0] == " "
    assert SOLVERS.get(task, needles_found)(sample.prompt) == set(sample.answers)
    counts = [sample.prompt.lower().count(answer.lower()) for answer in sample.answers]
    if task == "frequent_words":
        assert counts[0] > counts[1] > counts[2] > 0
        assert counts[0] / counts[1] == pytest.approx(9 / 4, rel=0.15)
    else:
        assert counts == times(task, length, len(counts))


def test_needles_are_as_many_as_the_task_says(ruler):
    needles = {task: NEEDLE.findall(ruler.sample(task, 2500).prompt) for task in TASKS}
    keys = {task: (len(found), len(dict(found))) for task, found in needles.items() if found}
    assert keys == {
        "niah_single": (1, 1),
        "niah_multikey": (4, 4),
        "niah_multivalue": (4, 1),
        "niah_multiquery": (4, 4),
    }


def test_haystacks_are_noise_or_the_text(ruler):
    assert "The grass is green.\nThe sky is blue." in ruler.sample("niah_single", 2500).prompt
    context = NEEDLE.sub("", ruler.sample("niah_multikey", 2500).prompt.split("\n")[1])
    text = " ".join(DOCUMENTS)
    assert " ".join(context.split()) in f"{text} {text}"


def test_needles_do_not_cut_sentences(ruler):
    for index in range(5):
        prompt = ruler.sample("niah_multikey", 2500, index).prompt
        for before in re.split(NEEDLE, prompt.split("\n")[1])[:-1:3][1:]:
            assert before.rstrip().endswith(".") or not before.strip()


def test_depths_are_spread_over_the_whole_context(ruler):
    depths = []
    for index in range(60):
        context = ruler.sample("niah_single", 2500, index).prompt.split("\n", 1)[1]
        depths.append(NEEDLE.search(context).start() / context.rindex("\nWhat"))
    assert Counter(int(depth * 4) for depth in depths).keys() == {0, 1, 2, 3}
    assert sum(depths) / 60 == pytest.approx(0.5, abs=0.12)  # 3 standard errors


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_fill_the_length_and_no_more(task, length, bos):
    tokenizer = tiny_tokenizer()
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    ruler = Ruler(tokenizer, DOCUMENTS)
    for index in range(3):
        sample = ruler.sample(task, length, index)
        used = len(tokenizer(sample.prompt)["input_ids"]) + sample.max_new_tokens
        assert length - 40 < used <= length


def test_one_more_of_anything_would_be_too_long():
    for case in range(300):
        rng = Random(case)
        start, most = rng.randrange(50), rng.randrange(1, 400)
        sizes = [start]
        while len(sizes) <= most + 1:
            sizes.append(sizes[-1] + rng.choice([1, 1, 2, rng.randrange(1, 60)]))
        budget, smallest = rng.randrange(1200), rng.randrange(most + 1)
        fitting = [size for size in range(smallest, most + 1) if sizes[size] <= budget]
        expected = max(fitting, default=None)
        assert largest_that_fits(sizes.__getitem__, budget, smallest, most) == expected


def test_the_size_is_found_in_a_few_steps():
    asked = []

    def tokens(size):
        asked.append(size)
        return 60 + int(2.7 * size) + size % 5

    size = largest_that_fits(tokens, 131_072, 1, 131_072)
    assert len(asked) < 20 and max(asked) < 2 * size


def test_samples_are_the_same_on_every_machine(ruler):
    samples = [ruler.sample(task, 2500, index) for task in TASKS for index in range(2)]
    assert samples == [
        Ruler(tiny_tokenizer(), DOCUMENTS).sample(task, 2500, index)
        for task in TASKS
        for index in range(2)
    ]
    digest = hashlib.sha256(repr(samples).encode()).hexdigest()
    assert digest[:16] == "09ced344f27a3a28"


def test_seeds_and_samples_differ_and_lengths_do_not(ruler, task):
    answers = ruler.sample(task, 2500).answers
    assert ruler.sample(task, 2500, 1).answers != answers
    assert Ruler(tiny_tokenizer(), DOCUMENTS, seed=1).sample(task, 2500).answers != answers
    if task != "common_words":  # whose example is longer from 4096 tokens on
        assert ruler.sample(task, 3000).answers == ruler.sample(task, 8000).answers == answers


def test_common_words_occur_in_the_list_alone():
    """A word of the question, or a part of another word, would score without being found."""
    words = [prose("a", 10), "Below list words appear often", "top topmost"]
    ruler = Ruler(tiny_tokenizer(), [" ".join(words), prose("b", 200).lower()])
    for index in range(40):
        sample = ruler.sample("common_words", 2500, index)
        prompt = sample.prompt.rpartition("\nBelow")[2]
        assert [prompt.count(answer) for answer in sample.answers] == [6] * 10
        assert not {"below", "list", "words", "appear", "often"} & {
            *re.findall(r"\. (\w+)", prompt)
        }


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" 1234567 and 7654321.", ("1234567", "7654321"), 1),
        (" 1234567", ("1234567", "7654321"), 0.5),
        (" 123456", ("1234567",), 0),
        (" abcde, FGHIJ", ("ABCDE", "fghij", "KLMNO", "PQRST"), 0.5),
        ("", ("1234567",), 0),
    ],
)
def test_recall_is_the_share_of_answers_that_occur(text, answers, expected):
    assert recall(text, answers) == expected


def test_the_least_length_that_a_refusal_names_is_enough(ruler, task):
    with pytest.raises(UserError, match=f"{task} takes") as error:
        ruler.sample(task, 300)
    least = int(
        re.search(r"takes (\d+) tokens at least, more than a length of 300", str(error.value))[1]
    )
    sample = ruler.sample(task, least)
    assert SOLVERS.get(task, needles_found)(sample.prompt) == set(sample.answers)
    with pytest.raises(UserError, match=f"takes {least} tokens"):
        ruler.sample(task, least - 1)


def test_what_cannot_be_made_is_refused(ruler):
    with pytest.raises(UserError, match="no RULER task 'niah'; there are niah_single, "):
        ruler.sample("niah", 2500)
    with pytest.raises(UserError, match="too few different words for common_words at 8000 tokens"):
        Ruler(tiny_tokenizer(), [prose("a", 10)]).sample("common_words", 8000)
    with pytest.raises(UserError, match="too few different words"):
        Ruler(tiny_tokenizer(), ["one two three"]).sample("common_words", 2500)
    with pytest.raises(UserError, match="no words"):
        Ruler(tiny_tokenizer(), [" \n"])
