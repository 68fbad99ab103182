"""Rows that are pruned, on CPUs: what each query head keeps, and attention to the union over its KV head."""

from __future__ import annotations

import numpy as np
from numba import carray, literally

from ._numba_attend import BLOCK_TOKENS, attend_rows, row_bytes_of
from ._numba_block import (
    CANDIDATE_COLUMNS,
    CANDIDATE_TOKENS,
    CHUNKS,
    FLAGS,
    KEY_DIM,
    MIN_KEEP,
    STATS,
    TOKENS,
    VALUE_CODES,
    VALUE_LO,
    VALUE_STEP,
    P,
    float_field,
    logits_of,
    page_of,
    partial_of,
    scored_pages,
    stats_of,
)
from ._numba_fetch import fetch_rows
from ._numba_ir import LANES
from ._numba_numbers import LOWEST, RAW_BF16, fast, fast_exp, inlined, u8_at
from ._numba_prune import find_threshold, mass_of
from ._numba_rows import count_flags, flag_at_least, flagged_positions, lower_unflagged
from ._numba_score import score_pages

_PRESENT = np.float32(-1.0e38)  # above ``LOWEST``, below every logit


@fast
def score_candidates(key_kind, page_size, q_per_kv, block, head, first, last, scratch, key_tiles):
    """Write the logits of the candidate tokens of the listed pages ``first .. last``, the lowest for others."""
    literally(key_kind)
    literally(page_size)
    literally(q_per_kv)
    flags, logits = _candidates_of(page_size, block, head), logits_of(block, head, q_per_kv)
    tiles, start = page_size // LANES, first
    while start < last:
        while start < last and count_flags(flags + start * page_size, tiles) == 0:
            for g in range(q_per_kv):
                logits[g, start * page_size : (start + 1) * page_size] = LOWEST
            start += 1
        end = start
        while end < last and count_flags(flags + end * page_size, tiles) > 0:
            end += 1
        if end > start:
            score_pages(key_kind, page_size, q_per_kv, block, head, start, end, scratch, key_tiles)
            for g in range(q_per_kv):
                row = logits[g].ctypes.data + 4 * start * page_size
                lower_unflagged(row, (end - start) * tiles, flags + start * page_size, LOWEST)
        start = end


