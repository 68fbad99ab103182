"""How one layer's pages lie in memory: packed tensors whose form is checked once.

A page is ``page_size`` consecutive tokens of one sequence. Keys are stored channel-major, so that one vector
holds the same channel of many tokens and a page's logits need no horizontal sum; values are stored
token-major, so that one kept token is one contiguous read. ``page_codec`` tells how the codes are packed.

Source: page bounds from the key scales, Quest (arXiv 2406.10774, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from .page_codec import KeyCodec, ValueCodec, check_head_dim, packed_size

COLUMN_MULTIPLE = 16  # plain columns are read in vectors of that many tokens
# query, new key, new value, block table, number of pages, number of plain tokens to output: see decode.prepare_decode
DecodeCall: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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

    def take(self, row: int, keys: Tensor, values: Tensor, paged: int, num_sinks: int) -> tuple[Tensor, Tensor]:
        """Copy a row's first tokens and its last ones to their columns; return those between, which go to pages.

        Args:
            row: of the batch.
            keys, values: ``[K, T, D]``.
            paged: how many go to pages.
            num_sinks: how many come before those.
        """
        first, end = min(num_sinks, keys.shape[1]), num_sinks + paged
        last = first + max(0, keys.shape[1] - end)
        self.keys[row, :, :, :first] = keys[:, :first].transpose(-1, -2)
        self.values[row, :, :first] = values[:, :first]
        self.keys[row, :, :, first:last] = keys[:, end:].transpose(-1, -2)
        self.values[row, :, first:last] = values[:, end:]
        return keys[:, num_sinks:end], values[:, num_sinks:end]

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    @cached_property
    def form(self) -> tuple[int, int, int, int]:
        """``(B, K, Dk, Dv)``; looked up thirty times a token, which shapes of tensors are slow at."""
        return (*self.keys.shape[:3], self.values.shape[3])


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
