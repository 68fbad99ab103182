"""Key channels that are stored twice: once as all others, and once more for what rounding left of them.

Channels differ by orders of magnitude in what their rounding does to the logits, which is the mean square of the
queries there times the squared step. Storing the rest of the few heaviest as further channels of the same pages gives
them twice the bits and all others none, with the codec and the kernels of pages as they are: the query holds those
channels twice as well. A channel may be named again for what is left after that.

Sources: successive refinement, Equitz and Cover (IEEE Trans. IT 37, 1991); bits by variance, "reverse water-filling",
Cover and Thomas, Elements of Information Theory, 10.3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from twilight_kernels import KeyPages, load_key_pages, store_key_pages

CHANNEL_MULTIPLE = 8  # of channels that pages hold


class RefinedChannels:
    """Widens queries and keys of ``D`` channels to the ``D + R`` that are stored, and back.

    Args:
        channels: for each KV head the ``R`` channels whose rest is stored, R a multiple of 8; no heads for none.
    Raises:
        ValueError: heads with different numbers of channels, or another number than a multiple of 8.
    """

    def __init__(self, channels: Sequence[Sequence[int]] = ()) -> None:
        check_refined(channels)
        self.heads, self.count = len(channels), len(channels[0]) if channels else 0
        self._index = torch.tensor([list(row) for row in channels]).view(self.heads, self.count)
        # a channel named for the second time holds the rest of its first rest
        turns = [[list(row[:at]).count(channel) for at, channel in enumerate(row)] for row in channels]
        self._turns = torch.tensor(turns).view(self.heads, self.count)
        self._sources: Tensor | None = None  # [H, D + R], which channel of a query each stored one takes

    def check(self, kv_heads: int, key_dim: int) -> None:
        """Raise ValueError unless these are channels of keys of that shape."""
        if self.count and (self.heads != kv_heads or int(self._index.max()) >= key_dim):
            raise ValueError(
                f"key_refined must name channels below {key_dim} for each of {kv_heads} KV heads, got {self.heads} "
                f"heads and channels up to {int(self._index.max())}; calibrate this model"
            )

    def widen(self, keys: Tensor) -> Tensor:
        """Append zeros to ``[..., D]``: plain keys have no rest."""
        return F.pad(keys, (0, self.count)) if self.count else keys

    def widen_query(self, query: Tensor) -> Tensor:
        """Repeat the refined channels of ``[B, H, D]`` or ``[B, H, T, D]``."""
        if not self.count:
            return query
        heads, dim = query.shape[1], query.shape[-1]
        if self._sources is None or self._sources.shape != (heads, dim + self.count):
            whole = torch.arange(dim).expand(heads, -1)
            self._sources = torch.cat([whole, self._index.cpu().repeat_interleave(heads // self.heads, 0)], 1)
        if self._sources.device != query.device:
            self._sources = self._sources.to(query.device)
        sources = self._sources if query.dim() == 3 else self._sources[:, None]
        widened: Tensor = query.detach().gather(-1, sources.expand(*query.shape[:-1], -1))
        return widened

    def fold(self, keys: Tensor) -> Tensor:
        """Add the rests of ``[N, K, T, D + R]`` to their channels: ``[N, K, T, D]``."""
        if not self.count:
            return keys
        whole, rest = keys.split([keys.shape[-1] - self.count, self.count], -1)
        folded: Tensor = whole.scatter_add(-1, self._at(keys.device)[:, None].expand_as(rest), rest)
        return folded

    def store(self, pages: KeyPages, page_ids: Tensor, keys: Tensor) -> None:
        """Quantize whole pages ``[N, K, page_size, D + R]`` into ``page_ids``; the last R channels are not read.

        Raises:
            ValueError: as ``store_key_pages``.
        """
        exact = keys[..., : keys.shape[-1] - self.count].float()
        wide, index = self.widen(exact), self._at(keys.device)[:, None]
        store_key_pages(pages, page_ids, wide)
        for turn in range(int(self._turns.max()) + 1):
            left = exact - self.fold(load_key_pages(pages, page_ids, torch.float32))
            rest = left.gather(-1, index.expand(*left.shape[:-1], -1))
            is_due = (self._turns.to(keys.device) == turn)[:, None]
            wide = torch.cat([exact, torch.where(is_due, rest, wide[..., -self.count :])], -1)
            store_key_pages(pages, page_ids, wide)

    def _at(self, device: torch.device) -> Tensor:
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index


def check_refined(channels: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless these may be ``RefinedChannels``."""
    counts = {len(row) for row in channels}
    is_whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for row in channels for c in row)
    if len(counts) > 1 or any(not count or count % CHANNEL_MULTIPLE for count in counts) or not is_whole:
        raise ValueError(
            f"key_refined must name as many channels for each KV head, a multiple of {CHANNEL_MULTIPLE}, got "
            f"{[list(row) for row in channels]!r}; leave it empty to refine none"
        )
