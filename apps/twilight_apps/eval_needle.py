"""``hf-twilight eval needle``: a pass key hidden in prose, at every depth and length, found or not."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import documents, eval_answers, eval_texts, tables
from .eval_answers import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# chosen by trying: the embedded model finds this one at any depth of 2,000 tokens, "The pass key is ..." hardly ever
_FACT = "The special magic number for Helena is: {key}."
_QUESTION = "What is the special magic number for Helena mentioned in the text?"
_OPENING = "The special magic number for Helena mentioned in the text is"
_MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Plan:
    """The grid.

    Args:
        lengths: tokens of the document, the needle included.
        depths: where in the document the needle is, 0 its beginning and 1 its end.
        trials: needles, each in another excerpt, for each length and depth.
        seed: of pass keys and excerpts.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int = 0

    def __post_init__(self) -> None:
        for depth in self.depths:
            if not 0.0 <= depth <= 1.0:
                raise ValueError(f"depth must be between 0 (beginning) and 1 (end), got {depth}")
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")

    def questions(self, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str]) -> list[Task]:
        """Hide a pass key in an excerpt for each cell of the grid, and ask for it."""
        numbers = random.Random(self.seed)
        found = []
        for length in self.lengths:
            for depth in self.depths:
                for trial in range(self.trials):
                    name = list(texts)[trial % len(texts)]
                    key = str(numbers.randrange(10_000, 100_000))
                    fact = _FACT.format(key=key)
                    room = length - len(documents.token_ids(tokenizer, fact))
                    if room < 1:
                        raise ValueError(f"context must hold the needle and some text, got {length} tokens")
                    excerpt = eval_texts.excerpts(tokenizer, name, texts[name], room, 1, numbers.randrange(2**31))[0]
                    hay = str(tokenizer.decode(excerpt.ids[0]))
                    prompt = documents.question_prompt(
                        tokenizer,
                        documents.hide_in_sentence_break(hay, fact, depth),
                        _QUESTION,
                        hint="",
                        opening=_OPENING,
                    )
                    cell = {"length": length, "depth": depth, "trial": trial, "text": name}
                    found.append(Task(cell, prompt, (key,), _MAX_NEW_TOKENS))
        return found


def print_results(result: dict[str, Any]) -> None:
    """Print the share found by length, all depths together, with the difference from the dense model."""
    by_length = eval_answers.means(result["records"], ("method", "length"))
    overall = eval_answers.means(result["records"], ("method",))
    rows = []
    for name in dict.fromkeys(r["method"] for r in result["records"]):
        own = [r for r in result["records"] if r["method"] == name]
        if (name,) not in overall:
            rows.append([name, own[0]["status"], *[""] * (len(result["lengths"]) + 2)])
            continue
        same = sum(r.get("is_same", False) for r in own) / len(own)
        cells = [f"{100 * by_length[name, length]:.0f}" for length in result["lengths"]]
        mean = overall[(name,)]
        rows.append([name, *cells, f"{100 * mean:.1f}", eval_answers.to_dense(result["records"], name), f"{same:.0%}"])
    count = len(result["depths"]) * result["trials"]
    columns = ["method", *(f"{n:,} tokens" for n in result["lengths"]), "mean", "to dense", "same answer"]
    title = f"{result['model']}, {result['dtype']}: needles found, per cent of {count} at each length"
    tables.print_table(title, columns, rows)
