"""Decode attention on every backend against the reference in float64.

Each case compiles its own kernel on CPUs, so the list below is a small one in which every two values of different
columns meet where that matters: widths, page sizes, query heads, head dims, dtypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_kernels import (
    KeyPages,
    PlainTokens,
    ValueCodec,
    ValuePages,
    _reference,
    decode_attention,
    release_threads,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
COLUMNS = ("key_bits", "value_bits", "page_size", "q_per_kv", "key_dim", "value_dim", "group_size", "dtype")
CASES = [
    (4, 4, 64, 3, 64, 64, 32, F32),
    (4, 3, 64, 3, 64, 64, 64, BF16),
    (2, 2, 128, 8, 128, 96, 32, F32),
    (3, 2, 16, 1, 256, 256, 64, F16),
    (8, 8, 16, 4, 80, 80, 32, F32),
    (2, 4, 32, 4, 96, 128, 128, F16),
    (16, 16, 64, 4, 128, 128, 64, BF16),
    (3, 16, 32, 8, 80, 64, 64, BF16),
    (16, 3, 128, 1, 64, 80, 48, F32),
]
# pages and plain tokens of the rows of one batch: none, one, either side of a vector, of a block, of a page; the
# last row is long enough for two tasks of 1024 tokens
PLAIN = (1, 63, 65, 17, 129)
PS = [0.5, 0.9, 0.95, 1.0]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(zip(COLUMNS, request.param, strict=True))


def _pages(page_size: int = 64) -> tuple[int, ...]:
    return 0, 1, 5, 3, 1 + 1024 // page_size


def _decode(kernel: Callable[..., Tensor], scene: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return output and counters."""
    arguments, step = scene.inputs()
    stats = torch.zeros(*scene.query.shape[:2], 5, dtype=torch.float64, device=scene.query.device)
    return kernel(*arguments, **{**step, "stats": stats, **options}), stats


def _assert_close(scene: Any, found: Tensor, exact: Tensor, eager: Tensor, rows: Tensor | None = None) -> None:
    """Compare ``[B, H, Dv]`` to float64: no further than eager computation is, plus what rounding can explain.

    A logit that is off by d changes an output by no more than 2 d times the largest value; then comes the rounding
    of the output itself, and of float32 sums of weighted values.
    """
    assert found.dtype == scene.query.dtype
    assert bool(found.isfinite().all())
    wide = scene.wide()
    used = scene.block_table[scene.block_table >= 0].long()
    values = _reference.load_value_pages(wide.value_pages, used, torch.float64).abs().flatten()
    largest = torch.cat([values, wide.plain.values.nan_to_num(0).abs().flatten(), exact.new_zeros(1)]).max()
    rounding = (2 * scene.logit_rounding()[..., None] + 8 * torch.finfo(F32).eps) * largest
    rounding = rounding + torch.finfo(found.dtype).eps * exact.abs()
    over = (found.double() - exact).abs() - (eager.double() - exact).abs().amax(-1, keepdim=True) - rounding
    if rows is not None:
        over = over[rows]
    assert float(over.max()) <= 0, f"over by {float(over.max()):.2e}"


def _decided(scene: Any, p: float, **options: Any) -> Tensor:
    """Query heads, ``[B, H]``, of whose KV head no token lies so close to the threshold that rounding decides."""
    few, many = (
        _decode(_reference.decode_attention, scene.wide(), p=share, **options)[1][..., 1:3]
        for share in (p - 1e-5, p + 1e-5)
    )
    per_kv = scene.query.shape[1] // scene.plain.keys.shape[1]
    decided = (few == many).all(-1).unflatten(1, (-1, per_kv)).all(-1).repeat_interleave(per_kv, 1)
    assert float(decided.double().mean()) > 0.5, "the scene leaves too little to compare"
    return decided


