"""Prepared decode steps, and refined channels: the same to the bit as a call that is told everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twilight_kernels import decode_attention, prepare_decode

D, COUNT = 64, 16
SHAPE = {"pages": (3, 0, 2), "plain": (20, 65, 33), "key_dim": D + COUNT, "sharpness": 2.0}
STEP = ("new_key", "new_value", "block_table", "num_pages", "plain_len")


def _refined(scene: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Channels, and the query and new key that a caller has who leaves the rests to the kernel."""
    draw = torch.Generator().manual_seed(1)
    index = torch.randint(0, D, (3, 2, COUNT), generator=draw).to(scene.query.device)
    return index, scene.query[..., :D], scene.new_key[..., :D]


@pytest.mark.interpreted
@pytest.mark.parametrize("p", [0.9, 1.0])
def test_refined_channels_of_queries_are_repeated_and_keys_padded(p: float, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(**SHAPE)
    index, query, new_key = _refined(scene)
    (_, keys, values, plain), step = scene.inputs()
    found = decode_attention(query, keys, values, plain, **{**step, "new_key": new_key}, p=p, refined=index)
    wide = torch.cat([query, query.gather(-1, index.repeat_interleave(3, 1))], -1)
    (_, keys, values, other), step = scene.inputs()
    padded = F.pad(new_key, (0, COUNT))
    assert torch.equal(found, decode_attention(wide, keys, values, other, **{**step, "new_key": padded}, p=p))
    assert torch.equal(plain.keys.nan_to_num(9e9), other.keys.nan_to_num(9e9))


@pytest.mark.interpreted("True")
@pytest.mark.parametrize("is_refined", [False, True])
def test_a_prepared_step_is_the_whole_call(is_refined: bool, make_scene: Callable[..., Any]) -> None:
    """Step after step, with tables that grow and shrink, beside other calls over the same pages."""
    scene = make_scene(**SHAPE)
    index, query, new_key = _refined(scene) if is_refined else (None, scene.query, scene.new_key)
    whole, prepared = scene.inputs()[0], scene.inputs()[0]
    arguments = {**scene.inputs()[1], "new_key": new_key}
    scaling = arguments.pop("scaling")
    sums = [torch.zeros(3, 6, 5, dtype=torch.float64, device=query.device) for _ in range(2)]
    options = {"p": 0.9, "min_keep": 2, "min_sparse_len": 128, "refined": index, "scaling": scaling}
    step = prepare_decode(*prepared[1:], heads=6, stats=sums[0], **options)
    for columns in (3, 2):
        arguments["block_table"] = scene.block_table[:, :columns]
        arguments["num_pages"] = scene.num_pages.clamp(max=columns)
        found = step(query, *(arguments[name] for name in STEP))
        assert torch.equal(found, decode_attention(query, *whole[1:], **arguments, **options, stats=sums[1]))
    assert torch.equal(sums[0], sums[1]) and bool(sums[0].any())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"heads": 5}, r"query must be \[3, H, 64\]"),
        ({"p": 0.0}, r"p must be in \(0, 1\]"),
        ({"stats": torch.zeros(3, 6, 5)}, "float64"),
        ({"refined": torch.zeros(3, 2, COUNT)}, r"refined must be \[3, 2, R\] int64"),
        ({"refined": torch.zeros(3, 1, COUNT).long()}, r"refined must be \[3, 2, R\] int64"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_prepared(
    changed: dict[str, Any], said: str, make_scene: Callable[..., Any]
) -> None:
    scene = make_scene(**SHAPE)
    options = {"heads": 6, "scaling": 1.0, "refined": _refined(scene)[0], **changed}
    with pytest.raises(ValueError, match=said):
        prepare_decode(*scene.inputs()[0][1:], **options)


@pytest.mark.parametrize("name", ["query", *STEP])
def test_what_does_not_fit_is_refused_at_a_step(name: str, make_scene: Callable[..., Any]) -> None:
    scene = make_scene(**SHAPE)
    step = prepare_decode(*scene.inputs()[0][1:], heads=6, scaling=1.0)
    given = {**scene.inputs()[1], "query": scene.query}
    for wrong in (given[name][:2], given[name].double()):
        other = {**given, name: wrong}
        with pytest.raises(ValueError, match="must be what the step was prepared for"):
            step(other["query"], *(other[argument] for argument in STEP))
