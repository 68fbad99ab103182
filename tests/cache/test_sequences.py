from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from twilight_cache import DRAFT_SLACK, Layout, PagePool, SequenceBatch

LAYOUT = Layout(page_size=16, num_sinks=4, window=24)


def _batch(layout: Layout = LAYOUT) -> SequenceBatch:
    return SequenceBatch(layout, PagePool())


def _check(batch: SequenceBatch) -> None:
    """Nothing lost, nothing owned twice, tables and lengths agree."""
    size = batch.layout.page_size
    references: Counter[int] = Counter()
    for row, count in enumerate(batch.pages.tolist()):
        owned = batch.table[row, :count].tolist()
        assert all(page >= 0 for page in owned)
        assert len(set(owned)) == count, "a row holds a page twice"
        assert (batch.table[row, count:] == -1).all()
        references.update(owned)
    assert batch.pool.num_used == len(references)
    assert all(batch.pool.owners(page) == references[page] for page in range(batch.pool.capacity))
    assert (batch.plain >= 0).all()
    assert (batch.plain + batch.pages * size == batch.lengths).all()
    assert (batch.lengths == np.maximum(0, batch.tokens - batch.pad)).all()


def _state(batch: SequenceBatch) -> tuple[object, ...]:
    return batch.tokens, batch.pad.tolist(), batch.pages.tolist(), batch.plain.tolist()


def test_sequences_keep_their_books_over_random_operations() -> None:
    rng = random.Random(0)
    batch = _batch()
    for _ in range(3000):
        action = rng.random()
        if not batch.batch_size or action < 0.7:
            rows = batch.batch_size or rng.randrange(1, 5)
            count = rng.choice([0, 1, 1, 1, 1, 15, 16, 17, 90])
            pad = None if batch.batch_size else [rng.randrange(0, max(1, count)) for _ in range(rows)]
            if batch.tokens < 2000:
                batch.begin(batch.tokens, count, rows, pad)
        elif action < 0.85:
            batch.crop(rng.choice([1, 2, 15, 16, 40, 200, batch.tokens]))
        elif action < 0.93:
            rows = rng.choices(range(batch.batch_size), k=rng.randrange(1, 6))
            lengths = batch.lengths[rows]
            batch.select_rows(rows)
            assert (batch.lengths == lengths).all()
        elif action < 0.96:
            batch.is_recording = not batch.is_recording
            batch.settle()
        elif action < 0.98:
            batch.clear()
            assert batch.pool.num_used == 0
        _check(batch)
    batch.clear()
    assert (batch.batch_size, batch.tokens, batch.pool.num_used) == (0, 0, 0)
    assert all(batch.pool.owners(page) == 0 for page in range(batch.pool.capacity))


@pytest.mark.parametrize("layout", [LAYOUT, Layout(16, 0, 1), Layout(32, 7, 5), Layout(64, 4, 128)])
def test_begin_depends_on_the_token_count_only(layout: Layout) -> None:
    rng = random.Random(1)
    total, pad = 333, [0, 1, 60, 332]
    whole = _batch(layout)
    whole.begin(0, total, 4, pad)
    for largest in (1, 3, 17, 100):
        fed = _batch(layout)
        while fed.tokens < total:
            count = min(rng.randrange(1, largest + 1), total - fed.tokens)
            # what a mask shows of the padding while a row is padding only
            seen = [min(p, fed.tokens + count) for p in pad]
            assert fed.accepts_padding(seen, fed.tokens)
            fed.begin(fed.tokens, count, 4, seen)
            _check(fed)
        assert _state(fed) == _state(whole)
    assert whole.pages.tolist() == layout.pages_after(np.array(total) - np.array(pad)).tolist()
    packed = whole.pages > 0
    assert (whole.plain[packed] >= layout.num_sinks + layout.window).all()
    assert (whole.plain[packed] < layout.num_sinks + layout.window + layout.page_size).all()


def test_begin_is_one_step_for_all_layers() -> None:
    batch = _batch()
    first = batch.begin(0, 50, 2)
    assert batch.begin(0, 50, 2) is first
    second = batch.begin(50, 1, 2)
    assert second is not first
    assert batch.tokens == 51
    with pytest.raises(ValueError, match="every layer must see the same tokens, got one at 20"):
        batch.begin(20, 1, 2)


def test_begin_refuses_another_batch_size() -> None:
    batch = _batch()
    batch.begin(0, 5, 2)
    before = _state(batch)
    with pytest.raises(ValueError, match="holds 2 sequences, got a batch of 3"):
        batch.begin(5, 1, 3)
    assert _state(batch) == before


