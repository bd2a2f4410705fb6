"""Makes the RULER tasks that need no external data set (Hsieh et al., arXiv:2404.06654, section 3
and appendices), from a seed and fitted to a length.

Prompts are those for base models: the task, and the beginning of the answer. Templates and sizes
are RULER's. The text that models are measured on replaces RULER's essays and its list of words. A
score is the share of a sample's answers that occur in the model's continuation.
"""

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from retrofit.utils.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One prompt and its answers.

    Attributes:
        prompt: the task, with the beginning of the answer.
        answers: the strings that the continuation should contain.
        max_new_tokens: how many tokens the model may generate.
        continuation: the right continuation: all the answers, as the prompt asks for them.
    """

    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    continuation: str


def recall(text: str, answers: Sequence[str]) -> float:
    """Returns the share of the answers that occur in a text, in upper or lower case (RULER's
    `string_match_all`)."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


class Ruler:
    """Makes samples from one text for one tokenizer.

    One seed gives the same samples on any machine, with the same needles at the same depths in all
    lengths.

    Args:
        tokenizer: counts the lengths, including the special tokens that it adds.
        documents: the haystack, and the source of common words.
        seed: the seed of all samples.

    Raises:
        UserError: if the documents have no words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seed: int = 0):
        self._tokenizer = tokenizer
        self._text = _Text(" ".join(documents).split())
        self._seed = seed
        if not self._text.words:
            raise UserError("RULER: the text has no words")

    def sample(self, task: str, length: int, index: int = 0) -> Sample:
        """Returns sample number `index` of one of `TASKS`: the longest whose prompt and answer fit
        into `length` tokens.

        Raises:
            UserError: if there is no such task, the length is too short for it, or the text has too
                few words.
        """
        if task not in TASKS:
            raise UserError(f"no RULER task {task!r}; there are {', '.join(TASKS)}")
        draft = TASKS[task](Random(f"{self._seed} {task} {index}"), self._text, length)
        budget = length - draft.max_new_tokens
        size = largest_that_fits(
            lambda size: self._tokens(draft.prompt(size)), budget, draft.smallest, draft.largest
        )
        if size is None:
            least = self._tokens(draft.prompt(draft.smallest)) + draft.max_new_tokens
            raise UserError(f"{task} takes {least} tokens at least, more than a length of {length}")
        if size >= draft.largest:
            raise UserError(f"the text has too few different words for {task} at {length} tokens")
        return Sample(
            draft.prompt(size), draft.answers, draft.max_new_tokens, f" {draft.continuation}"
        )

    def _tokens(self, prompt: str) -> int:
        return len(self._tokenizer(prompt, verbose=False)["input_ids"])


def largest_that_fits(
    tokens: Callable[[int], int], budget: int, smallest: int, largest: int
) -> int | None:
    """Returns the largest size with at most `budget` tokens, or `None` if there is none.

    The number of tokens is nearly proportional to the size, so linear interpolation finds the size
    in a few steps. If it does not, bisection takes over.

    Args:
        tokens: counts the tokens at a size.
        budget: how many tokens there may be.
        smallest: the smallest size.
        largest: the largest size.
    """
    low, high = smallest, largest + 1
    at_low, at_high = tokens(low), None
    if at_low > budget:
        return None
    steps = 0
    while high - low > 1:
        if steps > _LINEAR_STEPS:
            guess = (low + high) // 2
        elif at_high is None:
            guess = low + max(low, budget // 16)
        else:
            guess = low + (budget - at_low) * (high - low) // (at_high - at_low)
        guess = min(max(guess, low + 1), high - 1)
        if (at_guess := tokens(guess)) <= budget:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
        steps += 1
    return low


@dataclass(frozen=True)
class _Draft:
    """A sample whose size is still open.

    `prompt(size)` accepts sizes from `smallest`, the first at which the task has an answer, to
    `largest`. The other fields are those of `Sample`.
    """

    prompt: Callable[[int], str]
    answers: tuple[str, ...]
    max_new_tokens: int
    continuation: str
    largest: int
    smallest: int = 1


# Python promises that `Random.random()` stays the same in all versions, and promises it of no other
# method.
def _shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())


def _code(rng: Random, alphabet: str, length: int) -> str:
    return "".join(alphabet[int(rng.random() * len(alphabet))] for _ in range(length))


def _number(rng: Random, digits: int) -> str:
    return str(10 ** (digits - 1) + int(rng.random() * 9 * 10 ** (digits - 1)))


def _distinct(count: int, draw: Callable[[], str], avoid: str = "") -> list[str]:
    """Draws `count` different strings that do not occur in `avoid`, in upper or lower case."""
    strings: dict[str, None] = {}
    while len(strings) < count:
        if (drawn := draw()).lower() not in avoid.lower():
            strings[drawn] = None
    return list(strings)


@dataclass(frozen=True)
class _Text:
    words: list[str]

    @cached_property
    def vocabulary(self) -> list[str]:
        """The different words of 4 to 12 plain letters, in alphabetical order."""
        stripped = {word.strip(string.punctuation).lower() for word in self.words}
        return sorted(filter(re.compile(r"[a-z]{4,12}").fullmatch, stripped))


_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

_ADJECTIVES = """ancient bitter blunt brave brisk calm clever crisp dusty eager faint fierce
    frosty gentle golden hollow humble idle jolly keen lively lucid mellow nimble patient polite
    quiet rapid rusty shallow silent sleepy slender smooth sturdy subtle tender tidy vivid
