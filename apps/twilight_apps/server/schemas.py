"""What ``/v1/chat/completions`` and ``/v1/completions`` accept; an unknown field is refused, never dropped.

Five fields of OpenAI's are accepted because clients send them, and change nothing here: ``user``, ``metadata``,
``safety_identifier``, ``prompt_cache_key`` (prefixes are always shared) and ``service_tier``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

_MAX_INT = 2**31 - 1

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=_MAX_INT)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Strict(BaseModel):
    """No coercion of types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = Field(False, description="Send one last chunk with the usage.")


class Sampling(Strict):
    """Fields that both kinds of completion share."""

    model: str = Field(max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_MAX_INT, description="0 keeps all.")
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenKey, Bias] | None = Field(None, max_length=1024)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted, not used.")
    metadata: dict[str, str] | None = Field(None, description="Accepted, not used.")
    safety_identifier: str | None = Field(None, description="Accepted, not used.")
    prompt_cache_key: str | None = Field(None, description="Accepted, not used: prefixes are always shared.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="Accepted, not used.")

    @model_validator(mode="before")
    @classmethod
    def _text_is_unicode(cls, body: Any) -> Any:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("text must be Unicode, got half of a surrogate pair (\\ud800 to \\udfff)") from None
        return body

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must come with stream=true; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(Strict):
    """A piece of a message's text; this server knows no other pieces."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1)]
# told apart by type, so that an error speaks of the one that was meant
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class Instruction(Strict):
    """What the model is told to be."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserTurn(Strict):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Strict):
    """A call that the model made; the arguments are JSON in a string."""

    name: Name
    arguments: str


class ToolCall(Strict):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantTurn(Strict):
    """What the model said; clients send its message back as they got it, with fields that must be null here."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantTurn:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message must have content or tool_calls")
        return self


class ToolTurn(Strict):
    """What a called function returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[Instruction | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class Function(Strict):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema; calls always fit it, strict or not.")
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A function's name."""

    name: Name


class NamedTool(Strict):
    """The one tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class PlainText(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObject(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class Schema(Strict):
    """A JSON schema with a name."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: Name
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = Field(None, description="The answer always fits the schema, strict or not.")


class JsonSchema(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: Schema


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class ChatRequest(Sampling):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must come with logprobs=true; set it, or leave top_logprobs out")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools must have different names")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice must come with tools; send tools, or leave it out")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice must name one of {', '.join(names)}")
        wants_json = self.response_format is not None and self.response_format.type != "text"
        if self.ignore_eos and (wants_json or self.can_call_tools):
            raise ValueError("ignore_eos cannot go with response_format or tools, whose answers have an end")
        if self.can_call_tools and wants_json:
            raise ValueError("response_format and tools cannot be asked for at once; set tool_choice to none")
        return self

    @property
    def can_call_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Body of ``POST /v1/completions``."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(False, description="Put the prompt before the text.")

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: prompts have no logprobs here; leave one out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]
