"""What happens before a request is looked at: id, key, place, size. A plain ASGI middleware.

The whole body is read here, so that its size and time are bounded in one place; the app gets it from memory.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, response
from .event_stream import ClientGone
from .jobs import Job
from .service import Service

access_log = logging.getLogger(f"{__package__}.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_GUARDED = "/v1/"
_PROBES = ("/health", "/metrics")
# a body that is too large is read on for so many times the limit, so that its sender comes to read our answer
_DISCARD = 8


class Gate:
    """Let requests pass to ``app``, or answer them with an error.

    Args:
        app: the ASGI app.
        service: its limits apply.
        api_key: the key that paths under ``/v1/`` need; None for no key.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None = None) -> None:
        self._app = app
        self._service = service
        self._api_key = api_key
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.perf_counter(), 499  # if nothing is sent: the client left

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        self._running += 1
        try:
            await self._pass(scope, headers, receive, send_with_id)
        except ApiError as error:
            await response(error)(scope, receive, send_with_id)
        except ClientGone:
            pass
        finally:
            self._running -= 1
            _log(scope, status, time.perf_counter() - start)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(_GUARDED):
            self._check_key(headers)
            limit = self._service.limits.max_connections
            if self._running > limit:
                raise ApiError(503, f"{limit} requests are open, which is the limit; try again", retry_after=1)
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body = await self._body(headers, receive)
        if scope["path"].startswith(_GUARDED) and not _is_json(headers):
            got = headers.get("content-type", "none")
            raise ApiError(415, f"Content-Type must be application/json, got {got[:80]}; set the header")
        await self._app(scope, _replay(body, receive), send)

    def _check_key(self, headers: Headers) -> None:
        if self._api_key is None:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the body.

        Raises:
            ApiError: 413, 408.
            ClientGone: the client left before its end.
        """
        limits = self._service.limits
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared) > limits.max_body_bytes
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.body_s):
                while size <= _DISCARD * limits.max_body_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > limits.max_body_bytes
                    parts = [] if too_large else [*parts, part]
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body must arrive within {limits.body_s:g} s") from None
        if too_large:
            raise ApiError(413, f"the body must have at most {limits.max_body_bytes} bytes; send less")
        return b"".join(parts)


def _log(scope: Scope, status: int, seconds: float) -> None:
    """Write a line about a request that ended; those of probes only when all is logged."""
    job: Job | None = scope["state"].get("job")
    tokens = ""
    if job is not None:
        tokens = f", {job.num_prompt_tokens} + {job.num_new_tokens} tokens{'' if job.is_complete else ', cut off'}"
    level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
    path = quote(scope["path"])  # what a client sends cannot begin a line of its own
    request_id = scope["state"]["request_id"]
    access_log.log(level, "%s %s %d in %.2f s%s (%s)", scope["method"], path, status, seconds, tokens, request_id)


def _is_json(headers: Headers) -> bool:
    """Whether the body says it is JSON; browsers send other types to other sites without asking, never this."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that begins with a whole body and goes on with what comes (a disconnect)."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
