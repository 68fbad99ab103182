from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from twilight_cache import DecodePolicy, LayerStore, Layout, PagePool, SequenceBatch
from twilight_kernels import (
    KeyCodec,
    KeyPages,
    ValueCodec,
    ValuePages,
    load_key_pages,
    load_value_pages,
    store_key_pages,
    store_value_pages,
)

B, K, D = 3, 2, 16
LAYOUT = Layout(page_size=16, num_sinks=4, window=24)
BITS = [(2, 2), (3, 3), (4, 4), (8, 8), (16, 16), (4, 2)]
PAD = [0, 7, 60]
TOTAL = 171


def _store(
    bits: tuple[int, int] = (4, 4), layout: Layout = LAYOUT, sequences: SequenceBatch | None = None
) -> LayerStore:
    sequences = sequences or SequenceBatch(layout, PagePool())
    size = sequences.layout.page_size
    return LayerStore(sequences, KeyCodec(bits[0], size), ValueCodec(bits[1], size, 16), DecodePolicy())


def _tokens(
    total: int = TOTAL, dtype: torch.dtype = torch.float32, rows: int = B, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, K, total, D, generator=generator) + 3 * torch.randn(D, generator=generator)
    return keys.to(dtype), torch.randn(rows, K, total, D, generator=generator).to(dtype)


def _feed(
    store: LayerStore, keys: Tensor, values: Tensor, chunks: Sequence[int], pad: Sequence[int] | None = None
) -> None:
    start = 0
    for chunk in chunks:
        end = start + chunk
        seen = None if pad is None else [min(p, end) for p in pad]
        step = store.sequences.begin(store.tokens, chunk, keys.shape[0], seen)
        store.append(step, keys[:, :, start:end], values[:, :, start:end])
        start = end
    assert start == keys.shape[2]


def _rows(store: LayerStore) -> Iterator[list[Tensor]]:
    """What each row holds, by logical place: which slot a page has is no part of the state."""
    sequences, plain = store.sequences, store.plain
    assert store.keys is not None
    assert store.values is not None
    assert plain is not None
    for row in range(sequences.batch_size):
        slots = torch.from_numpy(sequences.table[row, : sequences.pages[row]]).long()
        columns = int(sequences.plain[row])
        parts = [tensor[slots] for pages in (store.keys, store.values) for tensor in pages.tensors().values()]
        yield [*parts, plain.keys[row, :, :, :columns], plain.values[row, :, :columns]]


def _assert_equal(one: LayerStore, other: LayerStore) -> None:
    for left, right in zip(_rows(one), _rows(other), strict=True):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def _chunks(total: int, size: int) -> list[int]:
    return [size] * (total // size) + ([total % size] if total % size else [])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_state_is_independent_of_chunks(bits: tuple[int, int], dtype: torch.dtype) -> None:
    keys, values = _tokens(dtype=dtype)
    whole = _store(bits)
    _feed(whole, keys, values, [TOTAL], PAD)
    for size in (1, 7, 33, 100):
        fed = _store(bits)
        _feed(fed, keys, values, _chunks(TOTAL, size), PAD)
        _assert_equal(fed, whole)


@pytest.mark.parametrize("layout", [Layout(16, 0, 1), Layout(32, 7, 5), Layout(64, 4, 40)])
def test_append_state_is_independent_of_chunks_in_any_layout(layout: Layout) -> None:
    keys, values = _tokens()
    whole = _store(layout=layout)
    _feed(whole, keys, values, [TOTAL], PAD)
    for size in (1, 5, 64):
        fed = _store(layout=layout)
        _feed(fed, keys, values, _chunks(TOTAL, size), PAD)
        _assert_equal(fed, whole)


def test_append_ignores_what_stands_in_padding() -> None:
    keys, values = _tokens()
    clean, dirty = _store(), _store()
    _feed(clean, keys, values, [TOTAL], PAD)
    for row, pad in enumerate(PAD):
        keys[row, :, :pad] = torch.nan
        values[row, :, :pad] = torch.inf
    _feed(dirty, keys, values, _chunks(TOTAL, 50), PAD)
    _assert_equal(dirty, clean)


def test_append_gives_a_padded_row_what_it_gets_alone() -> None:
    keys, values = _tokens()
    together = _store()
    _feed(together, keys, values, _chunks(TOTAL, 40), PAD)
    rows = list(_rows(together))
    for row, pad in enumerate(PAD):
        alone = _store()
        _feed(alone, keys[row : row + 1, :, pad:], values[row : row + 1, :, pad:], [TOTAL - pad])
        for a, b in zip(rows[row], next(_rows(alone)), strict=True):
            assert torch.equal(a, b)


def test_append_takes_any_strides() -> None:
    keys, values = _tokens()
    straight, strided = _store(), _store()
    _feed(straight, keys, values, [TOTAL])
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2), values.flip(-1).contiguous().flip(-1)
    _feed(strided, turned[0], turned[1].transpose(-1, -2).contiguous().transpose(-1, -2), [TOTAL])
    _assert_equal(strided, straight)


