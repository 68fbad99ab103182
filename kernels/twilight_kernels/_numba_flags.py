"""Which entries the query heads of a KV head need, on CPUs (definition: ``_reference.top_p_flags``)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._numba_ir import LANES
from ._numba_numbers import LOWEST, address_of, exact, f32_at, f64_at, fast, fast_exp, fetch_add, u8_at
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run
from ._numba_prune import find_threshold, largest
from ._numba_rows import flag_at_least

_HEADS, _PER_HEAD, _COLUMNS, _LOGITS, _FORCED, _FLAGS, _SHARE, _P = range(2, 10)
_PRESENT = np.float32(-1.0e38)  # above ``LOWEST``, below every logit


def top_p_flags(logits: Tensor, p: float, *, forced_lse: Tensor) -> tuple[Tensor, Tensor]:
    """See ``_reference.top_p_flags``."""
    rows, kv_heads, per_head, columns = logits.shape
    logits, forced_lse = logits.contiguous(), forced_lse.contiguous()
    flags = torch.empty(rows, kv_heads, columns, dtype=torch.bool)
    share = torch.empty(rows, kv_heads, per_head)
    block = np.zeros(BLOCK_SIZE, np.int64)
    block[_HEADS], block[_PER_HEAD], block[_COLUMNS] = rows * kv_heads, per_head, columns
    block[_LOGITS], block[_FORCED] = logits.data_ptr(), forced_lse.data_ptr()
    block[_FLAGS], block[_SHARE] = flags.data_ptr(), share.data_ptr()
    block.view(np.float64)[_P] = p
    run(_flags_worker(), block.ctypes.data, rows * kv_heads)
    return flags, share


@cache
def _flags_worker() -> int:
    source = SOURCE_HASH

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, per_head = address_of(arg), block[_PER_HEAD]
        padded = (block[_COLUMNS] + LANES - 1) // LANES * LANES
        logits, masses = np.empty(padded, np.float32), np.empty((per_head, padded), np.float32)
        near, flags = np.empty((2, padded), np.float32), np.empty(padded, np.uint8)
        totals = np.empty((per_head, 2), np.float32)
        while True:
            head = fetch_add(ticket, 1)
            if head >= block[_HEADS] * (source >= 0):
                break
            flags[:] = 0
            for g in range(per_head):
                _read(block, head * per_head + g, logits)
                _flag(block, head * per_head + g, logits, masses[g], near, flags, totals[g])
            _write(block, head, masses, flags, totals)

    return compile_worker(worker, "top_p_flags")


@exact
def _read(block, row, logits):
    """Copy a row, with the lowest number where nothing is; here, not below, may infinity appear."""
    columns = block[_COLUMNS]
    source = carray(f32_at(block[_LOGITS] + 4 * row * columns), (columns,))
    for i in range(columns):
        logits[i] = source[i] if source[i] >= LOWEST else LOWEST
    logits[columns:] = LOWEST


@fast
def _flag(block, row, logits, masses, near, flags, totals):
    """Flag what one query head needs; note the masses, their sum, and the forced mass beside them."""
    columns = block[_COLUMNS]
    forced_top = carray(f32_at(block[_FORCED]), (row + 1,))[row]
    top = largest(logits, 0, logits.size)
    peak, total = max(top, forced_top), np.float32(0)
    for i in range(logits.size):
        masses[i] = fast_exp(logits[i] - peak)
        total += masses[i]
    forced = fast_exp(forced_top - peak)
    totals[0], totals[1] = total, forced
    p = np.float32(carray(f64_at(block.ctypes.data), (BLOCK_SIZE,))[_P])
    need = p * (total + forced) - forced
    if top <= _PRESENT or (need <= 0 and p < 1):
        return
    limit = _PRESENT
    if p < 1:
        limit = find_threshold(logits, columns, top, peak, total, need, 0, near)
    flag_at_least(logits.ctypes.data, logits.size // LANES, limit, flags.ctypes.data)


@fast
def _write(block, head, masses, flags, totals):
    """Write the flags of a KV head, and what share of each query head's mass they carry."""
    columns, per_head = block[_COLUMNS], block[_PER_HEAD]
    out = carray(u8_at(block[_FLAGS] + head * columns), (columns,))
    for i in range(columns):
        out[i] = flags[i]
    share = carray(f32_at(block[_SHARE]), ((head + 1) * per_head,))
    for g in range(per_head):
        kept, row = np.float32(0), masses[g]
        for i in range(row.size):
            kept += row[i] if flags[i] != 0 else np.float32(0)
        share[head * per_head + g] = (kept + totals[g, 1]) / (totals[g, 0] + totals[g, 1])
