"""What concerns GPUs: the whole path at toy sizes, nothing timed that is wrong, no figure that was not measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_twilight import TwilightConfig
from twilight_apps import (
    bench_gpu,
    bench_gpu_check,
    bench_gpu_decode,
    bench_gpu_memory,
    bench_gpu_report,
    bench_gpu_step,
    gpu_sizes,
)
from twilight_apps.gpu_inputs import PackedLayer, make_inputs, pack
from twilight_apps.gpu_worker import CallError, Worker
from twilight_cache import DecodePolicy, LayerStore, PagePool, SequenceBatch

CPU, F32 = torch.device("cpu"), torch.float32


def _written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / bench_gpu.FILE_NAME).read_text())
    return found


def _units(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    return {unit["name"]: unit for unit in _written(folder)["units"] if unit["part"] == part}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition computes what kernels would: for tests of the path, not of what is on it."""
    monkeypatch.setenv("HF_TWILIGHT_BACKEND", "reference")


@pytest.mark.usefixtures("quick")
def test_bench_gpu_walks_every_part_and_keeps_no_time(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("bench", "gpu", "--toy", "--out", tmp_path)
    assert result.exit_code == 0, result.stdout
    found = _written(tmp_path)
    assert found["is_toy"]
    assert not found["not_reached"]
    assert {unit["part"] for unit in found["units"]} == set(bench_gpu.PARTS)
    assert {unit["status"] for unit in found["units"]} == {"passed"}
    rows = [row for unit in found["units"] for row in unit["result"].get("entrants", [])]
    assert all(row["ms"] is None and not any(name.startswith("speedup") for name in row) for row in rows)
    decode = _units(tmp_path, "decode")["1,160 x 1"]["result"]
    checks = {row["name"]: row["check"] for row in decode["entrants"] if row["is_ours"]}
    assert list(checks) == ["K2V2, p = 0.95", "K2V2, p = 1", "K4V4, p = 0.95", "K4V4, p = 1"]
    assert all(check["error"] <= check["tolerance"] for check in checks.values())
    assert checks["K4V4, p = 0.95"]["kept_share"] < checks["K4V4, p = 1"]["kept_share"] == 1.0
    prefill = _units(tmp_path, "prefill")["300"]["result"]
    assert prefill["check"]["stripes_otherwise"] == 0.0
    assert prefill["kept"]["mass"] >= 0.95


def test_bench_gpu_lets_a_kernel_that_does_not_compile_end_its_own_units_only(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Triton's interpreter: the kernels of ``p < 1`` raise, those of ``p = 1`` do not."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not there, or compiles for the GPU of this machine")
    from twilight_kernels import _triton_decode

    def out_of_resources(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of resource: shared memory\na whole program")

    monkeypatch.setenv("HF_TWILIGHT_BACKEND", "triton")
    monkeypatch.setattr(_triton_decode, "find_limits", out_of_resources)
    labels = {name: found for name, found in bench_gpu_decode.LABELS.items() if "K4V4" in name}
    monkeypatch.setattr(bench_gpu_decode, "LABELS", labels)
    every = bench_gpu_check.units
    monkeypatch.setattr(bench_gpu_check, "units", lambda sizes: [u for u in every(sizes) if u.name in labels])
    few = dataclasses.replace(gpu_sizes.TOY, decode=((1160, 1),))
    monkeypatch.setattr(bench_gpu, "TOY", few)
    result = cli("bench", "gpu", "--toy", "--out", tmp_path, "--part", "check", "--part", "decode", "--part", "memory")
    assert result.exit_code == 1
    check, decode = _units(tmp_path, "check"), _units(tmp_path, "decode")["1,160 x 1"]
    assert check["K4V4, p = 0.95"]["message"] == "RuntimeError: out of resource: shared memory"
    assert check["K4V4, p = 1"]["status"] == "passed"
    assert decode["message"] == "K4V4, p = 0.95: failed its check"
    assert [row["name"] for row in decode["result"]["entrants"] if row["is_ours"]] == ["K4V4, p = 1"]
    assert {unit["status"] for unit in _units(tmp_path, "memory").values()} == {"passed"}
    assert not _written(tmp_path)["not_reached"]


@pytest.mark.usefixtures("quick")
def test_bench_gpu_refuses_to_time_a_wrong_kernel(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PackedLayer.attend

    def wrong(self: PackedLayer, *args: Any, **options: Any) -> torch.Tensor:
        return right(self, *args, **options) * 1.01

    monkeypatch.setattr(PackedLayer, "attend", wrong)
    assert cli("bench", "gpu", "--toy", "--out", tmp_path, "--part", "decode").exit_code == 1
    for unit in _units(tmp_path, "decode").values():
        assert "must agree with its definition to be timed" in unit["message"]
        assert not any(row["is_ours"] for row in unit["result"]["entrants"])


@pytest.mark.usefixtures("quick")
def test_bench_gpu_goes_on_from_what_was_written(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = ("bench", "gpu", "--toy", "--out", tmp_path, "--part", "memory")
    assert cli(*memory, "--budget-s", 1).exit_code == 0
    assert _written(tmp_path)["not_reached"] == [f"memory {name}" for name in ("K2V2", "K3V3", "K4V4", "stock")]
    fit = bench_gpu_memory._allocate
    monkeypatch.setattr(bench_gpu_memory, "_allocate", lambda sizes, settings, *rest: 1 / (settings is not None))
    assert cli(*memory).exit_code == 1  # what is returned is no mapping, and the last is no number
    assert {unit["status"] for unit in _units(tmp_path, "memory").values()} == {"failed"}
    monkeypatch.setattr(bench_gpu_memory, "_allocate", fit)
    assert cli(*memory).exit_code == 0
    first = _units(tmp_path, "memory")
    assert {unit["status"] for unit in first.values()} == {"passed"}
    monkeypatch.setattr(bench_gpu_memory, "_allocate", None)
    assert cli(*memory).exit_code == 0  # nothing is run again
    assert _units(tmp_path, "memory") == first
    monkeypatch.setattr(bench_gpu, "_digest", lambda: "other kernels")
    result = cli(*memory)
    assert "is of another kernels: begun anew" in result.stdout
    assert result.exit_code == 1


def test_worker_outlives_what_raises_dies_and_hangs() -> None:
    with Worker() as worker:
        assert worker.call(math.sqrt, 4.0, limit_s=60) == 2.0
        with pytest.raises(CallError, match="ValueError"):
            worker.call(math.sqrt, -1.0, limit_s=60)
        with pytest.raises(CallError, match="died with exit code 3"):
            worker.call(os._exit, 3, limit_s=60)
        with pytest.raises(TimeoutError, match="no answer within"):
            worker.call(time.sleep, 60, limit_s=1.0)
        assert worker.call(math.sqrt, 9.0, limit_s=60) == 3.0


def test_bench_gpu_says_what_is_missing(cli: Callable[..., Any], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        result = cli("bench", "gpu", "--out", tmp_path)
        assert result.exit_code == 2
        assert "bench gpu needs a CUDA device" in result.stderr
    result = cli("bench", "gpu", "--toy", "--out", tmp_path, "--part", "sums")
    assert result.exit_code == 2
    assert "part must be one of check, decode, step, prefill, generate, memory, got sums" in result.stderr


def test_pack_holds_what_a_cache_would_hold() -> None:
    settings = TwilightConfig.preset("compact", p=1.0)
    made = make_inputs((4, 2, 16), 700, 0, CPU, F32)
    layer = pack(made.keys, made.values, settings, 2)
    sequences = SequenceBatch(settings.layout, PagePool())
    store = LayerStore(sequences, settings.key_codec, settings.value_codec, DecodePolicy())
    before = made.keys[:, :, :-1], made.values[:, :, :-1]
    store.append(sequences.begin(0, 699, 1, [0]), *before)
    step = sequences.begin(699, 1, 1, [0])
    expected = store.attend(made.query, made.scaling, step, made.keys[:, :, -1], made.values[:, :, -1])
    out = layer.attend(made.query.repeat(2, 1, 1), made.scaling, 1.0)
    assert torch.equal(out[:1], expected)
    assert torch.equal(out[1:], expected)
    assert torch.equal(layer.first().attend(made.query, made.scaling, 1.0), expected)


def test_weight_count_is_that_of_the_model() -> None:
    model = bench_gpu_step.make_model(gpu_sizes.TOY, CPU, F32, 0)
    assert bench_gpu_memory.weight_count(gpu_sizes.TOY) == sum(found.numel() for found in model.parameters())
    assert 8.0e9 < bench_gpu_memory.weight_count(gpu_sizes.FULL) < 8.1e9


def test_compared_names_the_fastest_dense_entrant() -> None:
    def row(name: str, ms: float, is_ours: bool) -> dict[str, Any]:
        return {"name": name, "is_ours": is_ours, "ms": {"median": ms}}

    rows = [row("ours", 1.0, True), row("sdpa, KV heads repeated beforehand", 8.0, False), row("flash", 4.0, False)]
    found = bench_gpu_report.compared({"entrants": rows})
    assert found["fastest_dense"] == "flash"
    assert [one["speedup_over_fastest"] for one in found["entrants"]] == [4.0, 0.5, 1.0]
    assert [one["speedup_over_repeated"] for one in found["entrants"]] == [8.0, 1.0, 2.0]
