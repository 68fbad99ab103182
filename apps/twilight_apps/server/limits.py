"""What one client may ask of the server, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on requests.

    Args:
        max_body_bytes: largest request body.
        max_prompt_tokens: longest prompt; None for what the model's context leaves.
        max_new_tokens: longest answer, and the answer of requests that name no ``max_tokens``; None for what the
            context leaves.
        max_choices: largest ``n``.
        max_connections: HTTP requests that are served at once, streams included; more get 503.
        body_s: seconds in which a body must have arrived.
        stall_s: seconds for which a client may leave a stream unread before its request is cancelled.
        drain_s: seconds that running requests get when the server stops.
    Raises:
        ValueError: a bound below 1.
    """

    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_choices: int = 16
    max_connections: int = 512
    body_s: float = 30.0
    stall_s: float = 30.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_tokens", "max_new_tokens", "max_choices", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("body_s", "stall_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if self.drain_s < 0:
            raise ValueError(f"drain_s must be 0 seconds or more, got {self.drain_s}")