def test_decode_leaves_what_append_leaves() -> None:
    keys, values = _tokens()
    appended, decoded = _store(), _store()
    _feed(appended, keys, values, [TOTAL], PAD)
    head = 61
    _feed(decoded, keys[:, :, :head], values[:, :, :head], [head], PAD)
    query = torch.randn(B, 2 * K, D, generator=torch.Generator().manual_seed(1))
    for at in range(head, TOTAL):
        step = decoded.sequences.begin(at, 1, B, PAD)
        out = decoded.decode(step, query, keys[:, :, at : at + 1], values[:, :, at : at + 1], D**-0.5)
        assert torch.isfinite(out).all()
    _assert_equal(decoded, appended)


@pytest.mark.parametrize("bits", [(4, 4), (16, 16)])
def test_decode_attends_to_what_read_returns(bits: tuple[int, int]) -> None:
    keys, values = _tokens()
    store = _store(bits)
    _feed(store, keys[:, :, :-1], values[:, :, :-1], [TOTAL - 1], PAD)
    query = torch.randn(B, 2 * K, D, generator=torch.Generator().manual_seed(1))
    past_keys, past_values = store.read()
    all_keys = torch.cat([past_keys, keys[:, :, -1:]], 2).double().repeat_interleave(2, 1)
    all_values = torch.cat([past_values, values[:, :, -1:]], 2).double().repeat_interleave(2, 1)
    logits = torch.einsum("bhd,bhsd->bhs", query.double(), all_keys) * D**-0.5
    padding = torch.arange(TOTAL) < torch.tensor(PAD)[:, None]
    weights = logits.masked_fill(padding[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhs,bhsd->bhd", weights, all_values)
    step = store.sequences.begin(TOTAL - 1, 1, B, PAD)
    out = store.decode(step, query, keys[:, :, -1:], values[:, :, -1:], D**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_read_is_the_definition(bits: tuple[int, int], dtype: torch.dtype) -> None:
    """Sinks and window bit for bit, pages as the codec rounds them, padding zero."""
    keys, values = _tokens(dtype=dtype)
    store = _store(bits)
    _feed(store, keys, values, _chunks(TOTAL, 29), PAD)
    read_keys, read_values = store.read()
    assert read_keys.dtype == read_values.dtype == dtype
    size = LAYOUT.page_size
    for row, pad in enumerate(PAD):
        pages = int(store.sequences.pages[row])
        at, end = pad + LAYOUT.num_sinks, pad + LAYOUT.num_sinks + pages * size
        expected_keys, expected_values = keys[row].clone(), values[row].clone()
        expected_keys[:, :pad] = expected_values[:, :pad] = 0
        key_pages = KeyPages.empty(pages, K, D, store.key_codec, dtype, "cpu")
        value_pages = ValuePages.empty(pages, K, D, store.value_codec, dtype, "cpu")
        ids = torch.arange(pages, dtype=torch.int32)
        store_key_pages(key_pages, ids, keys[row, :, at:end].unflatten(1, (pages, size)).transpose(0, 1))
        store_value_pages(value_pages, ids, values[row, :, at:end].unflatten(1, (pages, size)).transpose(0, 1))
        expected_keys[:, at:end] = load_key_pages(key_pages, ids, dtype).transpose(0, 1).flatten(1, 2)
        expected_values[:, at:end] = load_value_pages(value_pages, ids, dtype).transpose(0, 1).flatten(1, 2)
        assert pages > 2
        assert torch.equal(read_keys[row], expected_keys)
        assert torch.equal(read_values[row], expected_values)
    if bits == (16, 16):
        for row, pad in enumerate(PAD):
            assert torch.equal(read_keys[row, :, pad:], keys[row, :, pad:])
            assert torch.equal(read_values[row, :, pad:], values[row, :, pad:])


@pytest.mark.parametrize("bits", [(2, 2), (4, 4)])
@pytest.mark.parametrize("draft", [1, 6, 30, 64])
def test_crop_of_a_recorded_draft_equals_never_drafted(bits: tuple[int, int], draft: int) -> None:
    keys, values = _tokens()
    wrong_keys, wrong_values = _tokens(draft, seed=5)
    plain, drafting = _store(bits), _store(bits)
    drafting.sequences.is_recording = True
    start = 100
    for store in (plain, drafting):
        _feed(store, keys[:, :, :start], values[:, :, :start], [start], PAD)
    for at in range(start, TOTAL, 17):
        count = min(17, TOTAL - at)
        step = drafting.sequences.begin(drafting.tokens, draft, B)
        drafting.append(step, wrong_keys, wrong_values)
        drafting.crop(drafting.sequences.crop(draft))
        drafting.flush(drafting.sequences.settle())
        _assert_equal(drafting, plain)
        for store in (plain, drafting):
            step = store.sequences.begin(store.tokens, count, B)
            store.append(step, keys[:, :, at : at + count], values[:, :, at : at + count])
        drafting.flush(drafting.sequences.settle())
        _assert_equal(drafting, plain)


@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (16, 16)])
@pytest.mark.parametrize("count", [1, 23, 24, 41, 100, 150, 168, TOTAL, TOTAL + 5])
def test_crop_keeps_the_tokens_before_it(bits: tuple[int, int], count: int) -> None:
    keys, values = _tokens()
    store = _store(bits)
    _feed(store, keys, values, [TOTAL], PAD)
    before_keys, before_values = store.read()
    store.crop(store.sequences.crop(count))
    after_keys, after_values = store.read()
    left = max(0, TOTAL - count)
    assert store.tokens == left
    assert torch.equal(after_keys, before_keys[:, :, :left])
    assert torch.equal(after_values, before_values[:, :, :left])


@pytest.mark.parametrize("count", [5, 41, 100])
def test_crop_and_append_again_equals_never_cropped_when_raw(count: int) -> None:
    keys, values = _tokens()
    store = _store((16, 16))
    _feed(store, keys, values, [TOTAL], PAD)
    store.crop(store.sequences.crop(count))
    for at in range(TOTAL - count, TOTAL, 13):
        more = min(13, TOTAL - at)
        step = store.sequences.begin(at, more, B)
        store.append(step, keys[:, :, at : at + more], values[:, :, at : at + more])
    for row, (read_keys, read_values) in enumerate(zip(*store.read(), strict=True)):
        assert torch.equal(read_keys[:, PAD[row] :], keys[row, :, PAD[row] :])
        assert torch.equal(read_values[:, PAD[row] :], values[row, :, PAD[row] :])


def test_select_rows_shares_pages_and_copies_windows() -> None:
    keys, values = _tokens()
    store = _store()
    _feed(store, keys, values, [TOTAL], PAD)
    before = list(_rows(store))
    pages, window, bytes_before = store.keys, store.plain, store.num_bytes()
    rows = [1, 0, 0, 2]
    store.sequences.select_rows(rows)
    store.select_rows(torch.tensor(rows))
    assert store.keys is pages
    assert store.num_bytes().codes == bytes_before.codes
    assert store.plain is not None
    assert window is not None
    assert store.plain.keys.data_ptr() != window.keys.data_ptr()
    assert store.num_bytes().window * B == bytes_before.window * len(rows)
    for row, parts in zip(rows, _rows(store), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before[row], parts, strict=True))


