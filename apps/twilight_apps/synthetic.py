"""Keys and queries whose attention is as concentrated as a real model's, exactly and at any length.

Each query head's logits fall as a power law, ``logit(rank) = -gamma * ln(rank)``, over positions in random
order. ``gamma`` is drawn for each head so that the tokens it needs for 95 % of the mass match a share
measured on the embedded model (``concentration.NEEDED_SHARES``). Keys are the targets on the dual basis of
the queries that share a KV head, plus noise orthogonal to these queries, so the dot products are the targets
and the rest looks like a key.

Harder than reality in two ways, on purpose. Heads of one KV head want unrelated tokens (measured: their union
is 2.2 times what one of three needs). Wanted tokens are scattered, where text keeps them together: a page
selector finds fewer of them, and each is an outlier that 2-bit pages clip (on the embedded model 2-bit pages
raise the needed tokens by 14 %, here they nearly double them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .concentration import CONTEXT, NEEDED_SHARES

_MASS = 0.95  # of NEEDED_SHARES
_LARGEST_GAMMA = 3.0  # three tokens: heads that need fewer get them from sinks and window
_NOISE = 2.0  # standard deviation of a key channel (embedded model: 2.2); a query channel's is 1


@dataclass(frozen=True)
class AttentionInputs:
    """One layer's decode inputs, float32.

    Attributes:
        query: ``[1, H, D]``.
        keys, values: ``[1, K, S, D]``.
        logits: ``[H, S]`` float32, ``scaling * query . key``.
        scaling: factor of the logits.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    scaling: float


def attention_inputs(heads: int, kv_heads: int, head_dim: int, tokens: int, seed: int) -> AttentionInputs:
    """Make the inputs of a decode step over ``tokens`` keys.

    Raises:
        ValueError: shapes that do not fit.
    """
    if min(heads, kv_heads, head_dim) < 1 or heads % kv_heads or heads // kv_heads > head_dim:
        raise ValueError(
            "shape must have query heads that are a multiple of KV heads, at most head_dim of them a KV head, "
            f"got {heads},{kv_heads},{head_dim}; write for example 32,8,128"
        )
    if tokens < 2:
        raise ValueError(f"context must be at least 2 tokens, got {tokens}")
    generator = torch.Generator().manual_seed(seed)
    exponents = draw_exponents(heads, generator)
    query = torch.randn(heads, head_dim, generator=generator)
    keys, logits = keys_for(query, exponents, kv_heads, tokens, generator)
    values = torch.randn(1, kv_heads, tokens, head_dim, generator=generator)
    return AttentionInputs(query[None], keys, values, logits, head_dim**-0.5)


def draw_exponents(heads: int, generator: torch.Generator) -> Tensor:
    """Draw ``[heads]`` exponents of the power law, on the CPU like ``generator``."""
    gammas = torch.tensor([power_law_exponent(share) for share in NEEDED_SHARES])
    return gammas[torch.randint(len(gammas), (heads,), generator=generator)]


def keys_for(
    query: Tensor, exponents: Tensor, kv_heads: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make keys ``[1, K, tokens, D]`` to which ``query [H, D]`` has logits ``[H, tokens]`` of the power law, float32.

    ``generator`` must be on the query's device.
    """
    heads, head_dim = query.shape
    per_kv, scaling, device = heads // kv_heads, head_dim**-0.5, query.device
    logits = torch.empty(heads, tokens, device=device)
    for head in range(heads):
        rank = torch.randperm(tokens, generator=generator, device=device) + 1
        logits[head] = -float(exponents[head]) * rank.log()
    keys = torch.empty(1, kv_heads, tokens, head_dim, device=device)
    for k in range(kv_heads):
        group = slice(k * per_kv, (k + 1) * per_kv)
        q, target = query[group].double(), logits[group].double() / scaling
        dual = torch.linalg.pinv(q)  # [D, G]
        noise = torch.randn(tokens, head_dim, generator=generator, device=device).mul_(_NOISE)
        basis = torch.linalg.qr(q.T)[0].float()  # [D, G]
        noise -= (noise @ basis) @ basis.T
        centred = target - target.mean(-1, keepdim=True)  # softmax does not see it, channel ranges do
        keys[0, k] = (dual @ centred).T.float() + noise
        logits[group] -= logits[group].double().mean(-1, keepdim=True).float()
    return keys, logits


def power_law_exponent(share: float) -> float:
    """Return ``gamma`` for which a share of ``CONTEXT`` tokens carries 95 % of ``rank ** -gamma``."""
    wanted = max(1, round(share * CONTEXT))
    log_rank = torch.arange(1, CONTEXT + 1, dtype=torch.float64).log()
    low, high = 0.0, _LARGEST_GAMMA
    for _ in range(30):
        middle = (low + high) / 2
        mass = (-middle * log_rank).softmax(0).cumsum(0)
        needed = int((mass < _MASS).sum()) + 1
        low, high = (middle, high) if needed > wanted else (low, middle)
    return high
