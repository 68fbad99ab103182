"""Sparse prefill on CPUs: choosing stripes and attending to them (definitions in ``_reference_prefill``).

A task is one strip of one KV head of one row. The parameter block is this file's own; numbers 0 and 1 belong to
``_numba_pool.run``. Strips are enumerated as ``StripePlan.strips`` does.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._numba_amx import CONFIG_ADDRESS, has_tiles
from ._numba_block import last_contiguous
from ._numba_numbers import RAW_BF16, RAW_KIND, address_of, aligned, fetch_add
from ._numba_pool import BLOCK_SIZE, SOURCE_HASH, compile_worker, run
from ._numba_stripe_amx import attend_strip_tiles, room_of, select_strip_tiles
from ._numba_stripe_attend import attend_strip
from ._numba_stripe_block import (
    ALPHA,
    DIM,
    FLOOR,
    KEYS,
    KEYS_LOW,
    KV_HEADS,
    OUT,
    QUERY,
    REPORT,
    ROWS,
    SCALING,
    STRIP,
    STRIPS,
    TASKS,
    TILES,
    TOTAL,
    VALUE_DIM,
    VALUES,
    VALUES_LOW,
)
from ._numba_stripe_select import scratch, select_strip
from ._numba_strips import BLOCK
from .stripe_plan import StripePlan


def select_stripes(
    query: Tensor, keys: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``_reference_prefill.select_stripes``."""
    query, keys, padding = last_contiguous(query), last_contiguous(keys), padding.contiguous()
    (batch, heads, rows, _), (kv_heads, total) = query.shape, keys.shape[1:3]
    mask = torch.zeros(batch, kv_heads, plan.max_strips(rows), -(-total // 8), dtype=torch.uint8)
    report = torch.zeros(*mask.shape[:3], 5, dtype=torch.float32)
    block = _block(query, keys, plan, scaling, padding, mask)
    block[REPORT] = report.data_ptr()
    run(_select_worker(RAW_KIND[query.dtype], heads // kv_heads, plan.samples), block.ctypes.data, int(block[TASKS]))
    return mask, report


def attend_stripes(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> Tensor:
    """See ``_reference_prefill.attend_stripes``."""
    query, keys, values = last_contiguous(query), last_contiguous(keys), last_contiguous(values)
    mask, padding = mask.contiguous(), padding.contiguous()
    (batch, heads, rows, _), kv_heads = query.shape, keys.shape[1]
    out = torch.empty(batch, rows, heads, values.shape[-1], dtype=query.dtype).transpose(
        1, 2
    )  # as models go on with it
    kind, lows = RAW_KIND[query.dtype], (0, 0)
    if kind != RAW_BF16 and has_tiles():
        keys, values = _split(keys), _split(values)
        lows = 2 * keys.stride(0), 2 * values.stride(0)
        keys, values = keys[0], values[0]
    block = _block(query, keys, plan, scaling, padding, mask)
    block[VALUES : OUT + 4] = values.data_ptr(), *values.stride()[:3], out.data_ptr(), *out.stride()[:3]
    block[VALUE_DIM], block[KEYS_LOW : VALUES_LOW + 1] = values.shape[-1], lows
    run(_attend_worker(kind, heads // kv_heads), block.ctypes.data, int(block[TASKS]))
    return out


def _split(x: Tensor) -> Tensor:
    """Return ``[2, *x.shape]`` bfloat16, high and low parts, see ``_numba_stripe_amx``."""
    parts = x.new_empty(2, *x.shape, dtype=torch.bfloat16)
    parts[0] = x
    torch.sub(x, parts[0], out=parts[1])
    return parts


def _block(query: Tensor, keys: Tensor, plan: StripePlan, scaling: float, padding: Tensor, mask: Tensor) -> np.ndarray:
    """Enter what both workers need; the caller keeps the tensors alive."""
    block = np.zeros(BLOCK_SIZE, np.int64)
    block[QUERY : KEYS + 4] = query.data_ptr(), *query.stride()[:3], keys.data_ptr(), *keys.stride()[:3]
    block[[ROWS, TOTAL, DIM, KV_HEADS]] = query.shape[2], keys.shape[2], query.shape[3], keys.shape[1]
    block[STRIP : STRIPS + 1] = (
        plan.strip, plan.samples, plan.window, plan.num_sinks, padding.data_ptr(), mask.data_ptr(), mask.shape[2]
    )  # fmt: skip
    block[TASKS], block[TILES] = mask.shape[0] * mask.shape[1] * mask.shape[2], CONFIG_ADDRESS
    block.view(np.float64)[[SCALING, ALPHA, FLOOR]] = scaling, plan.alpha, plan.floor
    return block


@cache
def _select_worker(kind: int, q_per_kv: int, samples: int) -> int:
    source, lanes = SOURCE_HASH, min(BLOCK, q_per_kv * samples)

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[TASKS] * (source >= 0)
        weights = scratch(q_per_kv, samples, block)
        task = fetch_add(ticket, 1)
        while task < tasks:
            select_strip(kind, q_per_kv, samples, lanes, block, tasks - 1 - task, weights)  # the longest first
            task = fetch_add(ticket, 1)

    def tiles(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[TASKS] * (source >= 0)
        weights = scratch(q_per_kv, samples, block)
        task = fetch_add(ticket, 1)
        while task < tasks:
            select_strip_tiles(q_per_kv, samples, lanes, block, tasks - 1 - task, weights)
            task = fetch_add(ticket, 1)

    name = f"select_stripes, kind {kind}, q_per_kv {q_per_kv}, samples {samples}"
    if kind == RAW_BF16 and has_tiles():
        return compile_worker(tiles, f"{name}, matrix tiles")
    return compile_worker(worker, name)


@cache
def _attend_worker(kind: int, q_per_kv: int) -> int:
    source, parts = SOURCE_HASH, 1 if kind == RAW_BF16 else 2

    def worker(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[TASKS] * (source >= 0)
        task = fetch_add(ticket, 1)
        while task < tasks:
            attend_strip(kind, q_per_kv, block, tasks - 1 - task)
            task = fetch_add(ticket, 1)

    def tiles(arg):
        block = carray(arg, (BLOCK_SIZE,))
        ticket, tasks = address_of(arg), block[TASKS] * (source >= 0)
        room = aligned(room_of(parts, q_per_kv, block))
        task = fetch_add(ticket, 1)
        while task < tasks:
            attend_strip_tiles(kind, parts, q_per_kv, block, tasks - 1 - task, room.ctypes.data)
            task = fetch_add(ticket, 1)
        room[0] = 0  # it must live until here

    name = f"attend_stripes, kind {kind}, q_per_kv {q_per_kv}"
    if has_tiles():
        return compile_worker(tiles, f"{name}, matrix tiles")
    return compile_worker(worker, name)
