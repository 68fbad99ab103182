"""Page bounds and logits on every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_kernels import _reference, key_logits, page_scores

# every width of code, page size, number of query heads and dtype once, and some pairs of them
CASES: list[dict[str, Any]] = [
    {"key_bits": 2, "page_size": 64, "q_per_kv": 3, "key_dim": 64},
    {"key_bits": 3, "page_size": 16, "q_per_kv": 1, "key_dim": 80, "dtype": torch.bfloat16},
    {"key_bits": 4, "page_size": 32, "q_per_kv": 4, "key_dim": 96, "dtype": torch.float16},
    {"key_bits": 8, "page_size": 128, "q_per_kv": 8, "key_dim": 128},
    {"key_bits": 16, "page_size": 64, "q_per_kv": 1, "key_dim": 256, "dtype": torch.bfloat16},
    {"key_bits": 16, "page_size": 16, "q_per_kv": 3, "key_dim": 20},
]


def _arguments(scene: Any) -> tuple[Any, ...]:
    return scene.query, scene.key_pages, scene.block_table, scene.num_pages, scene.scaling


@pytest.mark.parametrize("case", CASES, ids=str)
def test_key_logits_are_those_of_float64_but_for_rounding(case: dict[str, Any], make_scene: Callable[..., Any]) -> None:
    scene = make_scene(pages=(3, 0, 1), plain=(1, 1, 1), **case)
    exact = _reference.key_logits(*_arguments(scene.wide()))
    found = key_logits(*_arguments(scene))
    assert found.dtype == torch.float32
    assert found.shape == exact.shape == (3, scene.query.shape[1], 3 * case["page_size"])
    absent = exact == -torch.inf
    assert torch.equal(found == -torch.inf, absent)
    assert bool(absent[1].all())
    error = (found.double() - exact).abs().masked_fill(absent, 0).amax(-1)
    eager = _reference.key_logits(*_arguments(scene)).double()
    eager_error = (eager - exact).abs().masked_fill(absent, 0).amax(-1)
    assert bool((error <= eager_error + scene.logit_rounding()).all())


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
