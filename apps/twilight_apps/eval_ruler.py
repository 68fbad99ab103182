"""``hf-twilight eval ruler``: synthetic long-context tasks, every method scored as the dense model is."""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import documents, eval_answers, eval_texts, tables
from .eval_answers import Task
from .ruler_tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 512  # tokens; needles and lists need some room


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Args:
        lengths: tokens of the document, about.
        tasks: names of ``ruler_tasks.TASKS``.
        samples: questions for each task and length.
        seed: of all of it.
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in TASKS:
                near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
                raise ValueError(f"task must be among {', '.join(TASKS)}, got {name!r}; did you mean {near!r}?")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if min(self.lengths) < _SHORTEST:
            raise ValueError(f"context must be at least {_SHORTEST} tokens, got {min(self.lengths)}")

    def questions(self, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str]) -> list[Task]:
        """Make a question for each length, task and sample."""
        found = []
        for length in self.lengths:
            for name in self.tasks:
                for sample in range(self.samples):
                    # a seed of its own for each question, so that tasks or lengths left out change no other
                    numbers = random.Random(f"{self.seed} {length} {name} {sample}")
                    text = list(texts)[sample % len(texts)]
                    found.append(_task(tokenizer, text, texts[text], length, name, sample, numbers))
        return found


def _task(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    content: str,
    length: int,
    name: str,
    sample: int,
    numbers: random.Random,
) -> Task:
    """Make a question whose document has about ``length`` tokens: what is too long loses prose or words."""
    excerpt = eval_texts.excerpts(tokenizer, text, content, length, 1, numbers.randrange(2**31))[0]
    prose = str(tokenizer.decode(excerpt.ids[0]))
    state, room = numbers.getstate(), len(prose)
    while True:
        numbers.setstate(state)
        made = TASKS[name](numbers, room, prose[:room])
        tokens = len(documents.token_ids(tokenizer, made.document))
        if tokens <= length or room < 200:
            break
        room = min(room - 50, round(room * length / tokens))
    prompt = documents.question_prompt(tokenizer, made.document, made.question, hint="", opening=made.opening)
    cell = {"length": length, "task": name, "sample": sample, "text": text}
    return Task(cell, prompt, made.expected, made.max_new_tokens)


def print_results(result: dict[str, Any]) -> None:
    """Print scores, one column a method: by task, by length, their mean, and its difference from the dense model."""
    records = result["records"]
    overall = eval_answers.means(records, ("method",))
    names = [name for (name,) in overall]
    rows = []
    for key, values in (("task", result["tasks"]), ("length", result["lengths"])):
        scores = eval_answers.means(records, ("method", key))
        for value in values:
            label = value if key == "task" else f"all tasks, {value:,} tokens"
            rows.append([label, *(f"{100 * scores[name, value]:.0f}" for name in names)])
    rows.append(["mean", *(f"{100 * overall[(name,)]:.1f}" for name in names)])
    rows.append(["mean, to dense", *(eval_answers.to_dense(records, name) for name in names)])
    same = {name: [r["is_same"] for r in records if r["method"] == name] for name in names}
    rows.append(["same answer as dense", *(f"{sum(same[name]) / len(same[name]):.0%}" for name in names)])
    title = (
        f"{result['model']}, {result['dtype']}: score, per cent; {result['samples']} questions for each task and length"
    )
    tables.print_table(title, ["", *names], rows)
    for name, status in dict.fromkeys((r["method"], r["status"]) for r in records if r["status"] != "ok"):
        tables.say(f"{name}: {status}")
