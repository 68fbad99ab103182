"""Many requests, one model, shared prefixes: continuous batching over packed pages."""

from .engine import Engine, EngineClosed, QueueFull
from .handle import Completion, RequestHandle, Timings, Token
from .sampling import SamplingParams
from .stats import EngineStats

__all__ = [
    "Completion",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "QueueFull",
    "RequestHandle",
    "SamplingParams",
    "Timings",
    "Token",
]
