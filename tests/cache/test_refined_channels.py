from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_cache import (
    SELECTORS,
    DecodePolicy,
    LayerStore,
    Layout,
    PagedStore,
    PagePool,
    RefinedChannels,
    RowTables,
    SequenceBatch,
)
from twilight_kernels import KeyCodec, KeyPages, ValueCodec, load_key_pages, repeat_channels, store_key_pages

K, G, D, SIZE = 2, 2, 16, 16
CHANNELS = ((1, 5, 2, 3, 0, 15, 7, 9), (4, 4, 4, 8, 9, 10, 11, 12))  # of the second head one three times over
KINDS = pytest.mark.parametrize("channels", [CHANNELS, 8], ids=["named", "chosen"])
LAYOUT = Layout(page_size=SIZE, num_sinks=4, window=24)


def _tokens(total: int = 120, rows: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 5 * torch.rand(D, generator=generator)
    keys = torch.randn(rows, K, total, D, generator=generator) * scale
    return keys.to(dtype), torch.randn(rows, K, total, D, generator=generator).to(dtype)


def _store(refined: RefinedChannels, bits: int = 2, policy: DecodePolicy | None = None) -> LayerStore:
    sequences = SequenceBatch(LAYOUT, PagePool())
    return LayerStore(sequences, KeyCodec(bits, SIZE), ValueCodec(4, SIZE, 16), policy or DecodePolicy(), refined)


def _feed(store: LayerStore, keys: Tensor, values: Tensor, sizes: list[int]) -> None:
    for part, of_values in zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True):
        step = store.sequences.begin(store.tokens, part.shape[2], keys.shape[0], None)
        store.append(step, part, of_values)


@KINDS
def test_widened_queries_and_keys_have_the_logits_they_had(channels: Any) -> None:
    refined, keys = RefinedChannels(channels), _tokens()[0]
    query, index = torch.randn(1, K * G, D), refined.choose(keys[:, :, :SIZE])
    wide_keys, wide_query = refined.widen(keys), repeat_channels(query, index)
    assert wide_keys.shape[-1] == wide_query.shape[-1] == D + 8
    assert torch.equal(refined.fold(wide_keys, index), keys)
    rests = torch.randn(1, K, 120, 8)
    stored = torch.cat([keys, rests], -1)
    logits = torch.einsum("kgd,ksd->kgs", wide_query[0].unflatten(0, (K, G)), stored[0])
    expected = torch.einsum("kgd,ksd->kgs", query[0].unflatten(0, (K, G)), refined.fold(stored, index)[0])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    rows = repeat_channels(query.expand(3, -1, -1), index.expand(3, -1, -1))
    assert torch.equal(rows, wide_query.expand(3, -1, -1))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@KINDS
def test_a_refined_channel_is_stored_with_the_rest_of_a_rest(bits: int, dtype: torch.dtype, channels: Any) -> None:
    refined, levels, codec = RefinedChannels(channels), (1 << bits) - 1, KeyCodec(bits, SIZE)
    keys, slot = _tokens(SIZE, dtype=dtype)[0], torch.zeros(1, dtype=torch.int32)
    index, pages = refined.choose(keys), KeyPages.empty(1, K, D + 8, codec, dtype, "cpu")
    wide = refined.widen(keys)
    refined.write_rests(wide, index, codec)
    store_key_pages(pages, slot, wide)
    error = (refined.fold(load_key_pages(pages, slot, torch.float32), index) - keys.float()).abs().amax(2)[0]  # [K, D]
    ranges = (keys.amax(2) - keys.amin(2)).float()[0]
    for head, named in enumerate(index[0].tolist()):
        for channel in range(D):
            times = 1 + named.count(channel)
            # half a step of the last rest, and what float16 rounds off the bounds of all of them
            assert error[head, channel] <= ranges[head, channel] * (0.51 * levels**-times + 2e-3)


