"""The routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

import hf_twilight

from . import errors
from .chat import Chat
from .completion import TextCompletion
from .errors import ApiError
from .event_stream import ClientGone, EventStream, unless_gone
from .gate import Gate
from .schemas import ChatRequest, CompletionRequest
from .service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "Malformed JSON, a prompt that is too long, a schema that cannot be used",
        401: "The API key is missing or wrong",
        404: "Unknown model",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is not sent as JSON",
        422: "A field of the wrong type, out of range, or unknown",
        429: "The queue is full; see Retry-After",
        503: "The server stops, or its engine died",
    }.items()
}


def create_app(service: Service, api_key: str | None = None) -> ASGIApp:
    """Build the ASGI app.

    Args:
        service: what the routes serve.
        api_key: the key that paths under ``/v1/`` need; None for no key.
    """
    app = FastAPI(title="hf-twilight", version=hf_twilight.__version__, responses=_ERRORS)
    errors.install(app)
    _add_completions(app, service)
    _add_models(app, service)
    _add_operations(app, service)
    return Gate(app, service, api_key)


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response | dict[str, Any]:
        """Answer a conversation."""
        return await _answer(await Chat.begin(service, body, _request_id(request)), request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response | dict[str, Any]:
        """Continue a text."""
        return await _answer(await TextCompletion.begin(service, body, _request_id(request)), request)

    async def _answer(work: Chat | TextCompletion, request: Request) -> Response:
        request.state.job = work.job  # for the log
        if work.request.stream:
            return EventStream(work.events(), service.limits.stall_s)
        try:
            return JSONResponse(await unless_gone(request.receive, work.whole()))
        except ClientGone:
            return Response(status_code=499)  # nobody is there to read it


def _add_models(app: FastAPI, service: Service) -> None:
    def described() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "hf-twilight",
            "max_model_len": service.context,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """Describe the one model."""
        if model != service.name:
            raise ApiError(404, f"the model {model[:80]!r} does not exist; this server has {service.name!r}")
        return described()


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Say whether requests are served: 200, or 503 while the server stops and after the engine died."""
        if not service.engine.is_alive:
            return JSONResponse({"status": "dead", "error": str(service.engine.error)}, 503)
        if service.is_draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Show counters and histograms in Prometheus' text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Name the server's version."""
        return {"version": hf_twilight.__version__}


def _request_id(request: Request) -> str:
    return str(request.state.request_id)
