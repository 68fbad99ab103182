"""The definition of packing pages and unpacking them: pure torch, float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import KeyPages, PlainTokens, ValuePages
from .page_codec import KeyCodec, packed_size, planes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes planar along the last axis.

    Args:
        codes: ``[..., n]`` uint8 below ``2 ** bits``, ``n`` a multiple of 8.
        bits: 2, 3, 4 or 8.
    Returns:
        ``[..., n * bits / 8]`` uint8: for each plane of ``w`` bits, byte ``j`` holds elements
        ``j + i * n * w / 8``.
    """
    parts, shift = [], 0
    for width in planes(bits):
        fields = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        split = plane.unflatten(-1, (fields, -1)).to(torch.int32)
        weight = torch.arange(fields, device=codes.device).mul_(width).view(-1, 1)
        parts.append((split << weight).sum(-2).to(torch.uint8))
        shift += width
    return torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo ``pack``: ``[..., n * bits / 8]`` uint8 to ``[..., n]`` uint8."""
    count = packed.shape[-1] * 8 // bits
    out = torch.zeros(*packed.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    start, shift = 0, 0
    for width in planes(bits):
        size = packed_size(count, width)
        plane = packed[..., start : start + size]
        fields = [((plane >> (i * width)) & ((1 << width) - 1)) for i in range(8 // width)]
        out |= torch.cat(fields, -1) << shift
        start, shift = start + size, shift + width
    return out


def store_key_pages(pages: KeyPages, page_ids: Tensor, keys: Tensor) -> None:
    """See ``codec.store_key_pages``; the range is clipped about its midpoint."""
    codec, index = pages.codec, page_ids.long()
    _require_finite(keys, "keys")
    if codec.is_raw:
        pages.codes[index] = keys.transpose(-1, -2).to(pages.codes.dtype)
        return
    codes, lo, step = _rounded(keys.float(), codec)
    _require_finite(lo, "keys")
    _require_finite(step, "keys")
    pages.codes[index] = pack(codes.to(torch.uint8).transpose(-1, -2), codec.bits)
    pages.lo[index], pages.step[index] = lo, step


def widest_channels(keys: Tensor, count: int) -> Tensor:
    """See ``rests.widest_channels``."""
    low, high = torch.aminmax(keys.float(), dim=-2)
    # stable, for a page must choose the same wherever and beside whatever it is packed
    return torch.sort(high - low, dim=-1, descending=True, stable=True).indices[..., :count]


def write_rests(keys: Tensor, index: Tensor, codec: KeyCodec, turns: Tensor | None = None) -> None:
    """See ``rests.write_rests``."""
    count, size = index.shape[-1], keys.shape[2]
    exact = keys.narrow(-1, 0, keys.shape[-1] - count)
    left = exact.gather(-1, index[:, :, None].expand(-1, -1, size, -1)).float()
    rests = left = left - _page_holds(left, codec)
    if turns is not None:
        turns = turns.to(keys.device)[:, None]
        for turn in range(1, 1 + int(turns.max())):
            left = left - _page_holds(left, codec)
            rests = torch.where(turns == turn, left, rests)
    keys.narrow(-1, keys.shape[-1] - count, count).copy_(rests)


def _page_holds(keys: Tensor, codec: KeyCodec) -> Tensor:
    """What pages of ``codec`` would hold of float32 keys ``[N, K, page_size, D]``; NaN if they cannot."""
    if codec.is_raw:
        return keys
    codes, lo, step = _rounded(keys, codec)
    return lo.float().unsqueeze(-2) + codes * step.float().unsqueeze(-2)


def repeat_channels(query: Tensor, index: Tensor) -> Tensor:
    """Append to queries ``[B, H, D]`` the channels ``index [B, K, R]``, of which keys hold rests."""
    return torch.cat([query, query.gather(-1, index.repeat_interleave(query.shape[1] // index.shape[1], 1))], -1)


def load_key_pages(pages: KeyPages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``codec.load_key_pages``."""
    index = page_ids.long()
    if pages.codec.is_raw:
        return pages.codes[index].transpose(-1, -2).to(dtype)
    wide = wide_dtype(dtype)
    codes = unpack(pages.codes[index], pages.codec.bits).to(wide)  # [N, K, D, page_size]
    x = pages.lo[index].to(wide).unsqueeze(-1) + codes * pages.step[index].to(wide).unsqueeze(-1)
    return x.transpose(-1, -2).to(dtype)


