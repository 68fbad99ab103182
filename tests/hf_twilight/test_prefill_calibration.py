from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_twilight import TwilightConfig, calibrate_prefill
from hf_twilight.prefill_calibration import ALPHAS

SETTINGS = TwilightConfig(
    page_size=16, group_size=16, window=32, prefill_window=32, min_prefill_len=512, dense_layers=()
)


class Bytes:
    """A tokenizer of one token a byte."""

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[3 + byte % 125 for byte in text.encode()]])
        return type("Encoding", (), {"input_ids": ids})


TEXT = " ".join(f"{n} times {n} is {n * n}." for n in range(120))


@pytest.fixture
def run(make_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., Any]:
    model = make_llama(max_position_embeddings=1024)

    def run(settings: TwilightConfig = SETTINGS, **changes: Any) -> Any:
        arguments: dict[str, Any] = {"sample_len": 768, "samples": 1} | changes
        return calibrate_prefill(model, Bytes(), TEXT, settings, **arguments)  # type: ignore[arg-type]

    return run


def test_takes_the_smallest_alpha_that_keeps_the_score(run: Any) -> None:
    settings, facts = run(kept_score=0.5)
    assert settings.alpha == ALPHAS[0]
    assert list(facts["tried"]) == [str(ALPHAS[0])]
    assert 0.0 < facts["tried"][str(ALPHAS[0])]["density"] < 1.0, "something was left out"


def test_stays_dense_where_no_alpha_keeps_the_score(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_twilight.prefill_calibration.ALPHAS", (0.2, 0.3))
    settings, facts = run(kept_score=1.0)
    scores = [tried["score"] for tried in facts["tried"].values()]
    assert settings.alpha == (0.2 if scores[0] >= 1.0 else 0.3 if scores[-1] >= 1.0 else 1.0)
    kls = [tried["kl"] for tried in facts["tried"].values()]
    assert min(kls) > 0, "sparse prefill was really measured"


def test_tells_how_far_it_is(run: Any) -> None:
    seen: list[tuple[int, int]] = []
    run(kept_score=0.5, samples=2, on_progress=lambda *at: seen.append(at))
    assert seen == [(n, 2 * (1 + len(ALPHAS))) for n in range(4)], "two dense forwards, two at the first alpha"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_score": 0.0}, "kept_score must be in"),
        ({"sample_len": 512}, "sample_len must be above min_prefill_len = 512"),
        ({"samples": 9}, "texts must hold"),
    ],
)
def test_says_what_cannot_be(run: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**changes)
