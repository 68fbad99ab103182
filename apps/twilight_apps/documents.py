"""Real text to read: the documentation that comes with Python, a fact hidden in it, and prompts cut to
length.

Every Python carries its language reference as ``pydoc_data.topics``: plain English, 100,000 tokens, no
download. The fact and the wording of the question were chosen by trying: the embedded model, with its stock
cache, finds the name at 3,500 tokens wherever in the text the document begins. Code words it often does not
find.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FACT = "The captain of the ship Aurora is named Helena Brandt."
QUESTION = "Who is the captain of the ship Aurora?"
EXPECTED = "Helena Brandt"

HINT = "Answer in one sentence."

_SENTENCE_END = re.compile(r"[.!?][\"']?\s+")
_INTRODUCTION = "Read this text and answer the question at its end."


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt: ``document`` ``[1, S]`` can be asked again with another ``question`` ``[1, T]``."""

    document: Tensor
    question: Tensor

    @property
    def ids(self) -> Tensor:
        import torch

        return torch.cat([self.document, self.question], 1)


def document_text(path: Path | None = None) -> str:
    """Return the text of ``path``, or the built-in document.

    Raises:
        FileNotFoundError: no such file, or a Python without ``pydoc_data``.
        ValueError: the file is empty or no text.
    """
    if path is None:
        return _builtin_text()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a UTF-8 text file, got bytes that are not ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{path} must hold text, got an empty file")
    return text


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Tokenize text of any length; ``special`` adds what the tokenizer puts around a text."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, *, repeat: bool = False) -> list[int]:
    """Return the first ``tokens`` token ids of a text; a shorter text is used whole, or again if ``repeat``.

    Raises:
        ValueError: fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"context must be at least 1 token, got {tokens}")
    ids = token_ids(tokenizer, text)
    while repeat and len(ids) < tokens:
        ids = ids + ids
    return ids[:tokens]


def hide_in_sentence_break(text: str, fact: str, depth: float) -> str:
    """Put ``fact`` between the two sentences nearest to the share ``depth`` of a text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    place = min([0, *ends, len(text)], key=lambda at: abs(at - depth * len(text)))
    before, after = text[:place], text[place:]
    gap = "" if not before or before[-1].isspace() else " "
    return f"{before}{gap}{fact} {after}"


def hide(text: str, fact: str, depth: float = 0.5) -> str:
    """Put ``fact`` between the two paragraphs nearest to the share ``depth`` of a text."""
    target = round(len(text) * depth)
    before, after = text.rfind("\n\n", 0, target), text.find("\n\n", target)
    breaks = [place for place in (before, after) if place >= 0]
    place = min(breaks, key=lambda at: abs(at - target)) if breaks else len(text)
    return f"{text[:place]}\n\n{fact}{text[place:] or ''}"


def question_prompt(
    tokenizer: PreTrainedTokenizerBase, document: str, question: str, *, hint: str = HINT, opening: str = ""
) -> Prompt:
    """Build the prompt that asks ``question`` about ``document``, in the model's chat template if it has one.

    Args:
        hint: how to answer, said after the question.
        opening: words that the answer is made to begin with.
    """
    asked = question_suffix(tokenizer, question, hint=hint, opening=opening)
    before, _ = _frame(tokenizer)
    special = not tokenizer.chat_template
    return Prompt(_row(token_ids(tokenizer, f"{before}{document}", special=special)), asked)


def question_suffix(
    tokenizer: PreTrainedTokenizerBase, question: str, *, hint: str = HINT, opening: str = ""
) -> Tensor:
    """Return the ids ``[1, T]`` that follow a document: the question and what makes the model answer."""
    _, after = _frame(tokenizer)
    text = f"\n\nQuestion: {question.strip()} {hint}{after}{opening}"
    return _row(token_ids(tokenizer, text))


def plain_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Take a text as it stands; its last token counts as the question."""
    ids = token_ids(tokenizer, text, special=True)
    if not ids:
        raise ValueError("prompt must hold at least one token, got an empty text")
    return Prompt(_row(ids[:-1]), _row(ids[-1:]))


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before the document and after the question."""
    if not tokenizer.chat_template:
        return f"{_INTRODUCTION}\n\n", "\nAnswer:"
    mark = "<document-and-question>"
    message = [{"role": "user", "content": f"{_INTRODUCTION}\n\n{mark}"}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    before, _, after = str(text).partition(mark)
    return before, after


def _builtin_text() -> str:
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise FileNotFoundError(
            "this Python comes without pydoc_data, the built-in document; name a text file with --document or --text"
        ) from error
    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))


def _row(ids: list[int]) -> Tensor:
    import torch

    return torch.tensor([ids], dtype=torch.long)
