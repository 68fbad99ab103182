"""The policy on a fake model: slots hold the tokens they stand for, and every row checks all that it would read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from hf_twilight.engine.plan import ScheduledRequest, StepPlan
from hf_twilight.engine.scheduler import AGEING_STEPS, Scheduler
from twilight_cache import Layout, PagePool, PrefixTree, TreePage

LAYOUT = Layout(page_size=4, num_sinks=2, window=6)
CONTEXT = 60


@dataclass
class FakeModel:
    """Plain slots hold, column by column, the whole prefix of the token there; packed slots copies of them."""

    scheduler: Scheduler
    layout: Layout = LAYOUT
    plain: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    packed: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def run(self, plan: StepPlan) -> None:
        for segment in plan.segments:
            for at in range(segment.start, segment.end):
                page, column = self._place(segment.request, at)
                assert page.plain is not None
                self.plain[page.plain, column] = tuple(segment.request.tokens[: at + 1])
        for source, target, count in plan.copies:
            for column in range(count):
                self.plain[target, column] = self.plain[source, column]
        for page, _ in plan.packs:
            assert page.plain is not None and page.packed is not None
            for column in range(self.layout.page_size):
                self.packed[page.packed, column] = self.plain[page.plain, column]
        for segment in plan.segments:
            for at in range(segment.start, segment.end):
                self._check_row(segment.request, at)

    def _check_row(self, request: ScheduledRequest, at: int) -> None:
        tree = self.scheduler.tree
        boundary = self.layout.num_sinks + tree.pages_before(at) * self.layout.page_size
        for earlier in range(at + 1):
            page, column = self._place(request, earlier)
            is_packed = self.layout.num_sinks <= earlier < boundary and tree.packed_pool is not None
            slot, store = (page.packed, self.packed) if is_packed else (page.plain, self.plain)
            assert slot is not None
            assert store[slot, column] == tuple(request.tokens[: earlier + 1]), (request.request_id, at, earlier)

    def _place(self, request: ScheduledRequest, at: int) -> tuple[TreePage, int]:
        sinks = self.layout.num_sinks
        index = 0 if at < sinks else (at - sinks) // self.layout.page_size + (sinks > 0)
        return request.pages[index], at - request.pages[index].start


def make_scheduler(*, is_raw: bool = False, pages: int = 24, layout: Layout = LAYOUT, **settings: int) -> Scheduler:
    settings = {"max_running": 4, "prefill_tokens": 16} | settings
    if is_raw:
        tree = PrefixTree(layout, PagePool(pages), None)
    else:
        tree = PrefixTree(layout, PagePool(settings["max_running"] * 6 + 8), PagePool(pages))
    return Scheduler(tree, max_cache_pages=pages, **settings)


def request(name: str, tokens: list[int], max_tokens: int = 4, priority: int = 0) -> ScheduledRequest:
    return ScheduledRequest(name, list(tokens), len(tokens), max_tokens, priority)


def next_token(tokens: list[int]) -> int:
    """The fake model's greedy answer: any function of the tokens."""
    return (sum(tokens) * 7 + len(tokens)) % 5


def step(scheduler: Scheduler, model: FakeModel) -> StepPlan:
    """Run one step and finish what is finished."""
    plan = scheduler.plan()
    model.run(plan)
    scheduler.commit(plan)
    for segment in plan.segments:
        if segment.is_last:
            segment.request.tokens.append(next_token(segment.request.tokens))
            if segment.request.generated >= segment.request.max_tokens:
                scheduler.finish(segment.request)
    return plan


