"""How much work, and how much time, do many requests take: ours, Transformers' continuous batching, ``generate``?

Regime: a workload of ``workloads.py``, in process, every entrant with an empty cache and the same weights and dtype,
in turns. Counters come first: rows and calls are counted at the model's own forward, alike for all. Rows do not depend
on the clock; calls do where requests arrive in time (W2). A run that takes longer than its limit is stopped and its
entrant left out of the rest; a round that no longer fits the time for all is not begun.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import documents, models, tables
from .serve_entrants import ContinuousBatching, Sequential, Twilight
from .serve_play import Entrant, Play, play
from .workloads import Client, Sizes, Workload, build

if TYPE_CHECKING:
    from hf_twilight import TwilightConfig

logger = logging.getLogger(__name__)

OURS, UNSHARED, DEFAULT, TUNED, ONE_BY_ONE = "twilight", "twilight-unshared", "cb", "cb-tuned", "generate"
ENTRANTS = (OURS, UNSHARED, DEFAULT, TUNED, ONE_BY_ONE)
_OF_WORKLOAD = {
    "w1": (OURS, DEFAULT, TUNED, ONE_BY_ONE),
    "w2": (OURS, UNSHARED, TUNED),
    "w3": (OURS, DEFAULT, TUNED),
    "w10": (OURS, DEFAULT, TUNED),
}


@dataclass(frozen=True)
class Effort:
    """How often to play, and for how long at most.

    Args:
        rounds: runs of each entrant.
        limit_s: seconds that a run may take.
        total_s: seconds that all workloads may take together.
    """

    rounds: int = 1
    limit_s: float = 180.0
    total_s: float = 900.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")


def run(
    model_name: str,
    dtype: str,
    settings: TwilightConfig,
    workload_names: Sequence[str],
    entrant_names: Sequence[str],
    sizes: Sizes,
    effort: Effort,
    *,
    memory_share: float,
    text: Path | None,
) -> dict[str, Any]:
    """Play workloads and print a table for each.

    Args:
        entrant_names: of ``ENTRANTS``; none for those that a workload is about.
        memory_share: of the machine's memory, for the cache of continuous batching with default settings.
    Returns:
        What ``--json`` prints.
    Raises:
        ValueError: unknown names, numbers out of range, or a model that cannot hold a workload.
    """
    if not 0 < memory_share <= 1:
        raise ValueError(f"memory_share must be in (0, 1], got {memory_share}")
    if unknown := [name for name in entrant_names if name not in ENTRANTS]:
        raise ValueError(f"entrant must be one of {', '.join(ENTRANTS)}, got {unknown[0]!r}")
    tokenizer = models.load_tokenizer(model_name)
    ids = documents.token_ids(tokenizer, documents.document_text(text))
    workloads = [build(name, ids, sizes) for name in workload_names]
    ours, stock = models.load(model_name, dtype), models.load(model_name, dtype)
    limit = models.trained_context(stock)
    for workload in workloads:
        if limit is not None and workload.longest > limit:
            raise ValueError(f"{workload.name} needs {workload.longest} tokens of context, the model has {limit}")
    known: dict[str, Entrant] = {
        OURS: Twilight(OURS, ours, tokenizer, settings),
        UNSHARED: Twilight(UNSHARED, ours, tokenizer, settings, is_salted=True),
        DEFAULT: ContinuousBatching(DEFAULT, stock, False, memory_share),
        TUNED: ContinuousBatching(TUNED, stock, True, memory_share),
        ONE_BY_ONE: Sequential(ONE_BY_ONE, stock),
    }
    results: list[dict[str, Any]] = []
    clock = _Clock(effort, time.perf_counter() + effort.total_s)
    for workload in workloads:
        names = entrant_names or _OF_WORKLOAD[workload.name]
        results.append(_compare(workload, [known[name] for name in names], clock))
        _print(results[-1], str(stock.dtype).removeprefix("torch."))
    return {
        "model": model_name,
        "dtype": str(stock.dtype).removeprefix("torch."),
        "text": "file" if text is not None else "pydoc_data.topics",
        "settings": settings.to_dict(),
        "sizes": vars(sizes),
        "effort": vars(effort),
        "memory_share_of_cb": memory_share,
        "results": results,
    }


@dataclass
class _Clock:
    effort: Effort
    end_s: float

    @property
    def limit_s(self) -> float:
        """Seconds that the next run may take."""
        left = self.end_s - time.perf_counter()
        if left <= 0:
            raise TimeoutError(f"the {self.effort.total_s:g} s for all are over; raise --total-s")
        return min(self.effort.limit_s, left)

    def fits(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return time.perf_counter() + seconds < self.end_s


def _compare(workload: Workload, entrants: list[Entrant], clock: _Clock) -> dict[str, Any]:
    first = Workload(workload.name, "", [Client(0.0, workload.clients[0].turns[:1])])
    alone: dict[str, list[Play]] = {entrant.name: [] for entrant in entrants}
    plays: dict[str, list[Play]] = {entrant.name: [] for entrant in entrants}
    over: dict[str, str] = {}
    rounds, longest_s, title = clock.effort.rounds, 0.0, workload.name.upper()
    with tables.progress(title, (rounds + 1) * len(entrants)) as bar:

        def attempt(entrant: Entrant, what: str, played: Workload, into: dict[str, list[Play]]) -> None:
            bar.update(bar.task_ids[0], description=f"{title} {entrant.name}, {what}")
            if entrant.name not in over:
                try:
                    into[entrant.name].append(play(entrant, played, clock.limit_s))
                except (TimeoutError, MemoryError) as error:
                    over[entrant.name] = str(error)
                    logger.warning("%s is left out of %s: %s", entrant.name, workload.name, error)
            bar.advance(bar.task_ids[0])

        for entrant in entrants:  # a warm-up, and the answer to compare with
            attempt(entrant, "one request alone", first, alone)
        for index in range(rounds):
            if index and not clock.fits(longest_s):
                logger.warning("%s stops after %d of %d rounds: --total-s is near", title, index, rounds)
                break
            start = time.perf_counter()
            for entrant in entrants[index % len(entrants) :] + entrants[: index % len(entrants)]:
                attempt(entrant, f"round {index + 1} of {rounds}", workload, plays)
            longest_s = max(longest_s, time.perf_counter() - start)
    rows = [_row(workload, name, runs) for name, runs in plays.items() if runs and name not in over]
    for row in rows:
        # float32 products of other numbers of rows are rounded otherwise, so that a near tie may fall otherwise
        wanted = alone[row["name"]][0].served[0][0].answer.token_ids
        answers = [one.served[0][0].answer.token_ids for one in plays[row["name"]]]
        row["first_answer_is_as_alone"] = all(ids == wanted for ids in answers)
        row["times_the_first"] = row["seconds"]["median"] / rows[0]["seconds"]["median"]
        row["first_token_times_the_first"] = row["first_token_s"]["median"] / rows[0]["first_token_s"]["median"]
        row["decode_share_of_the_first"] = row["decode_tokens_per_s"] / (rows[0]["decode_tokens_per_s"] or 1.0)
    return {
        "workload": workload.name,
        "title": workload.title,
        "requests": workload.num_requests,
        "prompt_tokens": workload.num_prompt_tokens,
        "new_tokens": workload.num_new_tokens,
        "least_prefill_rows": workload.least_rows,
        "entrants": rows,
        "left_out": over,
    }


def _row(workload: Workload, name: str, plays: list[Play]) -> dict[str, Any]:
    """Summarize an entrant's runs; counters are those of the first."""
    first = plays[0]
    decode_rows = workload.num_new_tokens - workload.num_requests
    prefill = first.rows - decode_rows
    waits = [one.answer.times[0] - one.sent_s for play in plays for one in play.requests]
    seconds = [play.end_s - play.start_s for play in plays]
    again = prefill - workload.least_rows
    possible = workload.num_prompt_tokens - workload.least_rows
    later_turns = workload.num_requests - len(workload.clients)
    return {
        "name": name,
        "prefill_rows": prefill,
        "forward_calls": first.calls,
        "recomputed_rows_per_later_turn": again / later_turns if later_turns else None,
        "shared_of_possible": (workload.num_prompt_tokens - prefill) / possible if possible else None,
        "counters": first.counters,
        "seconds": _spread(seconds),
        "requests_per_s": workload.num_requests / statistics.median(seconds),
        "first_token_s": _spread(waits),
        "decode_tokens_per_s": statistics.median(_decode_speed(play) for play in plays),
        "runs": len(plays),
    }