@fast
def prune(page_size, q_per_kv, value_dim, block, head, near, totals):
    """Flag, for each query head, the fewest packed tokens that with the plain ones carry ``p`` of the mass.

    ``totals [q_per_kv, 3]`` receives the largest logit, the whole mass relative to it, the largest packed
    logit.
    """
    count = scored_pages(block, head, page_size) * page_size
    logits = logits_of(block, head, q_per_kv)
    flags = _flags_of(block, head)
    flags[:count] = 0
    scored, candidates = count, count
    if block[CANDIDATE_TOKENS] != 0:
        flagged, scored, candidates = _candidates_of(page_size, block, head), np.int64(0), np.int64(0)
        for start in range(0, count, page_size):
            found = count_flags(flagged + start, page_size // LANES)
            scored += page_size if found > 0 else 0
            candidates += found
    p, min_keep = np.float32(float_field(block, P)), min(block[MIN_KEEP], candidates)
    plain = partial_of(block, head, 0, q_per_kv, value_dim)
    for g in range(q_per_kv):
        top = LOWEST
        for chunk in range(1, block[CHUNKS]):
            top = max(top, partial_of(block, head, chunk, q_per_kv, value_dim)[g, value_dim])
        peak = max(top, plain[g, value_dim])
        mass = mass_of(logits[g], count, peak)
        forced = plain[g, value_dim + 1] * fast_exp(plain[g, value_dim] - peak)
        need = p * (mass + forced) - forced
        own = np.int64(0)
        if candidates > 0 and (p >= 1 or need > 0 or min_keep > 0):
            limit = _PRESENT
            if p < 1:
                limit = find_threshold(logits[g], count, top, peak, mass, need, min_keep, near)
            own = flag_at_least(logits[g].ctypes.data, count // LANES, limit, flags.ctypes.data)
        if block[STATS] != 0:
            stats = stats_of(block, q_per_kv)
            stats[head * q_per_kv + g, 0] += scored
            stats[head * q_per_kv + g, 1] += own
            stats[head * q_per_kv + g, 4] += candidates
        totals[g, 0], totals[g, 1], totals[g, 2] = peak, mass + forced, top


@fast
def attend_kept(value_kind, page_size, q_per_kv, value_dim, group_size, block, head, scratch, rows, positions, totals):
    """Attend every query head of the KV head to the union of what they keep, into partial 1."""
    literally(value_kind)
    literally(q_per_kv)
    literally(value_dim)
    literally(group_size)
    tiles = scored_pages(block, head, page_size) * page_size // LANES
    kept = flagged_positions(_flags_of(block, head).ctypes.data, tiles, positions.ctypes.data)
    logits = logits_of(block, head, q_per_kv)
    partial = partial_of(block, head, 1, q_per_kv, value_dim)
    partial[:, :] = 0
    for g in range(q_per_kv):
        # may be above all kept tokens, if this head needs none: then the plain tokens outweigh it
        partial[g, value_dim] = totals[g, 2] if kept > 0 else LOWEST
    ahead = rows[2 * BLOCK_TOKENS :]
    list_rows(value_kind, page_size, value_dim, group_size, block, head, positions, 0, kept, ahead)
    for first in range(0, kept, BLOCK_TOKENS):
        count = min(BLOCK_TOKENS, kept - first)
        for i in range(BLOCK_TOKENS):  # not a slice: numba would compile what it says if lengths differed, for seconds
            rows[i] = ahead[i]
        list_rows(
            value_kind, page_size, value_dim, group_size, block, head, positions, first + BLOCK_TOKENS, kept, ahead
        )
        attend_rows(
            value_kind, q_per_kv, value_dim, group_size, block[VALUE_CODES], block[VALUE_LO], block[VALUE_STEP],
            rows, count, logits.ctypes.data, block[TOKENS], positions.ctypes.data + 4 * first, partial, scratch,
            block[KEY_DIM],
        )  # fmt: skip
    if block[STATS] != 0:
        stats = stats_of(block, q_per_kv)
        plain = partial_of(block, head, 0, q_per_kv, value_dim)
        for g in range(q_per_kv):
            attended = plain[g, value_dim + 1] * fast_exp(plain[g, value_dim] - totals[g, 0])
            attended += partial[g, value_dim + 1] * fast_exp(partial[g, value_dim] - totals[g, 0])
            stats[head * q_per_kv + g, 2] += kept
            stats[head * q_per_kv + g, 3] += attended / totals[g, 1]


@fast
def list_rows(value_kind, page_size, value_dim, group_size, block, head, positions, first, kept, rows):
    """List the value rows of the block of kept tokens that starts at ``first``, and ask for them."""
    literally(value_kind)
    count = max(np.int64(0), min(np.int64(BLOCK_TOKENS), kept - first))
    start, index = np.int64(0), np.int64(-1)  # of the page that holds the token; the tokens ascend
    for i in range(count):
        token = np.int64(positions[first + i])
        if token // page_size != index:
            index = token // page_size
            start = (page_of(block, head, index, page_size) - index) * page_size
        rows[i] = start + token
    fetch_rows(block[VALUE_CODES], rows.ctypes.data, count, row_bytes_of(value_kind, value_dim))
    if value_kind < RAW_BF16:
        scale_bytes = 2 * ((value_dim + group_size - 1) // group_size)
        fetch_rows(block[VALUE_LO], rows.ctypes.data, count, scale_bytes)
        fetch_rows(block[VALUE_STEP], rows.ctypes.data, count, scale_bytes)


@fast
def count_dense(page_size, q_per_kv, block, head):
    """Count for a row that was not pruned."""
    if block[STATS] == 0:
        return
    stats = stats_of(block, q_per_kv)
    scored = scored_pages(block, head, page_size) * page_size
    for g in range(q_per_kv):
        for column in range(3):
            stats[head * q_per_kv + g, column] += scored
        stats[head * q_per_kv + g, 3] += 1
        stats[head * q_per_kv + g, 4] += scored


@inlined
def _candidates_of(page_size, block, head):
    """Address of the flags of this head's listed tokens."""
    return block[CANDIDATE_TOKENS] + head * block[CANDIDATE_COLUMNS] * page_size


@inlined
def _flags_of(block, head):
    return carray(u8_at(block[FLAGS] + head * block[TOKENS]), (block[TOKENS],))
