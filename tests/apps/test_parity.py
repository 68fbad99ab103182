"""Parity passes where it must, and notices a cache that is wrong or fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from hf_twilight.layer import TwilightLayer
from twilight_apps.parity_modes import MODES


def test_parity_exact_is_identical(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli("parity", "--model", tiny_model, "--new-tokens", 5, "--json")
    assert result.exit_code == 0, result.stdout
    found = result.json
    assert found["is_passed"] is True
    assert [row["mode"] for row in found["results"]] == list(MODES)
    assert {row["status"] for row in found["results"]} == {"identical"}
    assert all(row["drift"]["largest"] == 0.0 for row in found["results"])
    assert found["prompt_tokens"]["long"] > 1500


def test_parity_rounding_presets_may_differ(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli("parity", "--model", tiny_model, "--new-tokens", 4, "--preset", "compact", "--json")
    assert result.exit_code == 0, result.stdout
    found = result.json
    assert {row["status"] for row in found["results"]} <= {"identical", "different"}
    assert any(row["drift"]["largest"] > 0 for row in found["results"])
    assert all(row["stats"]["mass"] <= 1.0 + 1e-9 for row in found["results"])


def test_parity_notices_wrong_numbers(
    cli: Callable[..., Any], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TwilightLayer.full

    def wrong(self: TwilightLayer) -> tuple[Tensor, Tensor]:
        keys, values = right(self)
        return keys, -values

    monkeypatch.setattr(TwilightLayer, "full", wrong)
    _only(monkeypatch, "greedy", "chunked prefill")
    result = cli("parity", "--model", tiny_model, "--new-tokens", 5, "--json")
    assert result.exit_code == 1
    found = result.json
    assert found["is_passed"] is False
    assert "different" in {row["status"] for row in found["results"]}


def test_parity_reports_a_mode_that_fails(
    cli: Callable[..., Any], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("hf_twilight.cache.TwilightCache.reorder_cache", failing)
    _only(monkeypatch, "greedy", "3 beams")
    result = cli("parity", "--model", tiny_model, "--new-tokens", 4, "--preset", "exact", "--json")
    assert result.exit_code == 1
    failed = {row["mode"]: row["reason"] for row in result.json["results"] if row["status"] == "failed"}
    assert failed == {"3 beams": "RuntimeError: out of order"}


def _only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr("twilight_apps.parity.MODES", {name: MODES[name] for name in names})
