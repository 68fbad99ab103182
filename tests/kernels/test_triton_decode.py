"""A decode step on GPUs never waits for the device: what a CUDA graph could not capture is refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twilight_kernels import channel_logits, decode_attention, key_logits, page_masses, page_scores

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


@pytest.fixture(params=["cuda", "interpreter"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield "cuda"
        return
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU of this machine")
    monkeypatch.setenv("HF_TWILIGHT_BACKEND", "triton")
    yield "cpu"


def test_the_refusal_notices_what_waits() -> None:
    for wait in (lambda x: x.item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x > 0)):
        with pytest.raises(AssertionError, match="waits for the device"), _RefuseWaiting():
            wait(torch.ones(1))


def test_a_step_reads_nothing_back(step: str, make_scene_on: Callable[..., Any]) -> None:
    scene = make_scene_on(step, pages=(3, 0), plain=(20, 65), key_bits=2, value_bits=2)
    arguments, options = scene.inputs()
    candidates = torch.zeros(2, 2, 1, dtype=torch.int32, device=step)
    candidates[1] = -1
    flags = torch.ones(2, 2, 64, dtype=torch.bool, device=step)
    stats = torch.zeros(2, 6, 5, dtype=torch.float64, device=step)
    with _RefuseWaiting():
        for p in (0.9, 1.0):
            decode_attention(*arguments, **options, p=p, min_keep=2, min_sparse_len=64, stats=stats)
            decode_attention(*arguments, **options, p=p, candidates=candidates, candidate_tokens=flags, stats=stats)
        for kernel in (page_scores, page_masses, key_logits):
            kernel(scene.query, scene.key_pages, scene.block_table, scene.num_pages, scene.scaling)
        channel_logits(scene.query, scene.key_pages, 16, scene.block_table, scene.num_pages, scene.scaling)
    assert stats[..., 3].min() > 0, "the steps were made"


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
