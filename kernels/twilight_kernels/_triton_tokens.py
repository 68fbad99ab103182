"""The tokens of a prompt on GPUs: torch copies the plain ones, kernels pack the pages."""

from __future__ import annotations

from torch import Tensor

from . import _reference_codec
from ._triton_codec import store_key_pages, store_value_pages
from .layout import KeyPages, PlainTokens, ValuePages


def largest_magnitudes(keys: Tensor, values: Tensor) -> tuple[float, float]:
    """See ``_reference.largest_magnitudes``; waits for the device."""
    return _reference_codec.largest_magnitudes(keys, values)


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
    """See ``_reference.store_tokens``."""
    shape = len(page_ids), key_pages.codec.page_size
    paged = plain.take(row, keys, values, shape[0] * shape[1], num_sinks)
    key_rows, value_rows = (x.unflatten(1, shape).transpose(0, 1) for x in paged)
    store_key_pages(key_pages, page_ids, key_rows)
    store_value_pages(value_pages, page_ids, value_rows)
