"""Dense attention that a GPU offers: every backend of torch that takes the shapes, to find the fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

REPEATED = "sdpa, KV heads repeated beforehand"
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip

Run = Callable[[], Tensor]


def decode_entrants(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> dict[str, Run]:
    """Ways to attend ``query [B, H, D]`` to ``keys, values [B, K, S, D]``, each returning ``[B, H, Dv]``.

    What takes no such shapes raises when it is run.
    """
    kv_heads = keys.shape[1]
    rows, grouped = query[:, :, None], query.unflatten(1, (kv_heads, -1))  # [B, H, 1, D], [B, K, G, D]

    def gqa() -> Tensor:
        out: Tensor = scaled_dot_product_attention(rows, keys, values, scale=scaling, enable_gqa=True)
        return out[:, :, 0]

    def as_rows() -> Tensor:
        return scaled_dot_product_attention(grouped, keys, values, scale=scaling).flatten(1, 2)

    def matmuls() -> Tensor:
        weights = (grouped * scaling @ keys.transpose(-1, -2)).softmax(-1, dtype=torch.float32)
        out: Tensor = (weights.to(values.dtype) @ values).flatten(1, 2)
        return out

    entrants: dict[str, Run] = {"sdpa, enable_gqa": gqa, "matmuls and softmax": matmuls}
    for name, backend in _BACKENDS.items():
        entrants[f"sdpa {name}, enable_gqa"] = _under(backend, gqa)
        entrants[f"sdpa {name}, query heads as rows"] = _under(backend, as_rows)
    return entrants


def repeated_entrant(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Run:
    """Attend without GQA packing: every query head reads keys of its own, repeated before the timing.

    Raises:
        MemoryError: the repeated keys and values do not fit.
    """
    per_kv = query.shape[1] // keys.shape[1]
    need = per_kv * (keys.nbytes + values.nbytes)
    if keys.is_cuda and need > 0.9 * torch.cuda.mem_get_info()[0]:
        raise MemoryError(f"repeated KV heads need {need / 1e9:.0f} GB")
    many_keys, many_values = keys.repeat_interleave(per_kv, 1), values.repeat_interleave(per_kv, 1)
    return lambda: scaled_dot_product_attention(query[:, :, None], many_keys, many_values, scale=scaling)[:, :, 0]


def prefill_entrants(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> dict[str, Run]:
    """Ways to attend a whole prompt causally, ``[1, H, S, D]`` to ``[1, H, S, Dv]``."""

    def gqa() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=True)

    def repeated() -> Tensor:
        per_kv = query.shape[1] // keys.shape[1]
        many = keys.repeat_interleave(per_kv, 1), values.repeat_interleave(per_kv, 1)
        return scaled_dot_product_attention(query, *many, is_causal=True, scale=scaling)

    entrants: dict[str, Run] = {"sdpa, enable_gqa": gqa, "sdpa, KV heads repeated by it": repeated}
    for name, backend in _BACKENDS.items():
        entrants[f"sdpa {name}, enable_gqa"] = _under(backend, gqa)
        entrants[f"sdpa {name}, KV heads repeated by it"] = _under(backend, repeated)
    return entrants


def flex_entrant(query: Tensor, keys: Tensor, values: Tensor, scaling: float, *, is_causal: bool) -> Run:
    """FlexAttention, compiled: ``query [B, H, T, D]``; compilation takes its time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    mask = None
    if is_causal:
        rows, total = query.shape[2], keys.shape[2]
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, rows, total, device=str(query.device))
    return lambda: compiled(query, keys, values, block_mask=mask, scale=scaling, enable_gqa=True)


def _under(backend: SDPBackend, run: Run) -> Run:
    def alone() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    return alone
