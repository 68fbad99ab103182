"""Settings for one model, from a text: bits of each layer, layers that stay dense, and how much mass to keep.

``calibrate`` rounds the keys or values of one layer at a time and measures how far the output moves; then it spends
a byte budget where it matters. It takes minutes, can be interrupted and taken up again, and is never required.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twilight_kernels import key_token_bytes, value_token_bytes

from .attention import use_attention
from .bit_allocation import KEY_CLIPS, Item, allocate_bits
from .config import TwilightConfig, as_config
from .decode_drift import DecodeDrift
from .layer_drift import LayerDrift
from .layer_settings import LayerSettings
from .samples import sample_ids
from .signature import signature

logger = logging.getLogger(__name__)

REPORT_NAME = "calibration.json"
REPORT_VERSION = 1
RATIOS = {"quality": 3.2, "balanced": 4.2, "compact": 5.5}
CONTEXT = 8000  # tokens at which a ratio is meant
_PROBES = (("keys", 2), ("keys", 3), ("values", 2))  # others follow, see Item.expected
_DIFFUSE = 0.5  # share of tokens kept, from which sparse decode does not pay


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found.

    Attributes:
        settings: to be used with this model.
        report: JSON-ready: the measured drift of each layer, the expected drift of the whole, the ratio to bf16.
    """

    settings: TwilightConfig
    report: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``twilight_config.json`` and ``calibration.json`` into ``folder``; return the settings' path."""
        _write_report(Path(folder), self.report)
        return self.settings.save_pretrained(folder)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    preset: TwilightConfig | str = "balanced",
    ratio: float | None = None,
    max_drift: float | None = None,
    sample_len: int = 4096,
    samples: int = 1,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Choose settings for ``model`` under a byte budget.

    Args:
        model: a decoder model.
        tokenizer: of the model.
        texts: what the model will read is best; a few thousand tokens suffice.
        preset: where all other settings come from.
        ratio: how many times smaller than a bf16 cache of 8,000 tokens; None for what suits the preset (quality 3.2,
            balanced 4.2, compact 5.5).
        max_drift: KL divergence in nats a token that top-p decode may add; the smallest ``p`` that stays below is
            taken. None keeps the preset's ``p``.
        sample_len: tokens of a sample; drift is measured on its last eighth, with the rest before it in the cache.
        samples: places in the texts that are measured.
        seed: of the places.
        folder: where measurements are kept as they are made, so that an interrupted run goes on where it stopped and
            another ratio needs no new ones; None keeps them in memory.
        on_progress: called with measurements made and to be made, before each of some seconds.
    Returns:
        The settings and the report; neither is written before ``save_pretrained``.
    Raises:
        ValueError: too little text, a ratio that 2 bits everywhere do not reach, or a preset without a ratio.
    """
    base = as_config(preset)
    if ratio is None:
        if not isinstance(preset, str) or preset not in RATIOS:
            raise ValueError(f"ratio must be given unless preset is one of {', '.join(RATIOS)}, got preset {preset!r}")
        ratio = RATIOS[preset]
    ids = sample_ids(tokenizer, texts, sample_len, samples, seed, base).to(model.device)
    facts = signature(model.config.get_text_config(decoder=True))
    del facts["rope_parameters"]  # stretching the context does not change which layers matter
    with use_attention(model, "sdpa"):
        drift = LayerDrift(model, ids, base)
        report = _measure(drift, {"model": facts, **_inputs(ids, base)}, folder, on_progress)
    chosen, expected = _spend(report, base, ratio)
    settings = replace(chosen, calibrated_for=facts)
    with use_attention(model, "twilight"):
        decode = DecodeDrift(model, ids[:1], settings)
        shares = decode.kept_shares(settings.p)
        settings = replace(settings, dense_layers=tuple(i for i, share in shares.items() if share > _DIFFUSE))
        tried: dict[str, float] = {}
        if max_drift is not None:
            settings, tried = decode.smallest_p(settings, max_drift)
    report |= {
        "ratio": ratio, "expected_drift": expected,
        "kept_shares": {str(layer): round(share, 4) for layer, share in shares.items()},
        "drift_of_p": tried, "seed": seed,
    }  # fmt: skip
    return Calibration(settings, report)


def _inputs(ids: Tensor, base: TwilightConfig) -> dict[str, Any]:
    """What measurements depend on beside the model."""
    layout = {name: getattr(base, name) for name in ("page_size", "group_size", "num_sinks")}
    return {"ids": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16], **layout}


def _measure(
    drift: LayerDrift,
    inputs: dict[str, Any],
    folder: str | os.PathLike[str] | None,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Measure what is not measured yet; ``layers`` maps an index to ``keys`` and ``values`` (nats by bits)."""
    report: dict[str, Any] = {"report_version": REPORT_VERSION, "inputs": inputs, "layers": {}}
    if folder is not None:
        report["layers"] = _earlier(Path(folder), report)
    layers = report["layers"]
    todo = [
        (layer, kind, bits)
        for kind, bits in _PROBES
        for layer in drift.layers
        if str(bits) not in layers.get(str(layer), {}).get(kind, {})
    ]
    for done, (layer, kind, bits) in enumerate(todo):
        if on_progress is not None:
            on_progress(done, len(todo))
        key_bits, value_bits = (bits, 16) if kind == "keys" else (16, bits)
        nats = drift.measure(layer, key_bits, value_bits, KEY_CLIPS.get(key_bits, 1.0))
        found = layers.setdefault(str(layer), {"keys": {}, "values": {}, "shape": drift.shape(layer)})
        found[kind][str(bits)] = nats
        if folder is not None:
            _write_report(Path(folder), report)
    return report


