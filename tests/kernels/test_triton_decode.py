"""A decode step on GPUs: it never waits for the device, and takes large batches and far pages.

What a CUDA graph could not capture is refused here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twilight_kernels import (
    KeyPages,
    ValuePages,
    _reference,
    channel_logits,
    decode_attention,
    key_logits,
    page_masses,
    page_scores,
)

pytest.importorskip("triton")

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.", "allclose")


class _RefuseWaiting(TorchDispatchMode):
    """Refuse what reads numbers back from the device, or makes shapes of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = str(func)
        is_masked = "index" in named and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for listed in args
            if isinstance(listed, (list, tuple))
            for part in listed
        )
        if is_masked or any(wait in named for wait in _WAITS):
            raise AssertionError(f"{named} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_refusal_notices_what_waits() -> None:
    for wait in (lambda x: x.item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x > 0)):
        with pytest.raises(AssertionError, match="waits for the device"), _RefuseWaiting():
            wait(torch.ones(1))


def test_a_step_reads_nothing_back(gpu: str, make_scene_on: Callable[..., Any]) -> None:
    scene = make_scene_on(gpu, pages=(3, 0), plain=(20, 65), key_bits=2, value_bits=2)
    arguments, options = scene.inputs()
    candidates = torch.zeros(2, 2, 1, dtype=torch.int32, device=gpu)
    candidates[1] = -1
    flags = torch.ones(2, 2, 64, dtype=torch.bool, device=gpu)
    stats = torch.zeros(2, 6, 5, dtype=torch.float64, device=gpu)
    with _RefuseWaiting():
        for p in (0.9, 1.0):
            decode_attention(*arguments, **options, p=p, min_keep=2, min_sparse_len=64, stats=stats)
            decode_attention(*arguments, **options, p=p, candidates=candidates, candidate_tokens=flags, stats=stats)
        for kernel in (page_scores, page_masses, key_logits):
            kernel(scene.query, scene.key_pages, scene.block_table, scene.num_pages, scene.scaling)
        channel_logits(scene.query, scene.key_pages, 16, scene.block_table, scene.num_pages, scene.scaling)
    assert stats[..., 3].min() > 0, "the steps were made"


def test_256_rows_are_those_of_the_reference(gpu: str, make_scene_on: Callable[..., Any]) -> None:
    scene = make_scene_on(
        gpu, pages=([0] * 14 + [2, 1]) * 16, plain=[1, 16] * 128, kv_heads=1, q_per_kv=1, key_dim=24, value_dim=16,
        page_size=16, group_size=16,
    )  # fmt: skip
    arguments, options = scene.inputs()
    found = decode_attention(*arguments, **options)
    arguments, options = scene.wide().inputs()
    exact = _reference.decode_attention(*arguments, **options)
    assert torch.allclose(found.double(), exact, atol=1e-4, rtol=0)
    assert float((exact[1:] - exact[:-1]).abs().amax((1, 2)).min()) > 0.01, "a row would not pass for its neighbour"


def test_long_rows_are_pruned_like_short_ones(gpu: str, make_scene_on: Callable[..., Any]) -> None:
    """Of a long row many blocks gather what one does of a short one, whose bits do not tell what is beside it."""
    scene = make_scene_on(
        gpu, pages=(130, 40), plain=(3, 17), kv_heads=1, q_per_kv=2, key_dim=16, value_dim=16, page_size=64,
        group_size=16, sharpness=2.0,
    )  # fmt: skip
    arguments, options = scene.inputs()
    found = decode_attention(*arguments, **options, p=0.9, min_keep=20)
    arguments, options = scene.wide().inputs()
    exact = _reference.decode_attention(*arguments, **options, p=0.9, min_keep=20)
    assert torch.allclose(found.double(), exact, atol=1e-4, rtol=0)
    (query, *pages, plain), options = scene.inputs()
    plain = dataclasses.replace(plain, keys=plain.keys[1:].clone(), values=plain.values[1:].clone())
    options = {name: x if name == "scaling" else x[1:] for name, x in options.items()}
    options["block_table"] = options["block_table"][:, :40]
    assert torch.equal(decode_attention(query[1:], *pages, plain, **options, p=0.9, min_keep=20)[0], found[1])


def test_pages_beyond_two_to_the_31_are_found(gpu: str, make_scene_on: Callable[..., Any]) -> None:
    """Codes of more numbers than 32 bits count; of the memory only what is touched is taken."""
    scene = make_scene_on(
        gpu, pages=(2, 1), plain=(16, 3), q_per_kv=1, key_dim=128, value_dim=128, page_size=128, key_bits=8,
        value_bits=8,
    )  # fmt: skip
    slots = (1 << 31) // (2 * 128 * 128) + 8

    def far(near: torch.Tensor) -> torch.Tensor:
        shape, kind = (slots, *near.shape[1:]), {torch.uint8: np.uint8, torch.float16: np.float16}[near.dtype]
        found = torch.from_numpy(np.zeros(shape, kind)) if gpu == "cpu" else near.new_zeros(shape)
        found[-len(near) :] = near
        return found

    keys, values = scene.key_pages, scene.value_pages
    arguments, options = scene.inputs()
    near = decode_attention(*arguments, **options, p=0.9)
    arguments, options = scene.inputs()
    table = options["block_table"]
    options["block_table"] = torch.where(table < 0, table, table + slots - keys.num_pages)
    far_keys = KeyPages(keys.codec, far(keys.codes), far(keys.lo), far(keys.step))
    far_values = ValuePages(values.codec, far(values.codes), far(values.lo), far(values.step))
    found = decode_attention(arguments[0], far_keys, far_values, arguments[3], **options, p=0.9)
    assert torch.equal(found, near)


@pytest.mark.gpu
def test_a_captured_step_replays_with_other_lengths(make_scene_on: Callable[..., Any]) -> None:
    """What depends on data is read on the device: the graph serves rows that have grown since."""
    scene = make_scene_on("cuda", pages=(30, 7), plain=(20, 65), key_bits=2, value_bits=2)
    arguments, options = scene.inputs()
    options |= {"p": 0.9, "min_keep": 2, "min_sparse_len": 64, "new_key": None, "new_value": None}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        decode_attention(*arguments, **options)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(*arguments, **options)
    for pages in ((30, 7), (12, 7), (0, 3)):
        scene.num_pages.copy_(torch.tensor(pages, dtype=torch.int32))
        graph.replay()
        assert torch.equal(captured, decode_attention(*arguments, **options))
