from __future__ import annotations

import pytest
import torch

from twilight_cache import DecodePolicy, PagedStore, PromptTables, RefinedChannels, RowTables
from twilight_kernels import KeyCodec, ValueCodec, load_key_pages, load_value_pages

SIZE, HEADS, DIM = 16, 2, 16


def make_store(bits: int) -> PagedStore:
    return PagedStore(
        KeyCodec(bits, SIZE), ValueCodec(bits, SIZE, 16), DecodePolicy(), RefinedChannels(), num_sinks=4, plain_pages=6,
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
    store.pack(torch.tensor([3]), torch.tensor([2], dtype=torch.int32), torch.tensor([2]))
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


@pytest.mark.parametrize("bits", [4, 16])
def test_rows_of_a_prompt_attend_as_rows_that_decode(bits: int) -> None:
    """40 tokens, of which one page has left the window of 8 for the last of them."""
    store, tokens = make_store(bits), 40
    slots, at = torch.tensor([4, 0, 3, 2]), torch.arange(tokens)  # of the sinks, then of three pages
    page = torch.where(at < 4, 0, (at - 4) // SIZE + 1)
    store.write(slots[page], torch.where(at < 4, at, (at - 4) % SIZE), *torch.randn(2, tokens, HEADS, DIM))
    if bits < 16:
        store.pack(slots[1:2], torch.tensor([1], dtype=torch.int32), torch.tensor([1]))
    packed = slots[1:2].int() if bits == 16 else torch.tensor([1], dtype=torch.int32)
    query, first = torch.randn(12, 2 * HEADS, DIM), tokens - 12
    count = (at[first:] - 4 - 8) // SIZE
    assert count.tolist() == [1] * 12
    stats = torch.zeros(2, 12, 2 * HEADS, 5, dtype=torch.float64)
    plain = torch.cat([slots[:1], slots[2:]]).int()
    found = store.attend(query, PromptTables(0, 12, first, 8, packed, plain, stats[0]), 0.2)
    rows = RowTables(
        0, 12, packed.expand(12, -1), count.int(), plain.expand(12, -1), (at[first:] + 1 - SIZE).int(), stats[1], None
    )
    assert torch.allclose(found, store.attend(query, rows, 0.2), atol=1e-6)
    assert torch.allclose(stats[0], stats[1], atol=1e-6)
