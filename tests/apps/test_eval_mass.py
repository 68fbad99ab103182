"""Attention mass and budgets: what unrounded keys promise is kept, and counts agree with the cache's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hf_twilight import TwilightCache
from hf_twilight.recording import Record
from twilight_apps.eval_mass import weigh


def _record(tokens: int, steps: int) -> Record:
    generator = torch.Generator().manual_seed(0)
    keys = 3.0 * torch.randn(1, 2, tokens, 16, generator=generator)
    values = torch.randn(1, 2, tokens, 16, generator=generator)
    return Record(torch.randn(1, 4, steps, 16, generator=generator), keys, values, 0.25)


def _cache(**changes: Any) -> TwilightCache:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return TwilightCache(config, page_size=16, window=16, min_keep=0, min_sparse_len=0, dense_layers=(), **changes)


@pytest.mark.parametrize("p", [0.8, 0.95])
def test_unrounded_keys_deliver_what_is_asked(p: float) -> None:
    found = weigh(_cache(key_bits=16, value_bits=16, key_clip=1.0, p=p), 1, _record(200, 40), 40)
    assert found.mass.shape == found.kept.shape == (40, 4)
    assert found.mass.min() >= p - 1e-6
    assert found.mass.max() <= 1.0 + 1e-9
    # the claim is of the packed tokens and the plain ones alike, by the same keys: it is the truth
    assert torch.allclose(found.claimed, found.mass, atol=1e-4)
    assert 0 < found.kept.mean() < 184


def test_rounded_keys_fall_short_of_their_claim_somewhere() -> None:
    found = weigh(_cache(key_bits=2, value_bits=2, p=0.8), 1, _record(200, 40), 40)
    assert found.mass.min() < 0.8
    assert (found.claimed - found.mass).abs().max() > 1e-3


def test_eval_mass_reports_asked_and_achieved(cli: Callable[..., Any], tiny_model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = cli(
        "eval", "mass", "--small", "--model", tiny_model, "--context", 400, "--steps", 3, "--preset", "compact",
        "--set", "min_sparse_len=0", "--set", "dense_layers=[0]", "--p", 0.9, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    exact, compact = result.json["records"]
    assert (exact["setting"], exact["p"], exact["share_reached"]) == ("exact keys", 0.9, 1.0)
    assert exact["least"] >= 0.9 - 1e-6
    assert exact["heads_and_steps"] == 1 * 4 * 3
    assert compact["least"] < exact["least"]
    assert {layer["layer"] for layer in result.json["layers"]} == {1}
    assert (tmp_path / "mass.png").is_file()


@pytest.mark.parametrize("selector", ["streaming", "snapkv", "tactic"])
def test_eval_mass_weighs_what_selectors_leave_out(cli: Callable[..., Any], tiny_model: str, selector: str) -> None:
    budget = ["--set", "p=0.9"] if selector == "tactic" else ["--set", "budget=0.25"]
    result = cli(
        "eval", "mass", "--small", "--model", tiny_model, "--context", 700, "--steps", 2, "--preset", "exact",
        "--set", f"selector={selector}", *budget, "--set", "min_sparse_len=0", "--p", 0.9, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = {r["setting"]: r for r in result.json["records"]}["exact"]
    assert found["least"] < 0.9  # mass beyond the candidates is lost, and seen to be
    assert (found["claimed_median"] is None) == (selector != "tactic")


def test_eval_budget_counts_what_the_cache_counts(cli: Callable[..., Any], tiny_model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = cli(
        "eval", "budget", "--small", "--model", tiny_model, "--context", 400, "--context", 300, "--steps", 3,
        "--preset", "compact", "--set", "min_sparse_len=250", "--set", "dense_layers=[0]", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    short, long = result.json["records"]
    assert (short["context"], short["is_sparse"]) == (300, False)
    assert short["kept_mean"] == short["packed_tokens"]
    assert (long["context"], long["is_sparse"]) == (400, True)
    assert long["needed_mean"] <= long["kept_mean"] < long["packed_tokens"]
    assert len(result.json["layers"]) == 4
    assert (tmp_path / "budget.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mass", "--p", "1"], "p must be between 0 and 1, got 1.0"),
        (["mass", "--steps", "0"], "steps must be at least 1, got 0"),
        (["mass", "--context", "8"], "context must exceed steps, got 8 and 8"),
        (["budget", "--set", "p=1"], "must leave at least one layer sparse"),
        (["budget", "--context", "0"], "context must be at least 1 token, got 0"),
    ],
    ids=" ".join,
)
def test_errors_say_what_is_allowed(
    cli: Callable[..., Any], tiny_model: str, arguments: list[str], expected: str
) -> None:
    result = cli("eval", *arguments, "--small", "--model", tiny_model)
    assert result.exit_code == 2
    assert expected in result.stderr