@pytest.mark.interpreted(
    "(4, 4, 64, 3, 64, 64, 32, torch.float32)-0.9",
    "(3, 2, 16, 1, 256, 256, 64, torch.float16)-0.5",
    "(2, 4, 32, 4, 96, 128, 128, torch.float16)-0.95",
    "(2, 4, 32, 4, 96, 128, 128, torch.float16)-1.0",
    "(16, 3, 128, 1, 64, 80, 48, torch.float32)-0.9",
)
@pytest.mark.parametrize("p", PS)
def test_is_the_attention_of_the_reference(case: dict[str, Any], p: float, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(case["page_size"]), plain=PLAIN, **case)
    found, stats = _decode(decode_attention, scene, p=p, min_keep=3)
    exact, exact_stats = _decode(_reference.decode_attention, scene.wide(), p=p, min_keep=3)
    eager, _ = _decode(_reference.decode_attention, scene, p=p, min_keep=3)
    rows = None if p == 1.0 else _decided(scene, p, min_keep=3)
    if rows is not None:
        stats, exact_stats = stats[rows], exact_stats[rows]
    assert torch.equal(stats[..., [0, 1, 2, 4]], exact_stats[..., [0, 1, 2, 4]])
    assert torch.allclose(stats[..., 3], exact_stats[..., 3], atol=1e-5, rtol=0)
    _assert_close(scene, found, exact, eager, rows)


@pytest.mark.interpreted(
    "(2, 4, 32, 4, 96, 128, 128, torch.float16)-1.0",
    "(16, 3, 128, 1, 64, 80, 48, torch.float32)-0.9",
)
@pytest.mark.parametrize("p", [0.9, 1.0])
def test_candidates_alone_are_scored(case: dict[str, Any], p: float, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(case["page_size"]), plain=PLAIN, **case)
    candidates = torch.full((5, 2, 4), -1, dtype=torch.int32, device=scene.query.device)
    candidates[1, 0, 0] = 0
    candidates[2, 0, :3] = torch.tensor([0, 2, 4])
    candidates[2, 1, :1] = 3
    candidates[3, 1, :3] = torch.arange(3)
    candidates[4, :, :] = torch.tensor([[1, 5, 7, 8], [0, 2, 3, 6]])
    options = {"p": p, "candidates": candidates}
    found, stats = _decode(decode_attention, scene, **options)
    exact, exact_stats = _decode(_reference.decode_attention, scene.wide(), **options)
    eager, _ = _decode(_reference.decode_attention, scene, **options)
    rows = None if p == 1.0 else _decided(scene, p, candidates=candidates)
    assert torch.equal(stats[..., 0], exact_stats[..., 0])
    _assert_close(scene, found, exact, eager, rows)


@pytest.mark.interpreted(
    "(4, 4, 64, 3, 64, 64, 32, torch.float32)-1.0",
    "(2, 4, 32, 4, 96, 128, 128, torch.float16)-0.9",
)
@pytest.mark.parametrize("p", [0.9, 1.0])
def test_candidate_tokens_alone_are_attended(case: dict[str, Any], p: float, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(case["page_size"]), plain=PLAIN, **case)
    candidates = torch.full((5, 2, 4), -1, dtype=torch.int32, device=scene.query.device)
    candidates[1, 0, 0] = 0
    candidates[2, 0, :3] = torch.tensor([0, 2, 4])
    candidates[3, 1, :3] = torch.arange(3)
    candidates[4, :, :] = torch.tensor([[1, 5, 7, 8], [0, 2, 3, 6]])
    draw = torch.Generator().manual_seed(3)
    tokens = (torch.rand(5, 2, 4 * case["page_size"], generator=draw) < 0.3).to(scene.query.device)
    tokens[3, 1] = False  # pages without a candidate
    tokens[4, 0, : case["page_size"]] = True
    options = {"p": p, "candidates": candidates, "candidate_tokens": tokens, "min_keep": 2}
    found, stats = _decode(decode_attention, scene, **options)
    exact, exact_stats = _decode(_reference.decode_attention, scene.wide(), **options)
    eager, _ = _decode(_reference.decode_attention, scene, **options)
    rows = None if p == 1.0 else _decided(scene, p, candidates=candidates, candidate_tokens=tokens, min_keep=2)
    listed = (candidates >= 0).repeat_interleave(case["page_size"], -1) & tokens
    in_pages = listed.unflatten(-1, (4, -1)).any(-1).sum(-1) * case["page_size"]
    for column, expected in ((0, in_pages), (4, listed.sum(-1))):
        assert torch.equal(stats[..., column], expected.double().repeat_interleave(case["q_per_kv"], 1))
        assert torch.equal(stats[..., column], exact_stats[..., column])
    if p == 1.0:
        assert torch.equal(stats[..., 1:3], stats[..., 4:].expand(-1, -1, 2))
    _assert_close(scene, found, exact, eager, rows)


