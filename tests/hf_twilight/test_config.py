from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from hf_twilight import PRESETS, TwilightConfig
from hf_twilight.config import CONFIG_NAME, as_config
from hf_twilight.layer_settings import LayerSettings
from twilight_cache import DecodePolicy, DoubleSparse, Full, Quest, Selector, SnapKV, Streaming, Tactic

# every setting at another value than its default
CHANGED: dict[str, Any] = {
    "key_bits": 2, "value_bits": 8, "page_size": 32, "group_size": 32, "key_clip": 0.9, "num_sinks": 0,
    "window": 7, "key_refined": 0.25, "p": 0.5, "min_keep": 3, "selector": "quest", "budget": 77,
    "dense_layers": (3,), "min_sparse_len": 5,
    "alpha": 0.9, "prefill_window": 64, "prefill_samples": 32, "max_retrieving": 0.02, "min_prefill_len": 512,
    "layers": {2: LayerSettings(4, 3, 1.0)}, "calibrated_for": {"model_type": "llama"},
    "skvq_tables": "/nowhere/skvq.safetensors",
}  # fmt: skip


def test_changed_names_every_setting() -> None:
    assert CHANGED.keys() == {f.name for f in fields(TwilightConfig)}
    assert all(getattr(TwilightConfig(), name) != value for name, value in CHANGED.items())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("keybits", "key_bits"),
        ("sink", "num_sinks"),
        ("windows", "window"),
        ("top_p", "p"),
        ("pagesize", "page_size"),
    ],
)
def test_unknown_setting_names_the_nearest(name: str, nearest: str) -> None:
    if name == "top_p":  # no letters in common but one: any suggestion will do
        nearest = ""
    for build in (
        lambda: TwilightConfig.from_dict({name: 4}),
        lambda: TwilightConfig.preset("exact", **{name: 4}),
        lambda: as_config(None, **{name: 4}),
        lambda: as_config("exact", **{name: 4}),
        lambda: as_config({"p": 1.0}, **{name: 4}),
        lambda: as_config(TwilightConfig(), **{name: 4}),
    ):
        with pytest.raises(ValueError, match=rf"no setting '{name}'; did you mean '{nearest}"):
            build()


def test_unknown_preset_names_the_nearest() -> None:
    for build in (
        lambda: TwilightConfig.preset("balance"),
        lambda: as_config("balance"),
        lambda: TwilightConfig.from_dict({"preset": "balance"}),
    ):
        with pytest.raises(ValueError, match="got 'balance'; did you mean 'balanced'"):
            build()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("key_bits", v) for v in (0, 1, 5, 32, -4, "4", None)],
        *[("value_bits", v) for v in (0, 1, 5, 32, None)],
        *[("page_size", v) for v in (0, 8, 48, 256, -64, None)],
        *[("group_size", v) for v in (0, -16, 8, 40)],
        *[("key_clip", v) for v in (0, 0.0, 1.5, -1.0, float("nan"))],
        *[("p", v) for v in (0, 0.0, 1.0001, -0.5, float("nan"), True, "0.9", None)],
        *[("num_sinks", v) for v in (-1, 1.5, True, "4", None)],
        *[("window", v) for v in (0, -1, 1.5, None)],
        *[("key_refined", v) for v in (-0.1, 0.6, 8, True, "0.1", float("nan"))],
        *[("min_keep", v) for v in (-1, 0.5)],
        *[("budget", v) for v in (0, -1, 0.0, 1.5, float("nan"), True, "0.5")],
        *[("min_sparse_len", v) for v in (-1, 0.5)],
        *[("dense_layers", v) for v in ((-1,), (0.5,), ("0",), [True])],
        *[("selector", v) for v in ("best", "", None, 3)],
        *[("layers", v) for v in ([4], None, {-1: {}}, {"x": {}}, {1.5: {}}, {True: {}}, {0: {"bits": 4}}, {0: 4})],
        ("calibrated_for", "llama"),
        ("skvq_tables", 3),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        TwilightConfig(**{name: value})


