"""Settings for one model, from a text: how each layer is packed, which stay dense, and how much mass to keep.

``calibrate`` finds the key channels that bear rounding least, rounds the keys or values of one layer at a time and
measures how far the output moves; then it spends a byte budget where it matters. It takes minutes, can be interrupted
and taken up again, and is never required.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twilight_kernels import key_token_bytes, value_token_bytes

from .attention import use_attention
from .bit_allocation import KEY_CLIPS, KEY_FORMS, VALUE_BITS, Option, allocate_bytes, scaled_drift
from .channel_weights import heavy_channels
from .config import TwilightConfig, as_config
from .decode_probe import DecodeProbe
from .layer_drift import LayerDrift, layer_shapes, tail_len
from .layer_settings import LayerSettings, refined_count
from .samples import sample_ids, with_facts
from .signature import signature

logger = logging.getLogger(__name__)

REPORT_NAME = "calibration.json"
REPORT_VERSION = 2
RATIOS = {"quality": 3.2, "balanced": 4.0, "compact": 5.5}
CONTEXT = 8000  # tokens at which a ratio is meant
# of keys and values, with the share of refined channels; the drift of more bits follows, see scaled_drift
_PROBES = (*(("keys", share) for bits, share in KEY_FORMS if bits == 2), ("values", 0.0))
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
            balanced 4.0, compact 5.5).
        max_drift: KL divergence in nats a token that top-p decode may add; the smallest ``p`` that stays below is
            taken. None keeps the preset's ``p``.
        sample_len: tokens of a sample; drift is measured on its last eighth, with the rest before it in the cache.
            Two fifths of what is measured are numbers that were hidden in the rest, so that copying counts.
        samples: places in the texts that are measured.
        seed: of the places.
        folder: where measurements are kept as they are made, so that an interrupted run goes on where it stopped and
            another ratio needs no new ones; None keeps them in memory.
        on_progress: called before each measurement, which takes some seconds, with those made, earlier ones
            included, and all.
    Returns:
        The settings and the report; neither is written before ``save_pretrained``.
    Raises:
        ValueError: too little text, a ratio that 2 bits everywhere do not reach, or a preset without a ratio.
    """
    base = as_config(preset)
    if ratio is None:
        if not isinstance(preset, str) or preset not in RATIOS:
            given = preset if isinstance(preset, str) else type(preset).__name__
            raise ValueError(f"ratio must be given unless preset is one of {', '.join(RATIOS)}, got preset {given!r}")
        ratio = RATIOS[preset]
    prose = sample_ids(tokenizer, texts, sample_len, samples, seed, base).to(model.device)
    ids = with_facts(tokenizer, prose, tail_len(sample_len), seed).to(model.device)
    shapes = layer_shapes(model, ids)
    budget = _token_budget(shapes.values(), base, ratio)
    facts = signature(model.config.get_text_config(decoder=True))
    del facts["rope_parameters"]  # stretching the context does not change which layers matter
    heavy = heavy_channels(model, ids, base.page_size, base.num_sinks)
    with use_attention(model, "sdpa"):
        drift = LayerDrift(model, ids, base, heavy)
        report = _measure(drift, shapes, {"model": facts, **_inputs(ids, base)}, folder, on_progress)
    chosen, expected = _spend(report, base, budget, heavy)
    settings = replace(chosen, calibrated_for=facts)
    with use_attention(model, "twilight"):
        decode = DecodeProbe(model, prose[:1], settings)
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
    shapes: Mapping[int, tuple[int, int, int]],
    inputs: dict[str, Any],
    folder: str | os.PathLike[str] | None,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Measure what is not measured yet; ``layers`` maps an index to ``keys`` (nats by refined share) and ``values``."""
    report: dict[str, Any] = {"report_version": REPORT_VERSION, "inputs": inputs, "layers": {}}
    if folder is not None:
        report["layers"] = _earlier(Path(folder), report)
    layers = report["layers"]
    todo = [
        (layer, kind, share)
        for kind, share in _PROBES
        for layer in shapes
        if str(share) not in layers.get(str(layer), {}).get(kind, {})
    ]
    total = len(_PROBES) * len(shapes)
    for done, (layer, kind, share) in enumerate(todo, total - len(todo)):
        if on_progress is not None:
            on_progress(done, total)
        nats = drift.measure(layer, 2, 16, KEY_CLIPS[2], share) if kind == "keys" else drift.measure(layer, 16, 2, 1.0)
        found = layers.setdefault(str(layer), {"keys": {}, "values": {}, "shape": shapes[layer]})
        found[kind][str(share)] = nats
        if folder is not None:
            _write_report(Path(folder), report)
    return report


def _plain_columns(base: TwilightConfig) -> int:
    """Tokens that sinks and window have room for."""
    return -(-(base.num_sinks + base.window + base.page_size) // 16) * 16


def _packed_tokens(base: TwilightConfig) -> int:
    return (CONTEXT - base.num_sinks - base.window) // base.page_size * base.page_size


def _token_budget(shapes: Iterable[tuple[int, int, int]], base: TwilightConfig, ratio: float) -> float:
    """Bytes that a packed token of all layers may take; ValueError for a ratio that is out of reach."""
    stock = plain = least = 0.0
    codecs = replace(base.key_codec, bits=2), replace(base.value_codec, bits=2)
    for heads, key_dim, value_dim in shapes:
        stock += 2 * heads * (key_dim + value_dim) * CONTEXT
        plain += 2 * heads * (key_dim + value_dim) * _plain_columns(base)
        least += heads * (key_token_bytes(key_dim, codecs[0], 2) + value_token_bytes(value_dim, codecs[1], 2))
    most = stock / (plain + _packed_tokens(base) * least)
    if not 1.0 < ratio <= most:
        raise ValueError(f"ratio must be above 1 and at most {most:.2f}, 2 bits everywhere, got {ratio}")
    return (stock / ratio - plain) / _packed_tokens(base)


def _spend(
    report: dict[str, Any], base: TwilightConfig, budget: float, heavy: Mapping[int, list[list[int]]]
) -> tuple[TwilightConfig, float]:
    """Turn measurements into settings whose packed tokens take ``budget`` bytes; return them and their drift."""
    items: list[list[Option]] = []
    for found in report["layers"].values():
        column_bytes = 2 * found["shape"][0] * _plain_columns(base) / _packed_tokens(base)
        items += [_key_options(found, base, column_bytes), _value_options(found, base)]
    chosen = allocate_bytes(items, budget)
    layers: dict[int, LayerSettings] = {}
    for name, keys, values in zip(report["layers"], chosen[::2], chosen[1::2], strict=True):
        refined = tuple(tuple(row[: keys.refined]) for row in heavy[int(name)]) if keys.refined else ()
        layers[int(name)] = LayerSettings(keys.bits, values.bits, KEY_CLIPS.get(keys.bits, 1.0), refined)
    plain = [settings for settings in layers.values() if not settings.key_refined]
    usual = Counter(plain).most_common(1)[0][0] if plain else replace(layers[min(layers)], key_refined=0.0)
    own = {layer: settings for layer, settings in layers.items() if settings != usual}
    settings = replace(
        base, layers=own, key_bits=usual.key_bits, value_bits=usual.value_bits, key_clip=usual.key_clip,
        key_refined=0.0,
    )  # fmt: skip
    return settings, sum(option.drift for option in chosen)


def _key_options(found: dict[str, Any], base: TwilightConfig, column_bytes: float) -> list[Option]:
    """Ways to pack a layer's keys; a refined channel widens sinks and window too, ``column_bytes`` a token."""
    heads, key_dim, _ = found["shape"]
    options: dict[tuple[int, int], Option] = {}
    for bits, share in KEY_FORMS:
        refined = refined_count(key_dim, share)
        token = heads * key_token_bytes(key_dim + refined, replace(base.key_codec, bits=bits), 2)
        drift = scaled_drift(found["keys"][str(share)], 2, bits)
        options.setdefault((bits, refined), Option(bits, refined, token + refined * column_bytes, drift))
    return list(options.values())


def _value_options(found: dict[str, Any], base: TwilightConfig) -> list[Option]:
    heads, _, value_dim = found["shape"]
    codecs = [replace(base.value_codec, bits=bits) for bits in VALUE_BITS]
    drift = found["values"]["0.0"]
    return [
        Option(c.bits, 0, heads * value_token_bytes(value_dim, c, 2), scaled_drift(drift, 2, c.bits)) for c in codecs
    ]


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
        logger.warning("%s is of another model, text or layout: measuring anew, over it", path)
        return {}
    logger.info("going on with the measurements in %s", path)
    return dict(stored["layers"])


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{REPORT_NAME}.tmp"
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, folder / REPORT_NAME)