def test_every_head_keeps_its_mass_and_no_more_than_it_needs(
    case: dict[str, Any], make_scene: Callable[..., Any]
) -> None:
    """The union over the query heads of a KV head holds each head's own tokens, so it carries its mass, too."""
    scene = make_scene(pages=_pages(case["page_size"]), plain=PLAIN, **case)
    heads = case["q_per_kv"]
    before = None
    for p in PS[:-1]:
        _, stats = _decode(decode_attention, scene, p=p)
        scored, own, union, share, candidates = stats.unbind(-1)
        assert torch.equal(scored, candidates)
        assert bool((share >= p - 1e-5).all())
        assert bool((share <= 1 + 1e-5).all())
        by_kv_head = own.unflatten(1, (-1, heads))
        union_by_kv_head = union.unflatten(1, (-1, heads))
        assert bool((union_by_kv_head == union_by_kv_head[..., :1]).all())
        assert bool((union_by_kv_head[..., 0] >= by_kv_head.amax(-1)).all())
        assert bool((union_by_kv_head[..., 0] <= by_kv_head.sum(-1)).all())
        assert bool((union <= scored).all())
        if before is not None:
            assert bool((own >= before[0]).all())
            assert bool((union >= before[1]).all())
        before = own, union


def test_rows_of_a_batch_do_not_see_each_other(case: dict[str, Any], make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(case["page_size"]), plain=PLAIN, **case)
    for p in (0.9, 1.0):
        together, stats = _decode(decode_attention, scene, p=p)
        for row in range(len(PLAIN)):
            alone, own_stats = _decode(decode_attention, scene.row(row), p=p)
            assert torch.equal(alone[0], together[row])
            assert torch.equal(own_stats[0], stats[row])


def test_does_not_depend_on_the_number_of_threads(case: dict[str, Any], make_scene: Callable[..., Any]) -> None:
    scene, before = make_scene(pages=(0, 1, 40), plain=(1, 63, 65), **case), torch.get_num_threads()
    for p in (0.9, 1.0):
        found = []
        try:
            for threads in (1, 2, 3, 3):
                torch.set_num_threads(threads)
                found.append(_decode(decode_attention, scene, p=p))
        finally:
            torch.set_num_threads(before)
        for out, stats in found[1:]:
            assert torch.equal(out, found[0][0])
            assert torch.equal(stats, found[0][1])


# What follows varies nothing that a kernel is compiled for: one case is enough.


@pytest.mark.interpreted
def test_step_appends_its_token_and_nothing_else(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(), plain=PLAIN)
    arguments, step = scene.inputs()
    plain = arguments[3]
    decode_attention(*arguments, **step, p=0.9)
    for row, length in enumerate(PLAIN):
        assert torch.equal(plain.keys[row, :, :, length - 1], scene.new_key[row])
        assert torch.equal(plain.values[row, :, length - 1], scene.new_value[row])
        plain.keys[row, :, :, length - 1] = scene.plain.keys[row, :, :, length - 1]
        plain.values[row, :, length - 1] = scene.plain.values[row, :, length - 1]
    assert torch.equal(plain.keys.nan_to_num(9e9), scene.plain.keys.nan_to_num(9e9))
    assert torch.equal(plain.values.nan_to_num(9e9), scene.plain.values.nan_to_num(9e9))


def test_without_a_new_token_the_plain_tokens_stay(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(), plain=PLAIN)
    arguments, step = scene.inputs()
    appended = decode_attention(*arguments, **step)
    again = decode_attention(*arguments, **{**step, "new_key": None, "new_value": None})
    assert torch.equal(again, appended)


@pytest.mark.interpreted
def test_rows_below_min_sparse_len_are_dense(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(), plain=PLAIN)
    candidates = torch.zeros(5, 2, 1, dtype=torch.int32, device=scene.query.device)
    dense, dense_stats = _decode(decode_attention, scene)
    pruned, pruned_stats = _decode(decode_attention, scene, p=0.5, candidates=candidates)
    mixed, stats = _decode(decode_attention, scene, p=0.5, candidates=candidates, min_sparse_len=3 * 64)
    is_sparse = torch.tensor([count * 64 >= 3 * 64 for count in _pages()])
    assert torch.equal(mixed[~is_sparse], dense[~is_sparse])
    assert torch.equal(stats[~is_sparse], dense_stats[~is_sparse])
    assert torch.equal(mixed[is_sparse], pruned[is_sparse])
    assert torch.equal(stats[is_sparse], pruned_stats[is_sparse])


