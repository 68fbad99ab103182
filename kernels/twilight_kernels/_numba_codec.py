"""Packing and unpacking pages on CPUs, bit for bit as ``_reference`` does it.

A task is one page of one KV head. Storing takes two rounds: the first works out all scales and whether
anything is not finite, and only if nothing is, the second writes. Sums of floats do not occur, so ``exact``
code (no reassociation, no fused multiply-add) still vectorizes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ._numba_block import kind_of, last_contiguous
from ._numba_key_pages import key_worker
from ._numba_numbers import RAW_KIND
from ._numba_page_block import (
    BITS,
    CLIP,
    CODES,
    DIM,
    GROUP_SIZE,
    GROUPS,
    HEADS,
    IS_BAD,
    KIND,
    LO,
    LOAD,
    MEASURE,
    NEW_LO,
    NEW_STEP,
    PAGES,
    ROUND,
    SLOTS,
    STEP,
    WRITE,
    X_PAGE,
    X_TOKEN,
    X,
)
from ._numba_pool import BLOCK_SIZE, run, scratch
from ._numba_value_pages import value_worker
from ._reference_codec import not_finite
from .layout import KeyPages, ValuePages


def store_key_pages(pages: KeyPages, page_ids: Tensor, keys: Tensor) -> None:
    """See ``_reference.store_key_pages``."""
    keys, slots = last_contiguous(keys), _slots(page_ids)
    block = _block(pages, slots, keys)
    block.view(np.float64)[CLIP] = pages.codec.clip
    _store(key_worker(), block, "keys", pages)


def load_key_pages(pages: KeyPages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``_reference.load_key_pages``."""
    slots, (heads, dim) = _slots(page_ids), pages.codes.shape[1:3]
    out = torch.empty(len(slots), heads, pages.codec.page_size, dim, dtype=dtype)
    block = _block(pages, slots, out)
    block[ROUND] = LOAD
    run(key_worker(), block.ctypes.data, len(slots) * heads)
    return out


def store_value_pages(pages: ValuePages, page_ids: Tensor, values: Tensor) -> None:
    """See ``_reference.store_value_pages``."""
    values, slots = last_contiguous(values), _slots(page_ids)
    block = _block(pages, slots, values)
    block[GROUP_SIZE], block[GROUPS] = pages.codec.group_size, pages.codec.groups(values.shape[-1])
    _store(value_worker(), block, "values", pages)


def load_value_pages(pages: ValuePages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``_reference.load_value_pages``."""
    slots, codec, (heads, _, stored) = _slots(page_ids), pages.codec, pages.codes.shape[1:]
    dim = stored if codec.is_raw else stored * 8 // codec.bits
    out = torch.empty(len(slots), heads, codec.page_size, dim, dtype=dtype)
    block = _block(pages, slots, out)
    block[GROUP_SIZE], block[GROUPS], block[ROUND] = codec.group_size, codec.groups(dim), LOAD
    run(value_worker(), block.ctypes.data, len(slots) * heads)
    return out


def _slots(page_ids: Tensor) -> Tensor:
    return page_ids.to(torch.int32).contiguous()


def _block(pages: KeyPages | ValuePages, slots: Tensor, x: Tensor) -> np.ndarray:
    """Describe pages and the numbers that go into them or come out of them."""
    block = np.zeros(BLOCK_SIZE, np.int64)
    block[PAGES : DIM + 1] = x.shape
    block[KIND], block[X], block[X_PAGE : X_TOKEN + 1] = RAW_KIND[x.dtype], x.data_ptr(), x.stride()[:3]
    block[BITS], block[SLOTS], block[CODES] = kind_of(pages), slots.data_ptr(), pages.codes.data_ptr()
    block[LO], block[STEP] = pages.lo.data_ptr(), pages.step.data_ptr()
    return block


def _store(worker: int, block: np.ndarray, what: str, pages: KeyPages | ValuePages) -> None:
    """Work out the scales; if all numbers are finite, write them and the codes."""
    tasks = int(block[PAGES] * block[HEADS])
    num_bytes = int(block[PAGES]) * 2 * math.prod(pages.lo.shape[1:])  # of float16 scales
    block[NEW_LO] = scratch(2 * num_bytes)
    block[NEW_STEP] = block[NEW_LO] + num_bytes
    block[ROUND] = MEASURE
    run(worker, block.ctypes.data, tasks)
    if block[IS_BAD]:
        raise not_finite(what)
    block[0], block[ROUND] = 0, WRITE
    run(worker, block.ctypes.data, tasks)
