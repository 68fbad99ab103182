"""What concerns GPUs: the whole path at toy sizes, nothing timed that is wrong, no figure that was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_twilight import TwilightConfig
from twilight_apps import bench_gpu, bench_gpu_memory, bench_gpu_step, gpu_sizes, gpu_timing
from twilight_apps.gpu_inputs import PackedLayer, make_inputs, pack
from twilight_cache import DecodePolicy, LayerStore, PagePool, SequenceBatch

CPU, F32 = torch.device("cpu"), torch.float32


def test_bench_gpu_walks_every_part_and_keeps_no_time(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("bench", "gpu", "--toy", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / bench_gpu.FILE_NAME).read_text())
    assert found["is_toy"]
    assert not found["failures"]
    assert not found["not_reached"]
    assert {part["part"] for part in found["results"]} == set(bench_gpu.PARTS)
    for part in found["results"]:
        for row in part.get("entrants", []):
            assert row["ms"] is None
            assert not any(row[name] for name in row if name.startswith("speedup"))
    decode = next(part for part in found["results"] if part["part"] == "decode")
    checks = {row["name"]: row["check"] for row in decode["entrants"] if row["is_ours"]}
    assert list(checks) == ["K2V2, p = 0.95", "K2V2, p = 1", "K4V4, p = 0.95", "K4V4, p = 1"]
    assert all(check["error"] <= check["tolerance"] for check in checks.values())
    assert checks["K4V4, p = 0.95"]["kept_share"] < checks["K4V4, p = 1"]["kept_share"] == 1.0
    prefill = next(part for part in found["results"] if part["part"] == "prefill")
    assert prefill["check"]["stripes_otherwise"] == 0.0
    assert prefill["kept"]["mass"] >= 0.95


def test_bench_gpu_refuses_to_time_a_wrong_kernel(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PackedLayer.attend

    def wrong(self: PackedLayer, *args: Any, **options: Any) -> torch.Tensor:
        return right(self, *args, **options) * 1.01

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a wrong kernel was timed")

    monkeypatch.setattr(PackedLayer, "attend", wrong)
    monkeypatch.setattr(gpu_timing, "interleave", never)
    result = cli("bench", "gpu", "--toy", "--out", tmp_path, "--part", "decode")
    assert result.exit_code == 1
    found = json.loads((tmp_path / bench_gpu.FILE_NAME).read_text())
    assert "must agree with its definition to be timed" in found["failures"]["decode"]
    assert found["not_reached"] == ["decode"]


def test_bench_gpu_says_what_is_missing(cli: Callable[..., Any], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        result = cli("bench", "gpu", "--out", tmp_path)
        assert result.exit_code == 2
        assert "bench gpu needs a CUDA device" in result.stderr
    result = cli("bench", "gpu", "--toy", "--out", tmp_path, "--part", "sums")
    assert result.exit_code == 2
    assert "part must be one of decode, prefill, step, memory, got sums" in result.stderr


def test_bench_gpu_begins_nothing_beyond_its_budget(cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("bench", "gpu", "--toy", "--out", tmp_path, "--budget-s", -1, "--part", "memory")
    assert result.exit_code == 0
    assert json.loads((tmp_path / bench_gpu.FILE_NAME).read_text())["not_reached"] == ["memory"]


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
    model = bench_gpu_step._model(gpu_sizes.TOY, CPU, F32, 0)
    assert bench_gpu_memory.weight_count(gpu_sizes.TOY) == sum(found.numel() for found in model.parameters())
    assert 8.0e9 < bench_gpu_memory.weight_count(gpu_sizes.FULL) < 8.1e9


def test_compared_names_the_fastest_dense_entrant() -> None:
    def row(name: str, ms: float, is_ours: bool) -> dict[str, Any]:
        return {"name": name, "is_ours": is_ours, "ms": {"median": ms}}

    rows = [row("ours", 1.0, True), row("sdpa, KV heads repeated beforehand", 8.0, False), row("flash", 4.0, False)]
    found = bench_gpu._compared({"entrants": rows})
    assert found["fastest_dense"] == "flash"
    assert [one["speedup_over_fastest"] for one in found["entrants"]] == [4.0, 0.5, 1.0]
    assert [one["speedup_over_repeated"] for one in found["entrants"]] == [8.0, 1.0, 2.0]
