"""Server-sent events to a client that may leave, or stop reading, at any time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection."""


class EventStream(Response):
    """Send each object of a generator as one event, then ``[DONE]``.

    The generator is closed, which cancels its work, when the client disconnects or leaves the stream unread for
    ``stall_s`` seconds. An error after the first event is sent as an event of its own.

    Args:
        events: objects that are sent as JSON.
        stall_s: seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any]], stall_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except ClientGone:
            logger.info("client left the stream: request cancelled")
        except TimeoutError:
            logger.warning("client read nothing for %g s: request cancelled", self._stall_s)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await self._send_piece(send, event)
        except ApiError as error:
            await self._send_piece(send, error.body)
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": DONE})

    async def _send_piece(self, send: Send, event: dict[str, Any]) -> None:
        body = f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await ``work``; cancel it when the client disconnects.

    Raises:
        ClientGone: it did.
    """
    running = asyncio.ensure_future(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientGone
    finally:
        for task in (running, watching):
            task.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
