"""The name ``"twilight"`` in Transformers' tuple of cache implementations."""

from __future__ import annotations

from types import ModuleType

CACHE_NAME = "twilight"
_TUPLE = "ALL_CACHE_IMPLEMENTATIONS"


def allow_name(configuration_utils: ModuleType) -> bool:
    """Add the name to ``transformers.generation.configuration_utils``; return whether it is there now."""
    names = getattr(configuration_utils, _TUPLE, None)
    if not isinstance(names, tuple) or "quantized" not in names:
        return False
    if CACHE_NAME not in names:
        setattr(configuration_utils, _TUPLE, (*names, CACHE_NAME))
    return True


def forbid_name(configuration_utils: ModuleType) -> None:
    """Take the name out again."""
    names = getattr(configuration_utils, _TUPLE, ())
    setattr(configuration_utils, _TUPLE, tuple(name for name in names if name != CACHE_NAME))


def is_name_allowed(configuration_utils: ModuleType) -> bool:
    """Whether the name is in the tuple."""
    return CACHE_NAME in getattr(configuration_utils, _TUPLE, ())
