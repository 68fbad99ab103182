from __future__ import annotations

import random

import pytest

from twilight_cache import PagePool


def test_allocate_hands_out_the_lowest_free_pages() -> None:
    pool = PagePool()
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([1])
    assert pool.allocate(2) == [1, 3]
    assert [pool.owners(page) for page in range(4)] == [1, 1, 1, 1]


def test_release_frees_a_shared_page_with_its_last_owner() -> None:
    pool = PagePool()
    (page,) = pool.allocate(1)
    pool.retain([page, page])
    pool.release([page, page])
    assert (pool.owners(page), pool.num_used) == (1, 1)
    pool.release([page])
    assert (pool.owners(page), pool.num_used) == (0, 0)
    assert pool.allocate(1) == [page]


def test_allocate_beyond_max_pages_takes_nothing() -> None:
    pool = PagePool(max_pages=5)
    held = pool.allocate(3)
    with pytest.raises(MemoryError, match="needs 6 pages, has 5; raise max_pages"):
        pool.allocate(3)
    assert pool.num_used == 3
    held += pool.allocate(2)
    assert sorted(held) == list(range(5))
    with pytest.raises(MemoryError):
        pool.allocate(1)
    pool.release(held)
    assert (pool.num_used, pool.capacity) == (0, 5)


def test_capacity_grows_by_little_and_never_shrinks() -> None:
    """Slack is memory that was to be saved; growth by a constant would copy pages quadratically often."""
    pool = PagePool()
    growths, last = 0, 0
    for count in range(1, 4001):
        pool.allocate(1)
        growths += pool.capacity > last
        assert pool.capacity >= max(last, count)
        assert pool.capacity <= count * 65 // 64 + 1
        last = pool.capacity
    assert growths < 400


@pytest.mark.parametrize("operation", ["retain", "release"])
def test_free_pages_have_no_owners_to_change(operation: str) -> None:
    pool = PagePool()
    pool.release(pool.allocate(2))
    with pytest.raises(AssertionError, match="page 1 is free"):
        getattr(pool, operation)([1])


@pytest.mark.parametrize("max_pages", [None, 40])
def test_pool_keeps_its_books_over_random_operations(max_pages: int | None) -> None:
    rng = random.Random(0)
    pool = PagePool(max_pages)
    owners: dict[int, int] = {}
    for _ in range(5000):
        action = rng.random()
        if action < 0.4:
            count = rng.randrange(5)
            if max_pages is not None and len(owners) + count > max_pages:
                with pytest.raises(MemoryError):
                    pool.allocate(count)
                continue
            pages = pool.allocate(count)
            assert len(set(pages)) == count
            assert not owners.keys() & set(pages), "a page was handed out twice"
            owners.update(dict.fromkeys(pages, 1))
        elif owners:
            pages = rng.choices(list(owners), k=rng.randrange(1, 4))
            if action < 0.6:
                pool.retain(pages)
                for page in pages:
                    owners[page] += 1
            else:
                pages = list(set(pages))
                pool.release(pages)
                for page in pages:
                    owners[page] -= 1
                    if not owners[page]:
                        del owners[page]
        assert pool.num_used == len(owners)
        assert all(pool.owners(page) == owners.get(page, 0) for page in range(pool.capacity))
    pool.release([page for page, count in owners.items() for _ in range(count)])
    assert pool.num_used == 0
    assert sorted(pool.allocate(pool.capacity)) == list(range(pool.capacity)), "a page was lost"
