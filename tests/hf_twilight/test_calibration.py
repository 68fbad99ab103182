from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_twilight import TwilightCache, TwilightConfig, calibrate
from hf_twilight.config import as_config
from hf_twilight.layer_drift import LayerDrift, layer_shapes

BASE = TwilightConfig(page_size=16, group_size=16, num_sinks=2, window=8, key_bits=2, value_bits=2)


class Bytes:
    """A tokenizer of one token a byte."""

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[3 + byte % 125 for byte in text.encode()]])
        return type("Encoding", (), {"input_ids": ids})


TEXT = " ".join(f"{n} times {n} is {n * n}." for n in range(60))


@pytest.fixture
def run(make_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., Any]:
    def run(model: LlamaForCausalLM | None = None, **changes: Any) -> Any:
        arguments: dict[str, Any] = {"preset": BASE, "ratio": 3.0, "sample_len": 256} | changes
        return calibrate(model or make_llama(), Bytes(), TEXT, **arguments)  # type: ignore[arg-type]

    return run


def test_layer_drift_falls_with_bits_and_is_none_without_rounding(make_llama: Any) -> None:
    ids = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
    heavy = [list(range(8)) for _ in range(2)]
    drift = LayerDrift(make_llama(attn_implementation="sdpa"), ids, BASE, {0: heavy, 1: heavy})
    assert drift.measure(0, 16, 16, 1.0) == 0.0
    coarse, middle, fine = (drift.measure(1, bits, 16, 1.0) for bits in (2, 4, 8))
    assert coarse > 4 * middle > 40 * fine > 0
    assert 0 < drift.measure(1, 2, 16, 1.0, share=0.5) < coarse
    assert drift.measure(1, 2, 16, 1.0, share=0.125) == coarse  # of 16 channels, less than pages take
    assert layer_shapes(drift.model, ids) == {0: (2, 16, 16), 1: (2, 16, 16)}


def test_calibrate_fits_the_budget_it_was_given(run: Any, make_llama: Any) -> None:
    found = run()
    model = make_llama(attn_implementation="twilight", max_position_embeddings=8192)
    cache = TwilightCache(model.config, found.settings, calibrated_for=None)
    keys = torch.randn(1, 2, 8000, 16, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        cache.update(keys, keys, layer)
    used = cache.memory()
    ratio = 2 * 2 * 2 * 8000 * 16 * 2 / (used.total - used.unused - (used.sinks + used.window) / 2)  # of bf16
    assert 3.0 <= ratio < 3.3
    assert found.report["expected_drift"] > 0


def test_calibrate_is_the_same_again_and_leaves_the_model_as_it_was(run: Any, make_llama: Any) -> None:
    model = make_llama()
    before = model.config._attn_implementation
    first = run(model)
    assert model.config._attn_implementation == before
    again = run(model)
    assert (first.settings, first.report) == (again.settings, again.report)
    assert run(model, seed=5).report["inputs"] != first.report["inputs"]


def test_calibrate_goes_on_where_it_stopped(run: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path, on_progress=stop)
    seen: list[tuple[int, int]] = []
    resumed = run(folder=tmp_path, on_progress=lambda *at: seen.append(at))
    assert seen == [(done, 10) for done in range(3, 10)]
    assert resumed.settings == run().settings
    resumed.save_pretrained(tmp_path)
    seen.clear()
    run(folder=tmp_path, ratio=2.5, on_progress=lambda *at: seen.append(at))  # another budget, nothing to measure
    assert not seen
    run(folder=tmp_path, seed=1, on_progress=lambda *at: seen.append(at))  # another text
    assert seen[0] == (0, 10)


def test_calibrated_settings_come_back_and_fit_no_other_model(run: Any, make_llama: Any, tmp_path: Path) -> None:
    found = run()
    found.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "calibration.json").read_text()) == json.loads(json.dumps(found.report))
    settings = as_config(str(tmp_path))
    assert settings == found.settings
    TwilightCache(make_llama().config, settings)
    with pytest.raises(ValueError, match="calibrated for another model: num_hidden_layers 2"):
        TwilightCache(make_llama(num_hidden_layers=3).config, settings)


def test_calibrate_chooses_p_by_the_drift_it_may_add(run: Any) -> None:
    assert run(max_drift=100.0).settings.p == 0.8
    exact = run(max_drift=1e-30)
    assert exact.settings.p == 1.0
    assert list(exact.report["drift_of_p"]) == ["0.8", "0.85", "0.9", "0.95", "0.98", "0.99"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": None}, "ratio must be given unless preset is one of quality, balanced, compact"),
        ({"ratio": None, "preset": "exact"}, "compact, got preset 'exact'"),
        ({"ratio": 40.0}, "ratio must be above 1 and at most .*, 2 bits everywhere, got 40.0"),
        ({"sample_len": 60}, "sample_len must be at least 74 .* got 60 and 1"),
        ({"samples": 100}, "texts must hold 25600 tokens, got"),
    ],
)
def test_calibrate_explains_what_it_cannot_do(run: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(**changes)


def test_calibrate_refuses_a_ratio_before_it_measures(run: Any) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match="ratio must be above 1"):
        run(ratio=9.0, on_progress=lambda *at: seen.append(at))
    assert not seen


def test_calibrate_explains_a_report_that_is_no_json(run: Any, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match=r"calibration\.json must be JSON that calibrate wrote"):
        run(folder=tmp_path)
