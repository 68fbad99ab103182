"""Top-p pruning on GPUs: a provable start, what lies above it, then bisection on that alone.

Definition: ``_reference.top_p_threshold``. Scoring leaves the largest logit and the mass of each split of a row. From
them ``start_kernel`` knows a logit below which nothing is needed (all tokens below
``largest + ln((1 - p) * mass / count)`` together weigh less than ``1 - p``), ``collect_kernel`` gathers what each split
holds above; one block a row then narrows the threshold by fifteen trial limits a round and drops what lies outside of
the part that is left. Of a short row that block does all three. A row's own length decides, sums run in fixed orders
and nothing is added atomically: the same row gives the same bits, whatever is computed beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_gather import LEAST_LOGIT, fill_quad, fours, places_of
from ._triton_tiles import FUSED, LEAST_TOKENS, REGISTERS, SPLITS, exponential, grid_splits, segment

ROUNDS = 6  # of 16 parts each: 2 ** -24 of the range
BLOCK = 1024  # logits that are looked at at once
QUADS = 128  # four logits for each thread of a block of four warps
SHORT_ROW = tl.constexpr(8192)  # logits that one block gathers: two more launches would cost as much


def top_p_threshold(logits: Tensor, p: float, *, forced_lse: Tensor | None = None, min_keep: int = 0) -> Tensor:
    """See ``_reference.top_p_threshold``."""
    rows, columns = logits.shape
    if p >= 1.0 or not logits.numel():
        return torch.full((rows,), -torch.inf, device=logits.device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    with torch.cuda.device_of(logits):
        tops, sums = row_masses(logits)
        plain = None if forced_lse is None else (forced_lse.contiguous(), torch.ones_like(forced_lse))
        lengths = torch.full((rows,), columns, dtype=torch.int32, device=logits.device)
        return find_limits(logits, tops, sums, plain, lengths, p, min_keep)[0]


def row_masses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and mass of each split of rows ``[R, S]``, both ``[R, SPLITS]``."""
    rows, columns = logits.shape
    tops = torch.full((rows, SPLITS), -torch.inf, device=logits.device)
    sums = torch.zeros_like(tops)
    mass_kernel[(rows, grid_splits(columns, LEAST_TOKENS))](
        logits, logits.stride(0), columns, tops, sums, SPLITS=SPLITS, LEAST=LEAST_TOKENS, BLOCK=BLOCK, num_warps=4,
        **FUSED,
    )  # fmt: skip
    return tops, sums


