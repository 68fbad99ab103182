"""Packing and unpacking on every backend, bit for bit as the reference does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_kernels import (
    KeyCodec,
    KeyPages,
    ValueCodec,
    ValuePages,
    _reference,
    load_key_pages,
    load_value_pages,
    store_key_pages,
    store_value_pages,
)

BITS = [2, 3, 4, 8, 16]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = 9
# head dim, page size, group size, key clip
SHAPES = [(64, 64, 64, 1.0), (80, 16, 32, 0.9), (96, 32, 64, 0.7), (128, 128, 32, 1.0), (256, 64, 80, 0.95)]


def _numbers(dim: int, page_size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Three pages of two heads, strided as a model's states are, channels of unlike scales."""
    draw = torch.Generator().manual_seed(dim + page_size)
    states = torch.randn(3, page_size, 2, dim, generator=draw) * torch.randn(dim, generator=draw) * 3
    return states.to(device, dtype).transpose(1, 2)


def _key_pages(dim: int, codec: KeyCodec, dtype: torch.dtype, device: str) -> KeyPages:
    return _blank(KeyPages.empty(SLOTS, 2, dim, codec, dtype, device))


def _value_pages(dim: int, codec: ValueCodec, dtype: torch.dtype, device: str) -> ValuePages:
    return _blank(ValuePages.empty(SLOTS, 2, dim, codec, dtype, device))


def _blank(pages: Any) -> Any:
    for tensor in pages.tensors().values():
        tensor.fill_(7)
    return pages


def _assert_same(found: Any, expected: Any) -> None:
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


@pytest.mark.interpreted(
    "80-16-32-0.9-2-dtype2",
    "80-16-32-0.9-3-dtype0",
    "80-16-32-0.9-4-dtype0",
    "80-16-32-0.9-8-dtype2",
    "80-16-32-0.9-16-dtype2",
    "64-64-64-1.0-3-dtype2",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("dim", "page_size", "group_size", "clip"), SHAPES)
def test_pages_are_bit_equal_to_the_reference(
    dtype: torch.dtype, bits: int, dim: int, page_size: int, group_size: int, clip: float, device: str
) -> None:
    numbers = _numbers(dim, page_size, dtype, device)
    slots = torch.tensor([7, 0, 3], dtype=torch.int32, device=device)
    keys = [_key_pages(dim, KeyCodec(bits, page_size, clip), dtype, device) for _ in range(2)]
    values = [_value_pages(dim, ValueCodec(bits, page_size, group_size), dtype, device) for _ in range(2)]
    store_key_pages(keys[0], slots, numbers)
    _reference.store_key_pages(keys[1], slots, numbers)
    _assert_same(keys[0], keys[1])  # slots that are not named keep what they held
    store_value_pages(values[0], slots, numbers)
    _reference.store_value_pages(values[1], slots, numbers)
    _assert_same(values[0], values[1])
    for out in (dtype, torch.float32):
        expected = _reference.load_key_pages(keys[1], slots, out)
        assert torch.equal(load_key_pages(keys[0], slots, out), expected)
        expected = _reference.load_value_pages(values[1], slots, out)
        assert torch.equal(load_value_pages(values[0], slots, out), expected)


@pytest.mark.interpreted
def test_any_strides_give_the_same_pages(device: str) -> None:
    numbers = _numbers(64, 64, torch.float32, device)
    slots = torch.arange(3, dtype=torch.int32, device=device)
    expected = _key_pages(64, KeyCodec(4), torch.float32, device)
    store_key_pages(expected, slots, numbers.contiguous())
    for strided in (
        numbers,
        numbers.transpose(-1, -2).contiguous().transpose(-1, -2),  # channel-major
        torch.stack([numbers, numbers], -1)[..., 0],  # every second number
        torch.stack([numbers, numbers], 0)[1],
    ):
        found = _key_pages(64, KeyCodec(4), torch.float32, device)
        store_key_pages(found, slots, strided)
        _assert_same(found, expected)


