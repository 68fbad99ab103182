"""What two models must share for the keys and values of one to mean the same to the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from .config import TwilightConfig

_NAMES = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
    "vocab_size", "rope_parameters", "layer_types", "sliding_window",
)  # fmt: skip


def signature(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the facts of a decoder's config, ready for JSON; weights are not looked at."""
    facts = {name: getattr(config, name, None) for name in _NAMES}
    return dict(json.loads(json.dumps(facts, default=str)))


def difference(stored: Mapping[str, Any], config: PreTrainedConfig) -> str:
    """Say in which of the ``stored`` facts a model differs; empty if in none."""
    given = signature(config)
    return ", ".join(
        f"{name} {fact} (this model: {given.get(name)})" for name, fact in stored.items() if fact != given.get(name)
    )


def require_fit(settings: TwilightConfig, config: PreTrainedConfig, num_layers: int) -> None:
    """Raise ValueError if the settings were made for another model."""
    if settings.calibrated_for is not None and (told := difference(settings.calibrated_for, config)):
        raise ValueError(f"these settings were calibrated for another model: {told}; calibrate this model")
    if settings.layers and max(settings.layers) >= num_layers:
        raise ValueError(f"layers must be below the model's {num_layers}, got {max(settings.layers)}")
