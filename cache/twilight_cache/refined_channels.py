"""Key channels that are stored twice: once rounded, once what rounding left of them.

A few channels carry most of what rounding does to attention: their ranges in a page are wide, and queries are large
there. The rest of such a channel, rounded as keys are, is a further channel of the page, and the query holds the
channel twice: ``q * k`` is ``q * rounded + q * rest``. So the codec, the layout and the kernels stay what they are; a
page just has ``D + R`` channels. Plain keys are exact and have zeros there.

Which channels those are is found by calibration, or by each sequence itself: those that range widest in its first
page. A model's wide channels stay the same along a text and from text to text, so one page tells enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from twilight_kernels import KeyCodec, widest_channels, write_rests

CHANNEL_MULTIPLE = 8  # what a head dim must be a multiple of to be packed
Named: TypeAlias = Sequence[Sequence[int]]


class RefinedChannels:
    """Which channels of a layer's keys are refined, and how keys of ``D`` channels and queries become ``D + R`` wide.

    Args:
        channels: for each KV head its ``R`` channels, where one that is named again holds the rest of its rest; or R,
            for those that range widest in the first page of each sequence. R is a multiple of 8, 0 for none.
    Raises:
        ValueError: heads with different numbers of channels, or another number than a multiple of 8.
    """

    def __init__(self, channels: int | Named = 0) -> None:
        self._named: Tensor | None = None  # [K, R]
        self._turns: Tensor | None = None  # [K, R], how often each was named before; None if none was
        if isinstance(channels, int):
            self.count = channels
            _require_multiple({channels} - {0}, channels)
            return
        check_refined(channels)
        self.count = len(channels[0]) if channels else 0
        if channels:
            turns = [[list(row[:at]).count(channel) for at, channel in enumerate(row)] for row in channels]
            self._named, self._turns = torch.tensor([list(row) for row in channels]), torch.tensor(turns)

    def check(self, kv_heads: int, key_dim: int) -> None:
        """Raise ValueError unless these are channels of keys of that shape."""
        named = self._named
        if named is not None and (named.shape[0] != kv_heads or int(named.max()) >= key_dim):
            raise ValueError(
                f"key_refined must name channels below {key_dim} for each of {kv_heads} KV heads, got "
                f"{named.shape[0]} heads and channels up to {int(named.max())}; calibrate this model"
            )

    def begin(self, sequences: int, kv_heads: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return the channels ``[B, K, R]`` of sequences without packed pages: those named, or any."""
        index = torch.zeros(sequences, kv_heads, self.count, dtype=dtype, device=device)
        return index if self._named is None else index.copy_(self._named)

    def choose(self, first_pages: Tensor) -> Tensor:
        """Return the channels ``[N, K, R]`` of sequences whose first pages hold keys ``[N, K, page_size, D]``."""
        if self._named is not None:
            return self._named.to(first_pages.device).expand(first_pages.shape[0], -1, -1)
        return widest_channels(first_pages, self.count)

    def write_rests(self, keys: Tensor, index: Tensor, codec: KeyCodec) -> None:
        """Write what rounding leaves of channels ``index [N, K, R]`` into pages ``[N, K, page_size, D + R]``."""
        write_rests(keys, index, codec, self._turns)

    def widen(self, keys: Tensor) -> Tensor:
        """Append zeros to ``[..., D]``: plain keys have no rest."""
        return F.pad(keys, (0, self.count)) if self.count else keys

    def fold(self, keys: Tensor, index: Tensor) -> Tensor:
        """Add the rests of ``[N, K, T, D + R]`` to their channels ``index [N, K, R]``: ``[N, K, T, D]``."""
        if not self.count:
            return keys
        whole, rest = keys.split([keys.shape[-1] - self.count, self.count], -1)
        folded: Tensor = whole.scatter_add(-1, index[:, :, None].expand_as(rest), rest)
        return folded


def check_refined(channels: Named) -> None:
    """Raise ValueError unless these may be ``RefinedChannels``."""
    is_whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for row in channels for c in row)
    _require_multiple({len(row) for row in channels} if is_whole else {0}, [list(row) for row in channels])


def _require_multiple(counts: set[int], given: object) -> None:
    if len(counts) > 1 or any(count <= 0 or count % CHANNEL_MULTIPLE for count in counts):
        raise ValueError(
            f"key_refined must name as many channels for each KV head, a multiple of {CHANNEL_MULTIPLE}, got "
            f"{given!r}; leave it empty to refine none"
        )
