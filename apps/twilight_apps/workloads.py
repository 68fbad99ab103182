"""Requests to serve: who asks when, what is shared, how long answers are.

W1 a burst with one system prompt, W2 the same spread in time, W3 conversations, W10 a batch of long contexts. Prompts
are cut from real text; an answer always has its full length, so that every engine does the same work.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

NAMES = ("w1", "w2", "w3", "w10")
# of all random arrivals
_SEED = 0


@dataclass(frozen=True)
class Turn:
    """One request of a client: the tokens that it adds to its conversation, and how many it wants back."""

    added: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Client:
    """One client: it starts at ``start_s`` seconds and sends a turn when the one before is answered."""

    start_s: float
    turns: list[Turn]


@dataclass(frozen=True)
class Workload:
    """What is asked of an engine.

    Attributes:
        name: one of ``NAMES``.
        title: for people.
        clients: in order of their start.
        shared_tokens: that all prompts begin with.
    """

    name: str
    title: str
    clients: list[Client]
    shared_tokens: int = 0
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return sum(len(client.turns) for client in self.clients)

    @property
    def num_new_tokens(self) -> int:
        return sum(turn.new_tokens for client in self.clients for turn in client.turns)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests, answers that later prompts repeat included."""
        return sum(prompt for client in self.clients for prompt, _ in _lengths(client))

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max(prompt + new for client in self.clients for prompt, new in _lengths(client))

    @property
    def least_rows(self) -> int:
        """Prompt rows that must be computed if nothing is ever computed twice."""
        own = sum(len(turn.added) for client in self.clients for turn in client.turns)
        return own - (len(self.clients) - 1) * self.shared_tokens


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are; the defaults are the ones that results are published for.

    Args:
        requests: of W1 and W10; W2 has twice as many.
        shared: tokens of the system prompt of W1 and W2.
        own: tokens that each request adds to it.
        answer: tokens of their answers.
        rate: requests a second of W2.
        chats, turns, turn_tokens: of W3; question and answer have ``turn_tokens`` each.
        context: tokens of W10's prompts.
    """

    requests: int = 16
    shared: int = 512
    own: int = 32
    answer: int = 32
    rate: float = 1.0
    chats: int = 4
    turns: int = 6
    turn_tokens: int = 48
    context: int = 1000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")


def build(name: str, text: list[int], sizes: Sizes) -> Workload:
    """Cut a workload from a text's tokens.

    Raises:
        ValueError: an unknown name, or too short a text.
    """
    if name not in NAMES:
        raise ValueError(f"workload must be one of {', '.join(NAMES)}, got {name!r}")
    pieces = _Pieces(text)
    if name == "w1":
        shared = pieces.take(sizes.shared)
        clients = [_single(0.0, shared + pieces.take(sizes.own), sizes.answer) for _ in range(sizes.requests)]
        title = f"W1: {_requests(sizes.requests)} at once, {sizes.shared} shared + {sizes.own} own tokens"
        return Workload(name, f"{title}, {sizes.answer} new", clients, sizes.shared)
    if name == "w2":
        shared, count = pieces.take(sizes.shared), 2 * sizes.requests
        clients = [_single(at, shared + pieces.take(sizes.own), sizes.answer) for at in _arrivals(count, sizes.rate)]
        title = f"W2: {_requests(count)}, {sizes.rate:g} a second at random, {sizes.shared} shared + {sizes.own} own"
        return Workload(name, f"{title}, {sizes.answer} new", clients, sizes.shared)
    if name == "w3":
        one = sizes.turn_tokens
        clients = [Client(0.0, [Turn(pieces.take(one), one) for _ in range(sizes.turns)]) for _ in range(sizes.chats)]
        return Workload(name, f"W3: {sizes.chats} chats, {sizes.turns} turns of {one} + {one} tokens", clients)
    clients = [_single(0.0, pieces.take(sizes.context), sizes.answer) for _ in range(sizes.requests)]
    title = f"W10: {_requests(sizes.requests)} of {sizes.context:,} tokens, {sizes.answer} new"
    return Workload(name, title, clients)


class _Pieces:
    """Pieces of a text that begin differently, so that nothing is shared by accident."""

    def __init__(self, text: list[int]) -> None:
        self._text = text
        self._place = 0
        self._firsts: set[int] = set()

    def take(self, size: int) -> list[int]:
        while self._place < len(self._text) and self._text[self._place] in self._firsts:
            self._place += 1
        piece = self._text[self._place : self._place + size]
        if len(piece) < size:
            raise ValueError(f"the text must have more than {self._place + size} tokens; give a longer --text")
        self._firsts.add(piece[0])
        self._place += size
        return piece


def _requests(count: int) -> str:
    return f"{count} request{'s' if count > 1 else ''}"


def _single(start_s: float, prompt: list[int], new_tokens: int) -> Client:
    return Client(start_s, [Turn(prompt, new_tokens)])


def _arrivals(count: int, rate: float) -> list[float]:
    """Poisson arrivals, the first at 0."""
    dice, at, times = random.Random(_SEED), 0.0, []
    for _ in range(count):
        times.append(at)
        at += dice.expovariate(rate)
    return times


def _lengths(client: Client) -> Iterator[tuple[int, int]]:
    """Prompt and answer tokens of each turn."""
    length = 0
    for turn in client.turns:
        yield length + len(turn.added), turn.new_tokens
        length += len(turn.added) + turn.new_tokens