def test_candidate_tokens_without_pages_are_refused(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3, 3), plain=(5, 70))
    every, tokens = torch.zeros(2, 2, 3, dtype=torch.int32), torch.ones(2, 2, 3 * 64, dtype=torch.bool)
    with pytest.raises(ValueError, match="candidate_tokens must come with candidates"):
        _decode(decode_attention, scene, candidate_tokens=tokens.to(scene.query.device))
    for wrong in (tokens[..., 1:], tokens.float()):
        with pytest.raises(ValueError, match=r"candidate_tokens must be \[2, 2, 192\] bool"):
            _decode(decode_attention, scene, candidates=every, candidate_tokens=wrong)


def test_candidates_that_name_every_page_change_nothing(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3, 3), plain=(5, 70))
    every = torch.arange(3, dtype=torch.int32, device=scene.query.device).expand(2, 2, 3)
    for p in (0.9, 1.0):
        listed, stats = _decode(decode_attention, scene, p=p, candidates=every)
        unlisted, unlisted_stats = _decode(decode_attention, scene, p=p)
        assert torch.equal(listed, unlisted)
        assert torch.equal(stats, unlisted_stats)


@pytest.mark.parametrize("min_keep", [1, 5, 100, 10_000])
def test_min_keep_tokens_are_kept_as_far_as_they_exist(min_keep: int, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(), plain=PLAIN, sharpness=30.0)
    out, stats = _decode(decode_attention, scene, p=0.01, min_keep=min_keep)
    scored, own = stats[..., 0], stats[..., 1]
    assert bool((own >= scored.clamp_max(min_keep)).all())
    if min_keep == 10_000:
        assert torch.equal(own, scored)
        exact, _ = _decode(_reference.decode_attention, scene.wide())
        _assert_close(scene, out, exact, _decode(_reference.decode_attention, scene)[0])


def test_order_of_pages_does_not_matter(make_scene: Callable[..., Any]) -> None:
    """Nothing may depend on where in the sequence the largest logit lies."""
    scene = make_scene(pages=(7,), plain=(33,))
    out, stats = _decode(decode_attention, scene, p=0.9)
    for shift in range(1, 7):
        moved = dataclasses.replace(scene, block_table=scene.block_table.roll(shift, 1))
        moved_out, moved_stats = _decode(decode_attention, moved, p=0.9)
        assert torch.equal(moved_stats[..., :3], stats[..., :3])
        assert torch.allclose(moved_out, out, atol=1e-5, rtol=0)


def test_far_logits_neither_overflow_nor_vanish(make_scene: Callable[..., Any]) -> None:
    """Weights far below what float32 can hold beside 1 count as nothing, wherever the largest is."""
    scene = make_scene(pages=(3, 3), plain=(65, 20), sharpness=3000.0)
    for p in (0.5, 0.999, 1.0):
        found, _ = _decode(decode_attention, scene, p=p)
        exact, _ = _decode(_reference.decode_attention, scene.wide(), p=p)
        _assert_close(scene, found, exact, exact)


@pytest.mark.interpreted
def test_equal_tokens_are_kept_together(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(2,), plain=(1,))
    for tensor in scene.key_pages.tensors().values():
        tensor.zero_()
    plain = PlainTokens(torch.full_like(scene.plain.keys, 0.0), scene.plain.values)
    scene = dataclasses.replace(scene, plain=plain, new_key=torch.zeros_like(scene.new_key))
    _, stats = _decode(decode_attention, scene, p=0.5)
    assert bool((stats[..., 1:3] == 128).all())


@pytest.mark.interpreted
def test_stats_are_added_to(make_scene: Callable[..., Any]) -> None:
    scene = make_scene()
    _, once = _decode(decode_attention, scene, p=0.9)
    twice = once.clone()
    _decode(decode_attention, scene, p=0.9, stats=twice)
    assert torch.equal(twice, 2 * once)


