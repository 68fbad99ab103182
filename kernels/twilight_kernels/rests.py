"""Key channels that a page holds twice: which range widest, and what rounding leaves of them."""

from __future__ import annotations

from torch import Tensor

from ._backend import kernels
from .page_codec import KeyCodec


def widest_channels(keys: Tensor, count: int) -> Tensor:
    """Return the ``count`` channels that range widest in each page, the widest first.

    Args:
        keys: ``[N, K, page_size, D]`` model dtype, finite, any strides.
        count: of channels, at most D.
    Returns:
        ``[N, K, count]`` int64; of channels that range alike, the first comes first.
    Raises:
        ValueError: more channels than there are.
    Reference: ``_reference.widest_channels``.
    """
    if not 0 <= count <= keys.shape[-1]:
        raise ValueError(f"count must be within 0 .. {keys.shape[-1]}, the channels of keys, got {count}")
    found: Tensor = kernels("rests", keys, keys.dtype).widest_channels(keys, count)
    return found


def write_rests(keys: Tensor, index: Tensor, codec: KeyCodec, turns: Tensor | None = None) -> None:
    """Write what rounding leaves of some channels of pages into further channels of these.

    Args:
        keys: ``[N, K, page_size, D + R]`` model dtype, any strides; the last R channels are overwritten.
        index: ``[N, K, R]`` int64, the channels below D that the last ones hold the rests of.
        codec: what rounds: a page of it would hold these keys.
        turns: ``[K, R]`` int64; where 1, the rest of the rest, and so on. None means 0 everywhere.
    Raises:
        ValueError: shapes that disagree.
    Reference: ``_reference.write_rests``.
    """
    pages, heads, size, _ = keys.shape
    count = index.shape[-1]
    if index.shape != (pages, heads, count) or size != codec.page_size or count >= keys.shape[3]:
        raise ValueError(
            f"keys and index must be [N, K, {codec.page_size}, D + R] and [N, K, R], got {list(keys.shape)} and "
            f"{list(index.shape)}"
        )
    kernels("rests", keys, keys.dtype).write_rests(keys, index, codec, turns)
