"""Change logits before sampling: bias, presence and frequency penalties, and their composition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

Processor = Callable[[list[int], "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Bias:
    """Add a number to the logits of single tokens (OpenAI's ``logit_bias``).

    Args:
        by_token: what is added, by token id; ids beyond the vocabulary are the caller's to refuse.
    """

    by_token: Mapping[int, float]

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        ids = torch.tensor(list(self.by_token), device=logits.device)
        added = torch.tensor(list(self.by_token.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(-1, ids, added)


@dataclass(frozen=True)
class Penalties:
    """Lower the logits of tokens that the answer has (OpenAI's definition).

    Args:
        presence: taken off once.
        frequency: taken off for each time.
    """

    presence: float
    frequency: float

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        if not token_ids:
            return logits
        ids, counts = torch.tensor(token_ids, device=logits.device).unique(return_counts=True)
        return logits.index_add(-1, ids, -(self.presence + self.frequency * counts).to(logits.dtype))


@dataclass(frozen=True)
class Chain:
    """Apply processors one after the other."""

    parts: Sequence[Processor]

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        for part in self.parts:
            logits = part(token_ids, logits)
        return logits


def chain(parts: Sequence[Processor]) -> Processor | None:
    """Return one processor for many; None for none."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else Chain(parts)