def test_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TwilightConfig().p = 0.5  # type: ignore[misc]
    assert hash(TwilightConfig()) == hash(TwilightConfig())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_what_its_name_says(name: str) -> None:
    config = TwilightConfig.preset(name)
    assert config == PRESETS[name] == as_config(name) == TwilightConfig.from_dict({"preset": name})
    assert config.is_exact == (name == "exact")


def test_preset_takes_changes() -> None:
    assert TwilightConfig.preset("compact", p=0.5) == as_config({"preset": "compact", "p": 0.5})
    assert TwilightConfig.preset("compact", p=0.5).key_bits == PRESETS["compact"].key_bits
    assert as_config({"preset": "compact"}, p=0.5).p == 0.5
    assert as_config(TwilightConfig(p=0.3), window=9) == TwilightConfig(p=0.3, window=9)
    assert as_config(None) == PRESETS["balanced"]


@pytest.mark.parametrize("given", [3, 0.9, ["exact"], ("p", 1), object()])
def test_as_config_refuses_other_types(given: Any) -> None:
    with pytest.raises(TypeError, match="must be a TwilightConfig, a dict or a preset's name, got"):
        as_config(given)


@pytest.mark.parametrize(
    "changes",
    [
        {"p": 0.99},
        {"key_bits": 8},
        {"value_bits": 8},
        {"selector": "quest", "budget": 1.0},
        {"selector": "snapkv", "budget": 9},
        {"layers": {1: {"value_bits": 8}}},
    ],
)
def test_is_exact_only_if_nothing_is_rounded_or_left_out(changes: dict[str, Any]) -> None:
    assert PRESETS["exact"].is_exact
    assert not TwilightConfig.preset("exact", **changes).is_exact


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 0.5}, "budget must be None with selector 'full', got 0.5"),
        ({"selector": "streaming"}, "selector 'streaming' must have a budget, got None; pass budget=0.25"),
        ({"selector": "snapkv"}, "selector 'snapkv' must have a budget, got None"),
        ({"selector": "quest", "p": 1.0}, "selector 'quest' with p = 1 must have a budget, got None"),
        ({"selector": "tactic", "p": 1.0}, "selector 'tactic' with p = 1 must have a budget, got None"),
    ],
)
def test_combinations_without_meaning_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TwilightConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "selector"),
    [
        ({}, Full()),
        ({"selector": "quest", "budget": 9}, Quest(9, 0.95)),
        ({"selector": "quest"}, Quest(None, 0.95)),
        ({"selector": "tactic"}, Tactic(None, 0.95)),
        ({"selector": "double_sparse", "budget": 0.5}, DoubleSparse(0.5, 0.95)),
        ({"selector": "streaming", "budget": 9}, Streaming(9)),
        ({"selector": "snapkv", "budget": 0.1}, SnapKV(0.1)),
    ],
)
def test_policy_holds_the_selector_and_keeps_dense_layers_whole(settings: dict[str, Any], selector: Selector) -> None:
    config = TwilightConfig(p=0.9, dense_layers=(1,), **settings)
    assert config.policy(0).p == 0.9
    assert config.policy(0).selector == selector
    assert config.policy(1) == DecodePolicy(p=1.0, selector=Full())


def test_codecs_and_layout_follow_the_settings() -> None:
    config = TwilightConfig(**CHANGED)
    assert (config.key_codec.bits, config.key_codec.page_size, config.key_codec.clip) == (2, 32, 0.9)
    assert (config.value_codec.bits, config.value_codec.page_size, config.value_codec.group_size) == (
        8,
        32,
        32,
    )
    assert (config.layout.page_size, config.layout.num_sinks, config.layout.window) == (32, 0, 7)


def test_layers_differ_where_they_are_named() -> None:
    config = TwilightConfig(key_bits=2, value_bits=3, layers={"7": {"key_bits": 4, "key_clip": 1.0}, 3: {}})
    assert list(config.layers) == [3, 7]
    assert [codec.bits for codec in config.codecs(7)] == [4, 3]
    assert config.codecs(7)[0].clip == 1.0
    assert config.codecs(3) == config.codecs(0) == (config.key_codec, config.value_codec)
    assert as_config({"preset": "exact", "layers": {0: {"key_bits": 16}}}).is_exact


