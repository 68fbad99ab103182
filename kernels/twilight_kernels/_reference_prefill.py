"""The definition of the prefill kernels; see ``_reference``, which offers them under its name too.

Letters: B requests, H query heads, K KV heads, T query rows, S keys, D head dim, N strips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stripe_plan import StripePlan

_LEVEL = 1 << 21  # a step of a float32's two leading mantissa bits: a quarter of an octave


def select_stripes(
    query: Tensor, keys: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose the keys that each strip of query rows attends to; see ``prefill.select_stripes``."""
    (batch, _, rows, _), (kv_heads, total) = query.shape, keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    mask = torch.zeros(batch, kv_heads, plan.max_strips(rows), total, dtype=torch.bool, device=query.device)
    report = torch.zeros(*mask.shape[:3], 4, dtype=torch.float32, device=query.device)
    position = torch.arange(total, device=query.device)
    for b, pad in enumerate(padding.tolist()):
        group = query[b].unflatten(0, (kv_heads, -1)).to(wide)  # [K, G, T, D]
        for n, (first, end) in enumerate(plan.strips(rows, total, pad)):
            sampled = torch.tensor(plan.sampled_rows(first, end, total - rows - pad), device=query.device)
            hidden = (position > sampled[:, None] + total - rows) | (position < pad)  # [R, S]
            logits = torch.einsum("kgrd,ksd->kgrs", group[:, :, sampled], keys[b].to(wide)) * scaling
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)  # [K, G, R, S]
            always = _always(plan, first + total - rows, end + total - rows, pad, position)
            for k in range(kv_heads):
                mask[b, k, n], report[b, k, n] = _fewest(weights[k], always, plan)
    return pack_bits(mask), report


def attend_stripes(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> Tensor:
    """Attend each query row to sinks, window and the stripes of its strip; see ``prefill.attend_stripes``."""
    (batch, heads, rows, _), (kv_heads, total) = query.shape, keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(batch, heads, rows, values.shape[-1])
    chosen = unpack_bits(mask, total)
    position = torch.arange(total, device=query.device)
    for b, pad in enumerate(padding.tolist()):
        group = query[b].unflatten(0, (kv_heads, -1)).to(wide)  # [K, G, T, D]
        for n, (first, end) in enumerate(plan.strips(rows, total, pad)):
            own = position[first + total - rows : end + total - rows]
            seen = chosen[b, :, n] | _always(plan, int(own[0]), int(own[-1]) + 1, pad, position)  # [K, S]
            seen = seen[:, None] & (position <= own[:, None]) & (position >= pad)  # [K, R, S]
            logits = torch.einsum("kgrd,ksd->kgrs", group[:, :, first:end], keys[b].to(wide)) * scaling
            weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            strip = torch.einsum("kgrs,ksd->kgrd", weights, values[b].to(wide))
            out[b, :, first:end] = strip.flatten(0, 1).to(query.dtype)
    return out


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bools along the last axis, eight a byte, lowest bit first: ``[..., S]`` to ``[..., ceil(S / 8)]``."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weight = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    packed: Tensor = (padded * weight).sum(-1).to(torch.uint8)
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Undo ``pack_bits``: ``[..., ceil(count / 8)]`` uint8 to ``[..., count]`` bool."""
    bits: Tensor = (packed[..., None] >> torch.arange(8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :count].to(torch.bool)


def _always(plan: StripePlan, first: int, end: int, pad: int, position: Tensor) -> Tensor:
    """``[S]`` bool: the sinks and the window of a strip at positions ``first .. end``."""
    slab = max(pad, first - plan.window)
    is_sink = (position >= pad) & (position < pad + plan.num_sinks)
    return (is_sink | (position >= slab)) & (position < end)


def _fewest(weights: Tensor, always: Tensor, plan: StripePlan) -> tuple[Tensor, Tensor]:
    """Choose the ``[S]`` stripes of sampled rows with ``weights [G, R, S]``, and report on them.

    The bar is the highest quarter octave of column mass at which rows keep enough, each judged by the columns that
    the *other* rows would choose: rows that were not sampled fare like that.
    """
    base = weights[..., always].sum(-1)  # [G, R]
    weights = weights.masked_fill(always, 0.0)
    column = weights.sum((0, 1)).float()
    others = (column - weights.sum(0)).float() if base.shape[1] > 1 else column  # [R, S]; a lone row has no others
    least = max(1, round(0.05 * base.numel()))

    def kept_at(level: int) -> Tensor:
        return base + (weights * (others >= _bar(level))).sum(-1)

    def is_enough(kept: Tensor) -> bool:
        return float(kept.mean()) >= plan.alpha and float(kept.flatten().sort().values[least - 1]) >= plan.floor

    low, high = 0, int(column.max().view(torch.int32)) // _LEVEL + 1  # high keeps nothing, low everything
    if plan.alpha < 1.0 and is_enough(kept_at(high)):
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        if plan.alpha < 1.0 and is_enough(kept_at(middle)):
            low = middle
        else:
            high = middle
    kept = kept_at(low)
    chosen = (column >= _bar(low)) & (column > 0)
    return chosen, torch.stack([chosen.sum(), base.mean(), kept.mean(), kept.flatten().sort().values[least - 1]])


def _bar(level: int) -> float:
    """The column mass at which a level begins; level 0 is everything, whatever rounding made of it."""
    if level == 0:
        return -1.0
    return float(torch.tensor(level * _LEVEL, dtype=torch.int32).view(torch.float32))
