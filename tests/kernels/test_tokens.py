"""A prompt's tokens put where they belong in one call, bit for bit as the reference does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_kernels import (
    KeyCodec,
    KeyPages,
    PlainTokens,
    ValueCodec,
    ValuePages,
    _reference,
    largest_magnitudes,
    store_tokens,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINKS, ROW = 5, 1


def _states(tokens: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """``[K, T, D]``, strided as a model's states are."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 2, dim, generator=draw).to(device, dtype).transpose(0, 1)


def _storage(bits: int, page_size: int, dtype: torch.dtype, device: str) -> tuple[KeyPages, ValuePages, PlainTokens]:
    keys = KeyPages.empty(9, 2, 64, KeyCodec(bits, page_size, 0.9), dtype, device)
    values = ValuePages.empty(9, 2, 80, ValueCodec(bits, page_size, 32), dtype, device)
    plain = PlainTokens.empty(2, 2, 64, 80, 48, dtype, device)
    for tensor in (*keys.tensors().values(), *values.tensors().values(), plain.keys, plain.values):
        tensor.fill_(7)
    return keys, values, plain


def _tensors(storage: Any) -> list[Tensor]:
    keys, values, plain = storage
    return [*keys.tensors().values(), *values.tensors().values(), plain.keys, plain.values]


@pytest.mark.interpreted("53-2-16-3-dtype0", "38-2-16-4-dtype2", "3-0-16-3-dtype0")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    ("tokens", "pages", "page_size"), [(53, 2, 16), (37, 2, 16), (38, 2, 16), (165, 2, 64), (20, 0, 16), (3, 0, 16)]
)
def test_store_tokens_is_bit_equal_to_the_reference(
    tokens: int, pages: int, page_size: int, bits: int, dtype: torch.dtype, device: str
) -> None:
    keys, values = _states(tokens, 64, dtype, device), _states(tokens, 80, dtype, device, seed=1)
    ids = torch.tensor([7, 2][:pages], dtype=torch.int32, device=device)
    found, expected = (_storage(bits, page_size, dtype, device) for _ in range(2))
    store_tokens(*found, ids, keys, values, row=ROW, num_sinks=SINKS)
    _reference.store_tokens(*expected, ids, keys, values, row=ROW, num_sinks=SINKS)
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):  # what is not named keeps what it held
        assert torch.equal(a, b)


@pytest.mark.interpreted
@pytest.mark.parametrize("which", [0, 1])
def test_store_tokens_refuses_pages_that_are_not_finite(which: int, device: str) -> None:
    states = [_states(40, 64, torch.float32, device), _states(40, 80, torch.float32, device)]
    states[which][1, 20, 3] = torch.nan
    ids = torch.tensor([1, 2], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=f"{('keys', 'values')[which]} must be finite"):
        store_tokens(*_storage(4, 16, torch.float32, device), ids, *states, row=0, num_sinks=SINKS)


@pytest.mark.parametrize(("tokens", "pages", "told"), [(36, 2, "32 tokens of pages"), (90, 2, "at most 48 plain ones")])
def test_store_tokens_refuses_more_or_fewer_tokens_than_there_is_room_for(tokens: int, pages: int, told: str) -> None:
    states = _states(tokens, 64, torch.float32, "cpu"), _states(tokens, 80, torch.float32, "cpu")
    ids = torch.arange(pages, dtype=torch.int32)
    with pytest.raises(ValueError, match=told):
        store_tokens(*_storage(4, 16, torch.float32, "cpu"), ids, *states, row=0, num_sinks=SINKS)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("culprit", [0.0, -50.0, torch.inf, -torch.inf, torch.nan])
def test_largest_magnitudes_are_those_of_the_reference(culprit: float, dtype: torch.dtype, device: str) -> None:
    keys, values = (_states(300, dim, dtype, device)[None] for dim in (64, 80))
    values[0, 1, 299, 79] = culprit
    for strided in (keys, keys.contiguous(), keys[:, :, ::2], keys.transpose(-1, -2)):
        found = torch.tensor(largest_magnitudes(strided, values))
        expected = torch.tensor(_reference.largest_magnitudes(strided, values))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
