"""Long-context tasks made offline: needles of four kinds, variable tracking, common words, frequent words.

Source: RULER (arXiv 2404.06654, sections 3 and 4.1), written anew. Deviations: sizes are scaled down (four needles,
chains of three variables, five common words) and words are short, so that a model of 135 million parameters solves some
of each; haystacks are any prose.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .documents import hide_in_sentence_break

_NEEDLES = 4
_CHAIN = 3
_CHAINS = 2
_COMMON = 5
_FREQUENT, _ZIPF = 3, 2.0
_FEWEST_WORDS = 60
_LISTED_CHARACTERS, _CODED_CHARACTERS = 11, 7  # of a word with what stands around it, about

_WORDS = """
amber anchor apple arrow autumn badge banner barrel basket beacon bell birch blanket bottle branch bridge brook
bucket button cabin candle canyon carpet castle cedar cherry circle cliff cloud clover coat coin comet compass
copper coral corner cotton cradle crane creek crown crystal curtain daisy dawn desert diamond dolphin door drum
eagle ember engine falcon feather fence field flame flute forest fountain fox garden garnet gate glass glove grape
gravel hammer harbor harvest hazel hill honey horse island ivory jacket jewel kettle key kite ladder lake lamp
lantern leaf lemon lily lion maple marble meadow mirror moon morning mountain needle nest north oak ocean olive
onion orange orchard otter paddle palace paper pearl pebble pepper piano pigeon pillow pine planet plum pocket pond
poppy prairie quartz rabbit raven ribbon ridge river robin rocket rope rose saddle salmon sand sail shadow shell
silver sparrow spring star stone storm summer sunset swallow table thunder tiger timber tower trail tulip tunnel
valley velvet village violet wagon walnut water wheat willow window winter wolf yarn
"""
_KEYS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Sample:
    """One question about a text.

    Attributes:
        document: the text.
        question: what is asked.
        opening: words that the answer is made to begin with.
        expected: strings that a right answer holds.
        max_new_tokens: that a right answer takes at most.
    """

    document: str
    question: str
    opening: str
    expected: tuple[str, ...]
    max_new_tokens: int


# builds a sample from random numbers, about so many characters of room and prose of that length
Task = Callable[[random.Random, int, str], Sample]


def single_needle(numbers: random.Random, room: int, prose: str) -> Sample:
    """One key with one value."""
    return _needles(numbers, prose, [(_keys(numbers, 1)[0], [_number(numbers)])], asked=1)


def multi_key(numbers: random.Random, room: int, prose: str) -> Sample:
    """Several keys; one is asked for, the others distract."""
    return _needles(numbers, prose, [(key, [_number(numbers)]) for key in _keys(numbers, _NEEDLES)], asked=1)


def multi_value(numbers: random.Random, room: int, prose: str) -> Sample:
    """One key with several values; all are asked for."""
    return _needles(numbers, prose, [(_keys(numbers, 1)[0], [_number(numbers) for _ in range(_NEEDLES)])], asked=1)


def multi_query(numbers: random.Random, room: int, prose: str) -> Sample:
    """Several keys; two of them are asked for."""
    return _needles(numbers, prose, [(key, [_number(numbers)]) for key in _keys(numbers, _NEEDLES)], asked=2)


def variable_tracking(numbers: random.Random, room: int, prose: str) -> Sample:
    """Chains of assignments; all variables of one chain are asked for."""
    names = [f"X{number}" for number in numbers.sample(range(10, 100), _CHAIN * _CHAINS)]
    facts = []
    for chain in range(_CHAINS):
        own = names[chain * _CHAIN : (chain + 1) * _CHAIN]
        value = _number(numbers)
        if not chain:
            first, expected = value, tuple(own)
        sources = [value, *(f"VAR {name}" for name in own[:-1])]
        facts.append([f"VAR {name} = {source}." for name, source in zip(own, sources, strict=True)])
    # a chain's assignments keep their order; chains are dealt out between each other
    depths = [sorted(numbers.random() for _ in range(_CHAIN)) for _ in range(_CHAINS)]
    placed = [(d, fact) for own, lines in zip(depths, facts, strict=True) for d, fact in zip(own, lines, strict=True)]
    return Sample(
        _hide_all(prose, placed),
        f"Find all variables that are assigned the value {first} in the text above.",
        f"The variables that are assigned the value {first} are:",
        expected,
        30,
    )


def common_words(numbers: random.Random, room: int, prose: str) -> Sample:
    """A numbered list of words, half of it taken by a few; these are asked for."""
    words = numbers.sample(_KEYS, len(_KEYS))
    common, rare = words[:_COMMON], words[_COMMON:]
    total = max(_FEWEST_WORDS, room // _LISTED_CHARACTERS)
    times = total // (2 * _COMMON)
    listed = common * times + [rare[index % len(rare)] for index in range(total - _COMMON * times)]
    numbers.shuffle(listed)
    document = "Memorize the words that appear most often. "
    document += " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return Sample(
        document,
        f"What are the {_COMMON} most common words in the above list?",
        f"The {_COMMON} most common words in the list are:",
        tuple(common),
        30,
    )


def frequent_words(numbers: random.Random, room: int, prose: str) -> Sample:
    """Made-up words whose frequency falls as a power of their rank; the three most frequent are asked for."""
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    words: list[str] = []
    while len(words) < 40:
        word = "".join(numbers.sample(syllables, 3))
        if word not in words:
            words.append(word)
    total = max(_FEWEST_WORDS, room // _CODED_CHARACTERS)
    weights = [1.0 / rank**_ZIPF for rank in range(1, len(words) + 1)]
    # counts follow the law instead of being drawn from it: no ties among the words asked for
    counts = [max(1, round(total * weight / sum(weights))) for weight in weights]
    coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    numbers.shuffle(coded)
    return Sample(
        "Read the following coded text and track the frequency of each coded word. " + " ".join(coded),
        "What are the three most frequently appearing words in the above coded text?",
        "The three most frequently appearing words are:",
        tuple(words[:_FREQUENT]),
        30,
    )


TASKS: dict[str, Task] = {
    "single needle": single_needle,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable tracking": variable_tracking,
    "common words": common_words,
    "frequent words": frequent_words,
}


def _needles(numbers: random.Random, prose: str, facts: list[tuple[str, list[str]]], asked: int) -> Sample:
    """Hide each value of each key at a random depth, and ask for the first keys."""
    placed = [
        (numbers.random(), f"One of the special magic numbers for {key} is: {value}.")
        for key, values in facts
        for value in values
    ]
    names = " and ".join(key for key, _ in facts[:asked])
    expected = tuple(value for _, values in facts[:asked] for value in values)
    is_one = len(expected) == 1
    subject = f"special magic number{'' if is_one else 's'} for {names} mentioned in the provided text"
    return Sample(
        _hide_all(prose, placed),
        f"What {'is the' if is_one else 'are all the'} {subject}?",
        f"The {subject} {'is' if is_one else 'are'}",
        expected,
        12 * len(expected),
    )


def _hide_all(prose: str, placed: list[tuple[float, str]]) -> str:
    for depth, fact in sorted(placed, reverse=True):  # from the end on, so that earlier places stay where they are
        prose = hide_in_sentence_break(prose, fact, depth)
    return prose


def _keys(numbers: random.Random, count: int) -> list[str]:
    return numbers.sample(_KEYS, count)


def _number(numbers: random.Random) -> str:
    return str(numbers.randrange(1_000_000, 10_000_000))
