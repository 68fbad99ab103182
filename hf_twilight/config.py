"""Settings of a Twilight cache, and the presets with what each costs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from twilight_cache import (
    SELECTORS,
    Budget,
    DecodePolicy,
    DoubleSparse,
    Full,
    Layout,
    Quest,
    RefinedChannels,
    Selector,
    SnapKV,
    Streaming,
    Tactic,
    check_budget,
)
from twilight_kernels import KeyCodec, StripePlan, ValueCodec

from .layer_settings import LayerSettings, parse_layers
from .setting_checks import nearest, require_count, require_known, require_share

CONFIG_NAME = "twilight_config.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class TwilightConfig:
    """How keys and values are stored and attended to.

    Args:
        key_bits: bits of a stored key number, 2, 3, 4, 8, or 16 for the model's dtype.
        value_bits: bits of a stored value number, 2, 3, 4, 8, or 16 for the model's dtype.
        page_size: tokens of a page, 16, 32, 64 or 128: unit of packing, selection and sharing.
        group_size: channels of a value that share one scale, a multiple of 16.
        key_clip: share of a page's key range that the levels span, about its midpoint, in ``(0, 1]``.
        key_refined: share of the key channels, in ``[0, 0.5]``, of which is stored, too, what rounding left of them: in
            each sequence those that range widest in its first page. Rounded to a multiple of 8 channels.
        num_sinks: first tokens that stay in the model's dtype.
        window: last tokens that stay in the model's dtype.
        p: share of the attention mass that a decode step keeps for each query head, in ``(0, 1]``.
        min_keep: packed tokens that each head keeps at least.
        selector: which packed tokens are candidates, of which ``p`` keeps some: ``"full"`` all of them, ``"quest"``
            pages by their bounds, ``"tactic"`` clusters of keys, ``"double_sparse"`` tokens by a few channels,
            ``"streaming"`` the last ones, ``"snapkv"`` those the end of the prompt attends to.
        budget: candidates of each KV head, as a number of packed tokens (int) or a share of them (float in
            ``(0, 1]``). None, for ``quest``, ``tactic`` and ``double_sparse``, takes as many as carry half of what
            ``p`` leaves out, by their estimate: 0.975 of the mass at ``p = 0.95``. Attention to a fixed budget as in
            the selectors' papers, without pruning, is ``p=1.0`` with a budget.
        dense_layers: layers that keep the whole mass, because their attention is diffuse.
        min_sparse_len: packed tokens below which decode keeps the whole mass.
        alpha: share of the attention mass that prefill keeps, in ``(0, 1]``; 1.0 attends to everything.
        prefill_window: keys before a strip of 256 query rows that prefill attends to in any case.
        prefill_samples: rows of a strip whose attention is computed to choose its keys, 16 or 32.
        max_retrieving: share of sampled rows that may find a quarter of their mass in a key of their own; a KV head
            above it attends to everything in prefill; in ``(0, 1]``.
        min_prefill_len: keys below which prefill attends to everything.
        layers: bits, clip and refined channels of single layers: an index to ``LayerSettings``, or to some fields.
        calibrated_for: signature of the only model that these settings are for; None fits every model.
        skvq_tables: file of ``calibrate_skvq``, by which SKVQ packs every layer; bits, clip and ``p`` do not apply.
    Raises:
        ValueError: a value outside its range.
    """

    key_bits: int = 3
    value_bits: int = 3
    page_size: int = 64
    group_size: int = 64
    key_clip: float = 0.95
    key_refined: float = 0.125
    num_sinks: int = 4
    window: int = 64
    p: float = 0.95
    min_keep: int = 16
    selector: str = "full"
    budget: Budget | None = None
    dense_layers: tuple[int, ...] = (0, 1)
    min_sparse_len: int = 1024
    alpha: float = 0.95
    prefill_window: int = 128
    prefill_samples: int = 16
    max_retrieving: float = 0.01
    min_prefill_len: int = 4096
    layers: Mapping[int, LayerSettings] = field(default_factory=dict, hash=False)
    calibrated_for: Mapping[str, Any] | None = field(default=None, hash=False)
    skvq_tables: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        _ = self.key_codec, self.value_codec  # check their ranges
        object.__setattr__(self, "layers", parse_layers(self.layers, self._usual))
        if self.calibrated_for is not None and not isinstance(self.calibrated_for, Mapping):
            raise ValueError(f"calibrated_for must be a model's signature or None, got {self.calibrated_for!r}")
        if self.skvq_tables is not None and not isinstance(self.skvq_tables, str):
            raise ValueError(f"skvq_tables must be a file's path or None, got {self.skvq_tables!r}")
        require_share("p", self.p, "keep everything")
        require_share("alpha", self.alpha, "attend to everything in prefill")
        require_share("max_retrieving", self.max_retrieving, "let no head go dense in prefill")
        for name in ("num_sinks", "window", "min_keep", "min_sparse_len", "min_prefill_len"):
            require_count(name, getattr(self, name), 1 if name == "window" else 0)
        _ = self.stripe_plan
        for layer in self.dense_layers:
            require_count("dense_layers", layer, 0)
        if self.selector not in SELECTORS:
            raise ValueError(f"selector must be one of {', '.join(SELECTORS)}, got {self.selector!r}")
        check_budget(self.budget)
        if self.selector == "full" and self.budget is not None:
            raise ValueError(f"budget must be None with selector 'full', got {self.budget!r}; choose another selector")
        if self.budget is None and self.selector in ("streaming", "snapkv"):
            raise ValueError(f"selector {self.selector!r} must have a budget, got None; pass budget=0.25 or a number")
        if self.budget is None and self.selector != "full" and self.p == 1.0:
            raise ValueError(
                f"selector {self.selector!r} with p = 1 must have a budget, got None; pass budget=0.25 to attend to a "
                "fixed share as in its paper, or p below 1"
            )

    @property
    def key_codec(self) -> KeyCodec:
        return KeyCodec(self.key_bits, self.page_size, self.key_clip)

    @property
    def value_codec(self) -> ValueCodec:
        return ValueCodec(self.value_bits, self.page_size, self.group_size)

    def codecs(self, layer_idx: int) -> tuple[KeyCodec, ValueCodec]:
        """Return how keys and values of layer ``layer_idx`` are packed."""
        own = self.layers.get(layer_idx) or self._usual
        value_codec = ValueCodec(own.value_bits, self.page_size, self.group_size)
        return KeyCodec(own.key_bits, self.page_size, own.key_clip), value_codec

    def refined(self, layer_idx: int, kv_heads: int, key_dim: int) -> RefinedChannels:
        """Return which key channels of layer ``layer_idx`` are stored twice, of keys of that shape.

        Raises:
            ValueError: channels that keys of that shape do not have.
        """
        return (self.layers.get(layer_idx) or self._usual).refined(kv_heads, key_dim)

    @property
    def _usual(self) -> LayerSettings:
        return LayerSettings(self.key_bits, self.value_bits, self.key_clip, self.key_refined)

    @property
    def stripe_plan(self) -> StripePlan:
        floor = max(0.0, 1.0 - 1.6 * (1.0 - self.alpha))  # what 95 % of the sampled rows keep: 0.92 at 0.95
        return StripePlan(self.alpha, floor, self.prefill_window, samples=self.prefill_samples)

    @property
    def layout(self) -> Layout:
        return Layout(self.page_size, self.num_sinks, self.window)

    @cached_property  # asked for by each layer at each step
    def is_exact(self) -> bool:
        """Whether nothing is rounded and nothing left out: attention is then the stock function."""
        codecs = [self.key_codec, self.value_codec, *(codec for layer in self.layers for codec in self.codecs(layer))]
        is_raw = self.skvq_tables is None and all(codec.is_raw for codec in codecs)
        return self.p == 1.0 and is_raw and self.selector == "full"

    def policy(self, layer_idx: int) -> DecodePolicy:
        """Return how layer ``layer_idx`` decodes."""
        if layer_idx in self.dense_layers:
            return DecodePolicy()
        return DecodePolicy(self.p, self.min_keep, self.min_sparse_len, self._selector())

    def _selector(self) -> Selector:
        share, budget = (1 + self.p) / 2, self.budget
        if self.selector == "quest":
            return Quest(budget, share)
        if self.selector == "tactic":
            return Tactic(budget, share)
        if self.selector == "double_sparse":
            return DoubleSparse(budget, share)
        if budget is None:
            return Full()
        return Streaming(budget) if self.selector == "streaming" else SnapKV(budget)

    @staticmethod
    def preset(name: str = "balanced", **changes: Any) -> TwilightConfig:
        """Return a preset, with ``changes`` to single settings.

        Raises:
            ValueError: an unknown preset or setting; the message names the nearest.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{nearest(name, PRESETS)}")
        require_known(changes, [f.name for f in fields(TwilightConfig)])
        return replace(PRESETS[name], **changes)

    @staticmethod
    def from_dict(settings: dict[str, Any]) -> TwilightConfig:
        """Build from a dict of settings, of which ``"preset"`` may name where the others start from.

        Raises:
            ValueError: an unknown key, a format of a later version, or a value outside its range.
        """
        given = dict(settings)
        version = given.pop("format_version", FORMAT_VERSION)
        if version == 1:  # in which only single layers refined channels
            given["key_refined"], version = 0.0, FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version!r}; update hf-twilight")
        return TwilightConfig.preset(given.pop("preset", "balanced"), **given)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings with the format version, ready for JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "dense_layers": list(self.dense_layers)}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``twilight_config.json`` into ``folder`` (made if missing) and return its path."""
        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(draft, path)
        return path

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], **hub_options: Any) -> TwilightConfig:
        """Read ``twilight_config.json`` from a folder, or from a repository on the Hub.

        Args:
            name: a folder, or a repository id.
            hub_options: passed to ``huggingface_hub.hf_hub_download``, as ``revision`` or ``token``.
        Raises:
            FileNotFoundError: a folder without the file.
            ValueError: the file is not valid JSON, or holds unknown settings.
        """
        from huggingface_hub import hf_hub_download

        path = Path(name) / CONFIG_NAME
        is_local = path.is_file()
        if not is_local:
            if Path(name).exists():
                told = f"{name} must hold {CONFIG_NAME}, got a folder without it"
                raise FileNotFoundError(f"{told}; write it with save_pretrained")
            path = Path(hf_hub_download(os.fspath(name), CONFIG_NAME, **hub_options))
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be JSON, got {error}; write it again with save_pretrained") from error
        if not isinstance(settings, dict):
            told = f"{path} must be JSON with one object of settings, got {settings!r}"
            raise ValueError(f"{told}; write it again with save_pretrained")
        config = TwilightConfig.from_dict(settings)
        tables = config.skvq_tables
        if tables is None or Path(tables).is_absolute():
            return config
        if not is_local:
            hf_hub_download(os.fspath(name), tables, **hub_options)  # comes to lie beside the settings
        return replace(config, skvq_tables=str(path.parent.absolute() / tables))


def as_config(settings: TwilightConfig | dict[str, Any] | str | None, **changes: Any) -> TwilightConfig:
    """Return a config from a config, a dict, a name or None (``balanced``), with ``changes``.

    A name is a preset's, or a folder that holds ``twilight_config.json``, as ``calibrate`` writes it.

    Raises:
        FileNotFoundError: a folder without the file.
        TypeError: another type.
        ValueError: unknown names or values outside their ranges.
    """
    if settings is None:
        settings = "balanced"
    if isinstance(settings, str) and settings not in PRESETS and Path(settings).is_dir():
        settings = TwilightConfig.from_pretrained(settings)
    if isinstance(settings, str):
        return TwilightConfig.preset(settings, **changes)
    if isinstance(settings, dict):
        return TwilightConfig.from_dict({**settings, **changes})
    if not isinstance(settings, TwilightConfig):
        raise TypeError(
            f"twilight_config must be a TwilightConfig, a dict or a preset's name, got {type(settings).__name__}"
        )
    require_known(changes, [f.name for f in fields(TwilightConfig)])
    return replace(settings, **changes)


# What each costs on the embedded model is measured by `hf-twilight bench generate` and stands in the README.
PRESETS: dict[str, TwilightConfig] = {
    "exact": TwilightConfig(
        key_bits=16, value_bits=16, key_clip=1.0, key_refined=0.0, p=1.0, dense_layers=(), alpha=1.0
    ),
    "quality": TwilightConfig(key_bits=4, value_bits=4, page_size=32, key_clip=1.0, p=0.98),
    "balanced": TwilightConfig(),
    "compact": TwilightConfig(key_bits=2, value_bits=2, key_clip=0.75),
}