def check(scheduler: Scheduler) -> None:
    """Every slot has one page or is free; users are the requests that run; nothing is held by nobody."""
    tree = scheduler.tree
    pages = list(tree.pages.values())
    for pool, slots in ((tree.plain_pool, [p.plain for p in pages]), (tree.packed_pool, [p.packed for p in pages])):
        taken = [slot for slot in slots if slot is not None]
        if pool is None:
            assert not taken
            continue
        assert len(taken) == len(set(taken)) == pool.num_used
        assert pool.max_pages is not None and pool.num_used <= pool.max_pages
    for page in pages:
        holders = [r for r in scheduler.running if page in r.pages]
        assert page.users == len(holders)
        sinks = int(tree.layout.num_sinks > 0)
        readers = [r for r in holders if (i := r.pages.index(page)) < sinks or i - sinks >= r.first_plain]
        assert page.plain_users == len(readers)
        assert page.parent is tree.root or (page.parent is not None and page.parent.serial in tree.pages)
        assert page.plain is not None or page.packed is not None
        if page.is_full and page.is_listed:
            assert page.parent is not None and page.parent.children[tuple(page.tokens)] is page


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_pages_are_conserved_and_hold_what_rows_read_over_random_operations(is_raw: bool, seed: int) -> None:
    draw = random.Random(seed)
    scheduler = make_scheduler(is_raw=is_raw, pages=24 if is_raw else 14)
    model = FakeModel(scheduler)
    alive: list[ScheduledRequest] = []
    preempted = evicted = 0
    prefixes = [[draw.randrange(5) for _ in range(draw.randrange(3, 30))] for _ in range(6)]
    for operation in range(5000):
        action = draw.random()
        if action < 0.35 and len(scheduler.waiting) < 8:
            prompt = draw.choice(prefixes)[: draw.randrange(1, 30)] + [
                draw.randrange(5) for _ in range(draw.randrange(1, 9))
            ]
            new = request(str(operation), prompt, draw.randrange(1, 20), draw.randrange(3))
            alive.append(new)
            scheduler.add(new)
        elif action < 0.45 and alive:
            scheduler.finish(draw.choice(alive))
        elif action < 0.48:
            plan = scheduler.plan()
            if plan.segments:
                scheduler.rollback(plan)
        else:
            step(scheduler, model)
        alive = [r for r in alive if r in scheduler.running or r in scheduler.waiting]
        check(scheduler)
        preempted, evicted = scheduler.counters.preemptions, scheduler.tree.evictions
    assert evicted > 50 and scheduler.counters.cached_tokens > 1000
    assert preempted > 0
    for left in alive:
        scheduler.finish(left)
    scheduler.tree.clear()
    check(scheduler)
    assert not scheduler.tree.pages and scheduler.tree.plain_pool.num_used == 0


def test_plans_are_replayed_exactly() -> None:
    def trace() -> list[object]:
        draw, scheduler = random.Random(3), make_scheduler(pages=20)
        model, seen = FakeModel(scheduler), []
        for number in range(300):
            if number % 3 == 0:
                scheduler.add(request(str(number), [draw.randrange(3) for _ in range(draw.randrange(4, 24))], 6))
            plan = step(scheduler, model)
            seen.append([(s.request.request_id, s.start, s.end) for s in plan.segments] + list(plan.copies))
        return seen

    assert trace() == trace()


