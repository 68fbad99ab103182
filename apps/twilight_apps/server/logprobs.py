"""Logprobs in OpenAI's two shapes: of chat completions, and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_twilight.engine import Token

from .grammar import Vocabulary


def chat_logprobs(tokens: Sequence[Token], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return ``choices[].logprobs`` of a chat completion."""
    content = []
    for token in _real(tokens):
        others = [_entry(other, value, vocabulary) for other, value in token.top_logprobs]
        content.append({**_entry(token.token_id, token.logprob, vocabulary), "top_logprobs": others})
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Token], offset: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return ``choices[].logprobs`` of a completion.

    Args:
        tokens: whose logprobs.
        offset: characters of the answer before them.
        vocabulary: for the tokens' texts.
    """
    offsets = []
    tokens = _real(tokens)
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [_text(token.token_id, vocabulary) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {_text(other, vocabulary): value for other, value in [*token.top_logprobs, (token.token_id, token.logprob)]}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def _real(tokens: Sequence[Token]) -> list[Token]:
    """Leave out text that was held back and has no token of its own."""
    return [token for token in tokens if token.token_id >= 0]


def _entry(token_id: int, logprob: float | None, vocabulary: Vocabulary) -> dict[str, Any]:
    raw = vocabulary.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def _text(token_id: int, vocabulary: Vocabulary) -> str:
    return vocabulary.token_bytes(token_id).decode("utf-8", "replace")
