"""One way to handle a layer's pages, whichever codec packs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from twilight_kernels import (
    KeyCodec,
    KeyPages,
    ValueCodec,
    ValuePages,
    key_token_bytes,
    load_key_pages,
    load_value_pages,
    store_key_pages,
    store_value_pages,
    value_token_bytes,
)
from twilight_kernels.skvq import SkvqCodec, SkvqPages, load_skvq_pages, store_skvq_pages

Codec = KeyCodec | ValueCodec | SkvqCodec
Pages = TypeVar("Pages", KeyPages | SkvqPages, ValuePages | SkvqPages)


def empty_keys(
    count: int, codec: KeyCodec | SkvqCodec, heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> KeyPages | SkvqPages:
    """Allocate ``count`` pages of keys, of unspecified content."""
    if isinstance(codec, SkvqCodec):
        return SkvqPages.empty(count, codec)
    return KeyPages.empty(count, heads, dim, codec, dtype, device)


def empty_values(
    count: int, codec: ValueCodec | SkvqCodec, heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> ValuePages | SkvqPages:
    """Allocate ``count`` pages of values, of unspecified content."""
    if isinstance(codec, SkvqCodec):
        return SkvqPages.empty(count, codec)
    return ValuePages.empty(count, heads, dim, codec, dtype, device)


def store_pages(pages: KeyPages | ValuePages | SkvqPages, page_ids: Tensor, x: Tensor) -> None:
    """Quantize ``[N, K, page_size, D]`` into the slots ``page_ids``."""
    if isinstance(pages, SkvqPages):
        store_skvq_pages(pages, page_ids, x)
    elif isinstance(pages, KeyPages):
        store_key_pages(pages, page_ids, x)
    else:
        store_value_pages(pages, page_ids, x)


def load_pages(pages: KeyPages | ValuePages | SkvqPages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the slots ``page_ids`` to ``[N, K, page_size, D]``, channels as the model has them."""
    if isinstance(pages, SkvqPages):
        return load_skvq_pages(pages, page_ids, dtype)
    if isinstance(pages, KeyPages):
        return load_key_pages(pages, page_ids, dtype)
    return load_value_pages(pages, page_ids, dtype)


def changed(pages: Pages, change: Callable[[Tensor], Tensor]) -> Pages:
    """Return pages of the same codec whose tensors went through ``change``."""
    return type(pages)(pages.codec, change(pages.codes), change(pages.lo), change(pages.step))  # type: ignore[arg-type]


def token_bytes(codec: Codec, dim: int, itemsize: int) -> float:
    """Bytes that one token of a KV head takes in a page with its scales."""
    if isinstance(codec, SkvqCodec):
        return codec.token_bytes
    if isinstance(codec, KeyCodec):
        return key_token_bytes(dim, codec, itemsize)
    return value_token_bytes(dim, codec, itemsize)