def test_values_of_a_layer_are_checked_as_those_of_all() -> None:
    with pytest.raises(ValueError, match=r"layers\[4\]: key_bits must be one of .*, got 5"):
        TwilightConfig(layers={4: {"key_bits": 5}})
    with pytest.raises(ValueError, match=r"layers\[4\] takes key_bits, value_bits, key_clip, key_refined, got 'bits'"):
        TwilightConfig(layers={4: {"bits": 5}})


def test_as_config_reads_a_folder(tmp_path: Path) -> None:
    TwilightConfig(**CHANGED).save_pretrained(tmp_path)
    assert as_config(str(tmp_path)) == TwilightConfig(**CHANGED)
    assert as_config(str(tmp_path), p=0.25).p == 0.25
    with pytest.raises(FileNotFoundError, match=r"must hold twilight_config\.json"):
        as_config(str(tmp_path.parent))


@pytest.mark.parametrize("config", [*PRESETS.values(), TwilightConfig(**CHANGED)])
def test_to_dict_is_json_and_comes_back(config: TwilightConfig) -> None:
    assert TwilightConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config", [*PRESETS.values(), TwilightConfig(**CHANGED)])
def test_save_pretrained_comes_back(config: TwilightConfig, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    path = config.save_pretrained(folder)
    assert path == folder / CONFIG_NAME
    assert [entry.name for entry in folder.iterdir()] == [CONFIG_NAME]
    assert TwilightConfig.from_pretrained(folder) == config
    assert TwilightConfig.from_pretrained(str(folder)) == config
    PRESETS["exact"].save_pretrained(folder)
    assert TwilightConfig.from_pretrained(folder) == PRESETS["exact"]


@pytest.mark.parametrize("length", [0, 1, 20, -3])
def test_from_pretrained_explains_a_truncated_file(length: int, tmp_path: Path) -> None:
    path = TwilightConfig().save_pretrained(tmp_path)
    path.write_text(path.read_text()[:length])
    with pytest.raises(ValueError, match=r"twilight_config\.json must be JSON, got .*save_pretrained"):
        TwilightConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"exact"', '[["p", 0.5]]', "true"])
def test_from_pretrained_explains_json_that_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"twilight_config\.json must be JSON"):
        TwilightConfig.from_pretrained(tmp_path)


def test_from_pretrained_explains_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(ValueError, match=r"twilight_config\.json must be JSON"):
        TwilightConfig.from_pretrained(tmp_path)


def test_from_pretrained_checks_what_it_reads(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_NAME
    path.write_text('{"pp": 0.5}')
    with pytest.raises(ValueError, match="no setting 'pp'; did you mean 'p'"):
        TwilightConfig.from_pretrained(tmp_path)
    path.write_text('{"p": 7}')
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got 7"):
        TwilightConfig.from_pretrained(tmp_path)
    path.write_text('{"format_version": 1, "layers": {"3": {"key_bits": 4}}}')
    earlier = TwilightConfig.from_pretrained(tmp_path)
    assert earlier.key_refined == earlier.layers[3].key_refined == 0.0
    path.write_text('{"format_version": 3, "p": 0.5}')
    with pytest.raises(ValueError, match="format_version must be 2, got 3; update hf-twilight"):
        TwilightConfig.from_pretrained(tmp_path)


def test_from_pretrained_explains_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold twilight_config\.json, got a folder without it"):
        TwilightConfig.from_pretrained(tmp_path)


def test_from_pretrained_without_network_fails_as_the_hub_does() -> None:
    with pytest.raises(OSError, match=r"no-such-owner/no-such-repo|offline|outgoing traffic|Hub"):
        TwilightConfig.from_pretrained("no-such-owner/no-such-repo")
