"""Excerpts of real texts, cut at random places that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "pydoc_data.topics"


@dataclass(frozen=True)
class Excerpt:
    """Some consecutive tokens of a text.

    Attributes:
        text: the text's name.
        start: token of the text that it begins with.
        ids: ``[1, S]``.
    """

    text: str
    start: int
    ids: Tensor


def named_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Read texts by the names of their files; no paths are the text that comes with Python.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an empty file, one that is no text, or two files of one name.
    """
    if not paths:
        return {BUILT_IN: documents.document_text()}
    found: dict[str, str] = {}
    for path in paths:
        if path.name in found:
            raise ValueError(f"texts must have different file names, got {path.name!r} twice; rename one")
        found[path.name] = documents.document_text(path)
    return found


def excerpts(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, tokens: int, count: int, seed: int
) -> list[Excerpt]:
    """Cut ``count`` excerpts of ``tokens`` tokens that do not overlap.

    Raises:
        ValueError: a text too short for them, fewer than 2 tokens or fewer than 1 excerpt.
    """
    if tokens < 2 or count < 1:
        raise ValueError(f"context must be at least 2 and excerpts at least 1, got {tokens} and {count}")
    ids = documents.token_ids(tokenizer, text)
    places = len(ids) // tokens
    if places < count:
        raise ValueError(
            f"{name} must hold at least {tokens * count} tokens, got {len(ids)}; give a longer --text, a smaller "
            "--context or fewer --excerpts"
        )
    starts = [place * tokens for place in sorted(random.Random(seed).sample(range(places), count))]
    return [Excerpt(name, start, torch.tensor([ids[start : start + tokens]])) for start in starts]


def one_excerpt(tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], tokens: int, seed: int) -> Excerpt:
    """Cut one excerpt of the only text; errors as ``excerpts``."""
    ((name, text),) = texts.items()
    return excerpts(tokenizer, name, text, tokens, 1, seed)[0]