@pytest.mark.interpreted
def test_no_pages_are_no_work(device: str) -> None:
    pages = _key_pages(64, KeyCodec(4), torch.float32, device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    store_key_pages(pages, nothing, torch.empty(0, 2, 64, 64, device=device))
    assert load_key_pages(pages, nothing, torch.float32).shape == (0, 2, 64, 64)


@pytest.mark.interpreted(
    "nan-dtype0-3",
    "inf-dtype2-8",
    "nan-dtype0-16",
)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("culprit", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(
    bits: int, dtype: torch.dtype, culprit: float, device: str
) -> None:
    numbers = _numbers(80, 16, dtype, device).clone()
    numbers[-1, -1, -1, -1] = culprit
    slots = torch.arange(3, dtype=torch.int32, device=device)
    keys, blank_keys = (_key_pages(80, KeyCodec(bits, 16), dtype, device) for _ in range(2))
    with pytest.raises(ValueError, match="keys must be finite"):
        store_key_pages(keys, slots, numbers)
    _assert_same(keys, blank_keys)
    values, blank_values = (_value_pages(80, ValueCodec(bits, 16), dtype, device) for _ in range(2))
    with pytest.raises(ValueError, match="values must be finite"):
        store_value_pages(values, slots, numbers)
    _assert_same(values, blank_values)


@pytest.mark.interpreted
@pytest.mark.parametrize("numbers", [torch.full((1, 2, 64, 64), 1e5), torch.randn(1, 2, 64, 64) * 1e30])
def test_numbers_beyond_float16_scales_are_refused(numbers: Tensor, device: str) -> None:
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    keys, values = _key_pages(64, KeyCodec(2), torch.float32, device), ValueCodec(2)
    with pytest.raises(ValueError, match="within float16 range"):
        store_key_pages(keys, slot, numbers.to(device))
    with pytest.raises(ValueError, match="within float16 range"):
        store_value_pages(_value_pages(64, values, torch.float32, device), slot, numbers.to(device))


def test_pages_do_not_depend_on_the_number_of_threads() -> None:
    numbers, slots = _numbers(64, 64, torch.float32, "cpu"), torch.arange(3, dtype=torch.int32)
    before, stored = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stored.append(_key_pages(64, KeyCodec(3), torch.float32, "cpu"))
            store_key_pages(stored[-1], slots, numbers)
    finally:
        torch.set_num_threads(before)
    _assert_same(stored[0], stored[1])
    _assert_same(stored[0], stored[2])


@pytest.mark.parametrize(
    ("slots", "shape", "said"),
    [
        ([0, 1], (3, 2, 64, 64), r"keys must be \[N, K, page_size, D\] = \[2, 2, 64, 64\], got \[3, 2, 64, 64\]"),
        ([0], (1, 2, 63, 64), r"got \[1, 2, 63, 64\]; pass whole pages"),
        ([0], (1, 3, 64, 64), r"got \[1, 3, 64, 64\]"),
        ([9], (1, 2, 64, 64), r"page_ids must be in \[0, 9\), got 9 .. 9"),
        ([-1], (1, 2, 64, 64), r"page_ids must be in \[0, 9\), got -1 .. -1"),
        ([[0]], (1, 2, 64, 64), r"page_ids must be \[N\] int32, got \[1, 1\]"),
    ],
)
def test_store_refuses(slots: list[Any], shape: tuple[int, ...], said: str) -> None:
    pages = _key_pages(64, KeyCodec(4), torch.float32, "cpu")
    with pytest.raises(ValueError, match=said):
        store_key_pages(pages, torch.tensor(slots, dtype=torch.int32), torch.zeros(shape))
    with pytest.raises(ValueError, match="page_ids must be in"):
        load_key_pages(pages, torch.tensor([9]), torch.float32)


def test_float64_runs_on_the_reference() -> None:
    numbers, slots = _numbers(64, 64, torch.float32, "cpu"), torch.arange(3, dtype=torch.int32)
    pages = [_key_pages(64, KeyCodec(4), torch.float32, "cpu") for _ in range(2)]
    store_key_pages(pages[0], slots, numbers.double())
    store_key_pages(pages[1], slots, numbers)
    _assert_same(pages[0], pages[1])
    assert load_key_pages(pages[0], slots, torch.float64).dtype == torch.float64
