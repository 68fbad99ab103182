"""``bench serve`` on a tiny model: what it counts is what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SMALL = ["--requests", 3, "--shared", 40, "--answer", 4, "--context", 50, "--rate", 50, "--memory-share", 0.1]


def test_bench_serve_counts_rows_alike_for_all(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli("bench", "serve", "--model", tiny_model, *SMALL, "--preset", "exact", "--json")
    assert result.exit_code == 0, result.stderr
    (w1,) = result.json["results"]
    rows = {row["name"]: row for row in w1["entrants"]}
    assert set(rows) == {"twilight", "cb", "cb-tuned", "generate"}
    assert w1["least_prefill_rows"] == 40 + 3 * 32
    assert rows["twilight"]["prefill_rows"] == w1["least_prefill_rows"]  # the shared part once
    assert rows["generate"]["prefill_rows"] == w1["prompt_tokens"] == 3 * 72
    assert rows["generate"]["forward_calls"] == 3 * 4
    assert all(row["seconds"]["median"] > 0 and row["first_token_s"]["median"] > 0 for row in rows.values())
    assert all(row["first_answer_is_as_alone"] for row in rows.values())
    assert "prefill rows" in result.stdout


def test_bench_serve_chats_compute_no_history_again(cli: Callable[..., Any], tiny_model: str) -> None:
    names = ["--entrant", "twilight", "--entrant", "cb-tuned"]
    result = cli("bench", "serve", "--model", tiny_model, *SMALL, "--workload", "w3", *names, "--json")
    assert result.exit_code == 0, result.stderr
    ours, _ = result.json["results"][0]["entrants"]
    assert ours["recomputed_rows_per_later_turn"] <= 64


def test_bench_serve_unshared_shares_nothing(cli: Callable[..., Any], tiny_model: str) -> None:
    names = ["--entrant", "twilight", "--entrant", "twilight-unshared"]
    result = cli("bench", "serve", "--model", tiny_model, *SMALL, "--workload", "w2", *names, "--json")
    shared, unshared = result.json["results"][0]["entrants"]
    assert shared["prefill_rows"] == 40 + 6 * 32
    assert unshared["prefill_rows"] == 6 * 72
    assert (shared["shared_of_possible"], unshared["shared_of_possible"]) == (1.0, 0.0)


def test_bench_serve_begins_no_round_that_does_not_fit(cli: Callable[..., Any], tiny_model: str) -> None:
    names = ["--entrant", "twilight", "--rounds", 1000, "--total-s", 3]
    result = cli("bench", "serve", "--model", tiny_model, *SMALL, *names, "--json")
    assert result.exit_code == 0, result.stderr
    (ours,) = result.json["results"][0]["entrants"]
    assert 1 <= ours["runs"] < 1000
    assert "of 1000 rounds: --total-s is near" in result.stderr


def test_bench_serve_leaves_out_what_is_too_slow(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli("bench", "serve", "--model", tiny_model, *SMALL, "--limit-s", 0.0001, "--entrant", "generate")
    assert result.exit_code == 0, result.stderr
    assert "generate is left out: not done after 0.0001 s" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "w9"], "workload must be one of w1, w2, w3, w10"),
        (["--entrant", "vllm"], "entrant must be one of"),
        (["--rounds", "0"], "rounds must be above 0"),
        (["--total-s", "0"], "total_s must be above 0"),
        (["--memory-share", "2"], r"memory_share must be in (0, 1], got 2"),
        (["--requests", "0"], "requests must be above 0"),
        (["--workload", "w10", "--context", "5000"], "tokens of context"),
    ],
)
def test_bench_serve_refuses(cli: Callable[..., Any], tiny_model: str, arguments: list[str], message: str) -> None:
    result = cli("bench", "serve", "--model", tiny_model, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