def test_select_rows_lets_forks_go_their_own_way() -> None:
    keys, values = _tokens()
    store = _store()
    _feed(store, keys, values, [TOTAL], PAD)
    rows = [0, 0, 1]
    store.sequences.select_rows(rows)
    store.select_rows(torch.tensor(rows))
    more_keys, more_values = _tokens(90, seed=3)
    step = store.sequences.begin(TOTAL, 90, 3)
    store.append(step, more_keys, more_values)
    for fork, row in enumerate(rows):
        alone = _store()
        both = [torch.cat([old[row : row + 1, :, PAD[row] :], new[fork : fork + 1]], 2)
                for old, new in ((keys, more_keys), (values, more_values))]  # fmt: skip
        _feed(alone, both[0], both[1], [both[0].shape[2]])
        assert all(torch.equal(a, b) for a, b in zip(list(_rows(store))[fork], next(_rows(alone)), strict=True))


def test_select_rows_frees_pages_for_new_rows() -> None:
    keys, values = _tokens()
    store = _store()
    _feed(store, keys, values, [TOTAL])
    store.sequences.select_rows([2])
    store.select_rows(torch.tensor([2]))
    assert store.sequences.pool.num_used == store.sequences.pages[0]
    capacity = store.sequences.pool.capacity
    kept = store.read()
    more_keys, more_values = _tokens(150, rows=1, seed=3)
    step = store.sequences.begin(TOTAL, 150, 1)
    store.append(step, more_keys, more_values)
    assert store.sequences.pool.capacity == capacity, "freed pages are used first"
    left = TOTAL - LAYOUT.window - LAYOUT.page_size
    assert torch.equal(store.read()[0][:, :, :left], kept[0][:, :, :left])


