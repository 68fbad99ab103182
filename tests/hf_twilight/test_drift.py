"""Drift through the cache: what must be zero is, what packing and pruning change is seen, and only where they act."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from hf_twilight import TwilightCache
from hf_twilight.drift import Reference, compare, decode_drift, packing_drift

PACKED: dict[str, Any] = {"key_bits": 4, "value_bits": 4, "page_size": 16, "window": 16, "p": 1.0}


@pytest.fixture
def model(llama: LlamaForCausalLM) -> PreTrainedModel:
    llama.set_attn_implementation("twilight")
    return llama


@pytest.fixture
def reference(model: PreTrainedModel) -> Reference:
    ids = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(0))
    return Reference.of(model, ids)


def test_reference_is_the_models_own_forward(model: PreTrainedModel, reference: Reference) -> None:
    with torch.inference_mode():
        assert torch.allclose(reference.logits, model(input_ids=reference.ids).logits[0], atol=1e-5)


@pytest.mark.parametrize("make", [lambda config: DynamicCache(config=config), lambda c: TwilightCache(c, "exact")])
def test_lossless_caches_do_not_drift(
    model: PreTrainedModel, reference: Reference, make: Callable[[Any], DynamicCache]
) -> None:
    for drift in (
        packing_drift(model, reference, make(model.config), chunk=16),
        decode_drift(model, reference, make(model.config), positions=20),
    ):
        found = drift.summary()
        assert abs(found["kl"]) < 1e-9
        assert found["agreement"] == 1.0
        assert found["perplexity"] == pytest.approx(found["dense_perplexity"], rel=1e-5)


def test_packing_drift_reads_packed_pages(model: PreTrainedModel, reference: Reference) -> None:
    cache = TwilightCache(model.config, **PACKED)
    drift = packing_drift(model, reference, cache, chunk=16)
    assert drift.kl.shape == (199,)
    # sinks, window and the page that is not full yet are exact; the pages behind them are not
    assert drift.kl[:32].max() < 1e-9
    assert drift.kl[64:].min() > 1e-7
    assert cache.get_seq_length() == 199
    at_once = TwilightCache(model.config, **PACKED, alpha=1.0)  # by the stock function, as the reference
    assert packing_drift(model, reference, at_once, chunk=199).kl.max() < 1e-9


def test_decode_drift_predicts_the_last_positions_from_a_prefilled_cache(
    model: PreTrainedModel, reference: Reference
) -> None:
    cache = TwilightCache(model.config, **PACKED)
    steps: list[int] = []
    drift = decode_drift(model, reference, cache, positions=12, on_tokens=steps.append)
    assert steps == [187] + [1] * 12
    expected = -reference.logits[-13:-1].log_softmax(-1).gather(-1, reference.ids[0, -12:, None])[:, 0]
    assert torch.allclose(drift.dense_nll, expected.double(), atol=1e-5)
    assert drift.kl.min() > 1e-7
    assert cache.stats()[0]["steps"] == 12


def test_pruning_acts_in_decode_only(model: PreTrainedModel, reference: Reference) -> None:
    pruned = {"key_bits": 16, "value_bits": 16, "page_size": 16, "window": 16, "p": 0.5, "min_keep": 0,
              "min_sparse_len": 0, "dense_layers": ()}  # fmt: skip
    assert packing_drift(model, reference, TwilightCache(model.config, **pruned), chunk=16).kl.max() < 1e-9
    assert decode_drift(model, reference, TwilightCache(model.config, **pruned), positions=20).kl.mean() > 1e-6


def test_compare_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, ours = (torch.randn(5, 7, generator=generator) for _ in range(2))
    next_ids = torch.tensor([0, 6, 3, 3, 1])
    found = compare(dense, ours, next_ids)
    p, q = dense.double().softmax(-1), ours.double().softmax(-1)
    assert torch.allclose(found.kl, (p * (p / q).log()).sum(-1), atol=1e-6)
    assert torch.allclose(found.nll, -q[torch.arange(5), next_ids].log(), atol=1e-6)
    summary = (found + found).summary()
    assert summary["positions"] == 10
    assert summary["perplexity_change"] == pytest.approx(summary["perplexity"] / summary["dense_perplexity"] - 1)
    assert summary["kl_error"] == pytest.approx(float(torch.cat([found.kl] * 2).std()) / math.sqrt(10))


def test_wrong_inputs_are_named(model: PreTrainedModel, reference: Reference) -> None:
    config = model.config
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        packing_drift(model, reference, DynamicCache(config=config), chunk=0)
    with pytest.raises(ValueError, match="positions must be from 1 to 198"):
        decode_drift(model, reference, DynamicCache(config=config), positions=199)
    cache = DynamicCache(config=config)
    packing_drift(model, reference, cache)
    with pytest.raises(ValueError, match="cache must be empty, got one of 199 tokens"):
        packing_drift(model, reference, cache)
    with pytest.raises(ValueError, match=r"ids must be \[1, S\]"):
        Reference.of(model, torch.zeros(2, 5, dtype=torch.long))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must use attn_implementation"):
        Reference.of(model, reference.ids)
