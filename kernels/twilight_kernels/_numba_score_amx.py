"""Scoring packed keys on matrix tiles of CPUs (see ``_numba_key_tiles``, ``_numba_limbs``), page by page.

The scratch of a thread is float32 ``query [q_per_kv, wide] | steps [wide] | lows [wide] | folded [q_per_kv, wide] |
numbers``, uint8 ``limbs`` and ``codes``, int32 ``sums``, each from a multiple of 64 bytes on; *wide* are the channels
up to a multiple of 64, and what is beyond the keys' own stays zero. It is passed as an address: numba counts references
to arrays with atomic instructions, which wait until all that was stored has left the core.
"""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_amx import CONFIG_ADDRESS, has_tiles, tiles_off, tiles_on
from ._numba_block import KEY_CODES, KEY_DIM, KEY_LO, KEY_STEP, TILE_BYTES, TILE_WORK, TILES, TOKENS, logits_of, page_of
from ._numba_fetch import fetch_row
from ._numba_ir import LANES
from ._numba_key_tiles import multiply_limbs, unpack_key_tiles
from ._numba_limbs import HEADS, LIMBS, ONES, STEP, sum_limbs, write_limbs
from ._numba_numbers import RAW_BF16, RAW_F16, exact, f32_at, fast, inlined, read_row, u8_at


def scores_on_tiles(key_kind: int) -> bool:
    """Whether keys stored as ``key_kind`` are scored on tiles here."""
    return key_kind < RAW_BF16 and has_tiles("int8")


def tile_bytes(page_size: int, q_per_kv: int, key_dim: int) -> int:
    """Bytes of a thread's scratch."""
    wide, rows = -(-key_dim // STEP) * STEP, -(-q_per_kv // HEADS) * LANES
    numbers = -(-LIMBS * -(-q_per_kv // 4) * 4 // LANES) * LANES
    return 4 * ((2 * q_per_kv + 2) * wide + numbers) + rows * wide + wide * page_size + 4 * rows * page_size


def put_tiles(block: np.ndarray, page_size: int, q_per_kv: int, key_dim: int, work: int) -> None:
    """Enter where the threads' scratch is."""
    block[[TILES, TILE_WORK, TILE_BYTES]] = CONFIG_ADDRESS, work, tile_bytes(page_size, q_per_kv, key_dim)


@fast
def own_tiles(q_per_kv, block, thread):
    """Return the address of a thread's scratch, in which is zero what stays zero, and one what stays one."""
    literally(q_per_kv)
    tiles, wide = block[TILE_WORK] + thread * block[TILE_BYTES], wide_of(block[KEY_DIM])
    scales = carray(f32_at(tiles), ((q_per_kv + 2) * wide,))
    scales[:] = 0
    ones = carray(u8_at(_limbs_of(q_per_kv, wide, tiles) + ONES * wide), (wide,))
    ones[:] = 1
    return tiles


@inlined
def wide_of(key_dim):
    """Channels up to a multiple of what a tile takes."""
    return (key_dim + STEP - 1) // STEP * STEP


@fast
def score_pages_on_tiles(key_kind, page_size, q_per_kv, block, head, first, last, scratch, tiles):
    """As ``score_pages``."""
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    key_dim, query = block[KEY_DIM], tiles
    wide = wide_of(key_dim)
    target = carray(f32_at(query), (q_per_kv * wide,))
    for g in range(q_per_kv):
        for d in range(key_dim):
            target[g * wide + d] = scratch[g * key_dim + d]
    out = logits_of(block, head, q_per_kv).ctypes.data
    tiles_on(block[TILES])
    for index in range(first, last):
        page = page_of(block, head, index, page_size)
        after = page_of(block, head, min(index + 1, last - 1), page_size)
        unpack_on_tiles(key_kind, page_size, q_per_kv, block, page, after, tiles)
        score_on_tiles(key_kind, page_size, q_per_kv, block, query, tiles, out + 4 * index * page_size)
    tiles_off()


@fast
def unpack_on_tiles(key_kind, page_size, q_per_kv, block, page, after, tiles):
    """Put the codes and scales of a page into the scratch."""
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    key_dim = block[KEY_DIM]
    wide, page_bytes = wide_of(key_dim), key_dim * page_size * key_kind // 8
    steps = tiles + 4 * q_per_kv * wide
    read_row(RAW_F16, block[KEY_STEP] + 2 * page * key_dim, key_dim, carray(f32_at(steps), (wide,)))
    read_row(RAW_F16, block[KEY_LO] + 2 * page * key_dim, key_dim, carray(f32_at(steps + 4 * wide), (wide,)))
    if after != page:
        fetch_row(block[KEY_STEP] + 2 * after * key_dim, 2 * key_dim)
        fetch_row(block[KEY_LO] + 2 * after * key_dim, 2 * key_dim)
    codes = _limbs_of(q_per_kv, wide, tiles) + _limb_rows(q_per_kv) * wide
    unpack_key_tiles(
        key_kind, page_size, block[KEY_CODES] + page * page_bytes, key_dim, codes,
        block[KEY_CODES] + after * page_bytes,
    )  # fmt: skip


@exact
def score_on_tiles(key_kind, page_size, q_per_kv, block, query, tiles, out):
    """Write the logits of the page in the scratch for the wide queries of one row."""
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    wide = wide_of(block[KEY_DIM])
    steps, limbs, rows = tiles + 4 * q_per_kv * wide, _limbs_of(q_per_kv, wide, tiles), _limb_rows(q_per_kv)
    numbers, codes = limbs - 4 * _numbers(q_per_kv), limbs + rows * wide
    sums = codes + wide * page_size
    write_limbs(q_per_kv, query, steps, steps + 4 * wide, wide, steps + 8 * wide, limbs, numbers)
    multiply_limbs(page_size, q_per_kv, limbs, wide, codes, sums)
    sum_limbs(key_kind, page_size, q_per_kv, sums, numbers, out, block[TOKENS])


@inlined
def _limbs_of(q_per_kv, wide, tiles):
    return tiles + 4 * ((2 * q_per_kv + 2) * wide + _numbers(q_per_kv))


@inlined
def _limb_rows(q_per_kv):
    return (q_per_kv + HEADS - 1) // HEADS * LANES


@inlined
def _numbers(q_per_kv):
    """Numbers that ``write_limbs`` notes, up to a multiple of 16."""
    return (LIMBS * ((q_per_kv + 3) // 4 * 4) + LANES - 1) // LANES * LANES
