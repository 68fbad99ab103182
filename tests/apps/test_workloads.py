"""Workloads share what they say they share, and nothing else."""

from __future__ import annotations

import pytest

from twilight_apps.workloads import NAMES, Sizes, build

TEXT = [(7 * index) % 5003 for index in range(60000)]
SMALL = Sizes(requests=4, shared=20, own=5, answer=3, chats=2, turns=3, turn_tokens=6, context=30)


@pytest.mark.parametrize("name", NAMES)
def test_build_is_deterministic_and_sized(name: str) -> None:
    workload = build(name, TEXT, SMALL)
    assert workload == build(name, TEXT, SMALL)
    assert workload.num_requests == {"w1": 4, "w2": 8, "w3": 6, "w10": 4}[name]
    assert workload.longest == {"w1": 28, "w2": 28, "w3": 36, "w10": 33}[name]


def test_published_sizes_have_the_published_rows() -> None:
    w1 = build("w1", TEXT, Sizes())
    assert (w1.num_prompt_tokens, w1.least_rows) == (8704, 1024)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_shared_by_accident(name: str) -> None:
    workload = build(name, TEXT, SMALL)
    prompts = [client.turns[0].added for client in workload.clients]
    shared = [sum(1 for _ in _common(a, b)) for i, a in enumerate(prompts) for b in prompts[:i]]
    assert set(shared) == {workload.shared_tokens}


def test_arrivals_of_w2_are_spread() -> None:
    times = [client.start_s for client in build("w2", TEXT, Sizes(rate=2.0)).clients]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert 8 < times[-1] < 32  # 31 gaps of half a second on average


@pytest.mark.parametrize(("change", "message"), [({"requests": 0}, "requests must be above 0"), ({"rate": -1}, "rate")])
def test_sizes_are_checked(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sizes(**change)  # type: ignore[arg-type]


def test_text_must_be_long_enough() -> None:
    with pytest.raises(ValueError, match="give a longer --text"):
        build("w10", TEXT[:100], SMALL)
    with pytest.raises(ValueError, match="workload must be one of"):
        build("w9", TEXT, SMALL)


def _common(a: list[int], b: list[int]) -> list[int]:
    found = []
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        found.append(left)
    return found
