"""Drift from the command line: records that hold together, bytes that are real, errors before anything is loaded."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hf_twilight import TwilightCache, TwilightConfig
from twilight_apps import eval_bytes, eval_methods, eval_output, eval_plots
from twilight_cache import SELECTORS

SHORT = ["--context", 1300, "--positions", 4, "--preset", "compact", "--baseline", "fp8", "--baseline", "top-p 0.95"]


def test_eval_pareto_records_are_those_of_the_definition(
    cli: Callable[..., Any], tiny_model: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    result = cli("eval", "pareto", "--small", "--model", tiny_model, *SHORT, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    found = {(r["method"], r["mode"]): r for r in result.json["records"]}
    # a policy differs from the stock cache in decode only
    assert set(found) == {
        (method, mode) for method in ("dense", "compact", "fp8") for mode in ("packing", "decode")
    } | {("top-p 0.95", "decode")}
    dense = found["dense", "packing"]
    assert abs(dense["kl"]) < 1e-9
    assert dense["positions"] == 1300
    assert dense["stored_bytes"] == 2 * 2 * 2 * 16 * 1300 * 2  # K and V, layers, heads, head dim, tokens, bf16
    if transformers.__version__ >= "5.21":  # has the backend
        assert found["fp8", "packing"]["smaller"] == pytest.approx(2.0, rel=1e-2)
    else:
        assert found["fp8", "packing"]["status"].startswith("failed")
    assert found["compact", "packing"]["kl"] > 1e-3
    assert found["compact", "packing"]["smaller"] > 2.5
    pruned = found["top-p 0.95", "decode"]
    assert pruned["kept_tokens"] is None or 0 <= pruned["kept_tokens"] < 1300
    assert found["compact", "decode"]["positions"] == 4
    written = json.loads((tmp_path / "pareto.json").read_text())
    assert written["records"] == result.json["records"]
    assert written["environment"]["versions"]["torch"]
    rows = list(csv.DictReader((tmp_path / "pareto.csv").open()))
    assert len(rows) == len(written["records"])
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pareto.csv", "pareto.json", "pareto.png"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--baseline", "hqq 4bit"], "did you mean 'hqq 4-bit'"),
        (["--preset", "balancd"], "did you mean 'balanced'"),
        (["--chunk", "0"], "chunk must be at least 1, got 0"),
        (["--chunk", "65", "--preset", "balanced"], "chunk must be at most the window of balanced, 64 tokens"),
        (["--mode", "prefill"], "mode must be packing or decode, got 'prefill'"),
        (["--positions", "0"], "positions must be from 1 to"),
        (["--text", "no-such.txt"], "no-such.txt"),
        (["--context", "100000000"], "must hold at least 100000001 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_errors_are_one_line(
    cli: Callable[..., Any], tiny_model: str, arguments: list[str], expected: str
) -> None:
    result = cli("eval", "kl", "--small", "--model", tiny_model, *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_peer_that_is_not_installed_is_reported(
    cli: Callable[..., Any], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_methods, "_PACKAGES", {"hqq": "no-such-distribution"})
    result = cli(
        "eval", "ppl", "--small", "--model", tiny_model, "--context", 200, "--positions", 2, "--mode", "packing",
        "--preset", "compact", "--baseline", "hqq 2-bit", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (record,) = [r for r in result.json["records"] if r["method"] == "hqq 2-bit"]
    assert record["status"] == 'not installed: pip install "hf-twilight[peers]"'
    assert "not installed" in result.stdout


def test_every_selector_is_a_baseline_alone_and_pruned() -> None:
    names = [method.name for method in eval_methods.baselines([])]
    for selector in SELECTORS:
        if selector != "full":
            assert f"{selector} 1/4" in names
            assert f"{selector} 1/4 + top-p 0.95" in names
    assert eval_methods.baselines(["none"]) == []


def test_presets_may_be_folders(tmp_path: Path) -> None:
    TwilightConfig.preset("compact", p=0.9).save_pretrained(tmp_path / "mine")
    (found,) = eval_methods.presets([str(tmp_path / "mine")])
    assert (found.name, found.settings["p"]) == ("mine", 0.9)
    with pytest.raises(ValueError, match="different names, got 'mine' twice"):
        eval_methods.presets([str(tmp_path / "mine"), str(tmp_path / "mine")])


@pytest.mark.parametrize("preset", ["exact", "compact"])
def test_stored_bytes_of_a_float32_model_are_those_of_a_bfloat16_one(preset: str) -> None:
    counts = {}
    for dtype in (torch.float32, torch.bfloat16):
        config = LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, dtype=dtype
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="twilight")
        for cache in (TwilightCache(model.config, preset), DynamicCache(config=model.config)):
            with torch.inference_mode():
                model(input_ids=torch.zeros(1, 300, dtype=torch.long), past_key_values=cache)
            counts[type(cache), dtype] = eval_bytes.stored_bytes(cache, dtype)
            if dtype == torch.bfloat16 and isinstance(cache, TwilightCache):
                assert counts[type(cache), dtype] == cache.nbytes
    for kind in (TwilightCache, DynamicCache):
        assert counts[kind, torch.float32] == counts[kind, torch.bfloat16]
    assert counts[DynamicCache, torch.bfloat16] == 2 * 2 * 300 * 32 * 2


def test_an_interrupted_file_is_not_there(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "kl.png").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        eval_output.write(tmp_path, "kl", {}, [{"a": 1}], interrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl.csv", "kl.json", "kl.png"]
    assert (tmp_path / "kl.png").read_bytes() == b"before"


def test_pareto_names_the_smallest_cache_within_each_limit() -> None:
    shown = [("a", 0.001, 2.7), ("b", 0.004, 3.2), ("c", 0.005, 3.1), ("d", 0.05, 4.4)]
    records = [{"method": name, "kl": kl, "smaller": smaller} for name, kl, smaller in shown]
    advice = "smallest with KL at most 0.005: b 3.2x;  at most 0.015: b 3.2x;  at most 0.06: d 4.4x"
    assert eval_plots._advice(records) == advice
    assert eval_plots._advice(records[3:]).count("none") == 2