def test_float64_runs_on_the_reference(make_scene: Callable[..., Any]) -> None:
    scene = make_scene().wide()
    assert torch.equal(
        _decode(decode_attention, scene, p=0.9)[0], _decode(_reference.decode_attention, scene, p=0.9)[0]
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"p": 0.0}, r"p must be in \(0, 1\], got 0.0; pass p=1.0 to keep everything"),
        ({"p": 1.5}, r"p must be in \(0, 1\], got 1.5"),
        ({"min_keep": -1}, "min_keep must be 0 or more"),
        ({"query": torch.zeros(2, 5, 64)}, r"query must be \[2, H, 64\] .* multiple of 2 KV heads, got \[2, 5, 64\]"),
        ({"query": torch.zeros(3, 6, 64)}, r"query must be \[2, H, 64\]"),
        ({"query": torch.zeros(2, 6, 64).half()}, r"query must be .* of torch.float32 .* torch.float16"),
        ({"query": torch.zeros(6, 64)}, r"query must be \[2, H, 64\]"),
        ({"block_table": torch.zeros(2, 3)}, r"block_table must be \[2, P\] int32"),
        ({"block_table": torch.zeros(1, 3).int()}, r"block_table must be \[2, P\] int32"),
        ({"num_pages": torch.zeros(2).long()}, r"num_pages must be \[2\] int32, got .* torch.int64"),
        ({"plain_len": torch.zeros(3).int()}, r"plain_len must be \[2\] int32, got \[3\]"),
        ({"new_key": None}, "new_key and new_value must be given together"),
        ({"new_key": torch.zeros(2, 2, 32)}, r"new_key must be \[2, 2, 64\]"),
        ({"new_value": torch.zeros(2, 2, 64).half()}, r"new_value must be .* got \[2, 2, 64\] torch.float16"),
        ({"candidates": torch.zeros(2, 6, 3).int()}, r"candidates must be \[2, 2, N\] int32"),
        ({"candidates": torch.zeros(2, 2, 3)}, r"candidates must be \[2, 2, N\] int32"),
        ({"stats": torch.zeros(2, 6, 5)}, r"stats must be contiguous \[2, 6, 5\] float64"),
        ({"strips": torch.tensor([0, 2])}, r"strips must be \[2 .. 3\] int32, got \[2\] torch.int64"),
        (
            {"strips": torch.tensor([0, 2], dtype=torch.int32), "candidates": torch.zeros(2, 2, 1, dtype=torch.int32)},
            "strips must be None with candidates",
        ),
        ({"stats": torch.zeros(2, 5, 6).double().transpose(1, 2)}, "stats must be contiguous"),
    ],
)
def test_refuses(changed: dict[str, Any], said: str, make_scene: Callable[..., Any]) -> None:
    (query, keys, values, plain), step = make_scene().inputs()
    with pytest.raises(ValueError, match=said):
        decode_attention(
            **{"query": query, "key_pages": keys, "value_pages": values, "plain": plain, **step, **changed}
        )


def test_refuses_pages_that_do_not_fit(make_scene: Callable[..., Any]) -> None:
    (query, keys, values, plain), step = make_scene().inputs()
    other = make_scene(key_dim=32, page_size=32)
    with pytest.raises(ValueError, match=r"key pages must have K, D = \[2, 64\]"):
        decode_attention(query, other.key_pages, values, plain, **step)
    with pytest.raises(ValueError, match=r"value pages must have P, K, D, page_size = \[8, 2, 64, 64\]"):
        decode_attention(query, keys, other.value_pages, plain, **step)
    raw = ValuePages.empty(8, 2, 64, ValueCodec(16, 64), F16, query.device)
    with pytest.raises(ValueError, match=r"raw value pages must be of the query's dtype, torch.float32"):
        decode_attention(query, keys, raw, plain, **step)


