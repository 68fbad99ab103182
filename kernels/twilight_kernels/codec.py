"""Packing whole pages of keys and values, and unpacking them (definitions in ``_reference``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import kernels
from .layout import KeyPages, PlainTokens, ValuePages


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


def largest_magnitudes(keys: Tensor, values: Tensor) -> tuple[float, float]:
    """Return the largest absolute key and value, NaN if any is: what tells whether they can be packed.

    Args:
        keys, values: ``[B, K, T, D]`` of one dtype, not empty.
    Raises:
        ValueError: other shapes or dtypes.
    Reference: ``_reference.largest_magnitudes``.
    """
    if keys.dim() != 4 or values.dim() != 4 or keys.dtype != values.dtype or not keys.numel() or not values.numel():
        raise ValueError(
            f"keys and values must be [B, K, T, D] of one dtype and not empty, got {list(keys.shape)} {keys.dtype} and "
            f"{list(values.shape)} {values.dtype}"
        )
    found: tuple[float, float] = kernels("tokens", keys, keys.dtype).largest_magnitudes(keys, values)
    return found


def store_tokens(
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    page_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    row: int,
    num_sinks: int,
) -> None:
    """Put one row's tokens where they belong: sinks and last tokens plain, whole pages between them packed.

    Args:
        key_pages, value_pages: the layer's pages; slots ``page_ids`` are overwritten, all others untouched.
        plain: row ``row`` takes the first ``num_sinks`` tokens and, behind them, those after the pages.
        page_ids: ``[N]`` int32, distinct, below ``key_pages.num_pages``.
        keys, values: ``[K, T, Dk]``, ``[K, T, Dv]`` of the plain tokens' dtype, any strides; T is at least
            ``num_sinks + N * page_size`` if there are pages.
        row: of the batch.
        num_sinks: tokens before the pages.
    Raises:
        ValueError: shapes or dtypes that disagree, or a slot that does not exist; a number of a page that is not
            finite, or too large for float16 scales: what was written is unspecified then, so ask
            ``largest_magnitudes`` first.
    Reference: ``_reference.store_tokens``.
    """
    paged, columns = len(page_ids) * key_pages.codec.page_size, keys.shape[1]
    plain_len = min(columns, num_sinks) + max(0, columns - num_sinks - paged)
    shapes = (plain.form[1], columns, plain.form[2]), (plain.form[1], columns, plain.form[3])
    if (
        (keys.shape, values.shape) != shapes or not keys.dtype == values.dtype == plain.keys.dtype
        or plain_len > plain.capacity or (paged and columns < num_sinks + paged)
    ):  # fmt: skip
        raise ValueError(
            f"keys and values must be {list(shapes[0])} and {list(shapes[1])} of {plain.keys.dtype}, and fill "
            f"{paged} tokens of pages and at most {plain.capacity} plain ones, got {list(keys.shape)} {keys.dtype} and "
            f"{list(values.shape)} {values.dtype}"
        )
    _check_slots(key_pages, page_ids)
    kernels("tokens", keys, keys.dtype).store_tokens(
        key_pages, value_pages, plain, page_ids, keys, values, row=row, num_sinks=num_sinks
    )


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
    if page_ids.device.type == "cpu":  # elsewhere the answer would have to be waited for
        listed = page_ids.tolist()
        if listed and (min(listed) < 0 or max(listed) >= pages.num_pages):
            raise ValueError(
                f"page_ids must be in [0, {pages.num_pages}), got {min(listed)} .. {max(listed)}; allocate more pages"
            )
