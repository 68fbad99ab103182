"""Weighed sums of packed values on a GPU.

Where the shape allows it, the scales of a token are folded into its weights and codes are multiplied as they are, as
in ``_triton_keys``; else values are unpacked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import (
    CODE,
    REGISTERS,
    exact_unit,
    field_bits,
    join_tiles,
    masked,
    nibble_words,
    odd_bytes,
    power_of_two,
    product,
    stack,
    stacked_product,
    tile_tokens,
    unpack_codes,
    warps_for,
)


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
        "PER_KV": per_kv, "M": max(8, power_of_two(per_kv)), "DV": dim, "VP": max(16, power_of_two(dim)),
        "VALUE_BITS": bits, "GROUP": group, "NARROW": not is_wide, "FOLDS": folds, "LANES": 4 if folds else 1,
        "T": (32 if dim <= 128 else 16) if folds else min(32, tile_tokens(dim, is_wide or dim > 128)),
    }  # fmt: skip


def value_launch(shape: dict[str, int], is_wide: bool) -> dict[str, int]:
    """How to launch a kernel of ``value_shape``."""
    warps = 4 if shape["FOLDS"] else warps_for(is_wide, shape["DV"])
    return {"num_warps": warps, "num_stages": 1, "maxnreg": REGISTERS}


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
def weigh_values(
    weights, codes, lows, steps, token_head, exists, M: tl.constexpr, DV: tl.constexpr, VP: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, NARROW: tl.constexpr, FOLDS: tl.constexpr, T: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """``weights [L, M, T] @ values`` of the tokens ``token_head [L, T]`` that exist, ``[L, M, VP]``."""
    if not FOLDS:
        values = load_values(
            codes, lows, steps, token_head.reshape(T), exists.reshape(T), DV, VP, BITS, GROUP, NARROW
        )  # fmt: skip
        found = add_weighed(weights.reshape(M, T), values, tl.zeros([M, VP], tl.float32)).reshape(LANES, M, VP)
        return found if BITS == 16 else found * 2
    else:
        groups: tl.constexpr = (DV + GROUP - 1) // GROUP
        folded, units, biases = (), (), ()
        for group in tl.static_range(groups):
            place = token_head * groups + group
            step = tl.load(steps + place, mask=exists, other=0.0).to(tl.float32)
            low = tl.load(lows + place, mask=exists, other=0.0).to(tl.float32)
            unit, inverse = exact_unit(tl.max(step, 1))
            scaled = weights * (step * inverse[:, None] * 16384)[:, None, :]  # below float16's limit: weights are 1
            high = scaled.to(tl.float16)
            folded = folded + (stack(high, (scaled - high.to(tl.float32)).to(tl.float16)),)
            units = units + (unit * (CODE / 16384),)
            biases = biases + (tl.sum(weights * low[:, None, :], 2),)
        field: tl.constexpr = 2 if BITS == 3 else BITS  # bits of the first plane
        count: tl.constexpr = DV * field // 8  # channels that lie side by side in a plane
        width: tl.constexpr = min(count, GROUP)
        row = codes.to(tl.pointer_type(tl.uint16), bitcast=True) + (token_head * (DV * BITS // 16))[:, :, None]
        tiles = ()
        if BITS == 3:  # of two planes, both of whose words are read for all channels
            column = tl.arange(0, count // 2)[None, None, :]
            words = tl.load(row + column, mask=exists[:, :, None], other=0)
            highs = tl.load(row + count // 2 + column % (count // 4), mask=exists[:, :, None], other=0)
            nibbles = nibble_words(words, highs, column, count // 4)
            for k in tl.static_range(4):
                found = plane_product(
                    folded[k * count // GROUP], units[k * count // GROUP], biases[k * count // GROUP], nibbles[k % 2],
                    k // 2 * 4, BITS, LANES, M, width,
                )  # fmt: skip
                tiles = tiles + (found,)
        else:
            for k in tl.static_range(8 // BITS):
                for part in tl.static_range(count // width):
                    column = part * (width // 2) + tl.arange(0, width // 2)
                    words = tl.load(row + column[None, None, :], mask=exists[:, :, None], other=0)
                    found = plane_product(
                        folded[(k * count + part * width) // GROUP], units[(k * count + part * width) // GROUP],
                        biases[(k * count + part * width) // GROUP], words, k * BITS, BITS, LANES, M, width,
                    )  # fmt: skip
                    tiles = tiles + (found,)
        return join_tiles(tiles, LANES, M, DV, DV // width)


@triton.jit
def plane_product(
    weighed, unit, bias, words, SHIFT: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Weighed sums ``[L, M, WIDTH]`` of the codes at bit ``SHIFT`` of words ``[L, T, WIDTH / 2]``, all of one group."""
    even = masked(words, ((1 << BITS) - 1) << SHIFT).to(tl.float16, bitcast=True)
    odd = masked(odd_bytes(words), ((1 << BITS) - 1) << SHIFT).to(tl.float16, bitcast=True)
    found = tl.join(stacked_product(weighed, even), stacked_product(weighed, odd)).reshape(LANES, M, WIDTH)
    return found * (unit * (1.0 / (1 << SHIFT)))[:, None, None] + bias[:, :, None]


@triton.jit
def add_weighed(weights, values, acc):
    """``acc + weights @ values``; weights in two parts, so that narrow tensor cores lose nothing of them."""
    if values.dtype == tl.float32:
        return acc + product(weights, values)
    else:
        high = weights.to(values.dtype)
        rest = (weights - high.to(tl.float32)).to(values.dtype)
        return acc + (product(high, values) + product(rest, values))
