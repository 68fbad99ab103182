"""Top-p pruning of logits (Twilight, arXiv 2502.02770, section 4.2; definition in ``_reference``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import kernels


def top_p_threshold(logits: Tensor, p: float, *, forced_lse: Tensor | None = None, min_keep: int = 0) -> Tensor:
    """Find, for each row, the logit from which kept tokens carry a share ``p`` of the mass.

    Args:
        logits: ``[R, S]`` float32; ``-inf`` marks entries that do not exist.
        p: mass to keep, in ``(0, 1]``; 1.0 keeps everything.
        forced_lse: ``[R]`` float32, log-sum-exp of tokens that are kept in any case (sinks, window) and count
            as mass; None means none.
        min_keep: entries to keep at least, as far as they exist.
    Returns:
        ``[R]`` float32 ``t``: keep ``logits >= t``. The kept mass is at least ``p`` of the whole, ties are
        kept together; ``-inf`` if everything is kept, ``+inf`` if the forced tokens suffice. A kernel may
        keep, beside the fewest tokens, those within 2 ** -24 of the range of logits below them.
    Raises:
        ValueError: ``p`` outside ``(0, 1]``, a negative ``min_keep``, or shapes that disagree.
    Source: Twilight, arXiv 2502.02770, section 4.2. Reference: ``_reference.top_p_threshold``.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"p must be in (0, 1], got {p}; pass p=1.0 to keep everything")
    if min_keep < 0:
        raise ValueError(f"min_keep must be 0 or more, got {min_keep}")
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits must be [R, S] float32, got {list(logits.shape)} {logits.dtype}; call float()")
    if forced_lse is not None and (forced_lse.shape != logits.shape[:1] or forced_lse.dtype != logits.dtype):
        raise ValueError(f"forced_lse must be [{logits.shape[0]}] {logits.dtype}, got {list(forced_lse.shape)}")
    limit: Tensor = kernels("prune", logits, logits.dtype).top_p_threshold(
        logits, p, forced_lse=forced_lse, min_keep=min_keep
    )
    return limit


def top_p_flags(logits: Tensor, p: float, *, forced_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Flag what some query head of a KV head needs to carry a share ``p`` of its mass.

    Args:
        logits: ``[B, K, G, N]`` float32, log masses of N entries for the G query heads of a KV head; ``-inf`` marks
            entries that do not exist.
        p: mass to keep, in ``(0, 1]``; 1.0 keeps everything.
        forced_lse: ``[B, K, G]`` float32, log-sum-exp of what is kept in any case and counts as mass.
    Returns:
        ``[B, K, N]`` bool, the union over G of the entries at or above ``top_p_threshold``; ``[B, K, G]`` float32, the
        share of each query head's mass that flagged entries and forced mass carry.
    Raises:
        ValueError: ``p`` outside ``(0, 1]``, or shapes that disagree.
    Source: Twilight, arXiv 2502.02770, section 4.2 (union over the heads of a group). Reference:
    ``_reference.top_p_flags``.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"p must be in (0, 1], got {p}; pass p=1.0 to keep everything")
    if logits.dim() != 4 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits must be [B, K, G, N] float32, got {list(logits.shape)} {logits.dtype}; call float()")
    if forced_lse.shape != logits.shape[:3] or forced_lse.dtype != logits.dtype:
        raise ValueError(
            f"forced_lse must be {list(logits.shape[:3])} {logits.dtype}, got {list(forced_lse.shape)} "
            f"{forced_lse.dtype}"
        )
    flags, share = kernels("flags", logits, logits.dtype).top_p_flags(logits, p, forced_lse=forced_lse)
    return flags, share
