"""Weighed sums of packed values on a GPU.

Where the shape allows it, the scales of a token are folded into its weights and codes are multiplied as they are, as
in ``_triton_key_words``; else values are unpacked.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._triton_tiles import (
    FEW_REGISTERS,
    FUSED,
    REGISTERS,
    exact_unit,
    field_bits,
    power_of_two,
    product,
    tile_tokens,
    unpack_codes,
    warps_for,
)
from ._triton_words import CODE, code_rows, heads_of, join_tiles, nibble_words, repeated

LEAST_STEP = tl.constexpr(2.0**-24)  # above zero of float16


def value_shape(dim: int, bits: int, group: int, per_kv: int, is_wide: bool) -> dict[str, int]:
    """Constants of the kernel that weighs values: where scales can be folded into weights, many tokens at once."""
    plane = dim * field_bits(bits) // 8  # channels that lie side by side in a plane
    width = min(plane, group)
    folds = (
        bits != 16 and not is_wide and dim == power_of_two(dim) and width == power_of_two(width)
        and max(plane, group) % width == 0 and dim // width <= 4
        and power_of_two(per_kv) * dim <= (1024 if bits == 3 else 2048)
    )  # fmt: skip
    return {
        "PER_KV": per_kv, "M": max(4 if folds else 8, power_of_two(per_kv)),
        "DV": dim, "VP": max(16, power_of_two(dim)),
        "VALUE_BITS": bits, "GROUP": group, "NARROW": not is_wide, "FOLDS": folds, "LANES": 4 if folds else 1,
        "T": (32 if dim <= 128 else 16) if folds else min(32, tile_tokens(dim, is_wide or dim > 128)),
    }  # fmt: skip


def value_launch(shape: dict[str, int], is_wide: bool) -> dict[str, Any]:
    """How to launch a kernel of ``value_shape``."""
    warps = 4 if shape["FOLDS"] else warps_for(is_wide, shape["DV"])
    registers = FEW_REGISTERS if shape["FOLDS"] else REGISTERS
    return {"num_warps": warps, "num_stages": 1, "maxnreg": registers, **FUSED}


@triton.jit
def load_values(
    codes, lows, steps, token_head, exists,
    DV: tl.constexpr, VP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Values ``[T, VP]`` of the tokens ``token_head [T]``; packed ones halved, so that float16 holds the largest."""
    d = tl.arange(0, VP)
    mask = exists[:, None] & (d < DV)[None, :]
    if BITS == 16:
        return tl.load(codes + token_head[:, None] * DV + d[None, :], mask=mask, other=0.0)
    else:
        groups: tl.constexpr = (DV + GROUP - 1) // GROUP
        if groups <= 4:  # one load a group and token, spread over the channels in registers
            low = tl.load(lows + token_head * groups, mask=exists, other=0.0).to(tl.float32)[:, None]
            step = tl.load(steps + token_head * groups, mask=exists, other=0.0).to(tl.float32)[:, None]
            for group in tl.static_range(1, groups):
                is_past = (d >= group * GROUP)[None, :]
                next_low = tl.load(lows + token_head * groups + group, mask=exists, other=0.0)
                next_step = tl.load(steps + token_head * groups + group, mask=exists, other=0.0)
                low = tl.where(is_past, next_low.to(tl.float32)[:, None], low)
                step = tl.where(is_past, next_step.to(tl.float32)[:, None], step)
        else:
            at = token_head[:, None] * groups + (d // GROUP)[None, :]
            low = tl.load(lows + at, mask=mask, other=0.0).to(tl.float32)
            step = tl.load(steps + at, mask=mask, other=0.0).to(tl.float32)
        row = codes + token_head[:, None] * (DV * BITS // 8)
        found = unpack_codes(row, d[None, :], DV, BITS, mask).to(tl.float32)
        values = found * (step * 0.5) + low * 0.5
        if NARROW:
            values = values.to(tl.float16)
        return values


@triton.jit
def weigh_codes(
    weights, acc, bias, codes, lows, steps, token_head, exists, is_rest, is_first, DV: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add values of tokens ``token_head [L, T]`` that exist, times ``weights [L, T, M]``, to what was summed so far.

    Tensor cores multiply 16 channels with 8 columns: the query heads, each twice, as in ``_triton_key_words``.

    Returns:
        ``acc [L, M, DV]`` and the tuple ``bias``, which is to be added to each group's channels, ``[L, T, M]``.
    """
    folded, units, biases = (), (), ()
    for group in tl.static_range((DV + GROUP - 1) // GROUP):
        place = token_head * ((DV + GROUP - 1) // GROUP) + group
        step = tl.load(steps + place, mask=exists, other=0.0).to(tl.float32)
        low = tl.load(lows + place, mask=exists, other=0.0).to(tl.float32)
        unit, inverse = exact_unit(tl.maximum(tl.max(step, 1), LEAST_STEP))
        # below float16's limit: weights are 1
        folded = folded + (weight_columns(weights * (step * (inverse * 16384)[:, None])[:, :, None], is_rest),)
        units, biases = units + (unit * (CODE / 16384),), biases + (tl.fma(weights, low[:, :, None], bias[group]),)
    field: tl.constexpr = 2 if BITS == 3 else BITS  # bits of the first plane
    count: tl.constexpr = DV * field // 8  # channels that lie side by side in a plane
    width: tl.constexpr = min(count, GROUP)
    row = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (token_head * (DV * BITS // 16))[:, :, None]
    tiles = ()
    if BITS == 3:  # of two planes
        words = tl.load(row + tl.arange(0, count // 2)[None, None, :], mask=exists[:, :, None], other=0)
        highs = tl.load(row + count // 2 + tl.arange(0, count // 4)[None, None, :], mask=exists[:, :, None], other=0)
        nibbles = nibble_words(words, repeated(highs), is_first)
        for k in tl.static_range(4):
            tiles = tiles + (plane_product(folded, units, nibbles[k % 2], k // 2 * 4, BITS, k * count // GROUP),)
    else:
        for k in tl.static_range(8 // BITS):
            for part in tl.static_range(count // width):
                column = part * (width // 2) + tl.arange(0, width // 2)
                words = tl.load(row + column[None, None, :], mask=exists[:, :, None], other=0)
                found = plane_product(folded, units, words, k * BITS, BITS, (k * count + part * width) // GROUP)
                tiles = tiles + (found,)
    return acc + join_tiles(tiles, acc.shape[0], acc.shape[1], DV, DV // width), biases


@triton.jit
def weight_columns(weights, is_rest):
    """Weights ``[L, T, M]`` as columns: the nearest float16 numbers and what rounding left, ``[L, T, 2 * M]``."""
    high = weights.to(tl.float16).to(tl.float32)
    parts = tl.fma(high[:, :, :, None], is_rest, weights[:, :, :, None]).to(tl.float16)
    return parts.reshape(weights.shape[0], weights.shape[1], 2 * weights.shape[2])


@triton.jit
def plane_product(folded, units, words, SHIFT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Weighed sums ``[L, M, 2 * W]`` of the codes at bit ``SHIFT`` of words' bytes ``[L, T, W]``, all of one group."""
    lanes: tl.constexpr = words.shape[0]
    found = heads_of(product(code_rows(words, SHIFT, BITS), folded[GROUP]))
    found = found.reshape(lanes, 2, words.shape[2], found.shape[2])
    sums = tl.permute(found, (0, 3, 2, 1)).reshape(lanes, found.shape[3], 2 * words.shape[2])
    return sums * (units[GROUP] * (1.0 / (1 << SHIFT)))[:, None, None]


@triton.jit
def weigh_numbers(
    weights, codes, lows, steps, token_head, exists, DV: tl.constexpr, VP: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """``weights [M, T] @ values`` of the tokens ``token_head [T]`` that exist, ``[M, VP]``."""
    values = load_values(codes, lows, steps, token_head, exists, DV, VP, BITS, GROUP, NARROW)
    found = add_weighed(weights, values, tl.zeros([weights.shape[0], VP], tl.float32))
    return found if BITS == 16 else found * 2


@triton.jit
def add_weighed(weights, values, acc):
    """``acc + weights @ values``; weights in two parts, so that narrow tensor cores lose nothing of them."""
    if values.dtype == tl.float32:
        return acc + product(weights, values)
    else:
        high = weights.to(values.dtype)
        rest = (weights - high.to(tl.float32)).to(values.dtype)
        return acc + (product(high, values) + product(rest, values))
