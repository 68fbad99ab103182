from __future__ import annotations

import pytest
import torch

from twilight_cache import DecodePolicy, PagedStore, RefinedChannels
from twilight_kernels import KeyCodec, ValueCodec, load_key_pages, load_value_pages

SIZE, HEADS, DIM = 16, 2, 32


def make_store(bits: int) -> PagedStore:
    return PagedStore(
        KeyCodec(bits, SIZE), ValueCodec(bits, SIZE, 32), DecodePolicy(), RefinedChannels(), num_sinks=4, plain_pages=6,
        packed_pages=0 if bits == 16 else 3, kv_heads=HEADS, key_dim=DIM, value_dim=DIM, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_written_copied_and_packed(bits: int) -> None:
    store = make_store(bits)
    keys, values = torch.randn(SIZE, HEADS, DIM), torch.randn(SIZE, HEADS, DIM)
    order = torch.randperm(SIZE)
    store.write(torch.full((SIZE,), 3), order, keys[order], values[order])
    store.copy([(3, 5, 10), (5, 0, 10)])
    assert torch.equal(store.plain.keys[0, :, :, :10], keys[:10].permute(1, 2, 0))
    assert torch.equal(store.plain.values[0, :, :10], values[:10].transpose(0, 1))
    store.pack(torch.tensor([3]), torch.tensor([2], dtype=torch.int32))
    ids = torch.tensor([2], dtype=torch.int32)
    step = (keys.amax(0) - keys.amin(0)).max() / (2**bits - 1)
    loaded = load_key_pages(store.keys, ids, torch.float32)[0].transpose(0, 1)  # [page_size, K, D]
    assert float((loaded - keys).abs().max()) <= 0.51 * float(step) + 0.01
    loaded = load_value_pages(store.values, ids, torch.float32)[0].transpose(0, 1)
    assert float((loaded - values).abs().max()) <= 0.51 * float((values.amax() - values.amin()) / (2**bits - 1)) + 0.01


def test_a_raw_codec_has_no_second_copy() -> None:
    store = make_store(16)
    assert store.keys.codes is store.plain.keys and store.values.codes is store.plain.values
    assert store.num_bytes() == (2 * SIZE * HEADS * DIM * 4, 0)
    plain, packed = make_store(4).num_bytes()
    assert plain == 2 * SIZE * HEADS * DIM * 4
    assert packed == 2 * SIZE * HEADS * DIM // 2 + 4 * HEADS * DIM + 4 * HEADS * SIZE
