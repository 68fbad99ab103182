"""Benchmarks: inputs are what they claim, wrong kernels are not timed, and JSON has what a card cites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_apps import bench_prefill, concentration, synthetic, timing
from twilight_cache import LayerStore

DECODE = ["bench", "decode", "--shape", "4,2,16", "--context", 1300, "--rounds", 2, "--json"]


def test_attention_inputs_have_exactly_the_target_logits() -> None:
    inputs = synthetic.attention_inputs(8, 2, 32, 700, seed=1)
    keys = inputs.keys.double().repeat_interleave(4, 1)[0]  # [H, S, D]
    found = torch.einsum("hd,hsd->hs", inputs.query[0].double(), keys) * inputs.scaling
    assert (found - inputs.logits.double()).abs().max() < 1e-4
    ranked = inputs.logits.sort(-1, descending=True).values
    log_rank = torch.arange(1, 701).log()
    slope = (ranked[:, 0] - ranked[:, -1]) / log_rank[-1]
    assert torch.allclose(ranked, ranked[:, :1] - slope[:, None] * log_rank, atol=1e-4)


@pytest.mark.parametrize("share", [share for share in concentration.NEEDED_SHARES if share > 0.001])
def test_power_law_exponent_needs_the_measured_share(share: float) -> None:
    gamma = synthetic.power_law_exponent(share)
    mass = (-gamma * torch.arange(1, concentration.CONTEXT + 1, dtype=torch.float64).log()).softmax(0).cumsum(0)
    needed = int((mass < 0.95).sum()) + 1
    assert abs(needed - share * concentration.CONTEXT) <= 1


def test_bench_decode_reports_what_a_card_cites(cli: Callable[..., Any]) -> None:
    result = cli(*DECODE)
    assert result.exit_code == 0, result.stderr
    (found,) = result.json["results"]
    names = [row["name"] for row in found["entrants"]]
    assert names[0] == "sdpa float32"
    assert names[1].startswith("float32 matmuls")
    assert names[3:] == ["compact, p = 0.95", "compact, p = 0.95, quest", "compact, p = 1, dense"]
    for row in found["entrants"]:
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["gb_per_s"] > 0
        if row["check"]:
            assert row["check"]["error"] <= row["check"]["tolerance"]
            assert 0 < row["check"]["mass"] <= 1.0 + 1e-9
    dense = found["entrants"][5]["check"]
    assert dense["mass"] == pytest.approx(1.0)
    assert dense["kept"] == dense["scored"] == found["packed_pages"] * 64


def test_bench_decode_refuses_to_time_a_wrong_kernel(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = LayerStore.attend

    def wrong(self: LayerStore, *args: Any) -> Tensor:
        return right(self, *args) * (1 + 1e-3)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a wrong kernel was timed")

    monkeypatch.setattr(LayerStore, "attend", wrong)
    monkeypatch.setattr(timing, "interleave", never)
    result = cli(*DECODE)
    assert result.exit_code == 2
    assert "must agree with its definition to be timed" in result.stderr


def test_bench_generate_reports_what_a_card_cites(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli(
        "bench", "generate", "--model", tiny_model, "--context", 500, "--new-tokens", 3, "--dtype", "float32",
        "--preset", "exact", "--preset", "compact", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (found,) = result.json["results"]
    rows = {row["name"]: row for row in found["entrants"]}
    assert list(rows) == ["stock", "exact", "compact", "stock, 16 tokens"]
    assert rows["exact"]["agreement"] == 1.0
    assert rows["stock"]["bf16_bytes_over_kv_bytes"] == 0.5
    assert rows["compact"]["kv_bytes"] < rows["stock"]["kv_bytes"]
    assert all(row["ms_per_token"]["runs"] == 3 for row in rows.values())
    assert found["rope_extended_with_yarn"] is False


def test_bench_generate_extends_rope_beyond_the_trained_context(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli(
        "bench", "generate", "--model", tiny_model, "--context", 4200, "--new-tokens", 2, "--preset", "exact", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert result.json["results"][0]["rope_extended_with_yarn"] is True
    assert "YaRN" in result.stdout


PREFILL = ["bench", "prefill", "--dtype", "float32", "--layer", 1, "--rounds", 1, "--set", "min_prefill_len=512"]


def test_bench_prefill_reports_what_a_card_cites(cli: Callable[..., Any], tiny_model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    contexts = ["--context", 400, "--context", 900]
    done = cli(*PREFILL, "--model", tiny_model, *contexts, "--set", "dense_layers=[]", "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    short, long = done.json["results"]
    assert (short["sparse_layers"], short["density"]) == (0, 1.0)
    assert long["sparse_layers"] == 2
    assert 0.0 < long["density"] < 1.0
    assert set(long["ttft_ms"]) == set(long["peak_bytes"]) == {"stock", "twilight"}
    (layer,) = long["layers"]
    assert layer["layer"] == 1
    assert layer["error"] < 0.5
    assert {path.name for path in tmp_path.iterdir()} == {f"bench-prefill.{end}" for end in ("json", "csv", "png")}


def test_bench_prefill_refuses_to_time_a_wrong_kernel(
    cli: Callable[..., Any], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = bench_prefill.attend_stripes
    monkeypatch.setattr(bench_prefill, "attend_stripes", lambda *args, **settings: attend(*args, **settings) * 1.01)
    done = cli(*PREFILL, "--model", tiny_model, "--context", 600)
    assert done.exit_code != 0
    assert "must agree with its definition to be timed" in done.stderr


def test_bench_prefill_has_nothing_to_draw_of_layers(cli: Callable[..., Any], tiny_model: str, tmp_path: Path) -> None:
    done = cli("bench", "prefill", "--model", tiny_model, "--rounds", 0, "--out", tmp_path)
    assert done.exit_code != 0
    assert "rounds must be at least 1" in done.stderr


def test_interleave_runs_everyone_once_a_round_in_turning_order() -> None:
    order: list[str] = []
    entrants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.interleave(entrants, 3, warmup=1)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_summary_is_median_and_percentiles() -> None:
    assert timing.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "p20": 1.8, "p80": 4.2, "runs": 5}
