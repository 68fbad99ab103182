"""Every selector by one list: what it may return, what it is for, and what becomes of what it notes down."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twilight_cache import (
    SELECTORS,
    DecodePolicy,
    DoubleSparse,
    Full,
    LayerStore,
    Layout,
    PagePool,
    Quest,
    Selection,
    Selector,
    SequenceBatch,
    SnapKV,
    Streaming,
    Tactic,
    check_budget,
)
from twilight_kernels import KeyCodec, ValueCodec, key_logits

B, K, D, SIZE = 3, 2, 16, 16
H, SCALING = 2 * K, D**-0.5
LAYOUT = Layout(page_size=SIZE, num_sinks=4, window=16)
LENGTHS = (300, 120, 30)  # the last row is too short to have a page
PAGES = (17, 6, 0)

# every selector, at a budget that leaves tokens out and, where it has one, at a share; a new one is a line or two here
ALL: dict[str, Callable[[], Selector]] = {
    "full": Full,
    "quest": lambda: Quest(0.25),
    "quest, share": lambda: Quest(None, 0.8),
    "tactic": lambda: Tactic(0.25),
    "tactic, share": lambda: Tactic(None, 0.8),
    "double_sparse": lambda: DoubleSparse(0.25),
    "double_sparse, share": lambda: DoubleSparse(None, 0.8),
    "streaming": lambda: Streaming(0.25),
    "snapkv": lambda: SnapKV(0.25),
}
BY_BUDGET = [name for name in ALL if name != "full" and "share" not in name]
BY_SHARE = [name for name in ALL if "share" in name]


def _tokens(seed: int = 0, total: int = max(LENGTHS)) -> Tensor:
    """Keys ``[B, K, total, D]`` with their own mean in each channel."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, total, D, generator=draw) + torch.randn(1, K, 1, D, generator=draw)


def _query(seed: int = 1) -> Tensor:
    return 4 * torch.randn(B, H, D, generator=torch.Generator().manual_seed(seed))


def _store(selector: Selector, bits: int = 4, **policy: float) -> LayerStore:
    codecs = KeyCodec(bits, SIZE), ValueCodec(bits, SIZE, 16)
    return LayerStore(SequenceBatch(LAYOUT, PagePool()), *codecs, DecodePolicy(selector=selector, **policy))  # type: ignore[arg-type]


def _filled(selector: Selector, bits: int = 4, keys: Tensor | None = None) -> LayerStore:
    """A store of rows of ``LENGTHS``, prefilled at once."""
    store = _store(selector, bits)
    keys = _tokens() if keys is None else keys
    step = store.sequences.begin(0, keys.shape[2], B, [keys.shape[2] - length for length in LENGTHS])
    store.append(step, keys, keys)
    store.observe(_query(3)[:, :, None].expand(-1, -1, 5, -1), SCALING)
    assert tuple(store.sequences.pages) == PAGES
    return store


def _select(store: LayerStore, query: Tensor) -> Selection | None:
    """Open a step of one token a row, select for it, and take it back."""
    found = store.select(query, SCALING, store.sequences.begin(store.tokens, 1, B))
    assert not store.sequences.crop(1), "the step fills no page"
    return found


def _mask(selection: Selection | None, pages: tuple[int, ...] = PAGES) -> Tensor:
    """Which packed tokens are candidates, ``[B, K, S]``."""
    mask = torch.zeros(B, K, max(pages) * SIZE, dtype=torch.bool)
    for row, count in enumerate(pages):
        for head in range(K):
            if selection is None:
                mask[row, head, : count * SIZE] = True
                continue
            for place, page in enumerate(selection.pages[row, head].tolist()):
                if page >= 0:
                    inside = slice(place * SIZE, (place + 1) * SIZE)
                    tokens = True if selection.tokens is None else selection.tokens[row, head, inside]
                    mask[row, head, page * SIZE : (page + 1) * SIZE] = tokens
    return mask


