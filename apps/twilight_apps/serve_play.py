"""Play a workload to an engine: send what is due, follow conversations, count forwards, note times."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .workloads import Client, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Answer:
    """Tokens of an answer and when each came, in seconds of ``time.perf_counter``."""

    token_ids: list[int]
    times: list[float]
    cached_tokens: int | None = None


class Ticket(Protocol):
    """A request that is being served."""

    def wait(self) -> Answer:
        """Return the answer when it is complete."""
        ...


class Serving(Protocol):
    """An engine that is running."""

    def submit(self, prompt: list[int], new_tokens: int) -> Ticket:
        """Start a request and return at once."""
        ...

    def counters(self) -> dict[str, float]:
        """What only this engine can tell."""
        ...


class Entrant(Protocol):
    """One way of serving."""

    name: str
    model: PreTrainedModel

    def open(self, workload: Workload) -> AbstractContextManager[Serving]:
        """Start an empty engine that is large enough for a workload."""
        ...


@dataclass
class Pending:
    """A ticket that another thread fills in."""

    is_finished: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    error: Exception | None = None

    def wait(self) -> Answer:
        self.is_finished.wait()
        if self.answer is None:
            raise self.error or RuntimeError("continuous batching gave no answer")
        return self.answer


@dataclass
class Served:
    """One request: when it was sent, and its answer; ``prompt`` is what was sent."""

    sent_s: float
    prompt: list[int]
    answer: Answer


@dataclass
class Play:
    """One run of a workload.

    Attributes:
        served: requests, by client and turn.
        calls, rows: forwards of the model, and tokens in them.
        start_s, end_s: of the whole.
        counters: what only this engine tells.
    """

    served: list[list[Served]]
    calls: int
    rows: int
    start_s: float
    end_s: float
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def requests(self) -> list[Served]:
        return [one for client in self.served for one in client]


def play(entrant: Entrant, workload: Workload, limit_s: float) -> Play:
    """Send a workload's requests when they are due, and wait for all answers.

    Raises:
        TimeoutError: not done after ``limit_s`` seconds.
    """
    served: list[list[Served]] = [[] for _ in workload.clients]
    failures: list[Exception] = []
    followers = []
    with entrant.open(workload) as serving, _counted(entrant.model) as counts:
        start = time.perf_counter()
        for index, client in enumerate(workload.clients):
            time.sleep(max(0.0, start + client.start_s - time.perf_counter()))
            # the first turn is sent from here, so that a burst is one
            sent, prompt = time.perf_counter(), list(client.turns[0].added)
            first = (sent, prompt, serving.submit(prompt, client.turns[0].new_tokens))
            follower = threading.Thread(
                target=_follow, args=(serving, client, first, served[index], failures), daemon=True
            )
            follower.start()
            followers.append(follower)
        for follower in followers:
            follower.join(max(0.0, start + limit_s - time.perf_counter()))
        if any(follower.is_alive() for follower in followers):
            raise TimeoutError(f"not done after {limit_s:g} s; raise --limit-s")
        end = time.perf_counter()
        if failures:
            raise failures[0]
        return Play(served, counts["calls"], counts["rows"], start, end, serving.counters())


def _follow(
    serving: Serving,
    client: Client,
    first: tuple[float, list[int], Any],
    served: list[Served],
    failures: list[Exception],
) -> None:
    """Wait for a client's answers, sending each next turn with the conversation so far."""
    try:
        sent, prompt, ticket = first
        for index in range(len(client.turns)):
            answer = ticket.wait()
            served.append(Served(sent, prompt, answer))
            if index + 1 < len(client.turns):
                turn = client.turns[index + 1]
                sent, prompt = time.perf_counter(), prompt + answer.token_ids + turn.added
                ticket = serving.submit(prompt, turn.new_tokens)
    except Exception as error:  # told to the main thread
        failures.append(error)


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[dict[str, int]]:
    """Count the model's forwards, and the tokens in them."""
    counts = {"calls": 0, "rows": 0}

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        counts["calls"] += 1
        counts["rows"] += 0 if ids is None else ids.numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()
