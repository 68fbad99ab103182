"""From messages or text to the model's token ids."""

from __future__ import annotations

import copy
import json
import threading
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from .errors import ApiError
from .schemas import AssistantTurn, ChatRequest, Content, Message, ToolTurn
from .tools import OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN_TEMPLATES = ("chatml-tools",)
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


def template_text(name: str) -> str:
    """Return the text of ``--chat-template``: a file's, or a built-in one's.

    Raises:
        FileNotFoundError: neither.
    """
    if name in BUILT_IN_TEMPLATES:
        return resources.files(__package__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name)
    if not path.is_file():
        known = ", ".join(BUILT_IN_TEMPLATES)
        raise FileNotFoundError(f"--chat-template must be a file or {known}, got {name!r}, which is neither")
    return path.read_text(encoding="utf-8")


class Prompts:
    """Render and tokenize, one request at a time, with a tokenizer of its own.

    Args:
        tokenizer: copied, since the engine's thread uses it too.
        chat_template: instead of the tokenizer's; None for that one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._lock = threading.Lock()
        self._tool_problem = self._why_no_tools() if self._tokenizer.chat_template else None

    def chat(self, request: ChatRequest) -> list[int]:
        """Return the prompt of a conversation.

        Raises:
            ApiError: 400, no chat template, or one that refuses these messages or knows no tools.
        """
        if not self._tokenizer.chat_template:
            raise ApiError(
                400,
                "this model has no chat template; use /v1/completions, or start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        if request.can_call_tools and self._tool_problem is not None:
            raise ApiError(400, self._tool_problem, param="tools", code="no_tool_template")
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()] if request.can_call_tools else None
        try:
            text = self._render([_plain(message) for message in request.messages], tools)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ApiError(400, f"the chat template refuses these messages: {reason}", param="messages") from error
        return self.tokens(text, special=False)

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Tokenize a text; ``special`` adds what the tokenizer puts around a text."""
        with self._lock:
            ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def text(self, token_ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        with self._lock:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        text = self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        return str(text)

    def _why_no_tools(self) -> str | None:
        """Say why tools cannot be asked for; None if they can: the template shows them, and calls in our form."""
        message = [{"role": "user", "content": "probe"}]
        hint = "start the server with --chat-template (a file, or chatml-tools for models trained on ChatML)"
        try:
            shown = self._render(message, [_PROBE_TOOL])
            if shown == self._render(message, None):
                return f"this model's chat template shows no tools to the model; {hint}"
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            return f"this model's chat template fails on tools ({' '.join(str(error).split())[:200]}); {hint}"
        if OPEN not in shown:
            return f"this model's chat template must write calls as {OPEN}JSON, which it does not; {hint}"
        return None


def _plain(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: text in one piece, arguments as objects."""
    plain: dict[str, Any] = {"role": message.role, "content": _joined(message.content)}
    if message.role == "developer":  # the newer name of "system"; templates know the older
        plain["role"] = "system"
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, ToolTurn):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantTurn) and message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _joined(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"arguments of a tool call must be JSON, got {text[:80]!r}") from error
