"""Page bounds and logits on every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_kernels import _reference, channel_logits, key_logits, page_masses, page_scores

# every width of code, page size, number of query heads and dtype once, and some pairs of them
CASES: list[dict[str, Any]] = [
    {"key_bits": 2, "page_size": 64, "q_per_kv": 3, "key_dim": 64},
    {"key_bits": 3, "page_size": 16, "q_per_kv": 1, "key_dim": 80, "dtype": torch.bfloat16},
    {"key_bits": 3, "page_size": 64, "q_per_kv": 3, "key_dim": 64},
    {"key_bits": 3, "page_size": 128, "q_per_kv": 2, "key_dim": 64, "dtype": torch.float16},
    {"key_bits": 4, "page_size": 32, "q_per_kv": 4, "key_dim": 96, "dtype": torch.float16},
    {"key_bits": 8, "page_size": 128, "q_per_kv": 8, "key_dim": 128},
    {"key_bits": 16, "page_size": 64, "q_per_kv": 1, "key_dim": 256, "dtype": torch.bfloat16},
    {"key_bits": 2, "page_size": 32, "q_per_kv": 16, "key_dim": 64},
    {"key_bits": 16, "page_size": 16, "q_per_kv": 3, "key_dim": 20},
]


def _arguments(scene: Any) -> tuple[Any, ...]:
    return scene.query, scene.key_pages, scene.block_table, scene.num_pages, scene.scaling


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_key_logits_are_those_of_float64_but_for_rounding(case: dict[str, Any], make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3, 0, 1), plain=(1, 1, 1), **case)
    found = _assert_logits(scene)
    assert found.dtype == torch.float32
    assert found.shape == (3, scene.query.shape[1], 3 * case["page_size"])
    assert bool((found[1] == -torch.inf).all())


def _assert_logits(scene: Any) -> Tensor:
    """Return the logits; their error is no larger than that of eager computation, and what rounding explains."""
    exact = _reference.key_logits(*_arguments(scene.wide()))
    found = key_logits(*_arguments(scene))
    absent = exact == -torch.inf
    assert torch.equal(found == -torch.inf, absent)
    error = (found.double() - exact).abs().masked_fill(absent, 0).amax(-1)
    eager = _reference.key_logits(*_arguments(scene)).double()
    eager_error = (eager - exact).abs().masked_fill(absent, 0).amax(-1)
    assert bool((error <= eager_error + scene.logit_rounding()).all())
    return found


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_key_logits_without_matrix_tiles(
    case: dict[str, Any], make_scene: Callable[..., Any], without_tiles: None
) -> None:
    _assert_logits(make_scene(pages=(3, 0, 1), plain=(1, 1, 1), **case))


@pytest.mark.parametrize(
    "case",
    [
        {"key_bits": 3, "page_size": 128, "q_per_kv": 6, "key_dim": 72},
        {"key_bits": 4, "page_size": 64, "q_per_kv": 5, "key_dim": 192, "dtype": torch.bfloat16},
        {"key_bits": 2, "page_size": 16, "q_per_kv": 11, "key_dim": 8, "dtype": torch.float16},
        {"key_bits": 8, "page_size": 32, "q_per_kv": 2, "key_dim": 320},
    ],
    ids=str,
)
def test_key_logits_where_tiles_are_not_filled(case: dict[str, Any], make_scene: Callable[..., Any]) -> None:
    """Channels, tokens and query heads that are no multiple of what a matrix tile of a CPU takes."""
    _assert_logits(make_scene(pages=(2, 17), plain=(1, 1), **case))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("spread", [0.0, 3.0, 12.0])
def test_key_logits_of_queries_of_any_size(size: float, spread: float, make_scene: Callable[..., Any]) -> None:
    """Bytes of a query stand for shares of its largest channel: neither its size nor that of others may matter."""
    scene = make_scene(pages=(3,), plain=(1,))
    factors = torch.logspace(0, -spread, 64, device=scene.query.device).roll(5)
    _assert_logits(dataclasses.replace(scene, query=scene.query * factors * size))


def test_key_logits_of_no_query_are_zero(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3,), plain=(1,))
    assert not bool(key_logits(*_arguments(dataclasses.replace(scene, query=scene.query * 0))).any())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_key_logits_of_queries_that_are_not_finite_are_not_finite(wrong: float, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3,), plain=(1,))
    before, query = key_logits(*_arguments(scene)), scene.query.clone()
    query[0, 1, 7] = wrong
    found = key_logits(*_arguments(dataclasses.replace(scene, query=query)))
    assert not bool(found[0, 1].isfinite().any())
    others = [0, *range(2, query.shape[1])]
    assert torch.equal(found[0, others], before[0, others])


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_page_scores_bound_the_logits(case: dict[str, Any], make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3, 0, 1), plain=(1, 1, 1), **case)
    scores, exact = page_scores(*_arguments(scene)), _reference.page_scores(*_arguments(scene.wide()))
    absent = exact == -torch.inf
    assert torch.equal(scores == -torch.inf, absent)
    rounding = scene.logit_rounding()[..., None]
    assert bool(((scores - exact).abs().masked_fill(absent, 0) <= rounding).all())
    logits = _reference.key_logits(*_arguments(scene.wide())).unflatten(-1, (3, case["page_size"]))
    assert bool((scores + rounding >= logits.amax(-1)).all())


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_page_masses_are_those_of_float64_but_for_rounding(
    case: dict[str, Any], make_scene: Callable[..., Any]
) -> None:
    scene = make_scene(pages=(3, 0, 1), plain=(1, 1, 1), **case)
    masses, exact = page_masses(*_arguments(scene)), _reference.page_masses(*_arguments(scene.wide()))
    absent = exact == -torch.inf
    assert torch.equal(masses == -torch.inf, absent)
    # the variance is a sum of positive terms: it rounds relative to itself
    rounding = scene.logit_rounding()[..., None] + 16 * torch.finfo(torch.float32).eps * exact.abs()
    assert bool(((masses - exact).abs().masked_fill(absent, 0) <= rounding).all())


def test_page_masses_see_a_heavy_page(make_scene: Callable[..., Any]) -> None:
    """Keys drawn as the estimate supposes: it is near the true mass, where the bound is far above it."""
    scene = make_scene(pages=(12,), plain=(1,), sharpness=1.0)
    logits = key_logits(*_arguments(scene)).unflatten(-1, (12, 64))
    error = (page_masses(*_arguments(scene)) - logits.logsumexp(-1)).abs().mean()
    assert float(error) < 0.2 * float((page_scores(*_arguments(scene)) - logits.amax(-1)).mean())


def _channel_arguments(scene: Any, num_channels: int) -> tuple[Any, ...]:
    return scene.query, scene.key_pages, num_channels, scene.block_table, scene.num_pages, scene.scaling


@pytest.mark.interpreted(*(f"7-{case}" for case in CASES), f"1-{CASES[8]}", f"None-{CASES[4]}")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("num_channels", [1, 7, None])
def test_channel_logits_are_those_of_float64_but_for_rounding(
    case: dict[str, Any], num_channels: int | None, make_scene: Callable[..., Any]
) -> None:
    pages = 1 + 1024 // case["page_size"]  # channels are chosen again after 1,024 tokens
    scene = make_scene(pages=(pages, 0, 2), plain=(1, 1, 1), **case)
    count = case["key_dim"] if num_channels is None else num_channels
    exact = _reference.channel_logits(*_channel_arguments(scene.wide(), count))
    found = channel_logits(*_channel_arguments(scene, count))
    assert found.dtype == torch.float32
    absent = exact == -torch.inf
    assert torch.equal(found == -torch.inf, absent)
    # a channel on the border of the choice may be in one list and not in the other: no scene here has one
    error = (found.double() - exact).abs().masked_fill(absent, 0).amax(-1)
    assert bool((error <= 2 * scene.logit_rounding()).all())
    if num_channels is None:
        logits = _reference.key_logits(*_arguments(scene.wide()))
        assert torch.allclose(exact.masked_fill(absent, 0), logits.masked_fill(absent, 0), atol=1e-9, rtol=0)


def test_channel_logits_come_closer_with_more_channels(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(5,), plain=(1,))
    exact, errors = key_logits(*_arguments(scene)), []
    for count in (1, 4, 16, 63):
        errors.append(float((channel_logits(*_channel_arguments(scene, count)) - exact).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * errors[0]


@pytest.mark.parametrize("count", [0, 65])
def test_channel_logits_refuse_channels_that_do_not_exist(count: int, make_scene: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="num_channels must be 1 to 64"):
        channel_logits(*_channel_arguments(make_scene(), count))


@pytest.mark.interpreted
def test_a_row_scores_as_it_does_alone(make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3, 1, 2), plain=(1, 1, 1))
    together, logits = page_scores(*_arguments(scene)), key_logits(*_arguments(scene))
    for row, count in enumerate((3, 1, 2)):
        alone = _arguments(scene.row(row))
        assert torch.equal(page_scores(*alone)[0], together[row, :, :count])
        assert torch.equal(key_logits(*alone)[0], logits[row, :, : count * 64])


@pytest.mark.parametrize("kernel", [page_scores, key_logits])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"query": torch.zeros(2, 5, 64)}, r"H a multiple of 2 KV heads, got \[2, 5, 64\]"),
        ({"query": torch.zeros(2, 6, 32)}, r"query must be \[B, H, 64\]"),
        ({"query": torch.zeros(6, 64)}, r"query must be \[B, H, 64\]"),
        ({"query": torch.zeros(3, 6, 64)}, r"block_table must be \[3, P\] int32"),
        ({"block_table": torch.zeros(2, 3)}, r"block_table must be \[2, P\] int32, got .* torch.float32"),
        ({"num_pages": torch.zeros(2)}, r"num_pages must be \[2\] int32, got .* torch.float32"),
    ],
)
def test_refuses(kernel: Callable[..., Tensor], changed: dict[str, Tensor], said: str, make_scene: Any) -> None:
    scene = dataclasses.replace(make_scene(), **changed)
    with pytest.raises(ValueError, match=said):
        kernel(*_arguments(scene))
