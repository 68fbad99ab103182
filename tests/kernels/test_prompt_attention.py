"""Attention of prompts on matrix tiles against its definition, one decode step after the other.

What tiles are given is what ``load_key_pages`` loads in bfloat16, to the bit: so the definition is asked about pages of
just these numbers, and only weights, sums and logits may be rounded otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_kernels import (
    KeyCodec,
    KeyPages,
    PlainTokens,
    ValueCodec,
    ValuePages,
    _reference,
    has_prompt_kernels,
    prompt_attention,
)

BF16 = torch.bfloat16
needs_tiles = pytest.mark.skipif(
    not has_prompt_kernels(torch.device("cpu"), BF16), reason="this CPU has no matrix tiles for bfloat16"
)
COLUMNS = (
    "key_bits", "value_bits", "page_size", "q_per_kv", "key_dim", "value_dim", "group_size", "num_sinks", "window",
    "tokens", "start",
)  # fmt: skip
# rows that see nothing but sinks, a window that fills, pages that leave it amid a strip; more sinks than a page
CASES = [
    (3, 3, 64, 3, 64, 64, 64, 4, 128, 600, 540),
    (2, 4, 16, 3, 80, 96, 32, 20, 40, 333, 266),
    (4, 2, 32, 1, 128, 256, 128, 0, 64, 300, 275),
    (16, 16, 128, 3, 36, 24, 64, 4, 128, 450, 420),
    (8, 3, 64, 1, 96, 40, 48, 70, 1, 210, 180),
    (3, 16, 64, 3, 72, 128, 64, 4, 64, 60, 0),
]


@dataclasses.dataclass
class Prompt:
    """A sequence whose tokens lie in plain pages, and in packed ones as far as they have left the window."""

    query: Tensor
    key_pages: KeyPages
    value_pages: ValuePages
    plain: PlainTokens
    packed_slots: Tensor
    plain_slots: Tensor
    num_sinks: int
    window: int

    @property
    def size(self) -> int:
        return self.key_pages.codec.page_size

    def pages(self, position: int) -> int:
        return max(0, (position - self.num_sinks - self.window) // self.size)

    def attend(
        self, first: int, last: int, kernel: Callable[..., Tensor] = prompt_attention, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Output and counters of tokens ``first .. last``, given no more slots than they need."""
        sinks = -(-self.num_sinks // self.size)
        stats = torch.zeros(last - first, self.query.shape[1], 5, dtype=torch.float64)
        end = sinks + -(-max(0, last - self.num_sinks) // self.size)
        plain = torch.cat([self.plain_slots[:sinks], self.plain_slots[sinks + self.pages(first) : end]])
        options = {"stats": stats, "num_sinks": self.num_sinks, "window": self.window, **options}
        out = kernel(
            self.query[first:last], self.key_pages, self.value_pages, self.plain, start=first, plain_table=plain,
            block_table=self.packed_slots[: self.pages(last - 1)], scaling=self.query.shape[2] ** -0.5, **options,
        )  # fmt: skip
        return out, options["stats"]

    def rounded(self, dtype: torch.dtype) -> Prompt:
        """The same with packed numbers as they are loaded in bfloat16, everything in ``dtype``."""
        slots = torch.arange(self.key_pages.num_pages)
        keys = _reference.load_key_pages(self.key_pages, slots, BF16).to(dtype).transpose(2, 3).contiguous()
        values = _reference.load_value_pages(self.value_pages, slots, BF16).to(dtype)
        nothing = torch.empty(0, dtype=torch.float16)
        return dataclasses.replace(
            self,
            query=self.query.to(dtype),
            key_pages=KeyPages(KeyCodec(16, self.size), keys, nothing, nothing),
            value_pages=ValuePages(ValueCodec(16, self.size), values, nothing, nothing),
            plain=PlainTokens(self.plain.keys.to(dtype), self.plain.values.to(dtype)),
        )

    def sizes(self) -> Prompt:
        """The same in float64 with the sizes of its values for values."""
        wide = self.rounded(torch.float64)
        values = dataclasses.replace(wide.value_pages, codes=wide.value_pages.codes.abs())
        return dataclasses.replace(
            wide, value_pages=values, plain=PlainTokens(wide.plain.keys, wide.plain.values.abs())
        )


def make_prompt(
    *,
    tokens: int,
    kv_heads: int = 2,
    q_per_kv: int = 3,
    key_dim: int = 64,
    value_dim: int = 64,
    key_bits: int = 3,
    value_bits: int = 3,
    page_size: int = 64,
    group_size: int = 64,
    num_sinks: int = 4,
    window: int = 128,
    sharpness: float = 3.0,
) -> Prompt:
    """A random sequence of ``tokens``, its pages in scattered slots, whatever is not stored being NaN."""
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    sinks, count = -(-num_sinks // page_size), -(-max(0, tokens - num_sinks) // page_size)
    keys = (normal(kv_heads, tokens, key_dim) + 2 * normal(kv_heads, 1, key_dim)).to(BF16)
    values = normal(kv_heads, tokens, value_dim).to(BF16)
    plain_slots = torch.randperm(sinks + count, generator=draw)
    plain = PlainTokens(
        torch.full((sinks + count, kv_heads, key_dim, page_size), torch.nan, dtype=BF16),
        torch.full((sinks + count, kv_heads, page_size, value_dim), torch.nan, dtype=BF16),
    )
    for token in range(tokens):
        column = token if token < num_sinks else sinks * page_size + token - num_sinks
        slot, offset = plain_slots[column // page_size], column % page_size
        plain.keys[slot, :, :, offset], plain.values[slot, :, offset] = keys[:, token], values[:, token]
    packed = max(0, (tokens - 1 - num_sinks - window) // page_size)
    packed_slots = torch.randperm(packed + 2, generator=draw)[:packed]
    key_pages = KeyPages.empty(packed + 2, kv_heads, key_dim, KeyCodec(key_bits, page_size), BF16, "cpu")
    value_pages = ValuePages.empty(
        packed + 2, kv_heads, value_dim, ValueCodec(value_bits, page_size, group_size), BF16, "cpu"
    )
    for tensor in (*key_pages.tensors().values(), *value_pages.tensors().values()):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
    if packed:
        gone = slice(num_sinks, num_sinks + packed * page_size)
        for store, pages, numbers in (
            (_reference.store_key_pages, key_pages, keys),
            (_reference.store_value_pages, value_pages, values),
        ):
            store(pages, packed_slots, numbers[:, gone].unflatten(1, (packed, page_size)).transpose(0, 1).float())
    wide = normal(tokens, 2, kv_heads * q_per_kv, key_dim).mul_(sharpness).to(BF16)
    return Prompt(
        wide[:, 1], key_pages, value_pages, plain, packed_slots.int(), plain_slots.int(), num_sinks, window
    )  # fmt: skip


def make_case(case: tuple[int, ...]) -> tuple[Prompt, int, int]:
    """A prompt, and the tokens of it that attend."""
    shape = dict(zip(COLUMNS, case, strict=True))
    start = shape.pop("start")
    return make_prompt(**shape), start, shape["tokens"]


def decided(prompt: Prompt, first: int, last: int, p: float, **options: Any) -> Tensor:
    """Query heads, ``[T, H]``, of whose KV head no token lies so close to the threshold that rounding decides."""
    wide = prompt.rounded(torch.float64)
    few, many = (
        wide.attend(first, last, _reference.prompt_attention, p=share, **options)[1][..., 1:3]
        for share in (p - 2e-5, p + 2e-5)
    )
    kv_heads = prompt.plain.keys.shape[1]
    per_kv = few.shape[1] // kv_heads
    found = (few == many).all(-1).unflatten(1, (kv_heads, per_kv)).all(-1).repeat_interleave(per_kv, 1)
    assert float(found.double().mean()) > 0.5, "the prompt leaves too little to compare"
    return found


@needs_tiles
@pytest.mark.parametrize("p", [0.8, 0.95, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_attention_of_the_definition(case: tuple[int, ...], p: float) -> None:
    """No further from float64 than eager bfloat16 is, plus what rounding weights to bfloat16 explains."""
    prompt, first, last = make_case(case)
    options: dict[str, Any] = {"p": p, "min_keep": 3}
    found, stats = prompt.attend(first, last, **options)
    exact, counted = prompt.rounded(torch.float64).attend(first, last, _reference.prompt_attention, **options)
    eager, _ = prompt.rounded(BF16).attend(first, last, _reference.prompt_attention, **options)
    sizes, _ = prompt.sizes().attend(first, last, _reference.prompt_attention, **options)
    assert found.dtype == BF16
    assert bool(found.isfinite().all())
    rows = torch.ones(stats.shape[:2], dtype=torch.bool) if p == 1.0 else decided(prompt, first, last, **options)
    assert torch.equal(stats[rows][:, [0, 1, 2, 4]], counted[rows][:, [0, 1, 2, 4]])
    assert torch.allclose(stats[rows][:, 3], counted[rows][:, 3], atol=1e-5, rtol=0)
    largest = prompt.rounded(torch.float64).key_pages.codes.nan_to_num(0).abs().max()
    largest = torch.maximum(largest, prompt.plain.keys.nan_to_num(0).double().abs().max())
    terms = prompt.query[first:last].double().abs().sum(-1, keepdim=True) * largest * prompt.query.shape[2] ** -0.5
    logits = terms * torch.finfo(torch.float32).eps * prompt.query.shape[2] ** 0.5  # as random signs add up
    half = torch.finfo(BF16).eps / 2
    allowed = (eager.double() - exact).abs().amax(-1, keepdim=True) + half * exact.abs() + (half + 2 * logits) * sizes
    over = ((found.double() - exact).abs() - allowed)[rows]
    assert float(over.max()) <= 0, f"over by {float(over.max()):.2e}"


@needs_tiles
@pytest.mark.parametrize("p", [0.9, 1.0])
@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_rows_depend_on_nothing_but_their_position(case: tuple[int, ...], p: float) -> None:
    prompt, first, last = make_case(case)
    first -= 70
    together, stats = prompt.attend(first, last, p=p, min_keep=3)
    alone = list(range(last - 40, last + 1))
    for cuts in ([first, first + 1, last], [first, first + 17, first + 21, last - 33, last], alone):
        for begin, end in itertools.pairwise(cuts):
            found, counted = prompt.attend(begin, end, p=p, min_keep=3)
            assert torch.equal(found, together[begin - first : end - first])
            assert torch.equal(counted, stats[begin - first : end - first])


@needs_tiles
def test_the_first_tokens_see_each_other_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of sinks that are still to come may have no slot yet."""
    prompt = make_prompt(tokens=100, page_size=16, num_sinks=40, window=16)
    found, _ = prompt.attend(0, 100)
    early = dataclasses.replace(prompt, plain_slots=prompt.plain_slots.clone())
    early.plain_slots[1:3] = -1
    assert torch.equal(early.attend(0, 9)[0], found[:9])
    assert torch.equal(found[0], prompt.plain.values[prompt.plain_slots[0], :, 0].repeat_interleave(3, 0))


@needs_tiles
def test_does_not_depend_on_threads_or_on_what_fits_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make_prompt(tokens=700, kv_heads=3)
    found, stats = prompt.attend(560, 700, p=0.9, min_keep=16)
    torch.set_num_threads(2)
    monkeypatch.setattr("twilight_kernels._numba_prompt._GRAIN", 1)
    assert torch.equal(prompt.attend(560, 700, p=0.9, min_keep=16)[0], found)
    monkeypatch.setattr("twilight_kernels._numba_prompt._UNPACKED_BYTES", 1)
    again, counted = prompt.attend(560, 700, p=0.9, min_keep=16)
    assert torch.equal(again, found)
    assert torch.equal(counted, stats)


@needs_tiles
@pytest.mark.parametrize("min_keep", [0, 5, 16, 40, 10_000])
@pytest.mark.parametrize("p", [0.05, 0.9])
def test_min_keep_tokens_are_kept_as_far_as_they_exist(min_keep: int, p: float) -> None:
    prompt = make_prompt(tokens=400, sharpness=2.0)
    rows = decided(prompt, 380, 400, p, min_keep=min_keep)
    _, stats = prompt.attend(380, 400, p=p, min_keep=min_keep)
    _, counted = prompt.rounded(torch.float64).attend(380, 400, _reference.prompt_attention, p=p, min_keep=min_keep)
    assert torch.equal(stats[rows][:, [1, 2]], counted[rows][:, [1, 2]])
    assert bool((stats[..., 1] >= min(min_keep, 192)).all())


@needs_tiles
def test_rows_below_min_sparse_len_are_dense() -> None:
    """A page leaves the window at token 388, so 256 tokens are packed from there on."""
    prompt = make_prompt(tokens=400)
    dense, _ = prompt.attend(370, 400)
    sparse, _ = prompt.attend(370, 400, p=0.5)
    found, stats = prompt.attend(370, 400, p=0.5, min_sparse_len=256)
    assert torch.equal(found[:18], dense[:18])
    assert torch.equal(found[18:], sparse[18:])
    assert bool((stats[:18, :, 2] == 192).all()) and bool((stats[18:, :, 2] < 256).any())


@needs_tiles
def test_far_logits_neither_overflow_nor_vanish() -> None:
    prompt = make_prompt(tokens=300, sharpness=400.0)
    for p in (0.9, 1.0):
        found, stats = prompt.attend(280, 300, p=p)
        exact, _ = prompt.rounded(torch.float64).attend(280, 300, _reference.prompt_attention, p=p)
        assert bool(found.isfinite().all())
        assert bool((stats[..., 3] <= 1 + 1e-6).all())
        near = (found.double() - exact).abs().amax(-1) < 0.02  # but where two tokens tie
        assert float(near.double().mean()) > 0.95


@needs_tiles
def test_stats_are_added_to() -> None:
    prompt = make_prompt(tokens=300)
    _, once = prompt.attend(280, 300, p=0.9)
    _, twice = prompt.attend(280, 300, p=0.9, stats=once.clone())
    assert torch.equal(twice, 2 * once)
    assert torch.equal(prompt.attend(280, 300, p=0.9, stats=None)[0], prompt.attend(280, 300, p=0.9)[0])


def test_without_tiles_it_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twilight_kernels._numba_amx.has_tiles", lambda: False)
    assert not has_prompt_kernels(torch.device("cpu"), BF16)
    prompt = make_prompt(tokens=250)
    found, _ = prompt.attend(240, 250, p=0.9)
    assert torch.equal(found, prompt.attend(240, 250, _reference.prompt_attention, p=0.9)[0])
    assert not has_prompt_kernels(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"p": 0.0}, r"p must be in \(0, 1\]"),
        ({"min_keep": -1}, "min_keep must be 0 or more"),
        ({"num_sinks": -1}, "num_sinks must be 0 or more, got -1"),
        ({"window": 0}, "window must be 1 or more, got 0"),
        ({"scaling": 0.0}, r"scaling must be positive, got 0\.0"),
        ({"block_table": torch.zeros(0, dtype=torch.int32)}, r"block_table must be \[1 or more\] int32, got \[0\]"),
        ({"plain_table": torch.zeros(4)}, r"plain_table must be \[4 or more\] int32, got \[4\] torch.float32"),
        (
            {"plain_table": torch.zeros(1, 4, dtype=torch.int32)},
            r"plain_table must be \[4 or more\] int32, got \[1, 4\]",
        ),
        ({"stats": torch.zeros(20, 6, 4)}, r"stats must be contiguous \[20, 6, 5\] float64"),
        ({"query": torch.zeros(20, 6, 64)}, r"query must be \[20, H, 64\] of torch.bfloat16"),
    ],
)
def test_refuses(changed: dict[str, Any], said: str) -> None:
    prompt = make_prompt(tokens=220)

    def kernel(query: Tensor, *pages: Any, **options: Any) -> Tensor:
        given = {**options, **changed}
        return prompt_attention(given.pop("query", query), *pages, **given)

    with pytest.raises(ValueError, match=said):
        prompt.attend(200, 220, kernel)