def test_begin_tells_kernels_the_state_before_its_own_flush() -> None:
    batch = _batch()
    full = LAYOUT.num_sinks + LAYOUT.window + LAYOUT.page_size
    batch.begin(0, full - 1, 1)
    step = batch.begin(full - 1, 1, 1)
    assert step.num_pages.tolist() == [0]
    assert step.plain_len.tolist() == [full]
    assert [(flush.row, flush.first, flush.page_ids) for flush in step.flushes] == [(0, 0, [0])]
    after = batch.begin(full, 1, 1)
    assert after.num_pages.tolist() == [1]
    assert after.plain_len.tolist() == [full + 1 - LAYOUT.page_size]
    assert after.block_table[0, 0] == 0


def test_first_new_skips_padding_across_chunks() -> None:
    batch = _batch()
    assert batch.begin(0, 4, 3, [0, 2, 4]).first_new.tolist() == [0, 2, 4]
    assert batch.begin(4, 4, 3, [0, 2, 6]).first_new.tolist() == [0, 0, 2]
    assert batch.begin(8, 4, 3).first_new.tolist() == [0, 0, 0]
    assert batch.lengths.tolist() == [12, 10, 6]


def test_accepts_padding_only_where_nothing_stored_would_change() -> None:
    batch = _batch()
    assert batch.accepts_padding([3, 4], 0)
    batch.begin(0, 6, 2, [2, 6])
    assert batch.accepts_padding([2, 6], 6)
    assert batch.accepts_padding([2, 9], 6), "a row of nothing but padding may turn out longer"
    assert not batch.accepts_padding([3, 6], 6)
    assert not batch.accepts_padding([0, 0], 6)


def test_crop_restores_the_cut_page_and_frees_what_is_behind() -> None:
    batch = _batch()
    batch.begin(0, 300, 2, [0, 10])
    table = batch.table.copy()
    crops = batch.crop(200)
    _check(batch)
    assert batch.lengths.tolist() == [100, 90]
    for crop, length in zip(crops, (100, 90), strict=True):
        kept = (length - LAYOUT.num_sinks) // LAYOUT.page_size
        assert batch.pages[crop.row] == kept
        assert crop.restored == (length - LAYOUT.num_sinks) % LAYOUT.page_size
        assert crop.page_id == table[crop.row, kept]


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_crop_within_the_window_touches_no_page(count: int) -> None:
    batch = _batch()
    batch.begin(0, 300, 1)
    pages = batch.pages.tolist()
    assert batch.crop(count) == []
    assert batch.pages.tolist() == pages


def test_crop_of_everything_gives_every_page_back() -> None:
    batch = _batch()
    batch.begin(0, 300, 3, [0, 5, 299])
    batch.crop(10_000)
    assert batch.tokens == 0
    assert batch.pool.num_used == 0
    batch.begin(0, 40, 3, [1, 2, 3])
    assert batch.lengths.tolist() == [39, 38, 37]


@pytest.mark.parametrize("draft", [1, 5, 16, DRAFT_SLACK])
def test_crop_of_a_recorded_draft_leaves_no_trace(draft: int) -> None:
    for start in range(100, 140):
        plain, drafting = _batch(), _batch()
        drafting.is_recording = True
        for batch in (plain, drafting):
            batch.begin(0, start, 2, [0, 9])
        drafting.settle()
        drafting.begin(start, draft, 2)
        assert drafting.crop(draft) == []
        drafting.settle()
        assert _state(drafting) == _state(plain)
        _check(drafting)


def test_select_rows_shares_pages() -> None:
    batch = _batch()
    batch.begin(0, 200, 2)
    used = batch.pool.num_used
    batch.select_rows([1, 0, 0])
    assert batch.pool.num_used == used
    assert (batch.table[1] == batch.table[2]).all()
    batch.begin(200, 100, 3)
    _check(batch)
    shared = LAYOUT.pages_after(np.array([200]))[0]
    assert (batch.table[1, :shared] == batch.table[2, :shared]).all()
    assert not set(batch.table[1, shared : batch.pages[1]]) & set(batch.table[2, shared : batch.pages[2]])


def test_max_pages_refuses_and_keeps_the_books() -> None:
    batch = SequenceBatch(LAYOUT, PagePool(max_pages=3))
    batch.begin(0, 60, 1)
    with pytest.raises(MemoryError, match="needs"):
        batch.begin(60, 200, 1)
    _check(batch)
    assert batch.tokens == 60, "a refused step must not count"
