"""Packing whole pages of keys and values, and unpacking them (definitions in ``_reference``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import kernels
from .layout import KeyPages, ValuePages


def store_key_pages(pages: KeyPages, page_ids: Tensor, keys: Tensor) -> None:
    """Quantize whole pages of keys into the slots ``page_ids``.

    Args:
        pages: the layer's key pages; slots ``page_ids`` are overwritten, all others untouched.
        page_ids: ``[N]`` int32, distinct, below ``pages.num_pages``.
        keys: ``[N, K, page_size, D]`` model dtype, any strides.
    Raises:
        ValueError: shapes that disagree, or a slot that does not exist; a key that is not finite, or too
            large for float16 scales. Nothing is written then.
    Source: KIVI, arXiv 2402.02750, section 3.1. Reference: ``_reference.store_key_pages``.
    """
    _check_pages("keys", pages, page_ids, keys)
    kernels("codec", keys, keys.dtype).store_key_pages(pages, page_ids, keys)


def load_key_pages(pages: KeyPages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the slots ``page_ids`` ([N] int32) to ``[N, K, page_size, D]`` of ``dtype``.

    Raises:
        ValueError: a slot that does not exist.
    Reference: ``_reference.load_key_pages``.
    """
    _check_slots(pages, page_ids)
    loaded: Tensor = kernels("codec", pages.codes, dtype).load_key_pages(pages, page_ids, dtype)
    return loaded


def store_value_pages(pages: ValuePages, page_ids: Tensor, values: Tensor) -> None:
    """Quantize whole pages of values into the slots ``page_ids``.

    Args:
        pages: the layer's value pages; slots ``page_ids`` are overwritten, all others untouched.
        page_ids: ``[N]`` int32, distinct, below ``pages.num_pages``.
        values: ``[N, K, page_size, D]`` model dtype, any strides.
    Raises:
        ValueError: shapes that disagree, or a slot that does not exist; a value that is not finite, or too
            large for float16 scales. Nothing is written then.
    Source: SKVQ, arXiv 2405.06219, section 3.1. Reference: ``_reference.store_value_pages``.
    """
    _check_pages("values", pages, page_ids, values)
    kernels("codec", values, values.dtype).store_value_pages(pages, page_ids, values)


def load_value_pages(pages: ValuePages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the slots ``page_ids`` ([N] int32) to ``[N, K, page_size, D]`` of ``dtype``.

    Raises:
        ValueError: a slot that does not exist.
    Reference: ``_reference.load_value_pages``.
    """
    _check_slots(pages, page_ids)
    loaded: Tensor = kernels("codec", pages.codes, dtype).load_value_pages(pages, page_ids, dtype)
    return loaded


def _check_pages(name: str, pages: KeyPages | ValuePages, page_ids: Tensor, x: Tensor) -> None:
    shape = (len(page_ids), pages.codes.shape[1], pages.codec.page_size, pages.head_dim)
    if x.shape != shape:
        raise ValueError(
            f"{name} must be [N, K, page_size, D] = {list(shape)}, got {list(x.shape)}; pass whole "
            "pages, one for each page id"
        )
    if x.device != pages.codes.device:
        raise ValueError(f"{name} must be on the device of the pages, {pages.codes.device}, got {x.device}")
    _check_slots(pages, page_ids)


def _check_slots(pages: KeyPages | ValuePages, page_ids: Tensor) -> None:
    if page_ids.dim() != 1 or page_ids.is_floating_point():
        raise ValueError(f"page_ids must be [N] int32, got {list(page_ids.shape)} {page_ids.dtype}")
    if page_ids.numel() and page_ids.device.type == "cpu":  # elsewhere the answer would have to be waited for
        low, high = int(page_ids.min()), int(page_ids.max())
        if low < 0 or high >= pages.num_pages:
            raise ValueError(f"page_ids must be in [0, {pages.num_pages}), got {low} .. {high}; allocate more pages")
