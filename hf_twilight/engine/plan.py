"""What the scheduler knows of a request, and what it decides for a step. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from twilight_cache import TreePage


@dataclass(eq=False)
class ScheduledRequest:
    """What the scheduler knows of a request.

    Attributes:
        request_id: its name.
        tokens: prompt and generated tokens.
        prompt_len: tokens of the prompt.
        max_tokens: tokens to generate at most.
        priority: higher goes first.
        order: number of arrival.
        done: tokens whose keys and values are stored.
        pages: its sequence in the tree.
        first_plain: of ``pages``, the first whose plain form it holds, sinks aside.
        cached_tokens: tokens of the prompt that were found stored when it first started.
        waiting_since: step from which it waits.
        preemptions: times it had to give its pages back.
    """

    request_id: str
    tokens: list[int]
    prompt_len: int
    max_tokens: int
    priority: int = 0
    order: int = 0
    done: int = 0
    pages: list[TreePage] = field(default_factory=list)
    first_plain: int = 0
    cached_tokens: int = -1
    waiting_since: int = 0
    preemptions: int = 0

    @property
    def pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.tokens) - self.done

    @property
    def is_prefilling(self) -> bool:
        return self.done < self.prompt_len

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len


@dataclass(frozen=True)
class Segment:
    """Tokens ``[start, end)`` of one request in a step; ``is_last`` if the next token can be sampled after it."""

    request: ScheduledRequest
    start: int
    end: int
    is_last: bool


@dataclass
class StepPlan:
    """One step.

    Attributes:
        number: of the step.
        segments: whose tokens it takes.
        copies: ``(source, target, count)``: plain slots, and how many tokens at the start are copied.
        packs: pages to pack, from their plain slot to their packed one, once all is written and copied; each with the
            packed slot of the first page of its sequence.
        fresh: pages that hold nothing valid before the step has run.
        extended: pages that get more tokens, and how many they held before.
        sources: pages to be copied from, held until the step has run.
        preempted: requests that lost their pages.
        admitted: requests that started.
    """

    number: int
    segments: list[Segment] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    packs: list[tuple[TreePage, int]] = field(default_factory=list)
    fresh: list[TreePage] = field(default_factory=list)
    extended: list[tuple[TreePage, int]] = field(default_factory=list)
    sources: list[TreePage] = field(default_factory=list)
    preempted: list[ScheduledRequest] = field(default_factory=list)
    admitted: list[ScheduledRequest] = field(default_factory=list)


@dataclass
class Counters:
    """Counts since the start; see ``EngineStats``."""

    steps: int = 0
    prefill_rows: int = 0
    decode_rows: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    recomputed_rows: int = 0
    peak_pages: int = 0
