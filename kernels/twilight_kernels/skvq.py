"""SKVQ pages: per token and group of reordered channels, clipped, with FP8 scales (arXiv 2405.06219, section 3).

Pure torch and its own definition: on the models measured so far the channel-major pages of ``layout`` are far better
at equal bytes, so this codec is here to be compared with, and decodes through dequantized pages. What differs from
the authors' code, which rounds in place: numbers are really packed (three levels are five base-3 digits a byte);
channels are reordered within a KV head, since RoPE forbids to fold the order into the weights and attention runs per
head; codes are found from the FP8 scales, not from the scales before rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._reference_codec import not_finite, pack, unpack
from .page_codec import PAGE_SIZES

LEVELS = (3, 4, 16)
DIGITS = 5  # base-3 digits of a byte: 3 ** 5 = 243
_FP8_MAX = 448.0
_SMALLEST_STEP = 2.0**-9  # below that, FP8 (E4M3) is zero


@dataclass(frozen=True)
class SkvqCodec:
    """How one layer's keys, or its values, are packed.

    Attributes:
        levels: 3 (1.6 bits), 4 (2 bits) or 16 (4 bits) a number.
        page_size: tokens of a page, 16, 32, 64 or 128.
        clip: factor of a group's minimum and maximum, in ``(0, 1]``.
        order: ``[K, D]`` int64, the channel at each place, channels of a group side by side.
        group: ``[K, D]`` int64, the group of each place, ascending from 0.
        unit: ``[K]`` float32, what FP8 scales are multiples of.
    Raises:
        ValueError: a value outside its range, or an order that is none.
    """

    levels: int
    page_size: int
    clip: float
    order: Tensor
    group: Tensor
    unit: Tensor

    def __post_init__(self) -> None:
        if self.levels not in LEVELS:
            raise ValueError(f"levels must be one of {', '.join(map(str, LEVELS))}, got {self.levels!r}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {', '.join(map(str, PAGE_SIZES))}, got {self.page_size!r}")
        if not 0.0 < self.clip <= 1.0:
            raise ValueError(f"clip must be in (0, 1], got {self.clip}; pass 1.0 to span the whole range")
        places = torch.arange(self.order.shape[-1], device=self.order.device)
        if self.order.dim() != 2 or not bool((self.order.sort(-1).values == places).all()):
            raise ValueError("order must be [K, D], each row every channel once; take it from calibration")
        ascends = self.group.shape == self.order.shape and bool((self.group.diff(dim=-1) >= 0).all())
        if not ascends or self.unit.shape != self.order.shape[:1]:
            raise ValueError("group must be [K, D], ascending, and unit [K]; take them from calibration")

    @property
    def is_raw(self) -> bool:
        return False

    @property
    def kv_heads(self) -> int:
        return self.order.shape[0]

    @property
    def head_dim(self) -> int:
        return self.order.shape[1]

    @property
    def groups(self) -> int:
        """Groups of the KV head that has most."""
        return int(self.group.max()) + 1

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one KV head takes, scales included."""
        return code_bytes(self.head_dim, self.levels) + 2 * self.groups