def _decode_speed(play: Play) -> float:
    """Tokens a second while every request decodes: after the last first token; 0 if nothing came then."""
    start = max(client[-1].answer.times[0] for client in play.served)
    end = max(one.answer.times[-1] for one in play.requests)
    count = sum(start < at <= end for one in play.requests for at in one.answer.times)
    return count / (end - start) if end > start else 0.0


def _spread(values: Sequence[float]) -> dict[str, float]:
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    low, middle, high = points.tolist()
    return {"median": middle, "p20": low, "p80": high}


def _print(result: dict[str, Any], dtype: str) -> None:
    rows = []
    is_chat = result["entrants"] and result["entrants"][0]["recomputed_rows_per_later_turn"] is not None
    for row in result["entrants"]:
        again = [f"{row['recomputed_rows_per_later_turn']:.1f}"] if is_chat else []
        peak = row["counters"].get("peak_pages")
        rows.append([
            row["name"],
            f"{row['prefill_rows']:,}",
            *again,
            f"{row['forward_calls']:,}",
            "-" if peak is None else f"{peak:,.0f}",
            f"{row['seconds']['median']:.2f}",
            f"{row['times_the_first']:.2f}",
            f"{row['requests_per_s']:.2f}",
            f"{row['first_token_s']['median']:.2f}",
            f"{row['decode_tokens_per_s']:.1f}",
            "yes" if row["first_answer_is_as_alone"] else "no",
        ])  # fmt: skip
    columns = ["entrant", "prefill rows", *(["again a turn"] if is_chat else []), "forwards", "peak pages", "s"]
    columns += [f"x {result['entrants'][0]['name']}" if rows else "x", "requests/s", "first token s", "decode tok/s"]
    columns.append("as alone")
    tables.print_table(f"{result['title']}; {dtype}, {torch.get_num_threads()} threads", columns, rows)
    for name, reason in result["left_out"].items():
        tables.say(f"{name} is left out: {reason}")
