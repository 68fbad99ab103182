from __future__ import annotations

import pytest
import torch

from twilight_kernels import (
    KeyCodec,
    KeyPages,
    PlainTokens,
    ValueCodec,
    ValuePages,
    key_token_bytes,
    packed_size,
    value_token_bytes,
)

BITS = (2, 3, 4, 8, 16)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_key_token_bytes_are_those_of_the_tensors(bits: int, page_size: int) -> None:
    pages, heads, dim = 5, 3, 80
    stored = KeyPages.empty(pages, heads, dim, KeyCodec(bits, page_size), torch.bfloat16, "cpu")
    per_token = key_token_bytes(dim, stored.codec, 2)
    assert sum(t.nbytes for t in stored.tensors().values()) == per_token * pages * heads * page_size
    if bits < 16:
        assert per_token == dim * bits / 8 + 4 * dim / page_size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("dim", "group_size", "groups"), [(64, 64, 1), (64, 16, 4), (96, 64, 2), (80, 32, 3)])
def test_value_token_bytes_are_those_of_the_tensors(bits: int, dim: int, group_size: int, groups: int) -> None:
    pages, heads = 5, 3
    stored = ValuePages.empty(pages, heads, dim, ValueCodec(bits, 32, group_size), torch.float32, "cpu")
    per_token = value_token_bytes(dim, stored.codec, 4)
    assert sum(t.nbytes for t in stored.tensors().values()) == per_token * pages * heads * 32
    if bits < 16:
        assert per_token == dim * bits / 8 + 4 * groups


def test_four_bits_are_a_quarter_of_bfloat16_plus_scales() -> None:
    assert packed_size(128, 4) * 4 == 128 * 2
    assert key_token_bytes(128, KeyCodec(4, 64), 2) == 64 + 8
    assert value_token_bytes(128, ValueCodec(4, 64, 64), 2) == 64 + 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 5}, "key_bits must be one of 2, 3, 4, 8, 16, got 5"),
        ({"page_size": 48}, "page_size must be one of 16, 32, 64, 128, got 48"),
        ({"clip": 0.0}, r"key_clip must be in \(0, 1\], got 0.0"),
        ({"clip": 1.5}, r"key_clip must be in \(0, 1\], got 1.5"),
    ],
)
def test_key_codec_refuses(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KeyCodec(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 1}, "value_bits must be one of"),
        ({"page_size": 0}, "page_size must be one of"),
        ({"group_size": 24}, "group_size must be a positive multiple of 16, got 24"),
        ({"group_size": 0}, "group_size must be a positive multiple of 16, got 0"),
    ],
)
def test_value_codec_refuses(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ValueCodec(**arguments)


def test_head_dim_that_does_not_pack_is_refused_unless_raw() -> None:
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8"):
        KeyPages.empty(1, 1, 20, KeyCodec(4), torch.float32, "cpu")
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8"):
        ValuePages.empty(1, 1, 20, ValueCodec(4), torch.float32, "cpu")
    assert KeyPages.empty(1, 1, 20, KeyCodec(16), torch.float32, "cpu").form == (1, 1, 20, 64)


def test_pages_refuse_tensors_of_another_form() -> None:
    keys = KeyPages.empty(2, 1, 16, KeyCodec(4), torch.float32, "cpu")
    with pytest.raises(ValueError, match="codes of key pages must be contiguous"):
        KeyPages(keys.codec, keys.codes[..., :-1], keys.lo, keys.step)
    with pytest.raises(ValueError, match=r"must be uint8, got torch\.float32"):
        KeyPages(keys.codec, keys.codes.float(), keys.lo, keys.step)
    with pytest.raises(ValueError, match="scales of key pages must be contiguous float16"):
        KeyPages(keys.codec, keys.codes, keys.lo.float(), keys.step)
    values = ValuePages.empty(2, 1, 16, ValueCodec(4, 32), torch.float32, "cpu")
    with pytest.raises(ValueError, match="value pages must hold 64 tokens, got 32"):
        ValuePages(ValueCodec(4, 64), values.codes, values.lo, values.step)


def test_plain_tokens_are_allocated_in_vectors() -> None:
    plain = PlainTokens.empty(1, 2, 8, 24, 33, torch.float32, "cpu")
    assert plain.capacity == 48
    assert plain.form == (1, 2, 8, 24)


@pytest.mark.parametrize(
    ("keys", "values", "said"),
    [
        (torch.zeros(1, 2, 8, 20), torch.zeros(1, 2, 20, 8), "multiple of 16, got 20"),
        (torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 32, 8), "must agree in B, K and C"),
        (torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 16, 8).half(), "of one dtype"),
        (torch.zeros(1, 2, 16, 8).transpose(2, 3), torch.zeros(1, 2, 16, 8), "must be contiguous"),
    ],
)
def test_plain_tokens_refuse(keys: torch.Tensor, values: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PlainTokens(keys, values)
