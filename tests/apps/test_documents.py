"""Texts, hidden facts and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from twilight_apps import documents


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return found


def test_builtin_text_is_long_and_the_same_each_time() -> None:
    text = documents.document_text()
    assert len(text) > 300_000
    assert documents.document_text() == text


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_hide_stands_between_paragraphs(depth: float) -> None:
    text = "\n\n".join(f"paragraph {index}" for index in range(20))
    hidden = documents.hide(text, "A fact.", depth)
    paragraphs = hidden.split("\n\n")
    paragraphs.remove("A fact.")
    assert "\n\n".join(paragraphs) == text
    assert abs(hidden.index("A fact.") / len(hidden) - depth) < 0.1


def test_hide_takes_text_without_paragraphs() -> None:
    assert documents.hide("one line", "A fact.") == "one line\n\nA fact."


def test_cut_repeats_only_if_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(documents.cut(tokenizer, "abc", 10)) == 3
    assert documents.cut(tokenizer, "abc", 7, repeat=True) == documents.token_ids(tokenizer, "abcabca")
    with pytest.raises(ValueError, match="context must be at least 1"):
        documents.cut(tokenizer, "abc", 0)


def test_question_prompt_is_document_then_question(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = documents.question_prompt(tokenizer, "The text.", "Why?")
    text = tokenizer.decode(prompt.ids[0])
    assert text.index("The text.") < text.index("Why?")
    assert tokenizer.decode(prompt.document[0]).endswith("The text.")
    assert prompt.question.tolist() == documents.question_suffix(tokenizer, "Why?").tolist()


def test_question_prompt_uses_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}[assistant]"
    tokenizer.chat_template = template
    try:
        text = tokenizer.decode(documents.question_prompt(tokenizer, "The text.", "Why?").ids[0])
    finally:
        tokenizer.chat_template = None
    assert text.startswith("[user]")
    assert text.endswith("[end][assistant]")


@pytest.mark.parametrize(("content", "reason"), [(b"\xff\xfe\x00", "UTF-8"), (b"  \n", "empty")])
def test_document_text_refuses_what_is_no_text(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        documents.document_text(path)
