"""Sparse prefill: sinks, a window and the key columns that carry the mass (SampleAttention, arXiv 2406.15486).

Query rows are taken in strips of neighbours. Of each strip a few rows are *sampled*: their attention is computed
exactly, and the fewest keys that carry ``alpha`` of it are the strip's *stripes*, one set for the query heads of
a KV head. Deviations from the paper: stripes are chosen for each strip instead of once for the whole prompt, so
that diagonals (the slashes of its third version) are caught without a pattern of their own, a row sees nothing of
later strips, and chunks of a prompt choose what the whole would; the window is a number of tokens; and a bar for
the worst sampled rows (the paper's CRA is a minimum over rows) adds stripes until they keep ``floor``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import kernels
from .stripe_plan import StripePlan


def select_stripes(
    query: Tensor, keys: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose the keys that each strip of query rows attends to beside sinks and window.

    Args:
        query: ``[B, H, T, D]`` model dtype: the last T of S positions.
        keys: ``[B, K, S, D]`` model dtype.
        plan: strips, samples, ``alpha``.
        scaling: factor of the logits, above 0.
        padding: ``[B]`` int32, leading positions of each row that are padding.
    Returns:
        ``[B, K, N, ceil(S / 8)]`` uint8, a bit for each key (lowest first), sinks and window not among them,
        N as of ``StripePlan.max_strips``, strips that do not exist are zero; and
        ``[B, K, N, 5]`` float32: stripes, mean mass of sinks and window over the sampled rows of the strip, mean
        mass kept, its 5 % quantile, and the share of sampled rows that *retrieve*: one key, neither sink nor
        window, carries a quarter of their mass or more, and most of what the strip's sampled rows give it.
    Raises:
        ValueError: shapes or dtypes that disagree, ``scaling`` that is not above 0.
    Source: SampleAttention, section 4.2. Reference: ``_reference.select_stripes``.
    """
    _check(query, keys, keys, padding, scaling)
    found: tuple[Tensor, Tensor] = kernels("prefill", query, query.dtype).select_stripes(
        query, keys, plan, scaling=scaling, padding=padding
    )
    return found


def attend_stripes(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> Tensor:
    """Attend each query row to the sinks, its strip's window and stripes, none behind its own position.

    Args:
        query: ``[B, H, T, D]`` model dtype: the last T of S positions.
        keys, values: ``[B, K, S, D]``, ``[B, K, S, Dv]`` model dtype.
        mask: what ``select_stripes`` chose.
        plan: the same plan.
        scaling: factor of the logits, above 0.
        padding: ``[B]`` int32, leading positions of each row that are padding.
    Returns:
        ``[B, H, T, Dv]`` in the query's dtype; zero in rows of padding. Where a CPU has matrix tiles, a product of
        float32 numbers is right to ``2 ** -16``: each is the sum of two bfloat16 numbers.
    Raises:
        ValueError: shapes or dtypes that disagree, ``scaling`` that is not above 0.
    Source: SampleAttention, section 4.3. Reference: ``_reference.attend_stripes``.
    """
    _check(query, keys, values, padding, scaling)
    expected = (*keys.shape[:2], plan.max_strips(query.shape[2]), -(-keys.shape[2] // 8))
    if mask.shape != expected or mask.dtype != torch.uint8:
        raise ValueError(f"mask must be {list(expected)} uint8, got {list(mask.shape)} {mask.dtype}")
    out: Tensor = kernels("prefill", query, query.dtype).attend_stripes(
        query, keys, values, mask, plan, scaling=scaling, padding=padding
    )
    return out


def _check(query: Tensor, keys: Tensor, values: Tensor, padding: Tensor, scaling: float) -> None:
    if query.dim() != 4 or keys.dim() != 4 or values.dim() != 4:
        raise ValueError(
            f"query, keys and values must be [B, H, T, D] and [B, K, S, D], got {list(query.shape)}, "
            f"{list(keys.shape)} and {list(values.shape)}"
        )
    batch, heads, rows, dim = query.shape
    if keys.shape[0] != batch or heads % keys.shape[1] or keys.shape[3] != dim or keys.shape[2] < rows:
        raise ValueError(
            f"keys must be [{batch}, K, S, {dim}] with S at least {rows} and K a divisor of {heads} like the query, "
            f"got {list(keys.shape)}"
        )
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"values must be {list(keys.shape[:3])} and D like the keys, got {list(values.shape)}")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"query, keys and values must be of one dtype, got {query.dtype}, {keys.dtype}, {values.dtype}"
        )
    if not scaling > 0:
        raise ValueError(f"scaling must be above 0, got {scaling}; pass D ** -0.5 = {dim**-0.5:.4g} as most models do")
    if padding.shape != (batch,) or padding.dtype != torch.int32:
        raise ValueError(f"padding must be [{batch}] int32, got {list(padding.shape)} {padding.dtype}")