def _in_pages(scene: Any, num_sinks: int) -> tuple[PlainTokens, Tensor]:
    """The plain tokens of a scene, its new ones included, as shared pages in scattered slots, and the table."""
    arguments, step = scene.inputs()
    plain, lens, size = arguments[3], step["plain_len"].tolist(), scene.key_pages.codec.page_size
    rows, kv_heads, key_dim, value_dim = plain.form
    sink_pages = -(-num_sinks // size)
    columns = sink_pages + max(-(-max(0, length - num_sinks) // size) for length in lens)
    slots = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(1)).view(rows, columns)
    keys = torch.full((rows * columns, kv_heads, key_dim, size), torch.nan, dtype=plain.keys.dtype)
    values = torch.full((rows * columns, kv_heads, size, value_dim), torch.nan, dtype=plain.keys.dtype)
    for row, length in enumerate(lens):
        plain.keys[row, :, :, length - 1], plain.values[row, :, length - 1] = (
            step["new_key"][row],
            step["new_value"][row],
        )
        for token in range(length):
            column = token if token < num_sinks else sink_pages * size + token - num_sinks
            slot, offset = int(slots[row, column // size]), column % size
            keys[slot, :, :, offset] = plain.keys[row, :, :, token]
            values[slot, :, offset] = plain.values[row, :, token]
    return PlainTokens(keys, values), slots.to(torch.int32)


@pytest.mark.interpreted("16-0.9-70")
@pytest.mark.parametrize("num_sinks", [0, 4, 70])
@pytest.mark.parametrize("p", [0.9, 1.0])
@pytest.mark.parametrize("bits", [3, 16])
def test_plain_tokens_in_pages_are_attended_like_those_in_rows(
    bits: int, p: float, num_sinks: int, make_scene: Callable[..., Any], device: str
) -> None:
    scene = make_scene(pages=_pages(), plain=PLAIN, key_bits=bits, value_bits=bits, group_size=64)
    pages, table = _in_pages(scene, num_sinks)
    pages = PlainTokens(pages.keys.to(device), pages.values.to(device))
    shared = {"block_table": scene.block_table, "num_pages": scene.num_pages, "plain_len": scene.plain_len}
    options = {**shared, "scaling": scene.scaling, "p": p, "plain_table": table.to(device), "num_sinks": num_sinks}
    rows, _ = _decode(decode_attention, scene, p=p)
    for kernel in (decode_attention, _reference.decode_attention):
        found = kernel(scene.query, scene.key_pages, scene.value_pages, pages, **options)
        assert torch.allclose(found, rows, atol=2e-5, rtol=0)


def test_rows_of_pages_do_not_depend_on_their_neighbours(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(), plain=PLAIN, key_bits=3, value_bits=3, group_size=64)
    pages, table = _in_pages(scene, 4)
    every = [scene.query, scene.block_table, scene.num_pages, scene.plain_len, table]
    order = torch.tensor([4, 0, 2])

    def run(query: Tensor, block_table: Tensor, num_pages: Tensor, plain_len: Tensor, plain_table: Tensor) -> Tensor:
        return decode_attention(
            query, scene.key_pages, scene.value_pages, pages, block_table=block_table, num_pages=num_pages,
            plain_len=plain_len, scaling=scene.scaling, p=0.95, plain_table=plain_table, num_sinks=4,
        )  # fmt: skip

    assert torch.equal(run(*(tensor[order] for tensor in every)), run(*every)[order])


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_strips_change_no_bit(case: dict[str, Any], p: float, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages(case["page_size"]), plain=PLAIN, **case)
    scene = dataclasses.replace(scene, block_table=scene.block_table[4:].expand(5, -1))
    found, stats = _decode(decode_attention, scene, p=p, min_keep=3)
    for starts in ([0, 5], [0, 1, 4, 5], [0, 3, 5]):
        strips = torch.tensor(starts, dtype=torch.int32, device=scene.query.device)
        together, counted = _decode(decode_attention, scene, p=p, min_keep=3, strips=strips)
        assert torch.equal(together, found)
        assert torch.equal(counted, stats)


@pytest.mark.parametrize("p", [0.9, 1.0])
@pytest.mark.parametrize("values", [CASES[1], CASES[5]], ids=str)
def test_without_matrix_tiles(
    values: tuple[Any, ...], p: float, make_scene: Callable[..., Any], without_tiles: None
) -> None:
    case = dict(zip(COLUMNS, values, strict=True))
    scene = make_scene(pages=_pages(case["page_size"]), plain=PLAIN, **case)
    found, _ = _decode(decode_attention, scene, p=p, min_keep=3)
    exact, _ = _decode(_reference.decode_attention, scene.wide(), p=p, min_keep=3)
    eager, _ = _decode(_reference.decode_attention, scene, p=p, min_keep=3)
    _assert_close(scene, found, exact, eager, None if p == 1.0 else _decided(scene, p, min_keep=3))
    shared = dataclasses.replace(scene, block_table=scene.block_table[4:].expand(5, -1))
    strips = torch.tensor([0, 1, 4, 5], dtype=torch.int32, device=scene.query.device)
    together, counted = _decode(decode_attention, shared, p=p, min_keep=3, strips=strips)
    found, stats = _decode(decode_attention, shared, p=p, min_keep=3)
    assert torch.equal(together, found)
    assert torch.equal(counted, stats)


@pytest.mark.parametrize("p", [0.9, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_gives_nan_and_touches_no_other(
    wrong: float, p: float, make_scene: Callable[..., Any]
) -> None:
    scene = make_scene(pages=_pages(), plain=PLAIN)
    before, query = _decode(decode_attention, scene, p=p)[0], scene.query.clone()
    query[2, 4, 7] = wrong
    found, _ = _decode(decode_attention, dataclasses.replace(scene, query=query), p=p)
    assert bool(found[2, 4].isnan().all())
    assert torch.equal(found[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_strips_may_be_long(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=_pages() * 8, plain=PLAIN * 8, key_bits=3, value_bits=3, group_size=64)
    scene = dataclasses.replace(scene, block_table=scene.block_table[4:5].expand(40, -1))
    strips = torch.tensor([0, 2, 40], dtype=torch.int32, device=scene.query.device)
    together, _ = _decode(decode_attention, scene, p=0.95, strips=strips)
    assert torch.equal(together, _decode(decode_attention, scene, p=0.95)[0])


def test_plain_pages_of_the_wrong_form_are_refused(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(1, 0), plain=(20, 70))
    pages, table = _in_pages(scene, 4)
    (query, keys, values, _), step = scene.inputs()
    with pytest.raises(ValueError, match="new_key must be None"):
        decode_attention(query, keys, values, pages, **step, plain_table=table)
    step |= {"new_key": None, "new_value": None}
    with pytest.raises(ValueError, match=r"plain_table must be \[2, C\] int32"):
        decode_attention(query, keys, values, pages, **step, plain_table=table[:1])
    wide = PlainTokens.empty(2, 2, 64, 64, 128, query.dtype, query.device)
    with pytest.raises(ValueError, match="plain pages must hold 64 tokens"):
        decode_attention(query, keys, values, wide, **step, plain_table=table)


def test_threads_that_were_given_back_start_again(make_scene: Callable[..., Any]) -> None:
    torch.set_num_threads(2)
    scene = make_scene(pages=_pages(), plain=PLAIN, key_bits=3, value_bits=3, group_size=64)
    before, _ = _decode(decode_attention, scene)
    release_threads()
    release_threads()
    assert torch.equal(_decode(decode_attention, scene)[0], before)


@pytest.mark.interpreted
def test_decode_attention_reaches_pages_beyond_two_gigabytes(make_scene: Callable[..., Any]) -> None:
    """Memory is only named, but for two pages: whatever overruns 32 bits reads elsewhere, or ends the process."""
    scene = make_scene(
        kv_heads=1, q_per_kv=3, pages=(2,), plain=(20,), key_bits=2, value_bits=2, page_size=64, group_size=64
    )
    device = scene.query.device
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        slots = (1 << 31) // scene.key_pages.codes[0].nbytes + 3
        key_pages = KeyPages.empty(slots, 1, 64, scene.key_pages.codec, scene.query.dtype, device)
        value_pages = ValuePages.empty(slots, 1, 64, scene.value_pages.codec, scene.query.dtype, device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert min(key_pages.codes.nbytes, value_pages.codes.nbytes) > 1 << 31
    places = torch.tensor([1, slots - 1], device=device)
    for large, small in ((key_pages, scene.key_pages), (value_pages, scene.value_pages)):
        for name, tensor in large.tensors().items():
            tensor[places] = small.tensors()[name][scene.block_table[0].long()]
    far = dataclasses.replace(
        scene, key_pages=key_pages, value_pages=value_pages, block_table=places[None].to(torch.int32)
    )
    for p in (0.9, 1.0):
        arguments, options = scene.inputs()
        expected = decode_attention(*arguments, **options, p=p)
        arguments, options = far.inputs()
        assert torch.equal(decode_attention(*arguments, **options, p=p), expected)
