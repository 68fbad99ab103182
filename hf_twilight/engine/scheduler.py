"""Who computes what in the next step: a pure function of what happened before, without tensors or clocks.

A step takes one token of every request that decodes and up to ``prefill_tokens`` tokens of prompts. Pages are
entered into the prefix tree when they are planned, not when they are computed: a request that is admitted in the
same step already shares them, because a forward writes the keys and values of a layer before any of its tokens
attends. Whoever is about to share what another is still reading waits for it.

Memory: a request is admitted if its prompt and the tokens it is expected to generate fit beside those of the
requests that run. Where that expectation fails, cached pages go first, then the youngest request gives its pages
back; what is dropped of them before it goes on is computed again, with the same result.
"""

from __future__ import annotations

from twilight_cache import Match, PrefixTree, TreePage

from .plan import Counters, ScheduledRequest, Segment, StepPlan

AGEING_STEPS = 32  # a request that waits this long counts as one priority higher
_SHARE_WORTH = 16  # tokens of another's prompt that are worth waiting a step for


class Scheduler:
    """Plan steps over a prefix tree.

    Args:
        tree: the pages.
        max_running: requests in a step at most.
        prefill_tokens: prompt tokens in a step at most.
        max_cache_pages: packed pages (plain ones of a raw codec) that requests and cache may hold.
    """

    def __init__(self, tree: PrefixTree, *, max_running: int, prefill_tokens: int, max_cache_pages: int) -> None:
        self.tree, self.max_running, self.prefill_tokens = tree, max_running, prefill_tokens
        self.max_cache_pages = max_cache_pages
        self.running: list[ScheduledRequest] = []
        self.waiting: list[ScheduledRequest] = []
        self.counters = Counters()
        self.expected_output: float | None = None  # tokens, running mean over finished requests
        self.alone: list[ScheduledRequest] = []  # of a step that failed: run one at a time until it is known whose
        self._order = 0

    def add(self, request: ScheduledRequest) -> None:
        """Queue a request."""
        self._order += 1
        request.order, request.waiting_since = self._order, self.tree.step
        self.waiting.append(request)

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens holds at most, as counted against ``max_cache_pages``."""
        layout = self.tree.layout
        if self.tree.packed_pool is not None:
            return self.tree.pages_before(tokens)
        return -(-max(0, tokens - layout.num_sinks) // layout.page_size) + (layout.num_sinks > 0)

    def plan(self) -> StepPlan:
        """Decide the next step and enter its pages into the tree; ``commit`` or ``rollback`` must follow."""
        self.tree.step += 1
        plan = StepPlan(self.tree.step)
        budget = self.prefill_tokens
        only = self._suspect()
        for request in sorted(self.running, key=self._rank):
            if request not in self.running or (only is not None and request is not only):
                continue
            count = request.pending if request.pending == 1 else min(request.pending, budget)
            if count and self._make_room(request, count, plan):
                self._take(request, count, plan)
                budget -= count if request.pending > 1 else 0
        for request in sorted(self.waiting, key=self._rank):
            if len(self.running) >= self.max_running or budget <= 0 or plan.preempted:
                break
            if only is not None and request is not only:
                continue
            match = self.tree.match(request.tokens, len(request.tokens) - 1)
            if only is None and self._should_wait(request, match, plan):
                continue
            count = min(len(request.tokens) - match.tokens, budget)
            if not self._admit(request, match, count, plan):
                break
            self._take(request, count, plan)
            budget -= count
        return plan

    def commit(self, plan: StepPlan) -> None:
        """Count a step in that has run."""
        counters = self.counters
        counters.steps += 1
        for segment in plan.segments:
            request = segment.request
            rows = segment.end - segment.start
            prompt_rows = max(0, min(segment.end, request.prompt_len) - segment.start)
            counters.prefill_rows += rows if rows > 1 else prompt_rows
            counters.decode_rows += 0 if rows > 1 else rows - prompt_rows
            if request.preemptions:
                counters.recomputed_rows += rows if rows > 1 else prompt_rows
            request.done = segment.end
            if request in self.alone:
                self.alone.remove(request)
            self._settle(request)
        for page in plan.sources:
            self.tree.drop_plain(page)
        held = self.tree.packed_pool or self.tree.plain_pool
        counters.peak_pages = max(counters.peak_pages, held.num_used)

    def rollback(self, plan: StepPlan) -> None:
        """Undo a step that failed: all wait again, and its requests are run one at a time first.

        The others give their pages back too, so that whoever runs alone finds room in any case.
        """
        for page in plan.sources:
            self.tree.drop_plain(page)
        for request in self.running:
            self._give_back(request)
        self.waiting += self.running
        self.running = []
        for page in plan.fresh:
            if page.serial in self.tree.pages:
                self.tree.remove(page)
        for page, count in plan.extended:
            if page.serial in self.tree.pages:
                self.tree.truncate(page, count)
        for page, _ in plan.packs:
            if page.serial in self.tree.pages:
                self.tree.drop_packed(page)
        self.alone = [segment.request for segment in plan.segments]

    def finish(self, request: ScheduledRequest) -> None:
        """Take a request out, whatever its state; what it computed stays cached."""
        if request in self.running:
            self.running.remove(request)
            self._give_back(request)
            mean = request.generated if self.expected_output is None else self.expected_output
            self.expected_output = 0.9 * mean + 0.1 * request.generated
        elif request in self.waiting:
            self.waiting.remove(request)
        if request in self.alone:
            self.alone.remove(request)

    def _suspect(self) -> ScheduledRequest | None:
        return self.alone[0] if self.alone else None

    def _rank(self, request: ScheduledRequest) -> tuple[int, int]:
        """Sort key: priority raised by age, then arrival. A request that runs ages no more."""
        waited = 0 if request in self.running else self.tree.step - request.waiting_since
        return -(request.priority + waited // AGEING_STEPS), request.order

    def _should_wait(self, request: ScheduledRequest, match: Match, plan: StepPlan) -> bool:
        """Whether a request that is reading its prompt will soon have stored more of this one's."""
        ends = {segment.request: segment.end for segment in plan.segments}
        for other in self.running:
            if not other.is_prefilling:
                continue
            end = ends.get(other, other.done)
            least = max(end + 1, match.tokens + _SHARE_WORTH)
            is_long = least <= min(len(request.tokens) - 1, other.prompt_len)
            if is_long and request.tokens[:least] == other.tokens[:least]:
                return True
        return False

    def _admit(self, request: ScheduledRequest, match: Match, count: int, plan: StepPlan) -> bool:
        """Move a request from waiting to running if what it is expected to need, and ``count`` tokens now, fit."""
        tree, sinks = self.tree, int(self.tree.layout.num_sinks > 0)
        unpacked = (i for i, page in enumerate(match.pages[sinks:]) if page.packed is None)
        first = min(tree.pages_before(match.tokens), next(unpacked, len(match.pages)))
        tree.acquire(match.pages, first)
        if match.source is not None:
            tree.hold_plain(match.source)
        request.pages, request.first_plain = list(match.pages), first
        request.done = match.tokens - match.count
        free = tree.free_slots()[tree.packed_pool is not None]
        needed = self._expected_pages(request) + sum(self._expected_pages(other) for other in self.running)
        if (needed > free and self.running) or not tree.can_take(*self._needs(request, match.count + count)):
            if match.source is not None:
                tree.drop_plain(match.source)
            self._give_back(request)
            return False
        self.waiting.remove(request)
        self.running.append(request)
        plan.admitted.append(request)
        if request.cached_tokens < 0:
            request.cached_tokens = match.tokens
            self.counters.cached_tokens += match.tokens
        request.done = match.tokens
        if match.source is not None:
            self._copy(request, match.source, match.count, plan)
        return True

    def _copy(self, request: ScheduledRequest, source: TreePage, count: int, plan: StepPlan) -> None:
        """Begin a request's page with the first tokens of another's."""
        page = self._begin_page(request, plan, self.tree.take_plain(1)[0])
        page.tokens.extend(source.tokens[:count])
        assert source.plain is not None and page.plain is not None
        plan.copies.append((source.plain, page.plain, count))
        plan.sources.append(source)

    def _expected_pages(self, request: ScheduledRequest) -> int:
        """Pages that a request will need beyond those it holds."""
        left = request.max_tokens - request.generated
        if self.expected_output is not None:
            left = min(left, max(1, round(self.expected_output) - request.generated))
        packed = self.tree.packed_pool is not None
        have = sum(page.packed is not None for page in request.pages) if packed else len(request.pages)
        return max(0, self.pages_for(len(request.tokens) + left) - have)

    def _needs(self, request: ScheduledRequest, count: int) -> tuple[int, int]:
        """Plain and packed slots that the next ``count`` tokens take."""
        end, layout = request.done + count, self.tree.layout
        stored = request.pages[-1].end if request.pages else 0
        plain = 0
        if end > stored:
            plain = int(stored == 0 and layout.num_sinks > 0)
            plain += -(-max(0, end - max(stored, layout.num_sinks)) // layout.page_size)
        if self.tree.packed_pool is None:
            return plain, 0
        last = self.tree.pages_before(end - 1)
        sinks = int(layout.num_sinks > 0)
        known = request.pages[sinks : sinks + last]
        return plain, last - len(known) + sum(page.packed is None for page in known)

    def _make_room(self, request: ScheduledRequest, count: int, plan: StepPlan) -> bool:
        """Make slots free for a request's next tokens; False if it had to give up its own."""
        scheduled = {segment.request for segment in plan.segments}
        while not self.tree.can_take(*self._needs(request, count)):
            victims = [other for other in self.running if other not in scheduled]
            victim = max(victims, key=lambda other: (-other.priority, other.order))
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, request: ScheduledRequest, plan: StepPlan) -> None:
        self._give_back(request)
        self.running.remove(request)
        request.waiting_since = self.tree.step
        request.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.append(request)
        plan.preempted.append(request)

    def _take(self, request: ScheduledRequest, count: int, plan: StepPlan) -> None:
        """Allot the slots of a request's next tokens."""
        start, end = request.done, request.done + count
        plain, packed = self._needs(request, count)
        slots = self.tree.take_plain(plain)[::-1]
        at = start
        while at < end:
            page = request.pages[-1] if request.pages else None
            if page is None or page.is_full:
                page = self._begin_page(request, plan, slots.pop())
            elif at == start:
                plan.extended.append((page, len(page.tokens)))
            taken = min(page.end, end) - at
            page.tokens.extend(request.tokens[at : at + taken])
            at += taken
            self._end_page(request)
        if self.tree.packed_pool is not None:
            targets = self.tree.take_packed(packed)[::-1]
            sinks = int(self.tree.layout.num_sinks > 0)
            first = -1
            for page in request.pages[sinks : sinks + self.tree.pages_before(end - 1)]:
                if page.packed is None:
                    assert page.plain is not None
                    page.packed = targets.pop()
                    plan.packs.append((page, page.packed if first < 0 else first))
                first = page.packed if first < 0 else first
        plan.segments.append(Segment(request, start, end, end == len(request.tokens)))

    def _begin_page(self, request: ScheduledRequest, plan: StepPlan, slot: int) -> TreePage:
        page = self.tree.begin_page(request.pages[-1] if request.pages else self.tree.root, slot)
        request.pages.append(page)
        plan.fresh.append(page)
        return page

    def _end_page(self, request: ScheduledRequest) -> None:
        """Let others find the last page if it is full now."""
        if request.pages[-1].is_full:
            self.tree.list_full(request.pages[-1])

    def _settle(self, request: ScheduledRequest) -> None:
        """After a step: join pages that others stored too, and let go of plain forms that left the window."""
        pages = request.pages
        for index, page in enumerate(pages):
            if page.is_full and not page.is_listed:
                pages[index] = self.tree.merge(page, pages[index + 1] if index + 1 < len(pages) else None)
        if self.tree.packed_pool is None:
            return
        sinks = int(self.tree.layout.num_sinks > 0)
        before = self.tree.pages_before(request.done - 1)
        for page in pages[sinks + request.first_plain : sinks + before]:
            self.tree.drop_plain(page)
        request.first_plain = max(request.first_plain, before)

    def _give_back(self, request: ScheduledRequest) -> None:
        """Let go of all pages; they stay cached as long as there is room."""
        sinks = int(self.tree.layout.num_sinks > 0)
        for index, page in reversed(list(enumerate(request.pages))):
            if index < sinks or index - sinks >= request.first_plain:
                self.tree.drop_plain(page)
            self.tree.release(page)
        request.pages, request.done, request.first_plain = [], 0, 0
