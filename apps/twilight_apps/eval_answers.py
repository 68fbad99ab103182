"""Questions about long documents, asked of every method and scored in the same way.

The document is read at once, the question in a second forward, the answer token by token. So even the first token of
an answer is read from packed pages; if document and question went in together, it would come from unrounded keys.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import eval_methods, models, tables
from .documents import Prompt
from .session import message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .eval_methods import Method


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        cell: what identifies it in a record, as length and depth.
        prompt: document and question.
        expected: strings that the answer must hold, each for an equal part of the score.
        max_new_tokens: of the answer.
    """

    cell: dict[str, Any]
    prompt: Prompt
    expected: tuple[str, ...]
    max_new_tokens: int


def score(answer: str, expected: Sequence[str]) -> float:
    """Return the share of the expected strings that the answer holds, whatever their case (RULER's measure)."""
    found = answer.lower()
    return sum(part.lower() in found for part in expected) / len(expected)


def ask_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """Ask every method every question.

    Returns:
        One flat record a question and method: its cell, ``method``, ``score``, ``answer``, ``expected``, and
        ``is_same``, whether the answer is the dense model's. A peer that cannot run has a ``status`` instead.
    """
    records: list[dict[str, Any]] = []
    with tables.progress("Asking", len(tasks) * len(methods)) as bar:
        task_id = bar.task_ids[0]
        for task in tasks:
            dense_answer: str | None = None
            for method in methods:
                cell = ", ".join(f"{name} {value}" for name, value in task.cell.items())
                bar.update(task_id, description=f"{cell}: {method.name}")
                facts = {**task.cell, "method": method.name, "kind": method.kind}
                answer, status = _try(model, tokenizer, method, task)
                facts["status"] = status
                if answer is not None:
                    if method.kind == eval_methods.DENSE:
                        dense_answer = answer
                    facts |= {
                        "score": score(answer, task.expected), "is_same": answer == dense_answer,
                        "tokens": task.prompt.ids.shape[1], "expected": " | ".join(task.expected), "answer": answer,
                    }  # fmt: skip
                records.append(facts)
                bar.advance(task_id)
    return records


class Plan(Protocol):
    """What is asked: a frozen dataclass whose fields are printed with the results."""

    def questions(self, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str]) -> list[Task]:
        """Make the questions about texts by name; the same seed makes the same."""


def run(
    model_name: str,
    dtype: str,
    texts: dict[str, str],
    plan: Plan,
    presets: Sequence[str],
    baselines: Sequence[str],
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Load the model for the longest prompt and ask the dense model, the presets and the baselines every question.

    Returns:
        What ``--json`` prints: ``model``, ``dtype``, ``settings`` by method, ``records`` as of ``ask_all``, ``texts``,
        and the fields of the plan.
    """
    tokenizer = models.load_tokenizer(model_name)
    tasks = plan.questions(tokenizer, texts)
    methods = [
        eval_methods.dense(),
        *eval_methods.presets(presets, changes),
        *eval_methods.baselines(baselines or [eval_methods.NO_BASELINES]),
    ]
    longest = max(task.prompt.ids.shape[1] + task.max_new_tokens for task in tasks)
    model = models.load(model_name, dtype, longest)
    models.use_attention(model, models.OUR_ATTENTION)
    return {
        "model": model_name, "dtype": str(model.dtype).removeprefix("torch."),
        "settings": {method.name: method.settings for method in methods},
        "records": ask_all(model, tokenizer, tasks, methods),
        "texts": list(texts), **vars(plan),
    }  # fmt: skip


def means(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """Average scores of the records that agree in ``keys``; what could not run is left out."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        if "score" in record:
            groups.setdefault(tuple(record[key] for key in keys), []).append(record["score"])
    return {key: sum(values) / len(values) for key, values in groups.items()}


def to_dense(records: Sequence[dict[str, Any]], name: str) -> str:
    """Write a method's mean score less the dense model's, in points, with its standard error over the questions."""
    dense, found = 0.0, []
    for record in records:
        if record["kind"] == eval_methods.DENSE:
            dense = record["score"]  # of the question that the next records answer
        if record["method"] == name and "score" in record:
            found.append(100.0 * (record["score"] - dense))
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return f"{statistics.fmean(found):+.1f} ± {error:.1f}"


def _try(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, task: Task
) -> tuple[str | None, str]:
    """Return an answer and a status; only a peer may fail, and is shown to."""
    if method.missing is not None:
        return None, method.missing
    try:
        return _answer(model, tokenizer, method, task), "ok"
    except Exception as error:  # whatever a peer does must not end the others' measurement, and is shown
        if method.kind != eval_methods.PEER:
            raise
        return None, f"failed: {type(error).__name__}: {message(error)}"


@torch.inference_mode()
def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, task: Task) -> str:
    cache = method.make(model.config)
    document, ids = (x.to(model.device) for x in (task.prompt.document, task.prompt.ids))
    model(input_ids=document, past_key_values=cache, logits_to_keep=1)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
        max_new_tokens=task.max_new_tokens, pad_token_id=pad,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