def _spend(report: dict[str, Any], base: TwilightConfig, ratio: float) -> tuple[TwilightConfig, float]:
    """Turn measurements into bits; return the settings and their expected drift."""
    items, stock, fixed, least = [], 0.0, 0.0, 0.0
    columns = -(-(base.num_sinks + base.window + base.page_size) // 16) * 16
    packed = (CONTEXT - base.num_sinks - base.window) // base.page_size * base.page_size
    for name, found in report["layers"].items():
        heads, key_dim, value_dim = found["shape"]
        for kind, dim in (("keys", key_dim), ("values", value_dim)):
            items.append(Item(int(name), kind, {int(b): nats for b, nats in found[kind].items()}, heads * dim))
        stock += 2 * heads * (key_dim + value_dim) * CONTEXT
        fixed += 2 * heads * (key_dim + value_dim) * columns
        key_codec, value_codec = replace(base.key_codec, bits=2), replace(base.value_codec, bits=2)
        least += heads * (key_token_bytes(key_dim, key_codec, 2) + value_token_bytes(value_dim, value_codec, 2))
    scales = least - sum(item.numbers * 2 / 8 for item in items)
    most = stock / (fixed + least * packed)
    if not 1.0 < ratio <= most:
        raise ValueError(f"ratio must be above 1 and at most {most:.2f}, 2 bits everywhere, got {ratio}")
    bits = allocate_bits(items, (stock / ratio - fixed) / packed - scales)
    expected = sum(item.expected(b) for item, b in zip(items, bits, strict=True))
    layers: dict[int, LayerSettings] = {}
    for key, key_bits, value_bits in zip(items[::2], bits[::2], bits[1::2], strict=True):
        layers[key.layer] = LayerSettings(key_bits, value_bits, KEY_CLIPS.get(key_bits, 1.0))
    usual = Counter(layers.values()).most_common(1)[0][0]
    own = {layer: settings for layer, settings in layers.items() if settings != usual}
    chosen = replace(base, layers=own, key_bits=usual.key_bits, value_bits=usual.value_bits, key_clip=usual.key_clip)
    return chosen, expected


def _earlier(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Measurements of the same model, text and layout that ``folder`` holds."""
    path = folder / REPORT_NAME
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON that calibrate wrote, got {error}; delete it to start anew") from error
    if stored.get("report_version") != REPORT_VERSION or stored.get("inputs") != report["inputs"]:
        logger.info("%s is of another model, text or layout: measuring anew", path)
        return {}
    logger.info("going on with the measurements in %s", path)
    return dict(stored["layers"])


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{REPORT_NAME}.tmp"
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, folder / REPORT_NAME)
