"""Sparse prefill on GPUs: choosing stripes and attending to them (definitions in ``_reference_prefill``).

Nothing waits for the device: grids cover the strips that there can be at most, and programs whose strip does not exist
leave at once. Scratch would grow with the square of the context, so strips go in waves that share it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
from torch import Tensor

from ._triton_aot import CAPABILITIES, AotCase
from ._triton_stripe_attend import attend_kernel, list_kernel
from ._triton_stripe_mass import column_kernel, lse_kernel
from ._triton_stripe_select import choose_kernel
from ._triton_tiles import FUSED, LARGE_BLOCKS, has_large_blocks
from .stripe_plan import StripePlan

_SCRATCH_BYTES = 512 << 20
_MASS_SPAN = 1024  # keys of a program of column_kernel
_SPAN = 1024  # keys that listing and marking look at together
_ALIGNED = 16  # numbers; threads take neighbours of scratch that begins at such addresses, so scans cost less
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_REGISTERS = 255  # left to itself, ptxas spills a little to stay at 128
# of products of float32 numbers: three products of the tensor cores, whose error is float32's own
_PRECISION = {torch.bfloat16: "ieee", torch.float16: "ieee", torch.float32: "tf32x3"}


def select_stripes(
    query: Tensor, keys: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``_reference_prefill.select_stripes``."""
    query, keys, padding = _last_contiguous(query), _last_contiguous(keys), padding.contiguous()
    (batch, heads, rows, dim), (kv_heads, total) = query.shape, keys.shape[1:3]
    strips, tasks = plan.max_strips(rows), batch * kv_heads
    mask = torch.zeros(batch, kv_heads, strips, -(-total // 8), dtype=torch.uint8, device=query.device)
    report = torch.zeros(*mask.shape[:3], 5, dtype=torch.float32, device=query.device)
    shape = _select_shape(dim, query.dtype, heads // kv_heads, plan, kv_heads)
    wave = _wave(strips, tasks, 8 * total)
    lines = tasks * wave * shape["CHUNKS"] * shape["HEADS"] * shape["SLOTS"]
    lse, base, kept = (query.new_empty(lines, dtype=torch.float32) for _ in range(3))
    lane = -(-total // _ALIGNED) * _ALIGNED
    column = query.new_empty(tasks * wave * lane, dtype=torch.float32)
    listed = torch.empty_like(column, dtype=torch.int32)
    strides = (*query.stride()[:3], *keys.stride()[:3])
    mass, choose = {**shape, "STRIPS": _strips_together(shape)}, _choose_shape(shape)
    factor, options = scaling / math.log(2), _select_options(mass)
    with torch.cuda.device_of(query):
        for first in range(0, strips, wave):
            here = min(wave, strips - first)
            groups = (here + mass["STRIPS"] - 2) // mass["STRIPS"] + 1
            places = *strides, first, here, rows, total
            lse_kernel[(groups, tasks, mass["CHUNKS"])](
                query, keys, padding, lse, base, *places, factor, **mass, **options
            )  # fmt: skip
            column_kernel[(triton.cdiv(total, _MASS_SPAN), groups, tasks)](
                query, keys, padding, lse, column, *places, lane, factor, **mass, SPAN=_MASS_SPAN, **options
            )
            choose_kernel[(here, tasks)](
                query, keys, padding, lse, base, column, listed, kept, mask, report, *strides, first, strips, rows,
                total, lane, factor, plan.alpha, plan.floor, **choose, **_select_options(choose),
            )  # fmt: skip
    return mask, report


def attend_stripes(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, plan: StripePlan, *, scaling: float, padding: Tensor
) -> Tensor:
    """See ``_reference_prefill.attend_stripes``."""
    query, keys, values = _last_contiguous(query), _last_contiguous(keys), _last_contiguous(values)
    mask, padding = mask.contiguous(), padding.contiguous()
    (batch, heads, rows, dim), (kv_heads, total) = query.shape, keys.shape[1:3]
    value_dim, strips, tasks = values.shape[3], plan.max_strips(rows), batch * kv_heads
    out = query.new_zeros(batch, rows, heads, value_dim).transpose(1, 2)  # as models go on with it
    wave = _wave(strips, tasks, 4 * total)
    listed = torch.empty(tasks * wave * total, dtype=torch.int32, device=query.device)
    lengths = torch.empty(tasks * wave, dtype=torch.int32, device=query.device)
    places = [stride for x in (query, keys, values, out) for stride in x.stride()[:3]]
    with torch.cuda.device_of(query):
        is_large = has_large_blocks()
        shape = _attend_shape(dim, value_dim, query.dtype, heads // kv_heads, plan, kv_heads, is_large=is_large)
        parts = plan.strip // shape["BLOCK_T"] * (heads // kv_heads)
        for first in range(0, strips, wave):
            here = min(wave, strips - first)
            list_kernel[(here, tasks)](
                mask, padding, listed, lengths, first, strips, rows, total, **_list_shape(plan, kv_heads), num_warps=4,
                **FUSED,
            )  # fmt: skip
            attend_kernel[(parts, here, tasks)](
                query, keys, values, padding, listed, lengths, out, *places, first, rows, total, scaling / math.log(2),
                **shape, **_attend_options(shape),
            )  # fmt: skip
    return out


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _wave(strips: int, tasks: int, strip_bytes: int) -> int:
    """Strips that run together, so that their scratch, ``strip_bytes`` a task, keeps within bounds."""
    return max(1, min(strips, _SCRATCH_BYTES // (tasks * strip_bytes)))


def _block_dim(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _select_shape(dim: int, dtype: torch.dtype, q_per_kv: int, plan: StripePlan, kv_heads: int) -> dict[str, Any]:
    lines = _tile_lines(_PRECISION[dtype], dim)
    slots = triton.next_power_of_2(plan.samples)
    heads = min(triton.next_power_of_2(q_per_kv), max(1, lines // slots))
    return {
        "KV_HEADS": kv_heads, "Q_PER_KV": q_per_kv, "DIM": dim, "STRIP": plan.strip, "SAMPLES": plan.samples,
        "SLOTS": slots, "WINDOW": plan.window, "SINKS": plan.num_sinks, "HEADS": heads,
        "CHUNKS": triton.next_power_of_2(triton.cdiv(q_per_kv, heads)), "BLOCK_D": _block_dim(dim),
        "BLOCK_S": 32 if dtype == torch.float32 or dim > 128 else 64, "PRECISION": _PRECISION[dtype],
    }  # fmt: skip


def _tile_lines(precision: str, dim: int) -> int:
    """Sampled rows of a tile; more would spill."""
    return 64 if precision != "ieee" or dim > 128 else 128


def _strips_together(shape: dict[str, Any]) -> int:
    """Strips whose sampled rows are one tile, so that keys are read once for all of them."""
    lines = _tile_lines(shape["PRECISION"], shape["DIM"])
    return min(4, max(1, lines // int(shape["HEADS"] * shape["SLOTS"])))


def _choose_shape(shape: dict[str, Any]) -> dict[str, Any]:
    keys = shape["BLOCK_S"] if shape["CHUNKS"] == 1 else 32  # weighed by a chunk for each, they would spill
    return {**shape, "BLOCK_S": keys, "SPAN": _SPAN}


def _select_options(shape: dict[str, Any]) -> dict[str, int]:
    lines = shape["HEADS"] * shape["SLOTS"] * shape.get("STRIPS", 1)
    is_narrow = shape["PRECISION"] == "ieee" and lines <= 64
    return {"num_warps": 4 if is_narrow else 8, "num_stages": _stages(shape), "maxnreg": _REGISTERS, **FUSED}


def _list_shape(plan: StripePlan, kv_heads: int) -> dict[str, Any]:
    sinks = triton.next_power_of_2(max(1, plan.num_sinks))
    return {
        "KV_HEADS": kv_heads, "STRIP": plan.strip, "WINDOW": plan.window, "SINKS": plan.num_sinks, "SPAN": _SPAN,
        "SINK_SPAN": sinks,
    }  # fmt: skip


def _attend_shape(
    dim: int, value_dim: int, dtype: torch.dtype, q_per_kv: int, plan: StripePlan, kv_heads: int, *, is_large: bool
) -> dict[str, Any]:
    """Constants of ``attend_kernel``; ``is_large`` as of ``has_large_blocks``."""
    is_exact, is_wide = dtype == torch.float32, max(dim, value_dim) > 128
    rows = 64 if is_exact or is_wide or plan.strip % 128 else 128
    if is_exact:
        tiles = 32, 16, 1
    elif is_wide:
        tiles = 32, 32, 5 if is_large else 3
    else:
        tiles = (128, 64, 5) if is_large else (64, 32, 5)
    return {
        "KV_HEADS": kv_heads, "Q_PER_KV": q_per_kv, "DIM": dim, "VALUE_DIM": value_dim, "STRIP": plan.strip,
        "WINDOW": plan.window, "SINKS": plan.num_sinks, "BLOCK_T": rows, "BLOCK_S": tiles[0], "SLAB_S": tiles[1],
        "LIST_STAGES": tiles[2], "BLOCK_D": _block_dim(dim), "BLOCK_V": _block_dim(value_dim),
        "PRECISION": _PRECISION[dtype],
    }  # fmt: skip


def _attend_options(shape: dict[str, Any]) -> dict[str, int]:
    return {"num_warps": 8, "num_stages": _stages(shape), **FUSED}


def _stages(shape: dict[str, Any]) -> int:
    if shape["PRECISION"] != "ieee":
        return 1
    return 3 if shape["BLOCK_S"] > 32 and shape.get("CHUNKS", 1) == 1 else 2


def aot_cases() -> list[AotCase]:
    """Configurations of real models; wider heads in float32, which serve checks only, spill a little."""
    shapes = [
        (torch.bfloat16, 64, 3), (torch.bfloat16, 80, 1), (torch.bfloat16, 96, 8), (torch.bfloat16, 128, 1),
        (torch.bfloat16, 128, 4), (torch.bfloat16, 128, 8), (torch.bfloat16, 128, 16), (torch.bfloat16, 256, 2),
        (torch.float16, 128, 4), (torch.float32, 64, 3),
    ]  # fmt: skip
    plan, found = StripePlan(), []
    for dtype, dim, q_per_kv in shapes:
        about = f"{_NAMES[dtype]}, D {dim}, q_per_kv {q_per_kv}"
        select = _select_shape(dim, dtype, q_per_kv, plan, 8)
        mass = {**select, "STRIPS": _strips_together(select)}
        kernels = {
            "lse": (lse_kernel, mass),
            "column": (column_kernel, {**mass, "SPAN": _MASS_SPAN}),
            "choose": (choose_kernel, _choose_shape(select)),
        }
        for name, (kernel, shape) in kernels.items():
            found.append(_case(f"{name}_stripes, {about}", kernel, dtype, shape, _select_options(shape)))
        for is_large in (False, True):
            spared = tuple(chip for chip in CAPABILITIES if (chip in LARGE_BLOCKS) != is_large)
            attend = _attend_shape(dim, dim, dtype, q_per_kv, plan, 8, is_large=is_large)
            case = _case(f"attend_stripes, {about}", attend_kernel, dtype, attend, _attend_options(attend))
            found.append(dataclasses.replace(case, spared=spared))
    found.append(_case("list_stripes", list_kernel, torch.bfloat16, _list_shape(plan, 8), {"num_warps": 4}))
    return found


def _case(
    name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], options: dict[str, int]
) -> AotCase:  # fmt: skip
    kinds = {"factor": "fp32", "alpha": "fp32", "floor": "fp32", "padding": "*i32", "listed": "*i32", "lengths": "*i32"}
    kinds |= dict.fromkeys(("query", "keys", "values", "out"), f"*{_NAMES[dtype]}")
    kinds |= dict.fromkeys(("lse", "base", "column", "kept", "report"), "*fp32")
    kinds |= {"mask": "*u8", "first_strip": "i32", "strips": "i32", "rows": "i32", "total": "i32"}
    signature = {arg: kinds.get(arg, "i32:16") for arg in kernel.arg_names if arg not in constants}
    return AotCase(
        name, kernel, signature, constants, options["num_warps"], options.get("num_stages", 3), options.get("maxnreg")
    )