def test_the_first_page_chooses_what_ranges_widest_in_it_and_the_first_of_what_ranges_alike() -> None:
    keys = torch.randn(2, K, SIZE, D)
    keys[..., 0, 3], keys[..., 1, 3] = -50.0, 50.0
    keys[1, 0, :, 4:12] = keys[1, 0, :, 3:4]
    chosen = RefinedChannels(8).choose(keys)
    assert chosen.shape == (2, K, 8) and (chosen[:, :, 0] == 3).all()
    assert chosen[1, 0].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    ranges = keys.amax(2) - keys.amin(2)
    least, most = ranges.gather(-1, chosen).amin(-1), ranges.scatter(-1, chosen, 0.0).amax(-1)
    assert (least >= most).all()
    assert torch.equal(RefinedChannels(8).choose(keys[1:]), chosen[1:])


def test_each_row_keeps_what_its_own_first_page_chose() -> None:
    """Also with padding, where rows change places, and where a page comes back into the window."""
    keys, values = _tokens(rows=2)
    keys[1] = keys[1].flip(-1)
    store = _store(RefinedChannels(8))
    step = store.sequences.begin(0, 120, 2, [0, 30])
    store.append(step, keys, values)
    assert store.refined_index is not None
    expected = [
        RefinedChannels(8).choose(keys[row : row + 1, :, pad + 4 : pad + 20])[0] for row, pad in ((0, 0), (1, 30))
    ]
    assert torch.equal(store.refined_index, torch.stack(expected))
    alone = _store(RefinedChannels(8))
    _feed(alone, keys[1:, :, 30:], values[1:, :, 30:], [7, 83])
    assert torch.equal(store.read()[0][1, :, 30:], alone.read()[0][0])
    rows = torch.tensor([1, 0, 1])
    before = store.read()[0][rows]
    store.sequences.select_rows(rows.tolist())
    store.select_rows(rows)
    assert torch.equal(store.read()[0], before)
    store.crop(store.sequences.crop(60))  # the second row has a page less, the first chose for all it keeps
    assert torch.allclose(store.read()[0], before[:, :, :60], atol=1e-5)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_independent_of_chunks_and_reads_back(channels: Any, dtype: torch.dtype) -> None:
    keys, values = _tokens(rows=2, dtype=dtype)
    whole, fed = _store(RefinedChannels(channels)), _store(RefinedChannels(channels))
    _feed(whole, keys, values, [120])
    _feed(fed, keys, values, [7, 50, *[1] * 40, 23])
    for name, tensor in whole.tensors().items():
        held = fed.tensors()[name]
        if name.startswith("plain"):
            count = int(whole.sequences.plain[0])
            tensor, held = tensor.transpose(2, 3), held.transpose(2, 3)
            if name == "plain.values":
                tensor, held = tensor.transpose(2, 3), held.transpose(2, 3)
            assert torch.equal(tensor[:, :, :count], held[:, :, :count])
        elif name == "refined.index":
            assert torch.equal(tensor, held)
        else:  # which slot a page has is no part of the state
            slots = [torch.from_numpy(s.sequences.table[:, : s.sequences.pages[0]]).long() for s in (whole, fed)]
            assert torch.equal(tensor[slots[0]], held[slots[1]])
    plain = _store(RefinedChannels())
    _feed(plain, keys, values, [120])
    errors = [(store.read()[0] - keys).float().abs() for store in (whole, plain)]
    assert errors[0].shape == keys.shape and whole.refined_index is not None
    refined = whole.refined_index[0, 0].tolist()
    assert errors[0][0, 0, :, refined].mean() < errors[1][0, 0, :, refined].mean() / 3
    others = [channel for channel in range(D) if channel not in refined]
    assert torch.equal(errors[0][0, 0, :, others], errors[1][0, 0, :, others])