@pytest.mark.parametrize("bits", BITS)
def test_num_bytes_is_the_closed_form(bits: tuple[int, int]) -> None:
    keys, values = _tokens()
    store = _store(bits)
    _feed(store, keys, values, [TOTAL], PAD)
    size, slots = LAYOUT.page_size, store.sequences.pool.capacity
    key_bits, value_bits = (8 * keys.element_size() if b == 16 else b for b in bits)
    codes = slots * K * size * D * (key_bits + value_bits) // 8
    key_scales = 0 if bits[0] == 16 else slots * K * D * 2 * 2
    value_scales = 0 if bits[1] == 16 else slots * K * size * -(-D // 16) * 2 * 2
    column = B * K * 2 * D * keys.element_size()
    found = store.num_bytes()
    assert (found.codes, found.scales) == (codes, key_scales + value_scales)
    assert found.sinks == column * LAYOUT.num_sinks
    assert store.plain is not None
    assert found.sinks + found.window == column * store.plain.capacity
    assert store.plain.capacity < LAYOUT.num_sinks + LAYOUT.window + size + 16
    used = store.sequences.pool.num_used
    assert found.unused == (codes + key_scales + value_scales) * (slots - used) // slots
    assert found.total == sum(tensor.nbytes for tensor in store.tensors().values())


@pytest.mark.parametrize(("bits", "levels"), [(2, 4), (3, 8), (4, 16)])
def test_pages_hold_no_more_levels_than_their_bits(bits: int, levels: int) -> None:
    keys, values = _tokens()
    store = _store((bits, bits))
    _feed(store, keys, values, [TOTAL])
    read_keys, read_values = store.read()
    page = slice(LAYOUT.num_sinks, LAYOUT.num_sinks + LAYOUT.page_size)
    for channel in range(D):
        assert len(read_keys[0, 0, page, channel].unique()) <= levels
    for token in read_values[0, 0, page]:
        assert len(token.unique()) <= levels


def test_pages_never_change_while_the_store_grows() -> None:
    keys, values = _tokens(600)
    store = _store()
    seen: dict[tuple[int, int], list[Tensor]] = {}
    moved = 0
    for at in range(600):
        before = store.keys.codes.data_ptr() if store.keys is not None else 0
        _feed_one(store, keys, values, at)
        assert store.keys is not None
        moved += store.keys.codes.data_ptr() != before
        for row in range(B):
            for page in range(int(store.sequences.pages[row])):
                slot = int(store.sequences.table[row, page])
                parts = [t[slot] for t in store.keys.tensors().values()]
                if (row, page) not in seen:
                    seen[row, page] = [part.clone() for part in parts]
                elif at % 50 == 49:
                    assert all(torch.equal(a, b) for a, b in zip(seen[row, page], parts, strict=True))
    assert moved > 3, "the store never grew"
    assert len(seen) == B * LAYOUT.pages_after(store.sequences.lengths)[0]


def test_window_grows_for_a_long_draft_and_keeps_its_tokens() -> None:
    keys, values = _tokens(400)
    store = _store((16, 16))
    store.sequences.is_recording = True
    for at in range(400):
        _feed_one(store, keys, values, at)
    assert all(torch.equal(a, b) for a, b in zip(store.read(), (keys, values), strict=True))


def test_clear_drops_everything() -> None:
    keys, values = _tokens()
    store = _store()
    _feed(store, keys, values, [TOTAL], PAD)
    expected = list(_rows(store))
    store.clear()
    store.sequences.clear()
    assert store.num_bytes().total == 0
    assert store.tensors() == {}
    _feed(store, keys, values, [TOTAL], PAD)
    for left, right in zip(expected, _rows(store), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_move_keeps_every_number() -> None:
    keys, values = _tokens()
    store = _store()
    _feed(store, keys, values, [TOTAL], PAD)
    expected = list(_rows(store))
    store.move(torch.device("cpu"))
    for left, right in zip(expected, _rows(store), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_layers_of_one_batch_share_tables_and_differ_in_content() -> None:
    sequences = SequenceBatch(LAYOUT, PagePool())
    layers = [_store(sequences=sequences) for _ in range(3)]
    tokens = [_tokens(seed=seed) for seed in range(3)]
    for at in range(0, TOTAL, 9):
        end = min(at + 9, TOTAL)
        for layer, (keys, values) in zip(layers, tokens, strict=True):
            step = sequences.begin(at, end - at, B)
            layer.append(step, keys[:, :, at:end], values[:, :, at:end])
    for layer, (keys, values) in zip(layers, tokens, strict=True):
        alone = _store()
        _feed(alone, keys, values, [TOTAL])
        _assert_equal(layer, alone)


def test_read_of_a_layer_that_lags_a_step_behind() -> None:
    """Layers take a step one after another: a later one is read while an earlier one is ahead."""
    sequences = SequenceBatch(LAYOUT, PagePool())
    ahead, behind = _store(sequences=sequences), _store(sequences=sequences)
    keys, values = _tokens()
    head = LAYOUT.num_sinks + LAYOUT.window + 3 * LAYOUT.page_size - 1
    for layer in (ahead, behind):
        layer.append(sequences.begin(0, head, B), keys[:, :, :head], values[:, :, :head])
    expected = behind.read()
    step = sequences.begin(head, 40, B)
    ahead.append(step, keys[:, :, head : head + 40], values[:, :, head : head + 40])
    assert all(torch.equal(a, b) for a, b in zip(behind.read(), expected, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_tensors_of_one_autograd_mode_serve_in_another(mode: type) -> None:
    keys, values = _tokens()
    store, expected = _store(), _store()
    _feed(expected, keys, values, [TOTAL], PAD)
    with torch.inference_mode():
        step = store.sequences.begin(0, 100, B, PAD)
        store.append(step, keys[:, :, :100], values[:, :, :100])
        store.select_rows(torch.arange(B))
    with mode():
        for at in (100, 101, 140):
            end = {100: 101, 101: 140, 140: TOTAL}[at]
            store.append(store.sequences.begin(at, end - at, B), keys[:, :, at:end], values[:, :, at:end])
        store.read()
    _assert_equal(store, expected)


def _feed_one(store: LayerStore, keys: Tensor, values: Tensor, at: int) -> None:
    step = store.sequences.begin(at, 1, B)
    store.append(step, keys[:, :, at : at + 1], values[:, :, at : at + 1])


def test_prepared_steps_follow_the_tensors_where_they_go() -> None:
    """Copies, reordered rows and pools that grew: each store decodes from what it holds now, to the bit."""
    keys, values = _tokens()
    query = torch.randn(B, 2 * K, D, generator=torch.Generator().manual_seed(5))

    def decoded(store: LayerStore, at: int, order: Sequence[int] = range(B)) -> Tensor:
        rows = list(order)
        step = store.sequences.begin(store.tokens, 1, B)
        return store.decode(step, query, keys[rows, :, at : at + 1], values[rows, :, at : at + 1], 0.3)

    def fresh(at: int, order: Sequence[int] = range(B)) -> Tensor:
        store, rows = _store(), list(order)
        _feed(store, keys[rows, :, :at], values[rows, :, :at], [at])
        return decoded(store, at, order)

    store = _store()
    _feed(store, keys[:, :, :60], values[:, :, :60], [60])
    assert torch.equal(decoded(store, 60), fresh(60))
    twin = copy.deepcopy(store)
    assert torch.equal(decoded(twin, 61), fresh(61))
    assert torch.equal(decoded(store, 61), fresh(61))
    twin.sequences.select_rows([2, 0, 1])
    twin.select_rows(torch.tensor([2, 0, 1]))
    assert torch.equal(decoded(twin, 62, [2, 0, 1]), fresh(62, [2, 0, 1]))
    _feed(store, keys[:, :, 62:165], values[:, :, 62:165], [103])  # more pages than there was room for
    assert torch.equal(decoded(store, 165), fresh(165))
