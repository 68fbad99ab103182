"""The definitions themselves: identities that hold whatever implements them."""

from __future__ import annotations

import math

import pytest
import torch

from twilight_kernels import KeyCodec, KeyPages, ValueCodec, ValuePages, _reference, pack, unpack

PACKED_BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("count", [8, 16, 40, 128])
def test_pack_is_undone_by_unpack(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (7, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (7, count * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_unpack_is_undone_by_pack_for_every_byte(bits: int) -> None:
    packed = torch.randint(0, 256, (4096, bits), dtype=torch.uint8)
    packed[:256] = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


def test_pack_places_fields_planar() -> None:
    codes = torch.arange(8, dtype=torch.uint8)
    low_plane = [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]  # byte j: elements j, j+2, j+4, j+6
    assert pack(codes % 4, 2).tolist() == low_plane
    assert pack(codes, 3).tolist() == [*low_plane, 0b11110000]  # then the high bits of elements 0 .. 7
    assert pack(codes, 4).tolist() == [0 | 4 << 4, 1 | 5 << 4, 2 | 6 << 4, 3 | 7 << 4]


def _stored(bits: int, clip: float = 1.0, scale: float = 1.0) -> tuple[torch.Tensor, KeyPages]:
    keys = torch.randn(3, 2, 64, 32, generator=torch.Generator().manual_seed(bits)) * scale
    pages = KeyPages.empty(3, 2, 32, KeyCodec(bits, 64, clip), keys.dtype, "cpu")
    _reference.store_key_pages(pages, torch.arange(3), keys)
    return keys, pages


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_key_quantization_error_is_half_a_step_inside_the_range(bits: int, clip: float) -> None:
    keys, pages = _stored(bits, clip)
    loaded = _reference.load_key_pages(pages, torch.arange(3), torch.float64)
    lo, step = (t.double().unsqueeze(2) for t in (pages.lo, pages.step))  # [N, K, 1, D]
    inside = (keys >= lo) & (keys <= lo + step * pages.codec.levels)
    half_step = step / 2 + 1e-6 * keys.abs()  # codes are found in float32
    assert bool((((keys - loaded).abs() <= half_step) | ~inside).all())
    # float16 scales move the ends of the range by at most their own rounding; a clipped range cuts on purpose
    if clip == 1.0:
        rounding = lo.abs() * 2.0**-11 + pages.codec.levels * step * 2.0**-11
        assert bool(((keys - loaded).abs() <= half_step + rounding).all())
    else:
        assert not bool(inside.all())


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_value_quantization_error_is_half_a_step(bits: int) -> None:
    values = torch.randn(3, 2, 16, 80, generator=torch.Generator().manual_seed(bits))
    pages = ValuePages.empty(3, 2, 80, ValueCodec(bits, 16, 32), values.dtype, "cpu")
    _reference.store_value_pages(pages, torch.arange(3), values)
    loaded = _reference.load_value_pages(pages, torch.arange(3), torch.float64)
    group = torch.arange(80) // 32
    lo, step = (t.double()[..., group] for t in (pages.lo, pages.step))
    rounding = lo.abs() * 2.0**-11 + pages.codec.levels * step * 2.0**-11
    assert bool(((values - loaded).abs() <= step / 2 + rounding + 1e-6).all())


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_stored_keys_have_no_more_levels_than_their_bits_allow(bits: int) -> None:
    _, pages = _stored(bits)
    loaded = _reference.load_key_pages(pages, torch.arange(3), torch.float32)
    distinct = [channel.unique().numel() for channel in loaded.transpose(2, 3).reshape(-1, 64)]
    assert max(distinct) <= 2**bits


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_constant_page_is_kept_exactly(bits: int) -> None:
    keys = torch.randn(1, 2, 1, 32).half().float().expand(1, 2, 64, 32)
    pages = KeyPages.empty(1, 2, 32, KeyCodec(bits, 64), keys.dtype, "cpu")
    _reference.store_key_pages(pages, torch.zeros(1), keys)
    assert torch.equal(_reference.load_key_pages(pages, torch.zeros(1), torch.float32), keys)
    assert not pages.step.any()


def test_wide_ranges_leave_no_code_out_of_bounds() -> None:
    for scale in (1e-7, 1e-4, 1.0, 1e4):
        keys, pages = _stored(4, scale=scale)
        loaded = _reference.load_key_pages(pages, torch.arange(3), torch.float64)
        lo = pages.lo.double().unsqueeze(2)
        high = lo + pages.codec.levels * pages.step.double().unsqueeze(2)
        assert bool(((loaded >= lo) & (loaded <= high)).all())
        assert bool(keys.isfinite().all())


@pytest.mark.parametrize("bits", [*PACKED_BITS, 16])
def test_page_scores_bound_every_dequantized_logit(bits: int) -> None:
    _, pages = _stored(bits)
    query = torch.randn(1, 6, 32, dtype=torch.float64)
    table, count = torch.arange(3, dtype=torch.int32)[None], torch.tensor([3], dtype=torch.int32)
    bound = _reference.page_scores(query, pages, table, count, 0.2)
    logits = _reference.key_logits(query, pages, table, count, 0.2).unflatten(-1, (3, 64))
    assert bool((bound >= logits.amax(-1) - 1e-9).all())


def test_page_score_is_reached_by_a_page_of_one_token() -> None:
    """A page whose tokens are all the same has no slack between its bound and its logits."""
    keys = torch.randn(1, 1, 1, 16).half().float().expand(1, 1, 16, 16)
    pages = KeyPages.empty(1, 1, 16, KeyCodec(4, 16), keys.dtype, "cpu")
    _reference.store_key_pages(pages, torch.zeros(1), keys)
    query, table, count = torch.randn(1, 1, 16).double(), torch.zeros(1, 1).int(), torch.ones(1).int()
    bound = _reference.page_scores(query, pages, table, count, 1.0)
    assert math.isclose(float(bound), float(query.flatten() @ keys[0, 0, 0].double()), rel_tol=1e-9, abs_tol=1e-9)


def test_raw_pages_are_stored_unchanged() -> None:
    keys, pages = _stored(16)
    assert torch.equal(_reference.load_key_pages(pages, torch.arange(3), keys.dtype), keys)
    assert list(pages.tensors()) == ["codes"]
