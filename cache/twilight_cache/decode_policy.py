"""How the decode steps of a layer attend."""

from __future__ import annotations

from dataclasses import dataclass, field

from .selectors import Full, Selector


@dataclass(frozen=True)
class DecodePolicy:
    """How a decode step attends.

    Args:
        p: share of the attention mass that each query head keeps, in ``(0, 1]``.
        min_keep: packed tokens each head keeps at least.
        min_sparse_len: packed tokens below which a row attends to all of them.
        selector: which packed tokens may be attended.
    """

    p: float = 1.0
    min_keep: int = 0
    min_sparse_len: int = 0
    selector: Selector = field(default_factory=Full)
