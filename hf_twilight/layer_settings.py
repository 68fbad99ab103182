"""Settings of single layers: layers differ in how much rounding they bear, so some are worth more bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from twilight_cache import check_refined
from twilight_kernels import KeyCodec, ValueCodec


@dataclass(frozen=True)
class LayerSettings:
    """How one layer's pages are packed, where it differs from the others.

    Args:
        key_bits: bits of a stored key number, as in ``TwilightConfig``.
        value_bits: bits of a stored value number.
        key_clip: share of a page's key range that the levels span.
        key_refined: for each KV head, channels of keys whose rest after rounding is stored as well; as many for each
            head, a multiple of 8. They depend on the model: ``calibrate`` finds them.
    Raises:
        ValueError: a value outside its range, or refined channels of keys that are not rounded.
    """

    key_bits: int
    value_bits: int
    key_clip: float
    key_refined: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        key_codec, _ = KeyCodec(self.key_bits, clip=self.key_clip), ValueCodec(self.value_bits)  # check their ranges
        if isinstance(self.key_refined, str) or not all(isinstance(row, list | tuple) for row in self.key_refined):
            raise ValueError(f"key_refined must be a list of channels for each KV head, got {self.key_refined!r}")
        object.__setattr__(self, "key_refined", tuple(tuple(row) for row in self.key_refined))
        check_refined(self.key_refined)
        if self.key_refined and key_codec.is_raw:
            raise ValueError(f"key_refined must be empty for {self.key_bits}-bit keys, which are not rounded")


def parse_layers(given: Any, default: LayerSettings) -> dict[int, LayerSettings]:
    """Build settings of single layers from what a user or a JSON file gives.

    Args:
        given: maps a layer's index, a number or its digits, to ``LayerSettings`` or a dict of some of its fields.
        default: fills the fields that a dict leaves out.
    Raises:
        ValueError: no mapping, an index that is none, an unknown field, or a value outside its range.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"layers must map a layer's index to its settings, got {given!r}; as {_EXAMPLE}")
    found = {_index(index): _layer(index, settings, default) for index, settings in given.items()}
    return dict(sorted(found.items()))


_NAMES = tuple(field.name for field in fields(LayerSettings))
_EXAMPLE = "{17: {'key_bits': 4}}"


def _index(given: Any) -> int:
    index = int(given) if isinstance(given, str) and given.isascii() and given.isdigit() else given
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"layers must be named by whole numbers of at least 0, got {given!r}; as {_EXAMPLE}")
    return index


def _layer(index: Any, given: Any, default: LayerSettings) -> LayerSettings:
    if isinstance(given, LayerSettings):
        return given
    unknown = [name for name in given if name not in _NAMES] if isinstance(given, Mapping) else [given]
    if unknown:
        raise ValueError(f"layers[{index}] takes {', '.join(_NAMES)}, got {unknown[0]!r}; as {_EXAMPLE}")
    try:
        return LayerSettings(**{**asdict(default), **given})
    except ValueError as error:
        raise ValueError(f"layers[{index}]: {error}") from error
