from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_twilight.engine import SamplingParams
from hf_twilight.engine.sampling import choose, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -torch.inf])


def counts(params: SamplingParams, number: int = 3000) -> torch.Tensor:
    """How often each token is drawn, over positions."""
    found = [choose(LOGITS, params, [0] * at, 0, seed=11).token_id for at in range(number)]
    return torch.bincount(torch.tensor(found), minlength=6)


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 4]),
        ({"top_p": 0.6}, [0, 4]),
        ({"top_p": 1e-6}, [0]),
        ({"min_p": 0.3}, [0, 1, 4]),
        ({"top_k": 3, "top_p": 0.85, "min_p": 0.5}, [0, 4]),
    ],
)
def test_draws_follow_the_distribution_of_the_candidates(changes: dict[str, Any], allowed: list[int]) -> None:
    params = SamplingParams(**({"temperature": 1.0} | changes))
    wanted = torch.zeros(6, dtype=torch.float64)
    wanted[allowed] = (LOGITS[allowed].double() / params.temperature).softmax(0)
    found = counts(params)
    assert found[wanted == 0].sum() == 0
    expected = wanted[allowed] * found.sum()
    chi_square = float(((found[allowed] - expected) ** 2 / expected).sum())
    assert chi_square < 20  # 4 degrees of freedom: p < 0.001


def test_draws_depend_on_seed_and_position_only() -> None:
    assert uniform(3, 7) == uniform(3, 7)
    numbers = {uniform(seed, position) for seed in range(20) for position in range(20)}
    assert len(numbers) == 400 and all(0 <= number < 1 for number in numbers)
    assert uniform(2**64 - 1, 5) != uniform(0, 5)


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    tokens = [0, 3, 0]
    logits = LOGITS[:5]
    wanted = RepetitionPenaltyLogitsProcessor(1.9)(torch.tensor([tokens]), logits[None].clone())[0]
    assert choose(logits, SamplingParams(repetition_penalty=1.9), tokens, 1, 0).token_id == int(wanted.argmax())
    assert int(wanted.argmax()) == 4


def test_logprobs_are_taken_before_anything_changes_the_logits() -> None:
    params = SamplingParams(temperature=2.0, top_k=1, repetition_penalty=3.0, logprobs=2)
    choice = choose(LOGITS, params, [0, 0], 0, 0)
    assert choice.token_id == 4
    assert choice.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[4]))
    assert [token for token, _ in choice.top_logprobs] == [0, 4]


def test_logits_that_allow_nothing_are_an_error() -> None:
    for value in (-torch.inf, torch.nan):
        with pytest.raises(ValueError, match="no token is allowed"):
            choose(torch.full((6,), value), SamplingParams(temperature=1.0), [0], 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"temperature": -0.1}, "temperature must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must be a whole number, 0 for all"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\)"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"stop": ("",)}, "stop must be texts that are not empty"),
        ({"seed": -1}, "seed must be in"),
        ({"logprobs": 21}, r"logprobs must be in \[0, 20\]"),
    ],
)
def test_params_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


def test_one_stop_text_may_stand_alone() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