def find_limits(
    logits: Tensor, tops: Tensor, sums: Tensor, plain: tuple[Tensor, Tensor] | None, lengths: Tensor, p: float,
    min_keep: int, *, runs: int = 1, page_size: int = 1, num_listed: int | None = None, min_sparse_len: int = 0,
    per_kv: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Find the threshold of each row of logits.

    Args:
        logits: ``[R, S]``, contiguous numbers in a row; ``R`` is rows of the batch times query heads.
        tops, sums: ``[R / per_kv, SPLITS, per_kv]`` largest logit of each split, and its mass in that unit.
        plain: the same of what is kept in any case, ``[R / per_kv, slots, per_kv]``.
        runs: slots of it that count.
        lengths: ``[B]`` int32, pages of each row of the batch.
        p, min_keep: see ``_reference.top_p_threshold``.
        page_size: entries of a page.
        num_listed: pages of every row, if not ``lengths``.
        min_sparse_len: rows of the batch with fewer entries keep everything.
        per_kv: query heads on one KV head.
    Returns:
        ``[R]`` float32 thresholds; ``[R]`` int32 entries kept; ``[R]`` float32 log of the whole mass.
    """
    rows, columns = logits.shape
    device = logits.device
    quads = triton.cdiv(columns, 4) + SPLITS + 1  # see near_place
    near = torch.empty(rows, 4 * quads, device=device)
    counts = torch.empty(rows, SPLITS, dtype=torch.int32, device=device)
    known = torch.empty(rows, 4, device=device)
    limits, masses = (torch.empty(rows, device=device) for _ in range(2))
    kept = torch.empty(rows, dtype=torch.int32, device=device)
    runs = 0 if plain is None else runs
    plain_tops, plain_sums = (tops, sums) if plain is None else plain
    shape = {
        "PAGE": page_size, "SPLITS": SPLITS, "LEAST": max(1, LEAST_TOKENS // page_size),
        "HAS_LISTED": num_listed is not None,
    }  # fmt: skip
    length = lengths, num_listed or 0, min_sparse_len, rows // len(lengths)
    parts = tops, sums, plain_tops, plain_sums, runs, plain_tops.numel() // rows
    starts = {"PER_KV": per_kv, "RUNS": triton.next_power_of_2(max(1, runs))}
    if columns > SHORT_ROW.value:
        start_kernel[(rows,)](*parts, known, masses, *length, p, min_keep, **shape, **starts, num_warps=1, **FUSED)
        collect_kernel[(rows, grid_splits(columns // page_size, shape["LEAST"]))](
            logits, logits.stride(0), near, quads, counts, known, *length, **shape, BLOCK=BLOCK, QUADS=QUADS,
            num_warps=4, **FUSED,
        )  # fmt: skip
    limit_kernel[(rows,)](
        logits, logits.stride(0), near, quads, counts, known, *parts, masses, limits, kept, *length, p, min_keep,
        **shape, **starts, QUADS=2 * QUADS, ROUNDS=ROUNDS, num_warps=8, maxnreg=REGISTERS, **FUSED,
    )  # fmt: skip
    return limits, kept, masses


@triton.jit(do_not_specialize=["columns"])
def mass_kernel(logits, stride, columns, tops, sums, SPLITS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """Write the largest logit of a split of a row, and the sum of exponentials below it."""
    row, split = tl.program_id(0), tl.program_id(1)
    first, last = segment(columns, split, SPLITS, LEAST)
    top = float("-inf")
    total = 0.0
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < last, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = new_top
    tl.store(tops + row * SPLITS + split, top)
    tl.store(sums + row * SPLITS + split, total)


@triton.jit(do_not_specialize=["runs", "slots", "num_listed", "min_sparse_len", "heads", "min_keep"])
def start_kernel(
    tops, sums, plain_tops, plain_sums, runs, slots, known, masses, lengths, num_listed, min_sparse_len, heads, p,
    min_keep, PER_KV: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    HAS_LISTED: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Write what is known of a row, if it is long, before its logits are looked at (see ``row_start``)."""
    head = tl.program_id(0)
    count = row_length(head, lengths, num_listed, min_sparse_len, heads, PAGE, HAS_LISTED)
    if count * PAGE <= SHORT_ROW:
        return
    mass, start, top, base, need = row_start(
        tops, sums, plain_tops, plain_sums, runs, slots, head, count, p, min_keep, PER_KV, PAGE, SPLITS, LEAST, RUNS
    )
    tl.store(masses + head, mass)
    tl.store(known + head * 4, start)
    tl.store(known + head * 4 + 1, top)
    tl.store(known + head * 4 + 2, base)
    tl.store(known + head * 4 + 3, need)


@triton.jit
def row_start(
    tops, sums, plain_tops, plain_sums, runs, slots, head, count, p, min_keep, PER_KV: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """What the masses of its splits tell of a row: the log of the whole mass, and four numbers.

    A logit below which nothing is needed, ``-inf`` if none is known; the largest; the largest of what is kept in any
    case, too; the mass that is needed in that one's unit.
    """
    pair, g = head // PER_KV, head % PER_KV
    split = tl.arange(0, SPLITS)
    first, _last = segment(count, split, SPLITS, LEAST)
    place = (pair * SPLITS + split) * PER_KV + g
    split_tops = tl.load(tops + place, mask=first < count, other=float("-inf"))
    split_sums = tl.load(sums + place, mask=first < count, other=0.0)
    run = tl.arange(0, RUNS)
    place = (pair * slots + run) * PER_KV + g
    run_tops = tl.load(plain_tops + place, mask=run < runs, other=float("-inf"))
    run_sums = tl.load(plain_sums + place, mask=run < runs, other=0.0)
    top = tl.max(split_tops, 0)
    peak = tl.maximum(top, tl.max(run_tops, 0))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    forced = tl.sum(run_sums * tl.exp(run_tops - base), 0)
    whole = tl.sum(split_sums * tl.exp(split_tops - base), 0) + forced
    start = top
    if p * whole > forced:
        slack = tl.maximum((1.0 - p) * whole, 1e-30)
        start = tl.minimum(top, base + tl.log(slack / (count * PAGE).to(tl.float32)) - 0.001)
    if min_keep > 0:  # the least split maximum that has min_keep of them at or above it
        above = tl.sum((split_tops[None, :] >= split_tops[:, None]).to(tl.int32), 1)
        start = tl.minimum(start, tl.max(tl.where(above >= min_keep, split_tops, float("-inf")), 0))
    return base + tl.log(whole), start, top, base, p * whole - forced


@triton.jit
def row_length(
    head, lengths, num_listed, min_sparse_len, heads, PAGE: tl.constexpr, HAS_LISTED: tl.constexpr
):  # fmt: skip
    """Pages of a row, zero if it keeps everything."""
    pages = tl.load(lengths + head // heads)
    count = pages
    if HAS_LISTED:
        count = num_listed
    return tl.where(pages * PAGE >= min_sparse_len, count, 0)


@triton.jit(do_not_specialize=["quads", "num_listed", "min_sparse_len", "heads"])
def collect_kernel(
    logits, stride, near, quads, counts, known, lengths, num_listed, min_sparse_len, heads, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, HAS_LISTED: tl.constexpr, BLOCK: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Gather what may be needed of one split of one long row, at the split's own place."""
    head, split = tl.program_id(0), tl.program_id(1)
    count = row_length(head, lengths, num_listed, min_sparse_len, heads, PAGE, HAS_LISTED)
    first, last = segment(count, split, SPLITS, LEAST)
    if first >= last or count * PAGE <= SHORT_ROW:
        return
    start = tl.maximum(tl.load(known + head * 4), LEAST_LOGIT)
    source = logits + head.to(tl.int64) * stride
    target = near_row(near, head, quads) + near_place(first, split, PAGE)
    found = 0
    for begin in range(first * PAGE, last * PAGE, BLOCK):
        tiles, flags = (), ()
        for k in tl.static_range(BLOCK // (4 * QUADS)):
            at = begin + k * (4 * QUADS) + fours(QUADS)
            x = tl.load(source + at, mask=at < last * PAGE, other=float("-inf"))
            tiles, flags = tiles + (x,), flags + ((x >= start).to(tl.int32),)
        places, found = places_of(flags, found)
        for k in tl.static_range(BLOCK // (4 * QUADS)):
            tl.store(target + places[k], tiles[k], mask=flags[k] > 0)
    fill_quad(target, found)
    tl.store(counts + head * SPLITS + split, found)


@triton.jit
def near_row(near, head, quads):
    """What is gathered of a row lies here; rows are ``quads`` times four entries apart."""
    return near + head.to(tl.int64) * quads * 4


@triton.jit
def near_place(first, split, PAGE: tl.constexpr):
    """Where in its row what is gathered of a split begins: on a multiple of four, with room for three more."""
    return (first * PAGE + 3) // 4 * 4 + 4 * split


@triton.jit
def near_at(row, ends, head, quad, count, PAGE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Entries ``[4, Q]`` of the quads ``[Q]`` of all that was gathered of a row, ``-inf`` past the last.

    Which split holds them is found by halving ``ends``, the quads up to the end of each split.
    """
    exists = quad < tl.load(ends + head * SPLITS + SPLITS - 1)
    split = tl.zeros_like(quad)
    reach: tl.constexpr = SPLITS // 2
    step = reach
    while step > 0:
        end = tl.load(ends + head * SPLITS + split + step - 1, mask=exists, other=0)
        split = tl.where(quad >= end, split + step, split)
        step = step // 2
    before = tl.load(ends + head * SPLITS + split - 1, mask=exists & (split > 0), other=0)
    first, _last = segment(count, split, SPLITS, LEAST)
    place = near_place(first, split, PAGE) // 4 + quad - before
    entries = place[None, :] * 4 + tl.arange(0, 4)[:, None]
    return tl.load(row + entries, mask=exists[None, :], other=float("-inf"))


@triton.jit(do_not_specialize=["quads", "runs", "slots", "num_listed", "min_sparse_len", "heads", "min_keep"])
def limit_kernel(
    logits, stride, near, quads, counts, known, tops, sums, plain_tops, plain_sums, runs, slots, masses, limits, kept,
    lengths, num_listed, min_sparse_len, heads, p, min_keep, PER_KV: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, HAS_LISTED: tl.constexpr, RUNS: tl.constexpr, QUADS: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Narrow the threshold of one row among what was gathered of it; of a short row that is done here, too."""
    head = tl.program_id(0)
    count = row_length(head, lengths, num_listed, min_sparse_len, heads, PAGE, HAS_LISTED)
    row = near_row(near, head, quads)
    if count * PAGE <= SHORT_ROW:
        mass, low, top, base, need = row_start(
            tops, sums, plain_tops, plain_sums, runs, slots, head, count, p, min_keep, PER_KV, PAGE, SPLITS, LEAST, RUNS
        )
        tl.store(masses + head, mass)
        source, start, found = logits + head.to(tl.int64) * stride, tl.maximum(low, LEAST_LOGIT), 0
        for begin in range(0, count * PAGE, 4 * QUADS):
            at = begin + fours(QUADS)
            x = tl.load(source + at, mask=at < count * PAGE, other=float("-inf"))
            is_near = (x >= start).to(tl.int32)
            places, found = places_of((is_near,), found)
            tl.store(row + places[0], x, mask=is_near > 0)
        fill_quad(row, found)
        tl.debug_barrier()  # what was gathered is read by other threads than those that wrote it
        find_limit(
            row, counts, limits, kept, head, found, (found + 3) // 4, count, low, top, base, need, min_keep, PAGE,
            SPLITS, LEAST, QUADS, ROUNDS, False,
        )  # fmt: skip
    else:
        split = tl.arange(0, SPLITS)
        first, _last = segment(count, split, SPLITS, LEAST)
        gathered = tl.load(counts + head * SPLITS + split, mask=first < count, other=0)
        ends = tl.cumsum((gathered + 3) // 4, 0)
        tl.store(counts + head * SPLITS + split, ends)
        tl.debug_barrier()  # the ends are read by other threads than those that wrote them
        find_limit(
            row, counts, limits, kept, head, tl.sum(gathered, 0), tl.max(ends, 0), count, tl.load(known + head * 4),
            tl.load(known + head * 4 + 1), tl.load(known + head * 4 + 2), tl.load(known + head * 4 + 3), min_keep,
            PAGE, SPLITS, LEAST, QUADS, ROUNDS, True,
        )  # fmt: skip


@triton.jit
def find_limit(
    row, ends, limits, kept, head, total, left, count, low, top, base, need, min_keep, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, QUADS: tl.constexpr, ROUNDS: tl.constexpr, IS_SPREAD: tl.constexpr,
):  # fmt: skip
    """Write the threshold of a row, of which ``left`` quads hold ``total`` entries, and how many it keeps."""
    if total == 0:  # nothing there, or everything kept
        tl.store(limits + head, float("-inf"))
        tl.store(kept + head, 0)
    elif (need <= 0) & (min_keep <= 0):
        tl.store(limits + head, float("inf"))
        tl.store(kept + head, 0)
    else:
        least = tl.minimum(min_keep, total)
        if low == float("-inf"):  # a row of few splits, all of which was gathered
            low = top
            for start in range(0, left, QUADS):
                quad = start + tl.arange(0, QUADS)
                x = entries_at(row, ends, head, quad, left, count, PAGE, SPLITS, LEAST, IS_SPREAD)
                low = tl.minimum(low, tl.min(tl.min(tl.where(x > float("-inf"), x, top), 1), 0))
        high, above, over, number = top, 0.0, 0, total
        low, high, above, over, number, left = narrow(
            row, ends, head, left, count, low, high, top, above, over, need, least, base, PAGE, SPLITS, LEAST,
            QUADS, IS_SPREAD, True,
        )  # fmt: skip
        for _round in range(ROUNDS - 1):
            low, high, above, over, number, left = narrow(
                row, ends, head, left, count, low, high, top, above, over, need, least, base, PAGE, SPLITS, LEAST,
                QUADS, False, False,
            )  # fmt: skip
        tl.store(limits + head, low)
        tl.store(kept + head, number)


@triton.jit
def narrow(
    row, ends, head, left, count, low, high, top, above, over, need, least, base, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, QUADS: tl.constexpr, IS_SPREAD: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Take the part of ``low .. high`` in which the threshold lies, of 16, and leave only its entries in ``row``.

    ``left`` quads of entries are there; ``above`` and ``over`` are mass and number of those from ``high`` on, which
    no longer are. At first parts grow with their number: most entries, and the threshold, lie near the start.

    Returns:
        The new ``low, high, above, over``, how many entries lie at ``low`` or above, how many quads are left.
    """
    trial = tl.arange(0, 16)
    part = trial.to(tl.float32) * 0.0625
    tried = low + (high - low) * (part * part if IS_FIRST else part)  # the first is low itself
    masses = tl.zeros([16, QUADS], tl.float32)
    numbers = tl.zeros([16, QUADS], tl.int32)
    for start in range(0, left, QUADS):
        x = entries_at(row, ends, head, start + tl.arange(0, QUADS), left, count, PAGE, SPLITS, LEAST, IS_SPREAD)
        taken = x[None, :, :] >= tried[:, None, None]
        masses += tl.sum(tl.where(taken, exponential(x - base)[None, :, :], 0.0), 1)
        numbers += tl.sum(taken.to(tl.int32), 1)
    mass = tl.sum(masses, 1) + above
    many = tl.sum(numbers, 1) + over
    best = tl.max(tl.where((mass >= need) & (many >= least), trial, 0), 0)
    is_last = best == 15  # then what lies above is where it was
    above = tl.where(is_last, above, tl.sum(tl.where(trial == best + 1, mass, 0.0), 0))
    over = tl.where(is_last, over, tl.sum(tl.where(trial == best + 1, many, 0), 0))
    high = tl.where(is_last, high, tl.sum(tl.where(trial == best + 1, tried, 0.0), 0))
    low = tl.sum(tl.where(trial == best, tried, 0.0), 0)
    number = tl.sum(tl.where(trial == best, many, 0), 0)
    end = tl.where(high < top, high, float("inf"))  # the largest entry is of the last part
    found = 0
    for start in range(0, left, QUADS):
        x = entries_at(row, ends, head, start + tl.arange(0, QUADS), left, count, PAGE, SPLITS, LEAST, IS_SPREAD)
        is_left = ((x >= low) & (x < end)).to(tl.int32)
        places, found = places_of((is_left,), found)
        # in place, and no farther than was read: the sums wait for all of the block's threads
        tl.store(row + places[0], x, mask=is_left > 0)
    fill_quad(row, found)
    tl.debug_barrier()  # what is left is read by other threads than those that wrote it
    return low, high, above, over, number, (found + 3) // 4


@triton.jit
def entries_at(
    row, ends, head, quad, left, count, PAGE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    IS_SPREAD: tl.constexpr,
):  # fmt: skip
    """Quads ``[Q]`` of what is left of a row, ``[4, Q]``: at the places of the splits, or one after another."""
    if IS_SPREAD:
        return near_at(row, ends, head, quad, count, PAGE, SPLITS, LEAST)
    else:
        places = quad[None, :] * 4 + tl.arange(0, 4)[:, None]
        return tl.load(row + places, mask=(quad < left)[None, :], other=float("-inf"))
