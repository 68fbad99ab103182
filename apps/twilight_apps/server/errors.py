"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_SHOWN_PROBLEMS = 3


class ApiError(Exception):
    """A refusal that the client is told.

    Args:
        status: HTTP status.
        message: what was given, what is allowed, how to mend it.
        param: the field at fault.
        code: OpenAI's word for the case, as ``context_length_exceeded``.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def install(app: FastAPI) -> None:
    """Make every error of an app an ``ApiError`` on the wire."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)


def response(error: ApiError) -> JSONResponse:
    """Turn an error into a response."""
    return JSONResponse(error.body, error.status, error.headers)


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return response(error)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response(_from_problems(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        400: "the body must be JSON in UTF-8, got something else",
        404: f"there is no {request.url.path}; see /docs for what there is",
        405: f"{request.method} is not allowed on {request.url.path}; see /docs",
    }.get(error.status_code, str(error.detail))
    return response(ApiError(error.status_code, message))


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    return response(ApiError(500, f"the server failed: {type(error).__name__}; its log has more"))


def _from_problems(problems: Sequence[Any]) -> ApiError:
    """Make one line of pydantic's list; malformed JSON is 400, what does not fit the schema 422."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "malformed")
        return ApiError(400, f"the body must be JSON in UTF-8: {reason}", code="invalid_json")
    lines = [f"{_place(problem['loc'])}: {_reason(problem)}" for problem in problems[:_SHOWN_PROBLEMS]]
    more = len(problems) - len(lines)
    text = "; ".join(lines) + (f"; and {more} more" if more else "")
    is_unknown = first["type"] == "extra_forbidden"
    return ApiError(422, text, param=_place(first["loc"]), code="unknown_field" if is_unknown else None)


def _place(loc: Sequence[Any]) -> str:
    parts = [str(part)[:64] for part in loc if part != "body"]
    return ".".join(parts).encode("ascii", "backslashreplace").decode() or "body"


def _reason(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "is not a field this server knows; leave it out"
    reason = str(problem["msg"])
    given = problem.get("input")
    if isinstance(given, bool | int | float | str | None):
        reason += f", got {repr(given)[:80]}"
    return reason.encode("ascii", "backslashreplace").decode()
