"""Packing and unpacking pages on GPUs, bit for bit as ``_reference`` does it.

Keys and values are one case: rows of a page (channels of keys, tokens of values) whose numbers (tokens; channels) are
packed along the row, a scale for each run of ``GROUP`` of them. Products and sums are rounded one by one, as torch
does: fused ones would put numbers between two levels on the other side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reference_codec import not_finite
from ._triton_tiles import REGISTERS, power_of_two, unpack_codes
from .layout import KeyPages, ValuePages

_NUMBERS = 2048  # numbers of a tile


def store_key_pages(pages: KeyPages, page_ids: Tensor, keys: Tensor) -> None:
    """See ``_reference.store_key_pages``."""
    rows = keys.transpose(-1, -2)  # [N, K, D, page_size]
    _store(pages, page_ids, rows, "keys", pages.codec.page_size, pages.codec.clip, is_key=True)


def load_key_pages(pages: KeyPages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``_reference.load_key_pages``."""
    if pages.codec.is_raw:
        return pages.codes[page_ids.long()].transpose(-1, -2).to(dtype)
    _, heads, dim, size = pages.form
    out = torch.empty(len(page_ids), heads, size, dim, dtype=dtype, device=pages.codes.device)
    _load(pages, page_ids, out.transpose(-1, -2), size)
    return out


def store_value_pages(pages: ValuePages, page_ids: Tensor, values: Tensor) -> None:
    """See ``_reference.store_value_pages``."""
    _store(pages, page_ids, values, "values", pages.codec.group_size, 1.0, is_key=False)


