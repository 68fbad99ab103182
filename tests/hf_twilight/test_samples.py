from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_twilight import TwilightConfig
from hf_twilight.samples import sample_ids, with_facts


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[sum(word.encode()) * len(word) for word in text.split()]])
        return type("Encoding", (), {"input_ids": ids})


@pytest.fixture
def tokenizer() -> Any:
    return Words()


def _find(row: list[int], part: list[int]) -> list[int]:
    return [at for at in range(len(row)) if row[at : at + len(part)] == part]


def test_with_facts_hides_before_the_tail_what_it_says_at_the_end(tokenizer: Any) -> None:
    prose, tail = torch.arange(-2000, 0).view(2, 1000), 200  # no word has such an id
    ids = with_facts(tokenizer, prose, tail, seed=3)
    assert ids.shape == prose.shape
    for row, plain in zip(ids.tolist(), prose.tolist(), strict=True):
        said = [token for token in row if token >= 0]
        facts = [said[at : at + 6] for at in range(0, len(said), 6)]  # "The code for X is N."
        assert len(facts) == 7 + 5
        assert row[-30:] == said[-30:]
        for fact in facts[7:]:
            hidden, again = _find(row, fact)
            assert hidden + 6 <= 1000 - tail
            assert again >= 1000 - 30
        assert [token for token in row if token < 0] == plain[: 1000 - 72]
    assert torch.equal(ids, with_facts(tokenizer, prose, tail, seed=3))
    assert not torch.equal(ids, with_facts(tokenizer, prose, tail, seed=4))


def test_with_facts_leaves_samples_without_room_as_they_are(tokenizer: Any) -> None:
    prose = torch.arange(-100, 0)[None]
    assert torch.equal(with_facts(tokenizer, prose, 30, seed=0), prose)
    assert torch.equal(with_facts(tokenizer, prose, 96, seed=0), prose)


def test_sample_ids_says_how_small_a_sample_may_be(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"hold 4096 tokens, got 2; .* smaller sample_len \(at least 324\)"):
        sample_ids(tokenizer, "two words", 4096, 1, 0, TwilightConfig())
