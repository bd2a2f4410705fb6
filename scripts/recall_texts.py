"""Generate training documents in which a model must find again what they said before.

    python scripts/assets.py recall

Speeches and web pages seldom repeat themselves, so the work of heads for copying and lookup hardly
shows in the loss on them. These documents consist of such work: passages that occur again, and
lists of records of which some are asked for later. They are drawn from a seed and from the web
pages that recipes train on, and share their wording with no benchmark. The run `no-recall` of
scripts/ablations/sinks.yaml trains without them.
"""

import random
from collections.abc import Iterator, Sequence

_FIRST = (
    "Ada Bruno Carla Dmitri Elena Farid Greta Hiro Ines Jonas Keiko Luca Mina Nadia Oskar Petra "
    "Quentin Rosa Stefan Tomas Ursula Viktor Wanda Ximena Yusuf Zora"
).split()
_LAST = (
    "Abbott Brandt Castro Duval Eriksen Fontaine Gruber Hansen Ivanov Jansen Keller Lindqvist "
    "Moreau Novak Okafor Petersen Quispe Rossi Santos Tanaka Ulrich Varga Weber Xu Yilmaz Zhou"
).split()
_THINGS = "parcel invoice ticket locker badge shipment claim permit account reservation".split()
_COLORS = (
    "amber black blue brown copper gray green ivory olive orange purple red silver white".split()
)
_RECORDS = (
    "{thing} of {name}: {value}",
    "{name}, {thing} {value}.",
    "The {thing} that belongs to {name} carries the mark {value}.",
)
_QUESTIONS = (
    "Which mark does the {thing} of {name} carry? {value}",
    "{name} asked after the {thing}, and the clerk read out {value}.",
    "{thing} of {name}: {value}",
)


def recall_documents(texts: Sequence[str], seed: int) -> Iterator[str]:
    """Yields documents without end, half with passages that occur again and half with records.

    They have about 350 to 2,800 words, as many of each size as of twice the size, so that what is
    looked for is near in some and thousands of tokens away in others.

    Args:
        texts: the texts that passages are taken from.
        seed: the seed of all draws.
    """
    draw = random.Random(seed)
    passages = [split for text in texts if len(split := text.split()) >= 60]
    while True:
        words = round(350 * 8 ** draw.random())
        yield (
            _repeated(draw, passages, words)
            if draw.random() < 0.5
            else _looked_up(draw, passages, words)
        )


def _passage(draw: random.Random, passages: Sequence[list[str]], words: int) -> str:
    text = draw.choice(passages)
    start = draw.randrange(max(1, len(text) - words))
    return " ".join(text[start : start + words])


def _repeated(draw: random.Random, passages: Sequence[list[str]], words: int) -> str:
    """Repeats passages from anywhere before, with other text between, until the document is long
    enough."""
    parts: list[str] = []
    heard: list[str] = []
    while sum(len(part.split()) for part in parts) < words:
        passage = _passage(draw, passages, draw.randint(40, 160))
        heard.append(passage)
        between = _passage(draw, passages, draw.randint(0, 120))
        parts += [passage, between, draw.choice(heard)]
    return "\n".join(parts)


def _looked_up(draw: random.Random, passages: Sequence[list[str]], words: int) -> str:
    """Lists records between pieces of text, and asks for some of them later by their name."""
    thing = draw.choice(_THINGS)
    names = draw.sample([f"{first} {last}" for first in _FIRST for last in _LAST], 12)
    record = draw.choice(_RECORDS)
    values = {name: _value(draw) for name in names}
    parts = []
    for name in names:
        parts.append(record.format(thing=thing, name=name, value=values[name]))
        parts.append(_passage(draw, passages, draw.randint(0, words // 12)))
    question = draw.choice(_QUESTIONS)
    for name in draw.sample(names, 8):
        parts.append(question.format(thing=thing, name=name, value=values[name]))
    return "\n".join(part for part in parts if part)


def _value(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return str(draw.randrange(10_000, 10_000_000))
    return "-".join([*draw.sample(_COLORS, 2), str(draw.randrange(10, 1000))])
