"""Questions: tasks that can be answered from their document, scores, and one harness for every method."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twilight_apps import documents, eval_answers, eval_needle, eval_ruler, models
from twilight_apps.ruler_tasks import TASKS, Sample

PROSE = "It was a dark night. The sea was calm! Nobody spoke of it again. " * 60


def _sample(name: str, seed: int = 1) -> Sample:
    return TASKS[name](random.Random(seed), len(PROSE), PROSE)


@pytest.mark.parametrize("name", [name for name in TASKS if "words" not in name])
def test_hidden_facts_are_all_in_the_document_and_prose_is_whole(name: str) -> None:
    sample = _sample(name)
    assert all(part in sample.document for part in sample.expected)
    rest = re.sub(r"One of the special magic numbers for \w+ is: \d+\. |VAR X\d+ = (VAR X)?\d+\. ", "", sample.document)
    assert rest.split() == PROSE.split()
    assert sample == _sample(name)
    assert sample != _sample(name, seed=2)


def test_needles_ask_for_exactly_the_named_keys() -> None:
    for name, count in (("single needle", 1), ("multi-key", 1), ("multi-value", 4), ("multi-query", 2)):
        sample = _sample(name)
        facts = re.findall(r"magic numbers for (\w+) is: (\d+)", sample.document)
        asked = re.findall(r"\w+", sample.question.partition(" for ")[2].partition(" mentioned")[0])
        assert sorted(sample.expected) == sorted(value for key, value in facts if key in asked)
        assert len(sample.expected) == count
        assert len(facts) == (1 if name == "single needle" else 4)


def test_variable_tracking_follows_the_chain() -> None:
    sample = _sample("variable tracking")
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.document):
        values[name] = values.get(source, source)  # a chain is in order, or its source would be unknown
    asked = re.search(r"\d{7}", sample.question)
    assert asked
    assert sorted(sample.expected) == sorted(name for name, value in values.items() if value == asked[0])


@pytest.mark.parametrize(("name", "pattern", "count"), [
    ("common words", r"\d+\. (\w+)", 5), ("frequent words", r"(?<=[a-z]) ([a-z]{6})\b", 3),
])  # fmt: skip
def test_word_tasks_ask_for_the_most_frequent_words(name: str, pattern: str, count: int) -> None:
    for room in (600, 8000, 30_000):
        sample = TASKS[name](random.Random(0), room, "")
        body = sample.document.partition(". ")[2]
        ranked = Counter(re.findall(pattern, f"x {body}")).most_common()
        assert {word for word, _ in ranked[:count]} == set(sample.expected)
        assert ranked[count - 1][1] > ranked[count][1]
        assert 0.6 * room < len(sample.document) < max(1.3 * room, 1200)


def test_score_is_the_share_of_expected_strings() -> None:
    assert eval_answers.score("X12 and x35.", ("X12", "X35", "X99")) == pytest.approx(2 / 3)
    assert eval_answers.score("", ("1",)) == 0.0


def test_to_dense_compares_question_by_question() -> None:
    """Both lose a half of the questions; only of one method are they the dense model's."""
    scores = {"dense": (1.0, 0.0, 1.0, 0.0), "same": (1.0, 0.0, 1.0, 0.0), "other": (0.0, 1.0, 1.0, 0.0)}
    records = [
        {"method": name, "kind": "dense" if name == "dense" else "preset", "score": own[question]}
        for question in range(4)
        for name, own in scores.items()
    ]
    records.append({"method": "same", "kind": "preset", "status": "failed"})
    assert eval_answers.to_dense(records, "same") == "+0.0 ± 0.0"
    assert eval_answers.to_dense(records, "other") == "+0.0 ± 40.8"


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_needle_is_hidden_between_sentences_at_its_depth(depth: float) -> None:
    text = documents.hide_in_sentence_break(PROSE, "THE FACT.", depth)
    place = text.index("THE FACT.") / len(PROSE)
    assert abs(place - depth) < 0.02
    assert text.replace("THE FACT. ", "").split() == PROSE.split()


def test_ruler_documents_have_the_length_asked_for(tiny_model: str) -> None:
    tokenizer = models.load_tokenizer(tiny_model)
    plan = eval_ruler.Plan((1200,), tuple(TASKS), 1)
    tasks = plan.questions(tokenizer, {"prose": PROSE * 10})
    for task in tasks:
        assert 900 < task.prompt.document.shape[1] < 1300, task.cell
    # a question does not depend on which others are asked
    alone = eval_ruler.Plan((1200,), ("multi-key",), 1).questions(tokenizer, {"prose": PROSE * 10})
    same = next(task for task in tasks if task.cell["task"] == "multi-key")
    assert alone[0].expected == same.expected
    assert alone[0].prompt.ids.equal(same.prompt.ids)


def test_needles_lie_where_they_are_said_to(tiny_model: str) -> None:
    tokenizer = models.load_tokenizer(tiny_model)
    tasks = eval_needle.Plan((800, 1600), (0.0, 0.5, 1.0), 1).questions(tokenizer, {"prose": PROSE * 10})
    assert len({task.expected for task in tasks}) == 6
    for task in tasks:
        text = str(tokenizer.decode(task.prompt.document[0]))
        assert abs(text.index(task.expected[0]) / len(text) - task.cell["depth"]) < 0.15
        assert abs(task.prompt.document.shape[1] - task.cell["length"]) < 80


@pytest.mark.parametrize("command", ["needle", "ruler"])
def test_lossless_methods_answer_as_the_dense_model(
    cli: Callable[..., Any], tiny_model: str, tmp_path: Path, command: str
) -> None:
    pytest.importorskip("matplotlib")
    extra = ["--depth", 0.5] if command == "needle" else ["--task", "multi-key", "--samples", 1]
    result = cli(
        "eval", command, "--small", "--model", tiny_model, "--context", 600, *extra, "--preset", "exact",
        "--preset", "compact", "--baseline", "fp8", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = {r["method"]: r for r in result.json["records"]}
    assert list(found) == ["dense", "exact", "compact", "fp8"]
    assert found["dense"]["is_same"]
    assert found["exact"]["answer"] == found["dense"]["answer"]
    assert not found["compact"]["is_same"]  # 2-bit pages under random weights: the answer is read from them
    assert all(r["tokens"] == found["dense"]["tokens"] for r in found.values() if "tokens" in r)
    assert (tmp_path / f"{command}.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["needle", "--depth", "1.5"], "depth must be between 0 (beginning) and 1 (end), got 1.5"),
        (["needle", "--context", "5"], "context must hold the needle and some text, got 5 tokens"),
        (["ruler", "--task", "multikey"], "did you mean 'multi-key'"),
        (["ruler", "--context", "100"], "context must be at least 512 tokens, got 100"),
        (["ruler", "--samples", "0"], "samples must be at least 1, got 0"),
    ],
    ids=" ".join,
)
def test_errors_say_what_is_allowed(
    cli: Callable[..., Any], tiny_model: str, arguments: list[str], expected: str
) -> None:
    result = cli("eval", *arguments, "--small", "--model", tiny_model)
    assert result.exit_code == 2
    assert expected in result.stderr