@pytest.mark.parametrize("is_raw", [False, True])
def test_requests_that_arrive_together_share_in_the_same_step(is_raw: bool) -> None:
    scheduler = make_scheduler(is_raw=is_raw, pages=80, max_running=16, prefill_tokens=4096)
    model, shared = FakeModel(scheduler), [1, 2, 3, 4] * 8
    for index in range(16):
        scheduler.add(request(str(index), [*shared, index % 4, index // 4, index], 2))
    plan = step(scheduler, model)
    check(scheduler)
    assert len(plan.segments) == 16
    # besides the common part, the first of four that agree in one more token computes it for the others
    assert sum(segment.end - segment.start for segment in plan.segments) == 32 + 4 + 16 * 2
    assert scheduler.counters.cached_tokens >= 15 * 32


def test_a_request_waits_for_one_that_is_reading_their_common_prompt() -> None:
    scheduler = make_scheduler(pages=80, prefill_tokens=16)
    model, shared = FakeModel(scheduler), [1, 2, 3, 4, 0] * 10
    for index in range(3):
        scheduler.add(request(str(index), [*shared, index], 1))
    while scheduler.waiting or scheduler.running:
        step(scheduler, model)
    assert scheduler.counters.prefill_rows == 51 + 2


def test_a_prefix_is_compared_by_tokens_not_by_hash() -> None:
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    scheduler.add(request("a", [-1, 1, 1, 1, 1, 1, 0], 1))  # hash(-1) == hash(-2)
    step(scheduler, model)
    assert hash((-1, 1)) == hash((-2, 1))
    assert scheduler.tree.match([-2, 1, 1, 1, 1, 1, 0], 6).tokens == 0
    assert scheduler.tree.match([-1, 1, 1, 1, 1, 1, 0], 6).tokens == 6


def test_a_finished_turn_is_continued_without_recomputing() -> None:
    scheduler = make_scheduler(pages=40)
    model, history = FakeModel(scheduler), [1, 2, 3]
    for turn in range(6):
        before = scheduler.counters.prefill_rows
        one = request(str(turn), [*history, turn, 4, 3], 5)
        scheduler.add(one)
        while scheduler.running or scheduler.waiting:
            step(scheduler, model)
        # the last token of an answer was never fed, so it is computed with the new ones
        assert scheduler.counters.prefill_rows - before <= 3 + (1 if turn else 3)
        history = one.tokens


def test_a_low_priority_request_does_not_starve() -> None:
    scheduler = make_scheduler(max_running=1, pages=40)
    model = FakeModel(scheduler)
    scheduler.add(request("first", [1, 2, 3], 4, priority=2))
    scheduler.add(poor := request("poor", [3, 2, 1, 0], 1, priority=0))
    for number in range(20 * AGEING_STEPS):
        if number % 4 == 0:
            scheduler.add(request(str(number), [number % 5, 4, 4, 4], 4, priority=2))
        step(scheduler, model)
        if poor.generated:
            break
    # two classes are climbed in twice AGEING_STEPS, then arrival decides
    assert poor.generated == 1 and number <= 2 * AGEING_STEPS + 8


def test_the_youngest_gives_way_and_ends_up_with_the_same_tokens() -> None:
    alone = {}
    for name in ("a", "b", "c"):
        scheduler = make_scheduler(pages=100)
        scheduler.add(one := request(name, [ord(name) % 5, 1, 2] * 4, 30))
        model = FakeModel(scheduler)
        while scheduler.running or scheduler.waiting:
            step(scheduler, model)
        alone[name] = one.tokens
    scheduler = make_scheduler(pages=14)
    scheduler.expected_output = 1.0  # far too hopeful: all are let in
    model, requests = FakeModel(scheduler), [request(name, [ord(name) % 5, 1, 2] * 4, 30) for name in alone]
    for one in requests:
        scheduler.add(one)
    while scheduler.running or scheduler.waiting:
        step(scheduler, model)
        check(scheduler)
    assert scheduler.counters.preemptions > 0
    assert requests[0].preemptions == 0 and requests[2].preemptions > 0
    assert {one.request_id: one.tokens for one in requests} == alone


def test_admission_waits_for_the_pages_that_are_expected() -> None:
    scheduler = make_scheduler(pages=14)
    model = FakeModel(scheduler)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, [ord(name) % 5, 1, 2] * 4, 30))
    step(scheduler, model)
    assert len(scheduler.running) == 1  # 42 tokens take 8 pages: no two fit
    while scheduler.running or scheduler.waiting:
        step(scheduler, model)
    assert scheduler.counters.preemptions == 0


def test_a_failed_step_leaves_nothing_that_was_never_computed() -> None:
    scheduler = make_scheduler(pages=40)
    model = FakeModel(scheduler)
    scheduler.add(request("old", [1, 2, 3, 4, 0, 1, 2], 1))
    step(scheduler, model)
    tokens = [1, 2, 3, 4, 0, 1, 2, 3, 3, 3]
    scheduler.add(request("a", tokens, 2))
    scheduler.add(request("b", [*tokens, 4], 2))
    failed = scheduler.plan()
    assert len(failed.segments) == 2
    scheduler.rollback(failed)
    check(scheduler)
    assert scheduler.tree.match(tokens, 9).tokens == 7
    first = scheduler.plan()
    assert [s.request.request_id for s in first.segments] == ["a"]  # alone, to find out whose fault it was
    model.run(first)
    scheduler.commit(first)
    assert [s.request.request_id for s in scheduler.plan().segments] == ["b"]


def test_more_sinks_than_a_page_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="num_sinks must be at most page_size=4"):
        PrefixTree(Layout(4, 5, 8), PagePool(8), PagePool(8))
