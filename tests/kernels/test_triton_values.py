"""Values whose scales are folded into the weights on GPUs, and those that are unpacked (see ``_triton_values``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twilight_kernels import _reference, decode_attention

pytest.importorskip("triton")

from twilight_kernels._triton_values import value_shape

FOLDED: list[dict[str, Any]] = [
    {"value_bits": 2, "value_dim": 128, "group_size": 64, "q_per_kv": 4},
    {"value_bits": 3, "value_dim": 128, "group_size": 64, "q_per_kv": 4},
    {"value_bits": 3, "value_dim": 64, "group_size": 16, "q_per_kv": 3},
    {"value_bits": 8, "value_dim": 64, "group_size": 32, "q_per_kv": 8},
]
UNPACKED: list[dict[str, Any]] = [
    {"value_bits": 3, "value_dim": 80, "group_size": 16, "q_per_kv": 2},
    {"value_bits": 3, "value_dim": 128, "group_size": 16, "q_per_kv": 1},  # a plane of 32 channels has two groups
]


@pytest.mark.parametrize(("case", "folds"), [*((x, True) for x in FOLDED), *((x, False) for x in UNPACKED)], ids=str)
def test_a_step_is_that_of_the_reference(
    case: dict[str, Any], folds: bool, gpu: str, make_scene_on: Callable[..., Any]
) -> None:
    shape = value_shape(case["value_dim"], case["value_bits"], case["group_size"], case["q_per_kv"], False)
    assert shape["FOLDS"] == folds
    scene = make_scene_on(gpu, pages=(3, 1), plain=(3, 17), sharpness=1.0, dtype=torch.float16, **case)
    arguments, options = scene.inputs()
    found = decode_attention(*arguments, **options)
    exact_arguments, options = scene.wide().inputs()
    exact = _reference.decode_attention(*exact_arguments, **options)
    rounding = 2 * torch.finfo(found.dtype).eps * float(exact.abs().max())
    assert torch.allclose(found.double(), exact, atol=rounding + 1e-5)