def store_value_pages(pages: ValuePages, page_ids: Tensor, values: Tensor) -> None:
    """See ``codec.store_value_pages``."""
    codec, index = pages.codec, page_ids.long()
    _require_finite(values, "values")
    if codec.is_raw:
        pages.codes[index] = values.to(pages.codes.dtype)
        return
    x = values.float()  # [N, K, page_size, D]
    parts = x.split(codec.group_size, -1)
    lo = torch.stack([part.amin(-1) for part in parts], -1)
    step = (torch.stack([part.amax(-1) for part in parts], -1) - lo) / codec.levels
    lo, step = lo.half(), step.half()
    _require_finite(lo, "values")
    _require_finite(step, "values")
    widths = torch.tensor([part.shape[-1] for part in parts], device=x.device)
    wide_lo, wide_step = (t.float().repeat_interleave(widths, -1) for t in (lo, step))
    pages.codes[index] = pack(_codes(x, wide_lo, wide_step, codec.levels).to(torch.uint8), codec.bits)
    pages.lo[index], pages.step[index] = lo, step


def load_value_pages(pages: ValuePages, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``codec.load_value_pages``."""
    index = page_ids.long()
    if pages.codec.is_raw:
        return pages.codes[index].to(dtype)
    wide = wide_dtype(dtype)
    codes = unpack(pages.codes[index], pages.codec.bits).to(wide)  # [N, K, page_size, D]
    channel = torch.arange(codes.shape[-1], device=codes.device) // pages.codec.group_size
    return (pages.lo[index].to(wide)[..., channel] + codes * pages.step[index].to(wide)[..., channel]).to(dtype)


def largest_magnitudes(keys: Tensor, values: Tensor) -> tuple[float, float]:
    """See ``codec.largest_magnitudes``."""
    found = []
    for x in (keys, values):
        low, high = torch.aminmax(x.detach())  # NaN if any number is
        found.append(torch.maximum(-low, high).item())
    return found[0], found[1]


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
    """See ``codec.store_tokens``."""
    shape = len(page_ids), key_pages.codec.page_size
    paged = plain.take(row, keys, values, shape[0] * shape[1], num_sinks)
    key_rows, value_rows = (x.unflatten(1, shape).transpose(0, 1) for x in paged)
    store_key_pages(key_pages, page_ids, key_rows)
    store_value_pages(value_pages, page_ids, value_rows)


def _rounded(x: Tensor, codec: KeyCodec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``[N, K, page_size, D]``, and the scales ``[N, K, D]`` of each page."""
    low, high = torch.aminmax(x, dim=-2)
    mid, half = (high + low) / 2, (high - low) / 2 * codec.clip
    lo = (mid - half).half()
    step = (half * 2 / codec.levels).half()
    return _codes(x, lo.float().unsqueeze(-2), step.float().unsqueeze(-2), codec.levels), lo, step


def _codes(x: Tensor, lo: Tensor, step: Tensor, levels: int) -> Tensor:
    """Round to the nearest level of the *stored* scales, so that codes and float16 rounding agree."""
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
    return ((x - lo) * inverse + 0.5).floor().clamp(0, levels)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where the caller asks for that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _require_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise not_finite(what)


def not_finite(what: str) -> ValueError:
    """Return the error of every backend for numbers that cannot be stored."""
    return ValueError(
        f"{what} must be finite and within float16 range to be packed, got NaN, infinity or a larger number; "
        "check the model's dtype for overflow, or use the preset 'exact'"
    )
