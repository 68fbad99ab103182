"""Settings of single layers: layers differ in how much rounding they bear, so some are worth more bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from twilight_cache import RefinedChannels, check_refined
from twilight_cache.refined_channels import CHANNEL_MULTIPLE
from twilight_kernels import KeyCodec, ValueCodec

from .setting_checks import require_refinable


@dataclass(frozen=True)
class LayerSettings:
    """How one layer's pages are packed, where it differs from the others.

    Args:
        key_bits: bits of a stored key number, as in ``TwilightConfig``.
        value_bits: bits of a stored value number.
        key_clip: share of a page's key range that the levels span.
        key_refined: channels of keys whose rest after rounding is stored as well: for each KV head those that
            ``calibrate`` found for a model, as many for each head, a multiple of 8; or a share of them in ``[0, 0.5]``,
            as in ``TwilightConfig``.
    Raises:
        ValueError: a value outside its range, or refined channels of keys that are not rounded.
    """

    key_bits: int
    value_bits: int
    key_clip: float
    key_refined: tuple[tuple[int, ...], ...] | float = 0.0

    def __post_init__(self) -> None:
        key_codec, _ = KeyCodec(self.key_bits, clip=self.key_clip), ValueCodec(self.value_bits)  # check their ranges
        given: Any = self.key_refined or 0.0
        if not isinstance(given, list | tuple) or not all(isinstance(row, list | tuple) for row in given):
            require_refinable(given)
            object.__setattr__(self, "key_refined", given)
            return
        check_refined(given)
        object.__setattr__(self, "key_refined", tuple(tuple(row) for row in given))
        if key_codec.is_raw:
            raise ValueError(f"key_refined must be empty for {self.key_bits}-bit keys, which are not rounded")

    def refined(self, kv_heads: int, key_dim: int) -> RefinedChannels:
        """Return what is refined of keys of that shape.

        Raises:
            ValueError: channels that keys of that shape do not have.
        """
        return _refined(self.key_refined, KeyCodec(self.key_bits).for_heads(key_dim).is_raw, kv_heads, key_dim)


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


@lru_cache(maxsize=1024)  # every layer of a cache asks, and a cache is made for every prompt
def _refined(
    channels: tuple[tuple[int, ...], ...] | float, is_raw: bool, kv_heads: int, key_dim: int
) -> RefinedChannels:
    if is_raw:
        return RefinedChannels()
    if isinstance(channels, int | float):
        return RefinedChannels(refined_count(key_dim, channels))
    refined = RefinedChannels(channels)
    refined.check(kv_heads, key_dim)
    return refined


def refined_count(key_dim: int, share: float) -> int:
    """Key channels that ``share`` of ``key_dim`` means: a multiple of what pages take."""
    return round(share * key_dim / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


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
