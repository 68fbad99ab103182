"""How one layer's pages lie in memory: codecs, packed tensors, exact byte counts.

A page is ``page_size`` consecutive tokens of one sequence. Keys are stored channel-major, so that one vector
holds the same channel of many tokens and a page's logits need no horizontal sum; values are stored
token-major, so that one kept token is one contiguous read. Codes are packed planar along the last axis: the
byte ``j`` of a plane of ``w`` bits holds elements ``j, j + n, j + 2n, ...`` with ``n = count * w / 8``, and
unpacking gives contiguous slices. Three bits are a 2-bit plane followed by a 1-bit plane.

Sources: key scales per channel and page, KIVI (arXiv 2402.02750, section 3.1); value groups per token, SKVQ
(arXiv 2405.06219, section 3.1); page bounds from the key scales, Quest (arXiv 2406.10774, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KEY_BITS = (2, 3, 4, 8, 16)
VALUE_BITS = (2, 3, 4, 8, 16)
PAGE_SIZES = (16, 32, 64, 128)
RAW_BITS = 16
COLUMN_MULTIPLE = 16  # plain columns are read in vectors of that many tokens
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


@dataclass(frozen=True)
class KeyPages:
    """Key pages of one layer; kernels trust them, so their form is checked here once.

    Attributes:
        codec: how they are packed.
        codes: ``[P, K, D, page_size * bits / 8]`` uint8, or ``[P, K, D, page_size]`` in the model's dtype if
            raw.
        lo, step: ``[P, K, D]`` float16: a key is ``lo + code * step``, so ``(lo, lo + levels * step)`` bounds
            the page (Quest's metadata at no extra byte); empty if raw.
    Raises:
        ValueError: a tensor of another shape or dtype, or not contiguous.
    """

    codec: KeyCodec
    codes: Tensor
    lo: Tensor
    step: Tensor

    def __post_init__(self) -> None:
        size = self.codec.page_size
        _check_codes("key pages", self.codes, self.codec, size if self.codec.is_raw else size * self.codec.bits // 8)
        _check_scales("key pages", self.lo, self.step, self.codec, self.codes.shape[:3])

    @staticmethod
    def empty(
        num_pages: int,
        kv_heads: int,
        head_dim: int,
        codec: KeyCodec,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KeyPages:
        """Allocate ``num_pages`` pages of unspecified content for heads of ``head_dim`` channels."""
        check_head_dim(head_dim, codec.bits)
        shape = (num_pages, kv_heads, head_dim)
        if codec.is_raw:
            nothing = torch.empty(0, dtype=torch.float16, device=device)
            return KeyPages(codec, torch.empty(*shape, codec.page_size, dtype=dtype, device=device), nothing, nothing)
        codes = torch.empty(*shape, packed_size(codec.page_size, codec.bits), dtype=torch.uint8, device=device)
        lo = torch.empty(shape, dtype=torch.float16, device=device)
        return KeyPages(codec, codes, lo, torch.empty_like(lo))

    @property
    def num_pages(self) -> int:
        return self.codes.shape[0]

    @property
    def head_dim(self) -> int:
        return self.codes.shape[2]

    @cached_property
    def form(self) -> tuple[int, int, int, int]:
        """``(P, K, D, page_size)``."""
        return (*self.codes.shape[:3], self.codec.page_size)

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name: what is counted, saved and copied."""
        return _stored(self)


@dataclass(frozen=True)
class ValuePages:
    """Value pages of one layer; kernels trust them, so their form is checked here once.

    Attributes:
        codec: how they are packed.
        codes: ``[P, K, page_size, D * bits / 8]`` uint8, or ``[P, K, page_size, D]`` in the model's dtype if
            raw.
        lo, step: ``[P, K, page_size, ceil(D / group_size)]`` float16; empty if raw.
    Raises:
        ValueError: a tensor of another shape or dtype, or not contiguous.
    """

    codec: ValueCodec
    codes: Tensor
    lo: Tensor
    step: Tensor

    def __post_init__(self) -> None:
        _check_codes("value pages", self.codes, self.codec, self.codes.shape[-1])
        if self.codes.shape[2] != self.codec.page_size:
            raise ValueError(f"value pages must hold {self.codec.page_size} tokens, got {self.codes.shape[2]}")
        shape = (*self.codes.shape[:3], self.codec.groups(self.head_dim))
        _check_scales("value pages", self.lo, self.step, self.codec, shape)

    @property
    def head_dim(self) -> int:
        return self.codes.shape[-1] if self.codec.is_raw else self.codes.shape[-1] * 8 // self.codec.bits

    @cached_property
    def form(self) -> tuple[int, int, int, int]:
        """``(P, K, D, page_size)``."""
        return (*self.codes.shape[:2], self.head_dim, self.codec.page_size)

    @staticmethod
    def empty(
        num_pages: int,
        kv_heads: int,
        head_dim: int,
        codec: ValueCodec,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> ValuePages:
        """Allocate ``num_pages`` pages of unspecified content for heads of ``head_dim`` channels."""
        check_head_dim(head_dim, codec.bits)
        shape = (num_pages, kv_heads, codec.page_size)
        if codec.is_raw:
            nothing = torch.empty(0, dtype=torch.float16, device=device)
            return ValuePages(codec, torch.empty(*shape, head_dim, dtype=dtype, device=device), nothing, nothing)
        codes = torch.empty(*shape, packed_size(head_dim, codec.bits), dtype=torch.uint8, device=device)
        lo = torch.empty(*shape, codec.groups(head_dim), dtype=torch.float16, device=device)
        return ValuePages(codec, codes, lo, torch.empty_like(lo))

    @property
    def num_pages(self) -> int:
        return self.codes.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by name: what is counted, saved and copied."""
        return _stored(self)


@dataclass(frozen=True)
class PlainTokens:
    """Sinks and window of a batch in the model's dtype: columns ``[0, num_sinks)``, then the window.

    Attributes:
        keys: ``[B, K, D, C]`` model dtype, channel-major like key pages.
        values: ``[B, K, C, D]`` model dtype.
    Raises:
        ValueError: shapes or dtypes that disagree, tensors not contiguous, ``C`` not a multiple of 16.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        if keys.dim() != 4 or values.dim() != 4 or keys.dtype != values.dtype:
            raise ValueError(
                "plain tokens must be keys [B, K, D, C] and values [B, K, C, D] of one dtype, got "
                f"{list(keys.shape)} {keys.dtype} and {list(values.shape)} {values.dtype}"
            )
        if keys.shape[:2] != values.shape[:2] or keys.shape[3] != values.shape[2]:
            raise ValueError(
                "plain keys [B, K, D, C] and values [B, K, C, D] must agree in B, K and C, got "
                f"{list(keys.shape)} and {list(values.shape)}"
            )
        if keys.shape[3] % COLUMN_MULTIPLE:
            raise ValueError(
                f"the capacity of plain tokens must be a multiple of {COLUMN_MULTIPLE}, got {keys.shape[3]}; "
                "allocate them with PlainTokens.empty, which rounds up"
            )
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise ValueError("plain tokens must be contiguous, got strided ones; call contiguous() on them")

    @staticmethod
    def empty(
        batch: int, kv_heads: int, key_dim: int, value_dim: int, capacity: int, dtype: torch.dtype,
        device: torch.device | str,
    ) -> PlainTokens:  # fmt: skip
        """Allocate zeroed columns a row, ``capacity`` rounded up to a multiple of 16 (a vector of tokens)."""
        capacity = -(-capacity // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        return PlainTokens(
            torch.zeros(batch, kv_heads, key_dim, capacity, dtype=dtype, device=device),
            torch.zeros(batch, kv_heads, capacity, value_dim, dtype=dtype, device=device),
        )

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    @cached_property
    def form(self) -> tuple[int, int, int, int]:
        """``(B, K, Dk, Dv)``; looked up thirty times a token, which shapes of tensors are slow at."""
        return (*self.keys.shape[:3], self.values.shape[3])


@dataclass(frozen=True)
class StripePlan:
    """How a sparse prefill chooses keys.

    Args:
        alpha: share of the attention mass that the sampled rows of a strip keep on average, in ``(0, 1]``.
        floor: share that 95 % of them keep at least, at most ``alpha``.
        window: last keys before a strip that all its rows see.
        num_sinks: first keys that all rows see.
        strip: query rows that share their stripes, a multiple of 64.
        samples: rows of a strip whose attention is computed to choose them, a multiple of 16 that divides ``strip``.
    Raises:
        ValueError: a value outside those ranges.
    """

    alpha: float = 0.95
    floor: float = 0.9
    window: int = 256
    num_sinks: int = 16
    strip: int = 256
    samples: int = 16

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}; pass 1.0 to keep every key")
        if not 0.0 <= self.floor <= self.alpha:
            raise ValueError(f"floor must be in [0, alpha = {self.alpha}], got {self.floor}")
        if self.strip <= 0 or self.strip % 64:
            raise ValueError(f"strip must be a positive multiple of 64, got {self.strip}; pass 128 or 256")
        if self.samples <= 0 or self.samples % 16 or self.strip % self.samples:
            raise ValueError(
                f"samples must be a multiple of 16 that divides strip = {self.strip}, got {self.samples}; pass 16 or 32"
            )
        if self.window < 0 or self.num_sinks < 0:
            raise ValueError(f"window and num_sinks must be 0 or more, got {self.window} and {self.num_sinks}")

    def max_strips(self, rows: int) -> int:
        """Most strips that ``rows`` query rows can touch."""
        return (rows + self.strip - 2) // self.strip + 1

    def strips(self, rows: int, total: int, pad: int) -> list[tuple[int, int]]:
        """First query row of each strip, and the one after its last.

        Strips begin at fixed positions of real tokens, so that neither padding nor chunks move them.

        Args:
            rows: query rows, the last of ``total`` positions.
            total: positions.
            pad: leading positions that are padding.
        """
        lead = total - rows - pad  # real position of query row 0
        first, found = max(0, -lead), []
        while first < rows:
            end = min(rows, first + self.strip - (lead + first) % self.strip)
            found.append((first, end))
            first = end
        return found

    def sampled_rows(self, first: int, end: int, lead: int) -> list[int]:
        """Query rows of a strip that are sampled: at fixed positions, and the last; ``lead`` is row 0's."""
        every = self.strip // self.samples
        return [row for row in range(first, end) if (lead + row + 1) % every == 0 or row == end - 1]


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


def _stored(pages: KeyPages | ValuePages) -> dict[str, Tensor]:
    return {"codes": pages.codes} if pages.codec.is_raw else {"codes": pages.codes, "lo": pages.lo, "step": pages.step}


def _check_codes(name: str, codes: Tensor, codec: KeyCodec | ValueCodec, last: int) -> None:
    if codes.dim() != 4 or codes.shape[-1] != last or not codes.is_contiguous():
        raise ValueError(
            f"codes of {name} must be contiguous [P, K, *, {last}], got {list(codes.shape)} with strides "
            f"{list(codes.stride())}; allocate them with {name.title().replace(' ', '')}.empty"
        )
    if (codes.dtype == torch.uint8) == codec.is_raw:
        wanted = "the model's dtype" if codec.is_raw else "uint8"
        raise ValueError(f"codes of {name} with {codec.bits} bits must be {wanted}, got {codes.dtype}")


def _check_scales(name: str, lo: Tensor, step: Tensor, codec: KeyCodec | ValueCodec, shape: tuple[int, ...]) -> None:
    for scale in () if codec.is_raw else (lo, step):
        if scale.shape != shape or scale.dtype != torch.float16 or not scale.is_contiguous():
            raise ValueError(
                f"scales of {name} must be contiguous float16 {list(shape)}, got {scale.dtype} {list(scale.shape)}"
            )


def _check_choice(name: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