def load_value_pages(pages: ValuePages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``_reference.load_value_pages``."""
    if pages.codec.is_raw:
        return pages.codes[page_ids.long()].to(dtype)
    _, heads, dim, size = pages.form
    out = torch.empty(len(page_ids), heads, size, dim, dtype=dtype, device=pages.codes.device)
    _load(pages, page_ids, out, pages.codec.group_size)
    return out


def _store(
    pages: KeyPages | ValuePages, page_ids: Tensor, x: Tensor, what: str, group: int, clip: float, *, is_key: bool
) -> None:
    """Pack rows ``x [N, K, rows, count]``; whether all is finite is waited for, so that nothing is written if not."""
    codec = pages.codec
    if not len(page_ids):
        return
    if codec.is_raw:
        if not bool(torch.isfinite(x).all()):
            raise not_finite(what)
        pages.codes[page_ids.long()] = x.to(pages.codes.dtype)
        return
    number, heads, rows, count = x.shape
    shape = _shape(rows, count, group)
    lo = torch.empty(number, heads, rows, -(-count // group), dtype=torch.float16, device=x.device)
    step = torch.empty_like(lo)
    grid = number * heads, triton.cdiv(rows, shape["ROWS"])
    with torch.cuda.device_of(x):
        range_kernel[grid](
            x, *x.stride(), lo, step, heads, rows, clip, LEVELS=codec.levels, IS_KEY=is_key, **shape,
            num_warps=4, maxnreg=REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip
        if not bool((torch.isfinite(lo) & torch.isfinite(step)).all()):
            raise not_finite(what)
        pack_kernel[grid](
            x, *x.stride(), lo, step, page_ids.contiguous(), pages.codes, pages.lo, pages.step, heads, rows,
            BITS=codec.bits, **shape, num_warps=4, maxnreg=REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip


def _load(pages: KeyPages | ValuePages, page_ids: Tensor, out: Tensor, group: int) -> None:
    number, heads, rows, count = out.shape
    if not number:
        return
    shape = _shape(rows, count, group)
    with torch.cuda.device_of(out):
        load_kernel[(number * heads, triton.cdiv(rows, shape["ROWS"]))](
            page_ids.contiguous(), pages.codes, pages.lo, pages.step, out, *out.stride(), heads, rows,
            BITS=pages.codec.bits, **shape, num_warps=4, maxnreg=REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip


def _shape(rows: int, count: int, group: int) -> dict[str, int]:
    width = power_of_two(count)
    return {"COUNT": count, "WIDTH": width, "GROUP": group, "ROWS": min(power_of_two(rows), max(1, _NUMBERS // width))}


@triton.jit
def range_kernel(
    x, page_stride, head_stride, row_stride, stride, lo, step, heads, rows, clip, LEVELS: tl.constexpr,
    IS_KEY: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scales of rows; not a number or infinite where a number of theirs is, or float16 cannot hold them."""
    page_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    base = x + page_head // heads * page_stride + page_head % heads * head_stride
    mask = (row < rows)[:, None] & (i < COUNT)[None, :]
    numbers = tl.load(base + row[:, None] * row_stride + i[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
    groups: tl.constexpr = (COUNT + GROUP - 1) // GROUP
    for group in range(groups):
        inside = mask & (i // GROUP == group)[None, :]
        low = tl.min(tl.where(inside, numbers, float("inf")), 1)
        high = tl.max(tl.where(inside, numbers, float("-inf")), 1)
        if IS_KEY:
            half = (high - low) * 0.5 * clip
            low = (high + low) * 0.5 - half
            spread = half * 2.0
        else:
            spread = high - low
        poison = tl.sum(tl.where(inside, numbers * 0.0, 0.0), 1)  # minima and maxima pass over what is no number
        place = (page_head * rows + row) * groups + group
        tl.store(lo + place, (low + poison).to(tl.float16), mask=row < rows)
        tl.store(step + place, tl.div_rn(spread, spread * 0.0 + LEVELS).to(tl.float16), mask=row < rows)


@triton.jit
def level_codes(base, row, i, mask, row_stride, stride, lo, step, scale, LEVELS: tl.constexpr):
    """Codes of some numbers of rows: the nearest level of the stored scales."""
    numbers = tl.load(base + row * row_stride + i * stride, mask=mask, other=0.0).to(tl.float32)
    low = tl.load(lo + scale, mask=mask, other=0.0).to(tl.float32)
    width = tl.load(step + scale, mask=mask, other=1.0).to(tl.float32)
    inverse = tl.where(width > 0.0, tl.div_rn(width * 0.0 + 1.0, tl.where(width > 0.0, width, 1.0)), 0.0)
    level = tl.floor((numbers - low) * inverse + 0.5)
    return tl.minimum(tl.maximum(level, 0.0), LEVELS).to(tl.int32)


@triton.jit
def pack_plane(
    base, row, rows, row_stride, stride, lo, step, scale, target, PLANE: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write one plane of ``PLANE`` bits, from bit ``SHIFT`` of the codes on, to ``target [ROWS]``."""
    size: tl.constexpr = COUNT * PLANE // 8
    wide: tl.constexpr = WIDTH * PLANE // 8
    j = tl.arange(0, wide)
    mask = (row < rows)[:, None] & (j < size)[None, :]
    byte = tl.zeros([ROWS, wide], tl.int32)
    for field in tl.static_range(8 // PLANE):
        i = (j + field * size)[None, :]
        code = level_codes(
            base, row[:, None], i, mask, row_stride, stride, lo, step, scale[:, None] + i // GROUP, (1 << BITS) - 1
        )
        byte = byte | (((code >> SHIFT) & ((1 << PLANE) - 1)) << (field * PLANE))
    tl.store(target[:, None] + j[None, :], byte.to(tl.uint8), mask=mask)


@triton.jit
def pack_kernel(
    x, page_stride, head_stride, row_stride, stride, lo, step, page_ids, codes, lows, steps, heads, rows,
    BITS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write codes and scales of rows into their slots, plane by plane."""
    page_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(page_ids + page_head // heads).to(tl.int64) * heads + page_head % heads
    base = x + page_head // heads * page_stride + page_head % heads * head_stride
    groups: tl.constexpr = (COUNT + GROUP - 1) // GROUP
    given = (page_head * rows + row) * groups
    home = (slot * rows + row) * groups
    for group in range(groups):
        tl.store(lows + home + group, tl.load(lo + given + group, mask=row < rows), mask=row < rows)
        tl.store(steps + home + group, tl.load(step + given + group, mask=row < rows), mask=row < rows)
    target = codes + (slot * rows + row) * (COUNT * BITS // 8)
    if BITS == 3:
        pack_plane(base, row, rows, row_stride, stride, lo, step, given, target, 2, 0, BITS, COUNT, WIDTH, GROUP, ROWS)
        target += COUNT // 4
        pack_plane(base, row, rows, row_stride, stride, lo, step, given, target, 1, 2, BITS, COUNT, WIDTH, GROUP, ROWS)
    else:
        pack_plane(
            base, row, rows, row_stride, stride, lo, step, given, target, BITS, 0, BITS, COUNT, WIDTH, GROUP, ROWS
        )


@triton.jit
def load_kernel(
    page_ids, codes, lows, steps, out, page_stride, head_stride, row_stride, stride, heads, rows,
    BITS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Dequantize ``ROWS`` packed rows of one head of a page."""
    page_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(page_ids + page_head // heads).to(tl.int64) * heads + page_head % heads
    i = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None] & (i < COUNT)
    groups: tl.constexpr = (COUNT + GROUP - 1) // GROUP
    home = (slot * rows + row)[:, None]
    low = tl.load(lows + home * groups + i // GROUP, mask=mask, other=0.0).to(tl.float32)
    step = tl.load(steps + home * groups + i // GROUP, mask=mask, other=0.0).to(tl.float32)
    code = unpack_codes(codes + home * (COUNT * BITS // 8), i, COUNT, BITS, mask).to(tl.float32)
    base = out + page_head // heads * page_stride + page_head % heads * head_stride
    numbers = low + code * step
    tl.store(base + row[:, None] * row_stride + i * stride, numbers.to(out.dtype.element_ty), mask=mask)
