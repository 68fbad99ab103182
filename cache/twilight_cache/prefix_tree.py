"""A token-exact prefix tree over pages: what is stored once for all requests that begin alike.

A sequence is cut at fixed positions: its sinks, then pages of ``page_size`` tokens. A page of the tree is known by
its own tokens and all tokens before it; the tokens themselves are compared, never only a hash. It is held in up to
two forms, each a slot of a pool: *plain* (the model's dtype, what windows read) and *packed* (what lies before the
window reads). A raw codec needs only the first, which then serves both.

    page of a request                plain slot                packed slot
    from its window on               held by the request       none, or there already
    before its window                cached, may be dropped    held by the request
    of no request                    cached, may be dropped    cached, may be dropped

Whoever is dropped is the one unused for longest; among equals the one furthest from the root. No tensors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .pool import PagePool
from .sequences import Layout
from .tree_page import Match, TreePage


class PrefixTree:
    """Pages of all requests, their slots, and which of them may be dropped.

    Args:
        layout: where tokens go.
        plain_pool: slots of plain pages.
        packed_pool: slots of packed pages; None if plain ones serve for both (raw codecs).
    Raises:
        ValueError: more sinks than a page holds.
    """

    def __init__(self, layout: Layout, plain_pool: PagePool, packed_pool: PagePool | None) -> None:
        if layout.num_sinks > layout.page_size:
            raise ValueError(
                f"num_sinks must be at most page_size={layout.page_size} to be shared, got {layout.num_sinks}"
            )
        self.layout, self.plain_pool, self.packed_pool = layout, plain_pool, packed_pool
        self.root = TreePage(None, 0, 0, 0, is_listed=True)
        self.pages: dict[int, TreePage] = {}  # by serial
        self.step = 0
        self.evictions = 0
        self._serial = 0

    def pages_before(self, position: int) -> int:
        """Packed pages that the token at ``position`` attends to."""
        layout = self.layout
        return max(0, (position - layout.num_sinks - layout.window) // layout.page_size)

    def match(self, tokens: Sequence[int], limit: int) -> Match:
        """Find the longest stored prefix of ``tokens[:limit]`` from which computing can go on exactly.

        Going on at position r needs the plain form of the window before r, so a prefix whose plain pages were
        dropped is followed only as far as they are there.
        """
        chain: list[TreePage] = []
        page, at = self.root, 0
        while True:
            child = page.children.get(tuple(tokens[at : at + self._size_at(at)])) if at < limit else None
            if child is None or child.end > limit:
                break
            chain.append(child)
            page, at = child, child.end
        source, count = self._longest(page, tokens, at, limit)
        if count and self._can_go_on(chain, at + count):
            return Match(chain, source, count, at + count)
        while chain and not self._can_go_on(chain, chain[-1].end):
            chain.pop()
        return Match(chain, None, 0, chain[-1].end if chain else 0)

    def acquire(self, pages: Iterable[TreePage], first_plain: int) -> None:
        """Hold pages for a request that reads the plain form of page ``first_plain`` of them and later."""
        for page in pages:
            page.users += 1
            page.last_use = self.step
            if self._index(page) < 0 or self._index(page) >= first_plain:
                page.plain_users += 1

    def hold_plain(self, page: TreePage) -> None:
        """Keep the plain form of a page until ``drop_plain``."""
        page.plain_users += 1

    def drop_plain(self, page: TreePage) -> None:
        """Undo one hold on the plain form; it stays cached while there is room."""
        assert page.plain_users > 0, "nobody held it"
        page.plain_users -= 1
        page.last_use = self.step

    def release(self, page: TreePage) -> None:
        """Undo one use; the page stays cached while there is room, unless nobody can find it."""
        assert page.users > 0, "nobody used it"
        page.users -= 1
        page.last_use = self.step
        if not page.users and not page.is_listed:
            self.remove(page)

    def begin_page(self, parent: TreePage, slot: int) -> TreePage:
        """Add an empty page after ``parent`` for one request, its tokens to be written to ``slot``."""
        self._serial += 1
        start = parent.end
        page = TreePage(parent, self._serial, start, self._size_at(start), plain=slot, users=1, plain_users=1)
        page.last_use = self.step
        page.is_listed = True
        parent.open.append(page)
        self.pages[page.serial] = page
        return page

    def list_full(self, page: TreePage) -> None:
        """Let others find a page by its tokens, now that it is full; a second one of the same tokens is not listed."""
        assert page.parent is not None and page.is_full
        if page in page.parent.open:
            page.parent.open.remove(page)
        key = tuple(page.tokens)
        page.is_listed = key not in page.parent.children
        if page.is_listed:
            page.parent.children[key] = page

    def truncate(self, page: TreePage, count: int) -> None:
        """Take tokens back that were never computed, all but the first ``count``; no page may follow."""
        assert page.parent is not None and not page.children and not page.open
        if page.is_full and page.is_listed:
            del page.parent.children[tuple(page.tokens)]
            page.parent.open.append(page)
        del page.tokens[count:]

    def merge(self, page: TreePage, follower: TreePage | None) -> TreePage:
        """Replace a full page by the listed one of the same tokens, which takes over what it lacks.

        Args:
            page: held by one request, not listed.
            follower: the request's next page, which moves along.
        Returns:
            The page that the request uses from now on.
        """
        assert page.parent is not None and page.users == 1
        twin = page.parent.children.get(tuple(page.tokens))
        if twin is None:
            self.list_full(page)
            return page
        if twin.plain is None:
            twin.plain, page.plain = page.plain, None
        if twin.packed is None:
            twin.packed, page.packed = page.packed, None
        twin.users, twin.plain_users = twin.users + 1, twin.plain_users + page.plain_users
        twin.last_use = self.step
        if follower is not None:
            follower.parent = twin
            page.children.clear()
            page.open.clear()
            follower.is_listed = not follower.is_full
            if not follower.is_full:
                twin.open.append(follower)
        page.users = page.plain_users = 0
        self.remove(page)
        return twin

    def can_take(self, plain: int, packed: int) -> bool:
        """Whether that many slots are free or can be made free."""
        if plain <= _free(self.plain_pool) and (self.packed_pool is None or packed <= _free(self.packed_pool)):
            return True  # what nearly every step finds, without a look at each page
        free_plain, free_packed = self.free_slots()
        return plain <= free_plain and (self.packed_pool is None or packed <= free_packed)

    def free_slots(self) -> tuple[int, int]:
        """Plain and packed slots that are free or hold what may be dropped."""
        plain = _free(self.plain_pool) + sum(self._is_plain_idle(page) for page in self.pages.values())
        if self.packed_pool is None:
            return plain, 0
        packed = sum(self._is_packed_idle(page) for page in self.pages.values())
        return plain, _free(self.packed_pool) + packed

    def take_plain(self, count: int) -> list[int]:
        """Allocate plain slots, dropping what was unused for longest."""
        missing = count - _free(self.plain_pool)
        if missing > 0:
            for page in self._oldest(page for page in self.pages.values() if self._is_plain_idle(page)):
                if missing <= 0:
                    break
                if page.serial in self.pages and page.plain is not None:
                    missing -= self._drop_plain_form(page)
        return self.plain_pool.allocate(count)

    def take_packed(self, count: int) -> list[int]:
        """Allocate packed slots, dropping what was unused for longest."""
        assert self.packed_pool is not None
        missing = count - _free(self.packed_pool)
        if missing > 0:
            for page in self._oldest(page for page in self.pages.values() if self._is_packed_idle(page)):
                if missing <= 0:
                    break
                if page.serial in self.pages:
                    before = self.packed_pool.num_used
                    self.remove(page)
                    self.evictions += 1
                    missing -= before - self.packed_pool.num_used
        return self.packed_pool.allocate(count)

    def drop_packed(self, page: TreePage) -> None:
        """Give back a packed slot that was never filled."""
        assert self.packed_pool is not None and page.packed is not None and page.plain is not None
        self.packed_pool.release([page.packed])
        page.packed = None

    def remove(self, page: TreePage) -> None:
        """Forget a page and all after it; nobody may use them."""
        for child in [*page.children.values(), *page.open]:
            self.remove(child)
        assert not page.users and not page.plain_users, "page is in use"
        if page.plain is not None:
            self.plain_pool.release([page.plain])
        if page.packed is not None and self.packed_pool is not None:
            self.packed_pool.release([page.packed])
        del self.pages[page.serial]
        assert page.parent is not None
        if page in page.parent.open:
            page.parent.open.remove(page)
        key = tuple(page.tokens)
        if page.parent.children.get(key) is page:
            del page.parent.children[key]

    def clear(self) -> None:
        """Drop everything that nobody uses."""
        for page in [*self.root.children.values(), *self.root.open]:
            if not page.users:
                self.remove(page)

    def _size_at(self, position: int) -> int:
        sinks = self.layout.num_sinks
        return sinks if sinks and position < sinks else self.layout.page_size

    def _index(self, page: TreePage) -> int:
        """Number among packed pages; -1 for the sinks."""
        return -1 if page.start < self.layout.num_sinks else (page.start - self.layout.num_sinks) // page.size

    def _longest(self, parent: TreePage, tokens: Sequence[int], at: int, limit: int) -> tuple[TreePage | None, int]:
        """The page after ``parent`` that agrees longest with ``tokens[at:limit]``, and in how many tokens."""
        best, most = None, 0
        wanted = list(tokens[at : min(limit, at + self._size_at(at))])
        for page in [*parent.children.values(), *parent.open] if wanted else []:
            if page.plain is None or page.tokens[:most] != wanted[:most]:
                continue
            count = _common(page.tokens, wanted)
            if count > most:
                best, most = page, count
        return best, most

    def _can_go_on(self, chain: list[TreePage], position: int) -> bool:
        """Whether everything that the token at ``position`` attends to is stored in the form that it reads."""
        first = self.pages_before(position)
        for page in chain:
            index = self._index(page)
            if page.plain is None and (page.packed is None or index < 0 or index >= first):
                return False
        return True

    def _is_plain_idle(self, page: TreePage) -> bool:
        held = page.users if self.packed_pool is None else page.plain_users
        return page.plain is not None and not held and not page.plain_users

    def _is_packed_idle(self, page: TreePage) -> bool:
        return page.packed is not None and not page.users and not page.plain_users

    def _drop_plain_form(self, page: TreePage) -> int:
        """Free the plain slot, and with it the page if there is nothing else to it; return slots freed."""
        self.evictions += 1
        before = self.plain_pool.num_used
        if page.packed is None:
            self.remove(page)
        else:
            assert page.plain is not None
            self.plain_pool.release([page.plain])
            page.plain = None
        return before - self.plain_pool.num_used

    def _oldest(self, pages: Iterable[TreePage]) -> list[TreePage]:
        return sorted(pages, key=lambda page: (page.last_use, -page.start, -page.serial))


def _free(pool: PagePool) -> int:
    assert pool.max_pages is not None
    return pool.max_pages - pool.num_used


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the start that agree."""
    count = min(len(a), len(b))
    if a[:count] == b[:count]:
        return count
    return next(i for i in range(count) if a[i] != b[i])
