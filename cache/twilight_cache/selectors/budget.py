"""How many candidates: a budget of tokens, or as many as carry a share of the estimated mass.

Scores are logits in both cases, those of tokens or the log masses of pages. The query heads of a KV head share their
candidates: a budget takes what is likeliest for any of them, a share the union of what each needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twilight_kernels import top_p_flags, top_p_threshold

Budget = int | float

_ANY = 1e-6  # a share that the first entry reaches: the least number to keep decides then


def check_budget(budget: Budget | None) -> None:
    """Raise ValueError unless ``budget`` is None, a positive int, or a float in ``(0, 1]``."""
    if budget is None or (isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1):
        return
    if isinstance(budget, float) and 0.0 < budget <= 1.0:
        return
    raise ValueError(
        f"budget must be a whole number of tokens from 1, a share of the packed tokens in (0, 1] as a float, or None, "
        f"got {budget!r}"
    )


def budget_tokens(budget: Budget, tokens: int) -> int:
    """Tokens that ``budget`` allows a KV head whose row has ``tokens`` packed ones."""
    return min(tokens, budget if isinstance(budget, int) else math.ceil(budget * tokens))


def likeliest(scores: Tensor, mass: Tensor, counts: list[int], kv_heads: int) -> Tensor:
    """Flag, for each KV head, the entries that are most likely for any of its query heads.

    Args:
        scores: ``[B, H, N]`` float32, ``-inf`` where there is nothing.
        mass: ``[B, H]`` float32 log mass that makes the scores of different heads comparable.
        counts: of each row, the entries to flag; ties are kept together.
        kv_heads: K.
    Returns:
        ``[B, K, N]`` bool.
    """
    joined = (scores - mass[..., None]).unflatten(1, (kv_heads, -1)).amax(2)  # [B, K, N]
    limits = [top_p_threshold(row, _ANY, min_keep=max(1, count)) for row, count in zip(joined, counts, strict=True)]
    flags: Tensor = (joined >= torch.stack(limits)[..., None]) & (joined > -torch.inf)
    return flags


def reaching(scores: Tensor, share: float, plain_mass: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Flag, for each KV head, the fewest entries that with sinks and window carry ``share`` for each query head.

    Args:
        scores: ``[B, H, N]`` float32 log masses, ``-inf`` where there is nothing.
        share: in ``(0, 1]``.
        plain_mass: ``[B, H]`` float32 log mass of sinks and window.
        kv_heads: K.
    Returns:
        ``[B, K, N]`` bool; ``[B, H]`` float32 share that the flagged entries, sinks and window carry by the scores.
    """
    grouped, forced = scores.unflatten(1, (kv_heads, -1)), plain_mass.unflatten(1, (kv_heads, -1))
    flags, coverage = top_p_flags(grouped, share, forced_lse=forced)
    return flags, coverage.flatten(1)


def coverage_of(scores: Tensor, flags: Tensor, plain_mass: Tensor) -> Tensor:
    """Share ``[B, H]`` of the mass that flagged entries ``[B, K, N]`` and ``plain_mass`` carry by the scores."""
    top = torch.maximum(scores.amax(-1), plain_mass)
    masses = (scores - top[..., None]).exp()
    per_kv = scores.shape[1] // flags.shape[1]
    plain = (plain_mass - top).exp()
    flagged = (masses * flags.repeat_interleave(per_kv, 1)).sum(-1)
    return (flagged + plain) / (masses.sum(-1) + plain)


def listed(flags: Tensor) -> Tensor:
    """Turn page flags ``[B, K, P]`` into ascending int32 page numbers ``[B, K, N]``, -1 padded."""
    count, pages = int(flags.sum(-1).max()), flags.shape[-1]
    number = torch.arange(pages, device=flags.device).expand_as(flags)
    index = torch.where(flags, number, pages).sort(-1).values[..., : max(1, count)]
    return torch.where(index < pages, index, -1).to(torch.int32)


def every_page(num_pages: Tensor, kv_heads: int, most: int) -> Tensor:
    """All pages of each row as a list ``[B, K, P]``, for candidates that are single tokens."""
    number = torch.arange(most, dtype=torch.int32, device=num_pages.device)
    pages = torch.where(number < num_pages.view(-1, 1), number, -1)
    return pages[:, None].expand(-1, kv_heads, -1)
