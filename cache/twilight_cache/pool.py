"""Page ids with reference counts: who owns which page, and nothing about what is in it."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hand out page ids; a page shared by several block tables is freed by its last owner.

    One id names the same slot in the tensors of every layer; layers size their tensors to ``capacity``.

    Args:
        max_pages: most pages that may be in use at a time; None means as many as memory holds.
    """

    def __init__(self, max_pages: int | None = None) -> None:
        self.max_pages = max_pages
        self.capacity = 0
        self._free: list[int] = []  # descending, so that pop() gives the lowest id
        self._owners: list[int] = []

    @property
    def num_used(self) -> int:
        """Pages that somebody owns."""
        return self.capacity - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages with one owner each.

        Raises:
            MemoryError: ``max_pages`` does not allow it; nothing is taken then.
        """
        if count > len(self._free):
            self._grow(self.num_used + count)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def reserve(self, count: int) -> None:
        """Grow until ``count`` pages are free, as far as ``max_pages`` lets it."""
        needed = self.num_used + count
        if self.max_pages is not None:
            needed = min(needed, self.max_pages)
        if needed > self.capacity:
            self._grow(needed)

    def retain(self, pages: Iterable[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free"
            self._owners[page] += 1

    def adopt(self, owners: list[int]) -> None:
        """Start with pages ``0 .. len(owners)`` held by so many owners each; the pool must be empty.

        Raises:
            MemoryError: ``max_pages`` does not allow it.
        """
        assert not self.num_used, "pages are in use"
        self._grow(len(owners))
        self._owners[: len(owners)] = owners
        self._free = [page for page in reversed(range(self.capacity)) if not self._owners[page]]

    def release(self, pages: Iterable[int]) -> None:
        """Remove an owner from each page; pages without owners are free again."""
        freed = []
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free already"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                freed.append(page)
        if freed:
            self._free = sorted([*self._free, *freed], reverse=True)

    def owners(self, page: int) -> int:
        """Return how many block tables hold ``page``."""
        return self._owners[page]

    def _grow(self, needed: int) -> None:
        if self.max_pages is not None and needed > self.max_pages:
            raise MemoryError(
                f"the page pool needs {needed} pages, has {self.max_pages}; raise max_pages, shorten the input, "
                "or drop a sequence"
            )
        # by a 64th: geometric, yet the slack stays out of the memory that was saved, and copying is 0.1 % of a step
        capacity = max(needed, self.capacity + self.capacity // 64)
        if self.max_pages is not None:
            capacity = min(capacity, self.max_pages)
        self._owners += [0] * (capacity - self.capacity)
        self._free = sorted([*self._free, *range(self.capacity, capacity)], reverse=True)
        self.capacity = capacity