def _shares(store: LayerStore, query: Tensor, mask: Tensor) -> Tensor:
    """Share ``[B, H]`` of the packed mass that the candidates carry."""
    assert store.keys is not None
    table, num_pages = torch.from_numpy(store.sequences.table), torch.tensor(PAGES, dtype=torch.int32)
    weights = key_logits(query, store.keys, table[:, : max(PAGES)], num_pages, SCALING).softmax(-1)
    return (weights * mask.repeat_interleave(H // K, 1)).sum(-1)


def test_every_selector_is_tested() -> None:
    assert {name.split(",")[0] for name in ALL} == SELECTORS.keys()
    assert all(isinstance(make(), SELECTORS[name.split(",")[0]]) for name, make in ALL.items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_candidates_are_tokens_of_ascending_pages_of_the_row(name: str, bits: int) -> None:
    found = _select(_filled(ALL[name](), bits), _query())
    if found is None:
        assert name == "full"
        return
    assert found.pages.dtype == torch.int32
    assert found.pages.shape[:2] == (B, K)
    for row, pages in enumerate(PAGES):
        for head in range(K):
            line = found.pages[row, head].tolist()
            real = [page for page in line if page >= 0]
            assert line == real + [-1] * (len(line) - len(real)), "padding stands at the end"
            assert real == sorted(set(real))
            assert all(page < pages for page in real)
    if found.tokens is not None:
        assert found.tokens.dtype == torch.bool
        assert found.tokens.shape == (B, K, found.pages.shape[2] * SIZE)
    if found.coverage is not None:
        assert found.coverage.shape == (B, H)
        assert bool((found.coverage <= 1 + 1e-5).all())
        assert bool((found.coverage > 0).all())
    assert 0 < int(_mask(found)[0].sum()) < K * PAGES[0] * SIZE


@pytest.mark.parametrize("name", BY_BUDGET)
def test_budget_is_a_share_of_the_tokens_of_the_row(name: str) -> None:
    mask = _mask(_select(_filled(ALL[name]()), _query()))
    whole = 1 if name in ("double_sparse", "snapkv") else SIZE
    for row, pages in enumerate(PAGES):
        count, wanted = mask[row].sum(-1), 0.25 * pages * SIZE
        assert bool((count >= wanted).all())
        # a cluster is taken whole, and may be larger than 16 tokens
        assert bool((count < wanted + (4 if name == "tactic" else 1) * whole).all())


@pytest.mark.parametrize("name", BY_BUDGET)
@pytest.mark.parametrize("budget", [1.0, 10_000])
def test_budget_for_everything_is_full(name: str, budget: int | float) -> None:
    store = _filled(SELECTORS[name](budget))  # type: ignore[call-arg]
    assert torch.equal(_mask(_select(store, _query())), _mask(None))


@pytest.mark.parametrize("name", BY_BUDGET)
def test_budget_may_be_a_number_of_tokens(name: str) -> None:
    mask = _mask(_select(_filled(SELECTORS[name](3 * SIZE)), _query()))  # type: ignore[call-arg]
    assert bool((mask[:2].sum(-1) >= 3 * SIZE).all())
    assert bool((mask[:2].sum(-1) < 7 * SIZE).all())


@pytest.mark.parametrize("name", BY_SHARE)
def test_share_takes_more_tokens_for_more_mass(name: str) -> None:
    make, query, before = SELECTORS[name.split(",")[0]], _query(), torch.zeros(B, K, PAGES[0] * SIZE).bool()
    for share in (0.3, 0.6, 0.9, 0.99, 1.0):
        store = _filled(make(None, share))  # type: ignore[call-arg]
        found = _select(store, query)
        mask = _mask(found)
        assert bool((mask | ~before).all()), "a larger share takes what a smaller one takes"
        assert found is not None
        assert found.coverage is not None
        assert bool((found.coverage >= share - 1e-4).all())
        before = mask
    assert torch.equal(mask, _mask(None))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("full", "streaming", "snapkv")])
def test_candidates_carry_more_than_their_share_of_the_mass(name: str) -> None:
    store, query = _filled(ALL[name]()), _query()
    mask = _mask(_select(store, query))
    shares = _shares(store, query, mask)[:2]
    fraction = mask.sum(-1)[:2] / (torch.tensor(PAGES[:2])[:, None] * SIZE)
    # keys without clusters: pages and clusters are hard to tell apart
    least = 2.0 if "double_sparse" in name else 1.5
    assert float((shares / fraction.repeat_interleave(H // K, 1)).mean()) > least


@pytest.mark.parametrize(
    ("selector", "tolerance"),
    [(Tactic(None, 0.8), 0.08), (DoubleSparse(None, 0.8, channel_share=1.0), 1e-4)],
    ids=["tactic", "double_sparse, all channels"],
)
def test_coverage_is_near_the_true_share(selector: Selector, tolerance: float) -> None:
    store, query = _filled(selector), _query()
    found = _select(store, query)
    assert found is not None
    assert found.coverage is not None
    assert store.plain is not None
    assert store.keys is not None
    table, num_pages = torch.from_numpy(store.sequences.table), torch.tensor(PAGES, dtype=torch.int32)
    packed = key_logits(query, store.keys, table[:, : max(PAGES)], num_pages, SCALING)
    mask = _mask(found).repeat_interleave(H // K, 1)
    plain = (query.unflatten(1, (K, -1)) @ store.plain.keys).flatten(1, 2) * SCALING
    stored = torch.from_numpy(store.sequences.plain)
    plain = plain.masked_fill(torch.arange(plain.shape[-1]) >= stored[:, None, None], -torch.inf)
    attended = torch.cat([packed.masked_fill(~mask, -torch.inf), plain], -1).logsumexp(-1)
    true = (attended - torch.cat([packed, plain], -1).logsumexp(-1)).exp()
    assert float((found.coverage - true).abs().mean()) < tolerance


@pytest.mark.parametrize("name", ALL)
def test_selector_depends_on_its_own_row_only(name: str) -> None:
    store, query = _filled(ALL[name]()), _query()
    found = _mask(_select(store, query))
    keys, changed = _tokens(), query.clone()
    keys[1:], changed[1:] = -keys[1:], -changed[1:]
    assert torch.equal(_mask(_select(_filled(ALL[name](), keys=keys), changed))[0], found[0])


@pytest.mark.parametrize("page", [0, 1, 8, 16])
@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("full", "streaming")])
def test_needle_is_found(name: str, page: int, bits: int) -> None:
    """A key along a query: by every selector that looks at keys, wherever it lies."""
    query = _query(3 if name == "snapkv" else 1)
    for head in range(K):
        keys = _tokens()
        at = LAYOUT.num_sinks + page * SIZE + 5
        keys[0, head, at] = 3 * query[0, 2 * head]
        found = _mask(_select(_filled(ALL[name](), bits, keys), query))
        assert bool(found[0, head, page * SIZE + 5])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("p", [0.9, 1.0])
def test_decode_attends_to_candidates_only(name: str, p: float) -> None:
    """With p = 1 nothing is pruned: the output is attention over sinks, candidates and window."""
    store, query = _filled(ALL[name]()), _query()
    store.policy = DecodePolicy(p=p, selector=store.policy.selector)
    keys, values = store.read()
    new_key, new_value = torch.randn(2, B, K, 1, D, generator=torch.Generator().manual_seed(2))
    sequences, total = store.sequences, store.tokens
    pad, pages = sequences.pad.copy(), sequences.pages.copy()
    step = sequences.begin(total, 1, B)
    mask = _mask(store.select(query, SCALING, step))
    out = store.decode(step, query, new_key, new_value, SCALING)
    assert store.decodes.sums is not None
    assert torch.equal(store.decodes.sums[..., 4], mask.sum(-1).double().repeat_interleave(H // K, 1))
    if p < 1.0:
        assert bool((store.decodes.sums[..., 2] <= store.decodes.sums[..., 4]).all())
        assert bool((store.decodes.sums[..., 3] >= p - 1e-5).all())
        return
    for row in range(B):
        for head in range(K):
            real = torch.arange(total) >= int(pad[row])
            start = int(pad[row]) + LAYOUT.num_sinks
            real[start : start + int(pages[row]) * SIZE] = mask[row, head, : int(pages[row]) * SIZE]
            k = torch.cat([keys[row, head, real], new_key[row, head]]).double()
            v = torch.cat([values[row, head, real], new_value[row, head]]).double()
            weights = (query[row, 2 * head : 2 * head + 2].double() @ k.T * SCALING).softmax(-1)
            torch.testing.assert_close(out[row, 2 * head : 2 * head + 2].double(), weights @ v, rtol=1e-5, atol=1e-5)


def _fed(selector: Selector, cuts: list[int], total: int) -> LayerStore:
    """Feed ``total`` tokens cut at ``cuts``, decoding those that come alone."""
    store, keys = _store(selector), _tokens(total=total)
    for first, last in zip([0, *cuts], [*cuts, total], strict=True):
        part, query = keys[:, :, first:last], _query(first)
        step = store.sequences.begin(first, last - first, B, [0] * B if first == 0 else None)
        if last - first == 1:
            store.decode(step, query, part, part, SCALING)
        else:
            store.append(step, part, part)
            store.observe(query[:, :, None].expand(-1, -1, last - first, -1), SCALING)
    return store


def _same_state(a: LayerStore, b: LayerStore) -> None:
    mine, theirs = a.selector_state.saved(), b.selector_state.saved()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", [name for name in ALL if name != "snapkv"])
def test_candidates_do_not_depend_on_how_tokens_were_fed(name: str) -> None:
    """SnapKV is left out: it depends on where the prompt ends, as its docstring says."""
    total, query, pages = 21 + 70 * SIZE, _query(), (70,) * B  # a run of 1,024 tokens, and shorter ones
    expected, tail = _fed(ALL[name](), [], total), list(range(total - 40, total))
    first = _mask(_select(expected, query), pages)
    for cuts in ([400, 401, 900], tail, [*range(100, 200), 1000]):
        store = _fed(ALL[name](), cuts, total)
        assert torch.equal(_mask(_select(store, query), pages), first)
        _same_state(store, expected)


def _noted() -> dict[str, Callable[[], Selector]]:
    """Selectors that note something down."""
    found = {name: make for name, make in ALL.items() if _run_once(make()).selector_state.tensors}
    assert {"tactic", "snapkv"} <= found.keys()
    return found


def _run_once(selector: Selector) -> LayerStore:
    store = _filled(selector)
    _select(store, _query())
    return store


NOTED = _noted()


@pytest.mark.parametrize("name", NOTED)
def test_what_a_selector_notes_down_is_counted(name: str) -> None:
    store = _run_once(NOTED[name]())
    state = store.selector_state
    counted = store.num_bytes()
    assert counted.selector == sum(t.nbytes for t in state.tensors.values()) + state.pages.nbytes > 0
    assert counted.total == counted.codes + counted.scales + counted.sinks + counted.window + counted.selector
    store.clear()
    assert store.num_bytes().selector == 0


@pytest.mark.parametrize("name", NOTED)
def test_rows_are_kept_repeated_and_reordered_with_their_notes(name: str) -> None:
    store, query, rows = _run_once(NOTED[name]()), _query(), torch.tensor([1, 0, 0])
    before = _mask(_select(store, query))
    store.sequences.select_rows(rows.tolist())
    store.select_rows(rows)
    pages = tuple(PAGES[row] for row in rows)
    assert torch.equal(_mask(_select(store, query[rows]), pages), before[rows])


@pytest.mark.parametrize("name", NOTED)
def test_copies_do_not_share_notes(name: str) -> None:
    store = _run_once(NOTED[name]())
    twin, kept = copy.deepcopy(store), copy.deepcopy(store.selector_state)
    for tensor in twin.selector_state.tensors.values():
        tensor.zero_()
    assert all(torch.equal(tensor, store.selector_state.tensors[name]) for name, tensor in kept.tensors.items())


@pytest.mark.parametrize("name", NOTED)
def test_notes_are_restored_from_what_was_saved(name: str) -> None:
    store, query = _run_once(NOTED[name]()), _query()
    expected = _mask(_select(store, query))
    saved = store.selector_state.saved()
    store.selector_state = type(store.selector_state)()
    store.selector_state.restore(saved)
    assert torch.equal(_mask(_select(store, query)), expected)


@pytest.mark.parametrize("name", [name for name in NOTED if "tactic" in name])
@pytest.mark.parametrize("cut", [1, 40, 300, 1000])
def test_notes_of_tokens_that_were_cut_are_forgotten(name: str, cut: int) -> None:
    """After a cut and other tokens the candidates are those of a cache that never held the first ones."""
    total, query, pages = 21 + 70 * SIZE, _query(), (70,) * B
    store, other = _fed(NOTED[name](), [], total), _tokens(seed=9, total=total)
    _select(store, query)
    store.crop(store.sequences.crop(cut))
    step = store.sequences.begin(store.tokens, cut, B)
    part = other[:, :, -cut:]
    store.append(step, part, part)
    found = _mask(_select(store, query), pages)
    fresh = _store(NOTED[name]())
    keys, values = store.read()
    fresh.append(fresh.sequences.begin(0, total, B, [0] * B), keys[:, :, :total], values[:, :, :total])
    assert fresh.keys is not None
    assert store.keys is not None
    for mine, theirs in ((fresh.keys, store.keys),):  # the same bytes, so that rounding twice makes no difference
        mine.codes[: mine.num_pages] = _by_row(theirs.codes, store, fresh)
        mine.lo[: mine.num_pages] = _by_row(theirs.lo, store, fresh)
        mine.step[: mine.num_pages] = _by_row(theirs.step, store, fresh)
    assert torch.equal(_mask(_select(fresh, query), pages), found)


def _by_row(theirs: Tensor, store: LayerStore, fresh: LayerStore) -> Tensor:
    """The pages of ``store`` in the slots that ``fresh`` has given to the same logical pages."""
    out = torch.zeros(fresh.sequences.pool.capacity, *theirs.shape[1:], dtype=theirs.dtype)
    for row in range(B):
        mine = torch.from_numpy(fresh.sequences.table[row, :70]).long()
        out[mine] = theirs[torch.from_numpy(store.sequences.table[row, :70]).long()]
    return out


def test_snapkv_takes_what_is_packed_after_the_prompt() -> None:
    store = _filled(SnapKV(0.25))
    keys = _tokens(seed=5, total=40)
    before = _mask(_select(store, _query()))
    for i in range(40):
        part = keys[:, :, i : i + 1]
        store.decode(store.sequences.begin(store.tokens, 1, B), _query(), part, part, SCALING)
    pages = tuple(int(count) for count in store.sequences.pages)
    mask = _mask(_select(store, _query()), pages)
    assert pages[0] > PAGES[0]
    assert torch.equal(mask[0, :, : PAGES[0] * SIZE], before[0])
    assert bool(mask[0, :, PAGES[0] * SIZE : pages[0] * SIZE].all())
    assert bool(mask[2, :, : pages[2] * SIZE].all()), "a row that had no page then is not limited"


def test_snapkv_before_a_prompt_limits_nothing() -> None:
    assert _select(_fed(SnapKV(0.25), list(range(1, 60)), 60), _query()) is None


@pytest.mark.parametrize("recent", [1, SIZE, SIZE + 1, 5 * SIZE])
def test_streaming_takes_the_last_pages(recent: int) -> None:
    mask = _mask(_select(_filled(Streaming(recent)), _query()))
    for row, pages in enumerate(PAGES):
        count = min(pages, -(-recent // SIZE)) * SIZE
        expected = torch.arange(PAGES[0] * SIZE) >= pages * SIZE - count
        expected &= torch.arange(PAGES[0] * SIZE) < pages * SIZE
        assert torch.equal(mask[row], expected.expand(K, -1))


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, float("nan"), True, "all"])
def test_check_budget_refuses(budget: object) -> None:
    with pytest.raises(ValueError, match="budget must be a whole number of tokens from 1, a share"):
        check_budget(budget)  # type: ignore[arg-type]
