from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_cache import (
    SELECTORS,
    DecodePolicy,
    Full,
    LayerStore,
    Layout,
    PagePool,
    Quest,
    Selector,
    SequenceBatch,
    Streaming,
)
from twilight_kernels import KeyCodec, ValueCodec

B, K, D, SIZE = 3, 2, 16, 16
LAYOUT = Layout(page_size=SIZE, num_sinks=4, window=16)
LENGTHS = (300, 120, 30)  # the last row is too short to have a page
PAGES = (17, 6, 0)

# every selector, at a budget that leaves pages out; a new one is one line here
ALL: dict[str, Callable[[], Selector]] = {
    "full": Full,
    "quest": lambda: Quest(fraction=0.25, min_tokens=3 * SIZE),
    "streaming": lambda: Streaming(recent_tokens=4 * SIZE),
}


def _filled(bits: int = 4, needle: tuple[int, int, int] | None = None, seed: int = 0) -> tuple[LayerStore, Tensor]:
    """A store of rows of ``LENGTHS``; ``needle`` is the (row, KV head, page) of a key along its query."""
    generator = torch.Generator().manual_seed(seed)
    total = max(LENGTHS)
    keys = torch.randn(B, K, total, D, generator=generator)
    query = torch.randn(B, 2 * K, D, generator=generator)
    if needle is not None:
        row, head, page = needle
        at = total - LENGTHS[row] + LAYOUT.num_sinks + page * SIZE + 5
        keys[row, head, at] = 4 * query[row, 2 * head]
    store = LayerStore(
        SequenceBatch(LAYOUT, PagePool()), KeyCodec(bits, SIZE), ValueCodec(bits, SIZE, 16), DecodePolicy()
    )
    step = store.sequences.begin(0, total, B, [total - length for length in LENGTHS])
    store.append(step, keys, keys)
    assert tuple(store.sequences.pages) == PAGES
    return store, query


def _select(selector: Selector, store: LayerStore, query: Tensor) -> Tensor | None:
    table = torch.from_numpy(store.sequences.table)
    num_pages = torch.from_numpy(store.sequences.pages).to(torch.int32)
    assert store.keys is not None
    return selector.select(query, store.keys, table, num_pages, D**-0.5)


def test_every_selector_is_tested() -> None:
    assert ALL.keys() == SELECTORS.keys()
    assert all(isinstance(make(), SELECTORS[name]) for name, make in ALL.items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_candidates_are_ascending_pages_of_the_row(name: str, bits: int) -> None:
    store, query = _filled(bits)
    found = _select(ALL[name](), store, query)
    if found is None:
        assert name == "full"
        return
    assert found.dtype == torch.int32
    assert found.shape[:2] == (B, K)
    assert 0 < found.shape[2] < max(PAGES)
    for row, pages in enumerate(PAGES):
        for head in range(K):
            line = found[row, head].tolist()
            real = [page for page in line if page >= 0]
            assert line == real + [-1] * (len(line) - len(real)), "padding stands at the end"
            assert real == sorted(set(real))
            assert all(page < pages for page in real)
            assert len(real) == min(pages, len(line)), "a short row gets all its pages"


@pytest.mark.parametrize("name", ALL)
def test_selector_with_budget_for_everything_is_full(name: str) -> None:
    settings: dict[str, Any] = {
        "full": {},
        "quest": {"fraction": 1.0, "min_tokens": 1},
        "streaming": {"recent_tokens": 300},
    }
    store, query = _filled()
    assert _select(SELECTORS[name](**settings[name]), store, query) is None


@pytest.mark.parametrize("name", ALL)
def test_selector_depends_on_its_own_row_only(name: str) -> None:
    """How much a selector takes may follow the longest row; which pages are best must not."""
    store, query = _filled()
    found = _select(ALL[name](), store, query)
    other, _ = _filled(seed=0)
    changed = query.clone()
    changed[1:] = -changed[1:]
    again = _select(ALL[name](), other, changed)
    if found is None or again is None:
        assert found is again
        return
    assert torch.equal(found[0], again[0])


@pytest.mark.parametrize("page", [0, 1, 8, 16])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_quest_finds_the_page_with_the_needle(page: int, bits: int) -> None:
    for head in range(K):
        store, query = _filled(bits, needle=(0, head, page))
        # a page for each query head of the KV head: the other one has a favourite too
        found = _select(Quest(fraction=0.01, min_tokens=2 * SIZE), store, query)
        assert found is not None
        assert found.shape == (B, K, 2)
        assert page in found[0, head].tolist()


@pytest.mark.parametrize("min_tokens", [1, SIZE, SIZE + 1, 100, 16 * SIZE, 17 * SIZE, 10_000])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
def test_quest_takes_the_larger_of_share_and_least(fraction: float, min_tokens: int) -> None:
    store, query = _filled()
    found = _select(Quest(fraction, min_tokens), store, query)
    tokens = max(min_tokens, round(fraction * max(PAGES) * SIZE))
    if tokens > (max(PAGES) - 1) * SIZE:
        assert found is None
    else:
        assert found is not None
        assert found.shape[2] == -(-tokens // SIZE)


@pytest.mark.parametrize("recent", [1, SIZE, SIZE + 1, 5 * SIZE])
def test_streaming_takes_the_last_pages(recent: int) -> None:
    store, query = _filled()
    found = _select(Streaming(recent), store, query)
    count = -(-recent // SIZE)
    assert found is not None
    for row, pages in enumerate(PAGES):
        last = list(range(max(0, pages - count), pages))
        for head in range(K):
            assert found[row, head].tolist() == last + [-1] * (count - len(last))


@pytest.mark.parametrize("name", ALL)
def test_decode_with_selector_attends_to_its_candidates_only(name: str) -> None:
    """With p just below 1 nothing is pruned: the output is attention over sinks, candidates and window."""
    store, query = _filled()
    store.policy = DecodePolicy(p=1 - 1e-9, selector=ALL[name]())
    total = store.tokens
    candidates = _select(store.policy.selector, store, query)
    keys, values = store.read()
    new_key, new_value = torch.randn(2, B, K, 1, D, generator=torch.Generator().manual_seed(2))
    sequences = store.sequences
    pad, pages = sequences.pad.copy(), sequences.pages.copy()
    out = store.decode(sequences.begin(total, 1, B), query, new_key, new_value, D**-0.5)
    for row in range(B):
        for head in range(K):
            real = torch.arange(total) >= int(pad[row])
            if candidates is not None:
                start = int(pad[row]) + LAYOUT.num_sinks
                real[start : start + int(pages[row]) * SIZE] = False
                for page in candidates[row, head][candidates[row, head] >= 0].tolist():
                    real[start + page * SIZE : start + (page + 1) * SIZE] = True
            k = torch.cat([keys[row, head, real], new_key[row, head]]).double()
            v = torch.cat([values[row, head, real], new_value[row, head]]).double()
            weights = (query[row, 2 * head : 2 * head + 2].double() @ k.T * D**-0.5).softmax(-1)
            torch.testing.assert_close(out[row, 2 * head : 2 * head + 2].double(), weights @ v, rtol=1e-5, atol=1e-5)
