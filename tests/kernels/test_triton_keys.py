"""Scoring keys on GPUs: channels in two parts, and the shapes whose query is too large for one warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twilight_kernels import _reference, channel_logits, decode_attention, key_logits, page_masses, page_scores

tiles = pytest.importorskip("twilight_kernels._triton_tiles")

CASES: list[dict[str, Any]] = [
    {"key_bits": 2, "page_size": 64, "q_per_kv": 4, "key_dim": 144, "dtype": torch.float16},
    {"key_bits": 3, "page_size": 64, "q_per_kv": 4, "key_dim": 144},
    {"key_bits": 4, "page_size": 32, "q_per_kv": 4, "key_dim": 144},
    {"key_bits": 3, "page_size": 64, "q_per_kv": 3, "key_dim": 72, "dtype": torch.float16},
    {"key_bits": 3, "page_size": 32, "q_per_kv": 3, "key_dim": 96},
    {"key_bits": 16, "page_size": 16, "q_per_kv": 1, "key_dim": 40},
    {"key_bits": 4, "page_size": 16, "q_per_kv": 16, "key_dim": 256},
]


@pytest.mark.parametrize(
    ("dim", "main", "rest"),
    [(144, 128, 16), (72, 64, 16), (96, 64, 32), (160, 128, 32), (40, 32, 16), (128, 128, 0), (112, 128, 0),
     (256, 256, 0), (20, 32, 0), (8, 16, 0)],
)  # fmt: skip
def test_channel_parts_are_two_where_that_pads_less(dim: int, main: int, rest: int) -> None:
    assert tiles.channel_parts(dim) == {"D": dim, "DP": main, "RP": rest}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_those_of_float64_but_for_rounding(
    case: dict[str, Any], gpu: str, make_scene_on: Callable[..., Any]
) -> None:
    scene = make_scene_on(gpu, pages=(3, 0, 1), plain=(1, 1, 1), kv_heads=1, **case)
    tables = scene.block_table, scene.num_pages, scene.scaling
    rounding = scene.logit_rounding()[..., None]
    for kernel in (key_logits, page_scores, page_masses, channel_logits):
        few = (8,) if kernel is channel_logits else ()
        found = kernel(scene.query, scene.key_pages, *few, *tables)
        definition = getattr(_reference, kernel.__name__)
        wide = scene.wide()
        exact = definition(wide.query, wide.key_pages, *few, *tables)
        eager = definition(scene.query, scene.key_pages, *few, *tables).double()
        absent = exact == -torch.inf
        assert torch.equal(found == -torch.inf, absent)
        error, eager_error = ((x - exact).abs().masked_fill(absent, 0).amax(-1) for x in (found.double(), eager))
        assert bool((error[..., None] <= eager_error[..., None] + rounding).all()), kernel.__name__


LARGE: dict[str, Any] = {  # its pages are read in parts, its values unpacked
    "key_bits": 4, "q_per_kv": 16, "key_dim": 256, "value_dim": 256, "group_size": 64, "dtype": torch.float16
}  # fmt: skip


@pytest.mark.parametrize("case", [CASES[1], CASES[3], LARGE], ids=str)
def test_a_step_over_keys_in_parts_is_that_of_the_reference(
    case: dict[str, Any], gpu: str, make_scene_on: Callable[..., Any]
) -> None:
    scene = make_scene_on(gpu, pages=(2, 1), plain=(3, 17), kv_heads=1, sharpness=1.0, **case)
    arguments, options = scene.inputs()
    found = decode_attention(*arguments, **options)
    exact_arguments, options = scene.wide().inputs()
    exact = _reference.decode_attention(*exact_arguments, **options)
    assert torch.allclose(
        found.double(), exact, atol=2 * torch.finfo(found.dtype).eps * float(exact.abs().max()) + 1e-5
    )
    plain, expected = arguments[3], exact_arguments[3]
    assert torch.equal(plain.keys.double().nan_to_num(9e9), expected.keys.nan_to_num(9e9)), "both parts are appended"
