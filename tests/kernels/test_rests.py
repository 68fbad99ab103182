"""Which key channels range widest, and what rounding leaves of them, bit for bit as the reference has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twilight_kernels import (
    KeyCodec,
    KeyPages,
    _reference,
    load_key_pages,
    store_key_pages,
    widest_channels,
    write_rests,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
D, COUNT = 80, 16
TURNS = torch.arange(2 * COUNT).view(2, COUNT) % 3
STRIDES = ["tokens", "channels"]  # what lies side by side in memory


def _pages(page_size: int, dtype: torch.dtype, device: str, strides: str = "tokens") -> Tensor:
    """Three pages of two heads, ``[3, 2, page_size, D + COUNT]``, channels of unlike scales, the last ones poisoned."""
    draw = torch.Generator().manual_seed(page_size)
    keys = torch.randn(3, 2, page_size, D + COUNT, generator=draw) * torch.randn(D + COUNT, generator=draw) * 3
    keys[..., D:] = torch.nan
    keys = keys.to(device, dtype)
    return keys if strides == "tokens" else keys.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.interpreted
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 64])
def test_widest_channels_are_those_of_the_reference(
    page_size: int, dtype: torch.dtype, strides: str, device: str
) -> None:
    keys = _pages(page_size, dtype, device, strides)[..., :D]
    keys[1, 0, :, 9], keys[2] = keys[1, 0, :, 4], 5.0
    found = widest_channels(keys, COUNT)
    assert torch.equal(found, _reference.widest_channels(keys, COUNT))
    assert found.dtype == torch.int64 and found[2].tolist() == [list(range(COUNT))] * 2  # first of what is alike


@pytest.mark.interpreted
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("turns", [None, TURNS], ids=["once", "turns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "page_size"), [(2, 16), (3, 64), (4, 16), (8, 32), (16, 16)])
def test_rests_are_bit_equal_to_the_reference(
    bits: int, page_size: int, dtype: torch.dtype, turns: Tensor | None, strides: str, device: str
) -> None:
    codec, keys = KeyCodec(bits, page_size, 0.9), _pages(page_size, dtype, device, strides)
    keys[2, 1, :, :D] = 1.5  # ranges of nothing
    expected, index = keys.clone(), torch.randint(0, D, (3, 2, COUNT), device=device)
    write_rests(keys, index, codec, turns)
    _reference.write_rests(expected, index, codec, turns)
    assert torch.equal(keys, expected) and not keys.isnan().any()
    shared = index[:1].expand(3, -1, -1)  # one sequence's pages
    write_rests(keys, shared, codec, turns)
    _reference.write_rests(expected, shared, codec, turns)
    assert torch.equal(keys, expected)


def test_a_rest_is_what_a_page_does_not_hold(device: str) -> None:
    codec, keys = KeyCodec(3, 16), _pages(16, torch.float32, device)
    index, slots = widest_channels(keys[..., :D], COUNT), torch.arange(3, dtype=torch.int32, device=device)
    write_rests(keys, index, codec)
    stored = KeyPages.empty(3, 2, D, codec, torch.float32, device)
    store_key_pages(stored, slots, keys[..., :D])
    left = (keys[..., :D] - load_key_pages(stored, slots, torch.float32)).gather(
        -1, index[:, :, None].expand(-1, -1, 16, -1)
    )
    assert torch.equal(keys[..., D:], left)


@pytest.mark.parametrize("index", [torch.zeros(2, 2, 8), torch.zeros(3, 1, 8), torch.zeros(3, 2, 96)])
def test_shapes_that_disagree_are_refused(index: Tensor, device: str) -> None:
    with pytest.raises(ValueError, match=r"index must be \[N, K, 16, D \+ R\]"):
        write_rests(_pages(16, torch.float32, device), index.long().to(device), KeyCodec(3, 16))
    with pytest.raises(ValueError, match="count must be within 0"):
        widest_channels(_pages(16, torch.float32, device), 97)