""".split()
_NOUNS = """anchor badger barrel beacon bridge canyon carpet castle cedar compass copper cradle
    dolphin engine falcon feather garden glacier hammer harbor island jacket kettle ladder lantern
    marble meadow mirror needle orchard paddle pebble pillow rocket saddle spider temple tunnel
    violin window""".split()

_FEW_NEEDLES, _HOPS = 4, 4
_CODES, _ZETA_2 = 1000, math.pi**2 / 6
_LONGEST_SENTENCE = 60  # words
_LINEAR_STEPS = 12

_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_NIAH_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n{context}\n"
    "What is the special magic number for {query} mentioned in the provided text? "
    "The special magic number for {query} mentioned in the provided text is"
)
_NIAH = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n{context}\n"
    "What are all the special magic numbers for {query} mentioned in the provided text? "
    "The special magic numbers for {query} mentioned in the provided text are"
)
_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assigned the value {value}, they are:"
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words.\n{context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text? Answer: According to the coded text above, the three most frequently appeared words are:"
)


def _niah_single(rng: Random, text: _Text, length: int) -> _Draft:
    return _needles(rng, text, length, noise=True)


def _niah_multikey(rng: Random, text: _Text, length: int) -> _Draft:
    return _needles(rng, text, length, keys=_FEW_NEEDLES)


def _niah_multivalue(rng: Random, text: _Text, length: int) -> _Draft:
    return _needles(rng, text, length, values=_FEW_NEEDLES)


def _niah_multiquery(rng: Random, text: _Text, length: int) -> _Draft:
    return _needles(rng, text, length, keys=_FEW_NEEDLES, queries=_FEW_NEEDLES)


def _needles(
    rng: Random,
    text: _Text,
    length: int,
    *,
    noise: bool = False,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> _Draft:
    """Makes a task of `keys` keys with `values` numbers of 7 digits each; the prompt asks for the
    numbers of `queries` keys."""
    pairs = [f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    names = _shuffled(rng, pairs)[:keys]
    numbers = _distinct(keys * values, lambda: _number(rng, 7))
    owners = [name for name in names for _ in range(values)]
    needles = [
        _NEEDLE.format(key=key, value=value) for key, value in zip(owners, numbers, strict=True)
    ]
    depths = [rng.random() for _ in needles]
    start = 0 if noise else int(rng.random() * len(text.words))
    query = ", and ".join(filter(None, (", ".join(names[: queries - 1]), names[queries - 1])))
    template = _NIAH_ONE if queries * values == 1 else _NIAH

    def prompt(size: int) -> str:
        units = _cycled(_NOISE if noise else text.words, start, size)
        context = ("\n" if noise else " ").join(_hidden(units, needles, depths))
        return template.format(context=context, query=query)

    answers = numbers[: queries * values]
    return _Draft(prompt, tuple(answers), 128, ", ".join(answers), largest=length)


def _variable_tracking(rng: Random, text: _Text, length: int) -> _Draft:
    """Makes a task with one chain of assignments in noise, after a small example of the task."""
    example_answers, example_prompt = _chain(rng, letters=3)
    answers, prompt = _chain(rng, letters=5)
    example = f"{example_prompt(2 * len(_NOISE))} {' '.join(example_answers)}\n\n"
    return _Draft(
        lambda size: example + prompt(size), tuple(answers), 30, " ".join(answers), largest=length
    )


def _chain(rng: Random, letters: int) -> tuple[list[str], Callable[[int], str]]:
    """Returns the names of the variables, and a function that makes the prompt of a size."""
    avoid = _TRACKING + " ".join(_NOISE)
    names = _distinct(_HOPS + 1, lambda: _code(rng, string.ascii_uppercase, letters), avoid)
    value, depths = _number(rng, 5), sorted(rng.random() for _ in names)
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]

    def prompt(size: int) -> str:
        context = "\n".join(_hidden(_cycled(_NOISE, 0, size), chain, depths))
        return _TRACKING.format(context=context, value=value, count=len(names))

    return names, prompt


def _common_words(rng: Random, text: _Text, length: int) -> _Draft:
    """Makes a list in which ten words of the text occur 30 times each and others 3 times each, or 6
    times and once below 4096 tokens. The example before the list has other words."""
    pool = _shuffled(rng, [word for word in text.vocabulary if word not in _COMMON.lower()])
    short = length < 4096
    example_size, example_repeats = (20, (3, 1)) if short else (40, (10, 3))
    repeats = (6, 1) if short else (30, 3)
    example_words, pool = pool[:example_size], pool[example_size:]
    answers = _unlike(pool, 10)
    others = [word for word in pool if not any(answer in word for answer in answers)]
    order = f"{rng.random()}"

    def listed(common: Sequence[str], rare: Sequence[str], repeats: tuple[int, int]) -> str:
        words = [*common] * repeats[0] + [*rare] * repeats[1]
        return _COMMON.format(context=_numbered(_shuffled(Random(order), words)))

    common, rare = example_words[:10], example_words[10:]
    example = listed(common, rare, example_repeats) + f" {_numbered(common)}\n"
    return _Draft(
        lambda size: example + listed(answers, others[:size], repeats),
        tuple(answers),
        120,
        _numbered(answers),
        largest=len(others),
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _frequent_words(rng: Random, text: _Text, length: int) -> _Draft:
    """Makes a text of coded words, of which the k-th occurs in proportion to 1 / k**2. The first is
    a row of dots, and the next three are the answers."""
    letters = string.ascii_lowercase
    codes = _distinct(_CODES, lambda: _code(rng, letters, 6), _FREQUENT)
    ranked, order = ["...", *codes], f"{rng.random()}"

    def prompt(size: int) -> str:
        counts = (int(size / rank**2 / _ZETA_2) for rank in range(1, len(ranked) + 1))
        words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        return _FREQUENT.format(context=" ".join(_shuffled(Random(order), words)))

    # From size 74 on, the fourth rank is more frequent than the fifth, so the answers are unique.
    return _Draft(
        prompt, tuple(codes[:3]), 50, ", ".join(codes[:3]), largest=2 * length, smallest=74
    )


def _unlike(words: Sequence[str], count: int) -> list[str]:
    """Returns the first `count` words of which none contains another."""
    chosen: list[str] = []
    for word in words:
        if len(chosen) < count and not any(word in other or other in word for other in chosen):
            chosen.append(word)
    return chosen


def _cycled(units: Sequence[str], start: int, size: int) -> list[str]:
    return [units[(start + place) % len(units)] for place in range(size)]


def _hidden(units: list[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Inserts the needles between sentences, each at its depth in [0, 1), and returns the units."""
    places = [_sentence_end(units, int(depth * (len(units) + 1))) for depth in depths]
    # Inserting from the end keeps the remaining places valid, and the order of needles that share
    # a place.
    for index in sorted(range(len(needles)), key=lambda i: (places[i], i), reverse=True):
        units.insert(places[index], needles[index])
    return units


def _sentence_end(units: Sequence[str], place: int) -> int:
    """Returns the first sentence end at or after a place, or the place itself if none is near."""
    for end in range(place, min(place + _LONGEST_SENTENCE, len(units)) + 1):
        if end == 0 or units[end - 1].rstrip("\"')]*_\u201d\u2019").endswith((".", "!", "?")):
            return end
    return place


TASKS: dict[str, Callable[[Random, _Text, int], _Draft]] = {
    "niah_single": _niah_single,
    "niah_multikey": _niah_multikey,
    "niah_multivalue": _niah_multivalue,
    "niah_multiquery": _niah_multiquery,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
