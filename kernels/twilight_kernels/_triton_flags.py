"""Which entries the query heads of a KV head need, on GPUs (definition: ``_reference.top_p_flags``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_prune import BLOCK, row_masses, top_p_threshold
from ._triton_tiles import FUSED


def top_p_flags(logits: Tensor, p: float, *, forced_lse: Tensor) -> tuple[Tensor, Tensor]:
    """See ``_reference.top_p_flags``."""
    rows, kv_heads, per_kv, columns = logits.shape
    logits, forced_lse = logits.contiguous(), forced_lse.contiguous()
    flags = torch.empty(rows, kv_heads, columns, dtype=torch.bool, device=logits.device)
    share = torch.empty(rows, kv_heads, per_kv, device=logits.device)
    if not logits.numel():
        return flags, share.fill_(1.0)
    flat = logits.flatten(0, 2)
    limits = top_p_threshold(flat, p, forced_lse=forced_lse.flatten())
    with torch.cuda.device_of(logits):
        flags_kernel[(rows * kv_heads, triton.cdiv(columns, BLOCK))](
            logits, limits, flags.view(torch.uint8), columns, PER_KV=per_kv, BLOCK=BLOCK, num_warps=4, **FUSED
        )
        tops, sums = row_masses(flat)
        kept_tops, kept_sums = row_masses(logits.masked_fill(~flags.unsqueeze(2), -torch.inf).flatten(0, 2))
    whole, kept = (
        (top + total.log()).logsumexp(-1).view_as(forced_lse).logaddexp(forced_lse)
        for top, total in ((tops, sums), (kept_tops, kept_sums))
    )
    return flags, (kept - whole).exp()


@triton.jit(do_not_specialize=["columns"])
def flags_kernel(logits, limits, flags, columns, PER_KV: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    needed = tl.zeros([BLOCK], tl.int32)
    for g in range(PER_KV):
        limit = tl.load(limits + pair * PER_KV + g)
        x = tl.load(logits + (pair * PER_KV + g) * columns + at, mask=at < columns, other=float("-inf"))
        needed = needed | ((x >= limit) & (x > float("-inf"))).to(tl.int32)
    tl.store(flags + pair * columns + at, needed.to(tl.uint8), mask=at < columns)
