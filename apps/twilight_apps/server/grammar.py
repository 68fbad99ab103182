"""Constrain an answer to a grammar: JSON, a JSON schema, or tool calls (through ``llguidance``)."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from .errors import ApiError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# at most so much white space between two tokens of JSON: small models else write it without end
_JSON_STYLE = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{1,32}", "lenient": False}}
# a mask bit per token, packed into words of so many bits
_WORD_BITS = 32


class Vocabulary:
    """A tokenizer's tokens as bytes: what a grammar needs, and what logprobs show.

    Args:
        tokenizer: a fast tokenizer.
        num_tokens: rows of the model's output, which may be more than the tokenizer has tokens.
        end_tokens: ids that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._end_tokens = list(end_tokens)
        self._lock = threading.Lock()

    @cached_property
    def _backend(self) -> LLTokenizer:
        # half a second for 50,000 tokens: built when the first request needs it
        tokenizer: Any = self._tokenizer
        try:
            return from_tokenizer(tokenizer, n_vocab=self._num_tokens, eos_token=self._end_tokens or None)
        except ValueError as error:
            raise ApiError(
                400, f"this model's tokenizer cannot serve grammars, tools or logprobs: {error}", code="no_grammar"
            ) from error  # fmt: skip

    def prepare(self) -> None:
        """Build what the first request needs, here and now.

        Raises:
            ApiError: 400, a tokenizer that llguidance does not take.
        """
        with self._lock:
            _ = self._backend

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes, which need not be whole characters; an end token's are its name."""
        with self._lock:
            found = bytes(self._backend.decode_bytes([token_id]))
        if found.startswith(b"\xff"):  # llguidance's mark of a special token
            return str(self._tokenizer.convert_ids_to_tokens(token_id) or "").encode()
        return found

    def is_single_token(self, text: str) -> bool:
        """Whether a text is one special token."""
        with self._lock:
            return len(self._backend.tokenize_str(text, parse_special=True)) == 1

    def json_grammar(self, schema: dict[str, Any] | bool) -> Grammar:
        """Compile a JSON schema.

        Raises:
            ApiError: 400, the schema is not valid, cannot be satisfied, or uses keywords that are not supported.
        """
        return self.compile(LLMatcher.grammar_from_json_schema(schema_text(schema)), "response_format")

    def compile(self, text: str, param: str) -> Grammar:
        """Compile a grammar that ``LLMatcher.grammar_from_*`` wrote.

        Args:
            text: the grammar.
            param: the request's field that it comes from, for the error.
        Raises:
            ApiError: 400, with llguidance's reason.
        """
        with self._lock:
            matcher = LLMatcher(self._backend, text, log_level=0)
        warnings = matcher.get_grammar_warnings()
        if matcher.is_error() or warnings:
            reason = (matcher.get_error() or "; ".join(warnings)).strip().splitlines()[0]
            raise ApiError(400, f"the JSON schema cannot be used: {reason[:500]}", param=param, code="invalid_schema")
        return Grammar(matcher, self._num_tokens)


def schema_text(schema: dict[str, Any] | bool) -> str:
    """Write a JSON schema for llguidance, with the white space that this server allows."""
    return json.dumps({**schema, **_JSON_STYLE} if isinstance(schema, dict) else schema)


class Grammar:
    """A compiled grammar; every choice of a request takes its own ``constraint``."""

    def __init__(self, matcher: LLMatcher, num_tokens: int) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens

    def constraint(self) -> Constraint:
        """Return a processor of logits that starts at the grammar's beginning."""
        return Constraint(self._matcher.deep_copy(), self._num_tokens)


class Constraint:
    """Mask the logits of tokens that would break the grammar."""

    def __init__(self, matcher: LLMatcher, num_tokens: int) -> None:
        self._matcher = matcher
        self._words = np.zeros(-(-num_tokens // _WORD_BITS), dtype=np.uint32)
        self._seen: list[int] = []

    def __call__(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """Mask the next token's logits.

        Args:
            token_ids: tokens of the answer so far.
            logits: ``[V]`` float.
        Returns:
            ``[V]``, minus infinity where the grammar allows no token.
        Raises:
            RuntimeError: the grammar allows none, or was left.
        """
        new = token_ids[len(self._seen) :]
        if new and not self._matcher.consume_tokens(new):
            raise RuntimeError(f"the answer left its grammar: {self._matcher.get_error()}")
        self._seen = list(token_ids)
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar allows no further token: {self._matcher.get_error()}")
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little", count=logits.shape[-1])
        allowed = torch.from_numpy(bits).to(logits.device, torch.bool)
        return logits.masked_fill(~allowed, float("-inf"))
