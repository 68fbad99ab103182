"""How numbers of a page are packed: bits of a code, which numbers share a scale, what they take.

Codes are packed planar along the last axis: the byte ``j`` of a plane of ``w`` bits holds elements
``j, j + n, j + 2n, ...`` with ``n = count * w / 8``, and unpacking gives contiguous slices. Three bits are a 2-bit
plane followed by a 1-bit plane.

Sources: key scales per channel and page, KIVI (arXiv 2402.02750, section 3.1); value groups per token, SKVQ
(arXiv 2405.06219, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KEY_BITS = (2, 3, 4, 8, 16)
VALUE_BITS = (2, 3, 4, 8, 16)
PAGE_SIZES = (16, 32, 64, 128)
RAW_BITS = 16
RAW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes that hold codes of ``bits`` bits, lowest bits first."""
    return (2, 1) if bits == 3 else (bits,)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take along the packed axis."""
    return count * bits // 8


@dataclass(frozen=True)
class KeyCodec:
    """How key pages are packed: ``bits`` a code, one ``(lo, step)`` a channel and page; 16 are raw.

    Args:
        bits: 2, 3, 4 or 8 packed; 16 stores the model's dtype unchanged.
        page_size: tokens of a page, 16, 32, 64 or 128.
        clip: share of the half range about the midpoint that the levels span, in ``(0, 1]``.
    Raises:
        ValueError: a value outside those ranges.
    """

    bits: int = 4
    page_size: int = 64
    clip: float = 1.0

    def __post_init__(self) -> None:
        _check_choice("key_bits", self.bits, KEY_BITS)
        _check_choice("page_size", self.page_size, PAGE_SIZES)
        if not 0.0 < self.clip <= 1.0:
            raise ValueError(f"key_clip must be in (0, 1], got {self.clip}; pass 1.0 to span the whole range")

    @property
    def is_raw(self) -> bool:
        return self.bits == RAW_BITS

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    def for_heads(self, head_dim: int) -> KeyCodec:
        """Itself, or the raw codec where ``head_dim`` channels do not fill whole bytes."""
        return KeyCodec(RAW_BITS, self.page_size) if head_dim % 8 else self


@dataclass(frozen=True)
class ValueCodec:
    """How value pages are packed: per token, one ``(lo, step)`` a group of channels; 16 are raw.

    Args:
        bits: 2, 3, 4 or 8 packed; 16 stores the model's dtype unchanged.
        page_size: tokens of a page, 16, 32, 64 or 128.
        group_size: channels that share one scale, a positive multiple of 16; the last group may be shorter.
    Raises:
        ValueError: a value outside those ranges.
    """

    bits: int = 4
    page_size: int = 64
    group_size: int = 64

    def __post_init__(self) -> None:
        _check_choice("value_bits", self.bits, VALUE_BITS)
        _check_choice("page_size", self.page_size, PAGE_SIZES)
        if self.group_size <= 0 or self.group_size % 16:
            raise ValueError(f"group_size must be a positive multiple of 16, got {self.group_size}; pass 32 or 64")

    @property
    def is_raw(self) -> bool:
        return self.bits == RAW_BITS

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    def groups(self, head_dim: int) -> int:
        """Groups that ``head_dim`` channels need."""
        return -(-head_dim // self.group_size)

    def for_heads(self, head_dim: int) -> ValueCodec:
        """Itself, or the raw codec where ``head_dim`` channels do not fill whole bytes."""
        return ValueCodec(RAW_BITS, self.page_size) if head_dim % 8 else self


def key_token_bytes(head_dim: int, codec: KeyCodec, itemsize: int) -> float:
    """Bytes that one key of a head takes in a page with its scales; ``itemsize`` bytes a number if raw."""
    if codec.is_raw:
        return head_dim * itemsize
    return head_dim * codec.bits / 8 + 4 * head_dim / codec.page_size


def value_token_bytes(head_dim: int, codec: ValueCodec, itemsize: int) -> float:
    """Bytes that one value of a head takes in a page with its scales; ``itemsize`` bytes a number if raw."""
    if codec.is_raw:
        return head_dim * itemsize
    return head_dim * codec.bits / 8 + 4 * codec.groups(head_dim)


def check_head_dim(head_dim: int, bits: int) -> None:
    """Raise ValueError unless ``head_dim`` channels pack into whole bytes at every plane of ``bits`` bits."""
    if head_dim % 8 and bits != RAW_BITS:
        raise ValueError(f"head_dim must be a multiple of 8 to be packed, got {head_dim}; use bits=16")


def _check_choice(name: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
