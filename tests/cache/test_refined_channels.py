from __future__ import annotations

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
    SequenceBatch,
)
from twilight_kernels import KeyCodec, KeyPages, ValueCodec, load_key_pages

K, G, D, SIZE = 2, 3, 16, 16
CHANNELS = ((1, 5, 2, 3, 0, 15, 7, 9), (4, 4, 4, 8, 9, 10, 11, 12))  # of the second head one three times over
LAYOUT = Layout(page_size=SIZE, num_sinks=4, window=24)


def _tokens(total: int = 120, rows: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 5 * torch.rand(D, generator=generator)
    keys = torch.randn(rows, K, total, D, generator=generator) * scale
    return keys.to(dtype), torch.randn(rows, K, total, D, generator=generator).to(dtype)


def _store(refined: RefinedChannels, bits: int = 2, policy: DecodePolicy | None = None) -> LayerStore:
    sequences = SequenceBatch(LAYOUT, PagePool())
    return LayerStore(sequences, KeyCodec(bits, SIZE), ValueCodec(8, SIZE, 16), policy or DecodePolicy(), refined)


def _feed(store: LayerStore, keys: Tensor, values: Tensor, sizes: list[int]) -> None:
    for part, of_values in zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True):
        step = store.sequences.begin(store.tokens, part.shape[2], keys.shape[0], None)
        store.append(step, part, of_values)


def test_widened_queries_and_keys_have_the_logits_they_had() -> None:
    refined, keys = RefinedChannels(CHANNELS), _tokens()[0]
    query = torch.randn(1, K * G, D)
    wide_keys, wide_query = refined.widen(keys), refined.widen_query(query)
    assert wide_keys.shape[-1] == wide_query.shape[-1] == D + 8
    assert torch.equal(refined.fold(wide_keys), keys)
    rests = torch.randn(1, K, 120, 8)
    stored = torch.cat([keys, rests], -1)
    logits = torch.einsum("kgd,ksd->kgs", wide_query[0].unflatten(0, (K, G)), stored[0])
    expected = torch.einsum("kgd,ksd->kgs", query[0].unflatten(0, (K, G)), refined.fold(stored)[0])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    several = refined.widen_query(query[:, :, None].expand(-1, -1, 4, -1))
    assert torch.equal(several, wide_query[:, :, None].expand(-1, -1, 4, -1))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_leaves_a_refined_channel_the_rest_of_a_rest(bits: int, dtype: torch.dtype) -> None:
    refined, levels = RefinedChannels(CHANNELS), (1 << bits) - 1
    keys = _tokens(SIZE, dtype=dtype)[0]
    pages = KeyPages.empty(1, K, D + 8, KeyCodec(bits, SIZE), dtype, "cpu")
    slot = torch.zeros(1, dtype=torch.int32)
    refined.store(pages, slot, refined.widen(keys))
    error = (refined.fold(load_key_pages(pages, slot, torch.float32)) - keys.float()).abs().amax(2)[0]  # [K, D]
    ranges = (keys.amax(2) - keys.amin(2)).float()[0]
    for head, channels in enumerate(CHANNELS):
        for channel in range(D):
            times = 1 + channels.count(channel)
            # half a step of the last rest, and what float16 rounds off the bounds of all of them
            assert error[head, channel] <= ranges[head, channel] * (0.51 * levels**-times + 2e-3)


def test_state_is_independent_of_chunks_and_reads_back() -> None:
    keys, values = _tokens(rows=2)
    whole, fed = _store(RefinedChannels(CHANNELS)), _store(RefinedChannels(CHANNELS))
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
        else:  # which slot a page has is no part of the state
            slots = [torch.from_numpy(s.sequences.table[:, : s.sequences.pages[0]]).long() for s in (whole, fed)]
            assert torch.equal(tensor[slots[0]], held[slots[1]])
    plain = _store(RefinedChannels())
    _feed(plain, keys, values, [120])
    errors = [(store.read()[0] - keys).abs() for store in (whole, plain)]
    assert errors[0].shape == keys.shape
    assert errors[0][:, 0, :, CHANNELS[0]].mean() < errors[1][:, 0, :, CHANNELS[0]].mean() / 3
    others = [channel for channel in range(D) if channel not in CHANNELS[0]]
    assert torch.equal(errors[0][:, 0, :, others], errors[1][:, 0, :, others])


@pytest.mark.parametrize("selector", SELECTORS)
def test_decode_attends_to_what_read_returns(selector: str) -> None:
    chosen = SELECTORS[selector](*([] if selector == "full" else [1.0]))  # every packed token
    store, (keys, values) = _store(RefinedChannels(CHANNELS), policy=DecodePolicy(selector=chosen)), _tokens(121)
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


def test_paged_store_holds_the_same_pages() -> None:
    refined = RefinedChannels(CHANNELS)
    paged = PagedStore(
        KeyCodec(2, SIZE), ValueCodec(4, SIZE, 16), DecodePolicy(), refined, num_sinks=4, plain_pages=2, packed_pages=1,
        kv_heads=K, key_dim=D, value_dim=D, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    keys, values = _tokens(SIZE)
    paged.write(
        torch.ones(SIZE, dtype=torch.long), torch.arange(SIZE), keys[0].transpose(0, 1), values[0].transpose(0, 1)
    )
    paged.pack(torch.tensor([1]), torch.zeros(1, dtype=torch.int32))
    pages = KeyPages.empty(1, K, D + 8, KeyCodec(2, SIZE), torch.float32, "cpu")
    refined.store(pages, torch.zeros(1, dtype=torch.int32), refined.widen(keys))
    for name, tensor in pages.tensors().items():
        assert torch.equal(tensor, paged.keys.tensors()[name])
    assert paged.num_bytes()[1] == K * (SIZE * (D + 8) * 2 // 8 + 4 * (D + 8) + SIZE * (D * 4 // 8 + 4))


@pytest.mark.parametrize("channels", [((0,) * 8, (1,) * 16), ((0,) * 7,), ((),), ((-1,) * 8,), ((0.5,) * 8,)])
def test_refined_channels_must_be_as_many_for_each_head(channels: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="key_refined must name as many channels for each KV head, a multiple of 8"):
        RefinedChannels(channels)


@pytest.mark.parametrize(("heads", "dim"), [(3, 16), (2, 15)])
def test_check_refuses_keys_of_another_shape(heads: int, dim: int) -> None:
    RefinedChannels(CHANNELS).check(2, 16)
    RefinedChannels().check(heads, dim)
    with pytest.raises(ValueError, match=f"channels below {dim} for each of {heads} KV heads, got 2 heads"):
        RefinedChannels(CHANNELS).check(heads, dim)
