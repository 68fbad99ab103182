from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from twilight_kernels.skvq import (
    SkvqCodec,
    SkvqPages,
    code_bytes,
    load_skvq_pages,
    pack_base3,
    store_skvq_pages,
    unpack_base3,
)

K, D, SIZE = 2, 64, 16


def _codec(levels: int = 4, *, groups: int = 2, clip: float = 1.0, seed: int = 0, unit: float = 0.01) -> SkvqCodec:
    """An order of random channels, in groups of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(D, generator=generator) for _ in range(K)])
    group = torch.randint(0, groups, (K, D), generator=generator).sort(-1).values
    return SkvqCodec(levels, SIZE, clip, order, group, torch.full((K,), unit))


def _numbers(pages: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(pages, K, SIZE, D, generator=torch.Generator().manual_seed(seed))


def _round_trip(codec: SkvqCodec, x: torch.Tensor, **how: bool) -> torch.Tensor:
    pages = SkvqPages.empty(len(x), codec)
    store_skvq_pages(pages, torch.arange(len(x)), x)
    return load_skvq_pages(pages, torch.arange(len(x)), torch.float32, **how)


def test_base3_bytes_are_a_bijection_of_all_digits() -> None:
    digits = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)
    packed = pack_base3(digits)
    assert sorted(packed.flatten().tolist()) == list(range(243))
    assert torch.equal(unpack_base3(packed, 5), digits)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 64, 80, 128])
def test_pack_base3_takes_any_count(count: int) -> None:
    digits = torch.randint(0, 3, (7, count), dtype=torch.uint8)
    packed = pack_base3(digits)
    assert packed.shape == (7, -(-count // 5)) == (7, code_bytes(count, 3))
    assert torch.equal(unpack_base3(packed, count), digits)


@pytest.mark.parametrize(("levels", "codes"), [(3, 13), (4, 16), (16, 32)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bytes_are_the_closed_form(levels: int, codes: int, groups: int) -> None:
    codec = _codec(levels, groups=groups)
    pages = SkvqPages.empty(5, codec)
    stored = sum(tensor.nbytes for tensor in pages.tensors().values())
    assert codec.token_bytes == codes + 2 * groups
    assert stored == 5 * K * SIZE * codec.token_bytes


@pytest.mark.parametrize("levels", [3, 4, 16])
def test_a_group_has_so_many_levels_and_errors_of_half_a_step(levels: int) -> None:
    codec, x = _codec(levels), _numbers()
    loaded = _round_trip(codec, x, in_order=True)
    places = x.gather(-1, codec.order[None, :, None].expand_as(x))
    for k, g in itertools.product(range(K), range(2)):
        own = codec.group[k] == g
        numbers, rounded = places[:, k][..., own], loaded[:, k][..., own]
        assert max(len(row.unique()) for row in rounded.flatten(0, 1)) <= levels
        span = numbers.amax(-1) - numbers.amin(-1)
        # half a step, and what the three bits of an FP8 fraction move the ends by
        allowed = 0.5 * span / (levels - 1) * (1 + 2**-4) + (numbers.amin(-1).abs() + span) * 2**-4
        assert bool(((numbers - rounded).abs() <= allowed[..., None] + 1e-6).all())


@pytest.mark.parametrize("levels", [3, 4, 16])
def test_attention_in_the_codecs_order_is_attention(levels: int) -> None:
    codec, x = _codec(levels), _numbers()
    query = torch.randn(K, D, generator=torch.Generator().manual_seed(3))
    usual = torch.einsum("kd,nktd->nkt", query, _round_trip(codec, x))
    ordered = torch.einsum("kd,nktd->nkt", query.gather(-1, codec.order), _round_trip(codec, x, in_order=True))
    torch.testing.assert_close(usual, ordered)


def test_channels_may_come_in_any_order() -> None:
    """What is stored does not depend on the order in which the model happens to have its channels."""
    codec, x = _codec(3), _numbers()
    shuffle = torch.randperm(D, generator=torch.Generator().manual_seed(9))
    shuffled = dataclasses.replace(codec, order=shuffle.argsort()[codec.order])
    assert torch.equal(_round_trip(shuffled, x[..., shuffle]), _round_trip(codec, x)[..., shuffle])


def test_a_lone_channel_is_stored_with_the_precision_of_its_scale() -> None:
    group = torch.cat([torch.zeros(K, D - 1), torch.ones(K, 1)], -1).long()
    codec, x = dataclasses.replace(_codec(4, unit=1.0), group=group), _numbers()
    x[:, torch.arange(K), :, codec.order[:, -1]] = 100.0
    loaded = _round_trip(codec, x)
    assert bool((loaded[:, torch.arange(K), :, codec.order[:, -1]] - 100.0).abs().max() <= 100 * 2**-4)


def test_constant_groups_and_zeros_come_back() -> None:
    assert torch.equal(_round_trip(_codec(4), torch.zeros(1, K, SIZE, D)), torch.zeros(1, K, SIZE, D))
    assert torch.equal(
        _round_trip(_codec(3, unit=1.0), torch.full((1, K, SIZE, D), 2.0)).round(), torch.full((1, K, SIZE, D), 2.0)
    )


def test_store_leaves_other_pages_and_refuses_what_is_not_finite() -> None:
    codec, x = _codec(3), _numbers(4)
    pages = SkvqPages.empty(6, codec)
    store_skvq_pages(pages, torch.tensor([4, 1]), x[:2])
    before = {name: tensor.clone() for name, tensor in pages.tensors().items()}
    store_skvq_pages(pages, torch.tensor([0]), x[2:3])
    for name, tensor in pages.tensors().items():
        assert torch.equal(tensor[[1, 4]], before[name][[1, 4]])
    bad = x[3:].clone()
    bad[0, 1, 3, 5] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        store_skvq_pages(pages, torch.tensor([1]), bad)
    assert torch.equal(pages.codes[1], before["codes"][1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": 5}, "levels must be one of 3, 4, 16, got 5"),
        ({"page_size": 48}, "page_size must be one of 16, 32, 64, 128, got 48"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\], got 0.0"),
        ({"order": torch.zeros(K, D, dtype=torch.long)}, "each row every channel once"),
        ({"group": torch.ones(K, D, dtype=torch.long).cumsum(-1).flip(-1)}, "group must be .* ascending"),
    ],
)
def test_codec_refuses(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(_codec(), **changes)  # type: ignore[arg-type]
