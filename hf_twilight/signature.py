"""What two models must share for the keys and values of one to mean the same to the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

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