@dataclass(frozen=True)
class SkvqPages:
    """Pages of one layer's keys or values.

    Attributes:
        codec: how they are packed.
        codes: ``[P, K, page_size, code_bytes(D, levels)]`` uint8, places in the codec's order.
        lo, step: ``[P, K, page_size, groups]`` uint8, bits of FP8 (E4M3) multiples of the codec's unit.
    """

    codec: SkvqCodec
    codes: Tensor
    lo: Tensor
    step: Tensor

    @staticmethod
    def empty(num_pages: int, codec: SkvqCodec) -> SkvqPages:
        """Allocate ``num_pages`` pages of unspecified content."""
        shape = (num_pages, codec.kv_heads, codec.page_size)
        device = codec.order.device
        codes = torch.empty(*shape, code_bytes(codec.head_dim, codec.levels), dtype=torch.uint8, device=device)
        lo = torch.empty(*shape, codec.groups, dtype=torch.uint8, device=device)
        return SkvqPages(codec, codes, lo, torch.empty_like(lo))

    @property
    def num_pages(self) -> int:
        return self.codes.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name: what is counted, saved and copied."""
        return {"codes": self.codes, "lo": self.lo, "step": self.step}


def store_skvq_pages(pages: SkvqPages, page_ids: Tensor, x: Tensor) -> None:
    """Quantize whole pages into the slots ``page_ids``; channels are put in order here and never again.

    Args:
        pages: the layer's keys or values; slots ``page_ids`` are overwritten, all others untouched.
        page_ids: ``[N]`` int32, distinct.
        x: ``[N, K, page_size, D]`` model dtype.
    Raises:
        ValueError: a number that is not finite; nothing is written then.
    Source: SKVQ, sections 3.2 (reorder) and 3.3 (clipped dynamic quantization).
    """
    codec, index = pages.codec, page_ids.long()
    if not bool(torch.isfinite(x).all()):
        raise not_finite("keys or values")
    places = x.float().gather(-1, codec.order[None, :, None].expand_as(x))  # [N, K, page_size, D]
    group = codec.group[None, :, None].expand_as(places)
    shape = (*places.shape[:-1], codec.groups)
    low, high = (
        # a group that another head has and this one lacks stays at zero
        places.new_zeros(shape).scatter_reduce(-1, group, places, kind, include_self=False) * codec.clip
        for kind in ("amin", "amax")
    )
    unit = codec.unit.view(1, -1, 1, 1)
    lo = _to_fp8(low / unit)
    step = _to_fp8(((high - low) / (codec.levels - 1) / unit).clamp_min(_SMALLEST_STEP))
    wide_lo, wide_step = (_from_fp8(t).mul(unit).gather(-1, group) for t in (lo, step))
    codes = ((places - wide_lo) / wide_step + 0.5).floor().clamp(0, codec.levels - 1).to(torch.uint8)
    pages.codes[index] = pack_base3(codes) if codec.levels == 3 else pack(codes, _bits(codec.levels))
    pages.lo[index], pages.step[index] = lo, step


def load_skvq_pages(pages: SkvqPages, page_ids: Tensor, dtype: torch.dtype, *, in_order: bool = False) -> Tensor:
    """Dequantize the slots ``page_ids`` ([N] int32) to ``[N, K, page_size, D]`` of ``dtype``.

    Args:
        pages: the layer's keys or values.
        page_ids: ``[N]`` int32.
        dtype: of the result.
        in_order: leave channels in the codec's order, for a query in that order (``query.gather`` by ``order``).
    """
    codec, index = pages.codec, page_ids.long()
    packed = pages.codes[index]
    codes = unpack_base3(packed, codec.head_dim) if codec.levels == 3 else unpack(packed, _bits(codec.levels))
    group = codec.group[None, :, None].expand_as(codes)
    unit = codec.unit.view(1, -1, 1, 1)
    lo, step = (_from_fp8(t[index]).mul(unit).gather(-1, group) for t in (pages.lo, pages.step))
    places = lo + codes.float() * step
    if not in_order:
        places = torch.empty_like(places).scatter_(-1, codec.order[None, :, None].expand_as(places), places)
    return places.to(dtype)


def pack_base3(codes: Tensor) -> Tensor:
    """Pack digits ``[..., n]`` below 3 to ``[..., ceil(n / 5)]`` bytes below 243.

    Planar: with ``m = ceil(n / 5)``, byte ``j`` is the sum of ``3 ** i`` times the digit at ``j + i * m``.
    """
    count = -(-codes.shape[-1] // DIGITS)
    padded = torch.nn.functional.pad(codes, (0, count * DIGITS - codes.shape[-1]))
    weight = torch.tensor([3**i for i in range(DIGITS)], device=codes.device).view(-1, 1)
    packed: Tensor = (padded.unflatten(-1, (DIGITS, count)) * weight).sum(-2).to(torch.uint8)
    return packed


def unpack_base3(packed: Tensor, count: int) -> Tensor:
    """Undo ``pack_base3``: ``[..., ceil(count / 5)]`` bytes to ``[..., count]`` uint8 digits."""
    digits = [packed // 3**i % 3 for i in range(DIGITS)]
    return torch.cat(digits, -1)[..., :count]


def code_bytes(count: int, levels: int) -> int:
    """Bytes of ``count`` packed codes."""
    return -(-count // DIGITS) if levels == 3 else count * _bits(levels) // 8


def _bits(levels: int) -> int:
    return levels.bit_length() - 1


def _to_fp8(x: Tensor) -> Tensor:
    """Round to E4M3 and return the bits; what a cast does beyond 448 differs between versions, so it is cut here."""
    bits: Tensor = x.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits


def _from_fp8(bits: Tensor) -> Tensor:
    wide: Tensor = bits.contiguous().view(torch.float8_e4m3fn).float()
    return wide
