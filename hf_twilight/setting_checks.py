"""Checks of single settings: errors that say what was given, what is allowed and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(name: object, allowed: Iterable[str]) -> str:
    """Return the part of a message that asks for the nearest of the allowed names; empty if there are none."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.0)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_known(changes: Iterable[str], names: Sequence[str]) -> None:
    """Raise ValueError unless all ``changes`` are settings."""
    for name in changes:
        if name not in names:
            raise ValueError(f"twilight_config has no setting {name!r}{nearest(name, [*names, 'preset'])}")


def require_share(name: str, value: float, meaning: str) -> None:
    """Raise ValueError unless a setting is in (0, 1]; 1.0 means ``meaning``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}; pass 1.0 to {meaning}")


def require_count(name: str, value: int, least: int) -> None:
    """Raise ValueError unless a setting is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def require_refinable(share: Any) -> None:
    """Raise ValueError unless that share of the key channels may be refined."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 0.5:
        raise ValueError(
            "key_refined must be a share in [0, 0.5], or of one layer a list of channels for each KV head, got "
            f"{share!r}; pass 0.0 to refine none"
        )
