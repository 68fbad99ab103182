"""Tool calls in the form most chat templates use: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``.

Calls are constrained to the functions' schemas from their first letter on, whether the model must call a tool or
decides to, so that what a client gets always parses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llguidance import LLMatcher, StructTag

from .grammar import Grammar, Vocabulary, schema_text
from .schemas import ChatRequest, Function, NamedTool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Call:
    """A call that the model made; ``arguments`` is JSON as the model wrote it."""

    name: str
    arguments: str


def grammar(request: ChatRequest, vocabulary: Vocabulary) -> Grammar:
    """Compile what an answer to a request with tools may be.

    Raises:
        ApiError: 400, a function's schema cannot be used.
    """
    choice = request.tool_choice
    functions = [tool.function for tool in request.tools or ()]
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
    is_parallel = request.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    if choice in (None, "auto"):
        text = _optional_calls(functions, vocabulary, is_parallel)
    else:
        text = _required_calls(functions, vocabulary, is_parallel)
    return vocabulary.compile(LLMatcher.grammar_from_lark(text), "tools")


def _required_calls(functions: Sequence[Function], vocabulary: Vocabulary, is_parallel: bool) -> str:
    names = [f"call_{index}" for index in range(len(functions))]
    opening = OPEN if vocabulary.is_single_token(OPEN) else json.dumps(OPEN)
    closing = CLOSE if vocabulary.is_single_token(CLOSE) else json.dumps(CLOSE)
    lines = ["%llguidance {}", 'start: calls ("\\n" calls){0,7}' if is_parallel else "start: calls"]
    lines.append(f"calls: {' | '.join(names)}")
    for name, function in zip(names, functions, strict=True):
        begin, end = json.dumps("\n" + _begin(function)), json.dumps("}\n")
        lines.append(f"{name}: {opening} {begin} %json {_schema(function)} {end} {closing}")
    return "\n".join(lines) + "\n"


def _optional_calls(functions: Sequence[Function], vocabulary: Vocabulary, is_parallel: bool) -> str:
    tags = [
        StructTag(
            trigger=OPEN, begin=f"{OPEN}\n{_begin(function)}", grammar=_schema(function), end="}\n" + CLOSE
        )
        for function in functions
    ]  # fmt: skip
    text = str(StructTag.to_grammar(tags, assume_special=vocabulary.is_single_token(OPEN)))
    return text if is_parallel else text.replace(")* tag_end", ")? tag_end")


def _begin(function: Function) -> str:
    return '{"name": ' + json.dumps(function.name) + ', "arguments": '


def _schema(function: Function) -> str:
    return schema_text(function.parameters or _ANY_OBJECT)


@dataclass
class CallReader:
    """Split an answer, as it comes, into text and calls.

    What may be the beginning of a call is held back until it is one or is not.
    """

    calls: list[Call] = field(default_factory=list)
    _held: str = ""

    def feed(self, text: str) -> list[str | Call]:
        """Take the next piece of the answer; return what is known by now."""
        self._held += text
        found: list[str | Call] = []
        while OPEN in self._held:
            before, rest = self._held.split(OPEN, 1)
            if CLOSE not in rest:
                self._add_text(found, before.rstrip("\n"))
                self._held = OPEN + rest
                return found
            inner, self._held = rest.split(CLOSE, 1)
            self._add_text(found, before.rstrip("\n") if before.strip() else "")
            call = _parse(inner)
            if call is None:
                self._add_text(found, f"{OPEN}{inner}{CLOSE}")
            else:
                self.calls.append(call)
                found.append(call)
        keep = _partial(self._held)
        self._add_text(found, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return found

    def finish(self) -> list[str | Call]:
        """Return what was held back: a call that never ended is text."""
        rest, self._held = self._held, ""
        return [rest] if rest.strip() or (rest and not self.calls) else []

    def _add_text(self, found: list[str | Call], text: str) -> None:
        if text and not (self.calls and not text.strip()):  # line ends between calls say nothing
            found.append(text)


def _partial(text: str) -> int:
    """Length of the end of a text that may begin a call, line ends before it included."""
    longest = max((size for size in range(1, len(OPEN)) if text.endswith(OPEN[:size])), default=0)
    body = text[: len(text) - longest]
    return longest + len(body) - len(body.rstrip("\n"))


def _parse(text: str) -> Call | None:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    return Call(found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
