"""Which key channels of a page range widest, and their rests, on GPUs: torch works them out, once a page."""

from __future__ import annotations

from torch import Tensor

from . import _reference_codec
from .page_codec import KeyCodec


def widest_channels(keys: Tensor, count: int) -> Tensor:
    """See ``_reference.widest_channels``."""
    return _reference_codec.widest_channels(keys, count)


def write_rests(keys: Tensor, index: Tensor, codec: KeyCodec, turns: Tensor | None = None) -> None:
    """See ``_reference.write_rests``."""
    _reference_codec.write_rests(keys, index, codec, turns)