@KINDS
@pytest.mark.parametrize("selector", SELECTORS)
def test_decode_attends_to_what_read_returns(selector: str, channels: Any) -> None:
    chosen = SELECTORS[selector](*([] if selector == "full" else [1.0]))  # every packed token
    store, (keys, values) = _store(RefinedChannels(channels), policy=DecodePolicy(selector=chosen)), _tokens(121)
    _feed(store, keys[:, :, :120], values[:, :, :120], [120])
    store.observe(torch.randn(1, K * G, 24, D), 0.25)
    query, step = torch.randn(1, K * G, D), store.sequences.begin(120, 1, 1, None)
    out = store.decode(step, query, keys[:, :, 120:], values[:, :, 120:], 0.25)
    seen_keys, seen_values = store.read()
    logits = torch.einsum("kgd,ksd->kgs", query[0].unflatten(0, (K, G)), seen_keys[0]) * 0.25
    expected = torch.einsum("kgs,ksd->kgd", logits.softmax(-1), seen_values[0]).flatten(0, 1)[None]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_crop_brings_a_pages_tokens_back_whole() -> None:
    store, (keys, values) = _store(RefinedChannels(CHANNELS), bits=4), _tokens()
    _feed(store, keys, values, [120])
    before = store.read()[0]
    store.crop(store.sequences.crop(50))
    assert torch.allclose(store.read()[0], before[:, :, :70], atol=1e-5)


@KINDS
def test_paged_store_holds_the_same_pages(channels: Any) -> None:
    """Two pages of a sequence, and one of another that begins with the second."""
    paged = PagedStore(
        KeyCodec(2, SIZE), ValueCodec(4, SIZE, 16), DecodePolicy(), RefinedChannels(channels), num_sinks=4,
        plain_pages=3, packed_pages=4, kv_heads=K, key_dim=D, value_dim=D, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    (keys, values), at = _tokens(4 + 2 * SIZE + 24), torch.arange(2 * SIZE)
    paged.write(1 + at // SIZE, at % SIZE, *(x[0, :, 4 : 4 + 2 * SIZE].transpose(0, 1) for x in (keys, values)))
    slots = torch.tensor([3, 0, 2], dtype=torch.int32)
    paged.pack(torch.tensor([1, 2, 2]), slots, torch.tensor([3, 3, 2]))
    store = _store(RefinedChannels(channels))
    _feed(store, keys, values, [keys.shape[2]])
    assert isinstance(store.keys, KeyPages)
    for name, tensor in store.keys.tensors().items():
        assert torch.equal(tensor[store.sequences.table[0, :2]], paged.keys.tensors()[name][slots[:2].long()])
    same = torch.equal(paged.keys.codes[2, :, D:], paged.keys.codes[0, :, D:])
    assert same == (channels is CHANNELS)
    assert paged.num_bytes()[1] == K * (SIZE * (D + 8) * 2 // 8 + 4 * (D + 8) + SIZE * (D // 2 + 4) + 2 * 8)
    query = torch.randn(1, K * G, D)
    table = RowTables(
        0, 1, slots[None, :2], torch.tensor([2], dtype=torch.int32), torch.tensor([[0]], dtype=torch.int32),
        torch.tensor([4], dtype=torch.int32), torch.zeros(1, K * G, 5, dtype=torch.float64), None,
    )  # fmt: skip
    paged.write(
        torch.zeros(4, dtype=torch.long), torch.arange(4), *(x[0, :, :4].transpose(0, 1) for x in (keys, values))
    )
    seen_keys, seen_values = (x[0, :, : 4 + 2 * SIZE] for x in store.read())
    logits = torch.einsum("kgd,ksd->kgs", query[0].unflatten(0, (K, G)), seen_keys) * 0.25
    expected = torch.einsum("kgs,ksd->kgd", logits.softmax(-1), seen_values).flatten(0, 1)[None]
    torch.testing.assert_close(paged.attend(query, table, 0.25), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [((0,) * 8, (1,) * 16), ((0,) * 7,), ((),), ((-1,) * 8,), ((0.5,) * 8,), 7, -8])
def test_refined_channels_must_be_as_many_for_each_head(channels: Any) -> None:
    with pytest.raises(ValueError, match="key_refined must name as many channels for each KV head, a multiple of 8"):
        RefinedChannels(channels)


@pytest.mark.parametrize(("heads", "dim"), [(3, 16), (2, 15)])
def test_check_refuses_keys_of_another_shape(heads: int, dim: int) -> None:
    RefinedChannels(CHANNELS).check(2, 16)
    RefinedChannels().check(heads, dim)
    with pytest.raises(ValueError, match=f"channels below {dim} for each of {heads} KV heads, got 2 heads"):
        RefinedChannels(CHANNELS).check(heads, dim)
