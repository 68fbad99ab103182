"""Every selector behind a model: copies, files, rows and statistics of a cache in the middle of a decode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_twilight import TwilightCache, TwilightConfig
from twilight_cache import SELECTORS

SMALL: dict[str, Any] = {"page_size": 16, "window": 16, "min_sparse_len": 0, "min_keep": 2, "dense_layers": (0,)}
# under the pruner without a budget (where that can be) and with one; alone with a budget
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "quest": {"selector": "quest"},
    "quest, budget": {"selector": "quest", "budget": 0.25, "p": 0.9},
    "quest, alone": {"selector": "quest", "budget": 64, "p": 1.0},
    "tactic": {"selector": "tactic"},
    "tactic, alone": {"selector": "tactic", "budget": 64, "p": 1.0},
    "double_sparse": {"selector": "double_sparse"},
    "double_sparse, alone": {"selector": "double_sparse", "budget": 64, "p": 1.0},
    "streaming": {"selector": "streaming", "budget": 64},
    "streaming, alone": {"selector": "streaming", "budget": 64, "p": 1.0},
    "snapkv": {"selector": "snapkv", "budget": 64},
    "snapkv, alone": {"selector": "snapkv", "budget": 64, "p": 1.0},
}
Decode = Callable[..., list[Tensor]]


@pytest.fixture
def model(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    model = make_llama()
    model.set_attn_implementation("twilight")
    return model


@pytest.fixture
def decode(model: LlamaForCausalLM) -> Decode:
    """Feed token by token the ids of some columns; return the logits of each."""

    @torch.inference_mode()
    def run(cache: TwilightCache, ids: Tensor, mask: Tensor, first: int, last: int) -> list[Tensor]:
        return [
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits[:, -1]
            for i in range(first, last)
        ]

    return run


def _inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 128, (2, 340), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(340) >= torch.tensor([[0], [100]])).long()


def _prefilled(model: LlamaForCausalLM, name: str, ids: Tensor, mask: Tensor, count: int = 300) -> TwilightCache:
    cache = TwilightCache(model.config, TwilightConfig(**{**SMALL, **SETTINGS[name]}))
    with torch.inference_mode():
        model(ids[:, :count], attention_mask=mask[:, :count], past_key_values=cache)
    return cache


def test_every_selector_is_tested() -> None:
    assert {name.split(",")[0] for name in SETTINGS} == SELECTORS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_copies_and_files_go_on_alike(name: str, model: LlamaForCausalLM, decode: Decode, tmp_path: Path) -> None:
    ids, mask = _inputs()
    cache = _prefilled(model, name, ids, mask)
    decode(cache, ids, mask, 300, 310)
    twin = copy.deepcopy(cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = TwilightCache.load(tmp_path / "cache.safetensors", model.config)
    expected = decode(cache, ids, mask, 310, 330)
    for other in (twin, loaded):
        for mine, theirs in zip(decode(other, ids, mask, 310, 330), expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_take_their_candidates_along(name: str, model: LlamaForCausalLM, decode: Decode) -> None:
    ids, mask = _inputs()
    cache, rows = _prefilled(model, name, ids, mask), torch.tensor([1, 0, 1])
    decode(cache, ids, mask, 300, 305)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(rows)
    expected = decode(cache, ids, mask, 305, 312)
    for mine, theirs in zip(decode(swapped, ids[rows], mask[rows], 305, 312), expected, strict=True):
        torch.testing.assert_close(mine, theirs[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_stats_say_what_is_known(name: str, model: LlamaForCausalLM, decode: Decode) -> None:
    ids, mask = _inputs()
    cache = _prefilled(model, name, ids, mask)
    decode(cache, ids, mask, 300, 310)
    dense, found = cache.stats()
    settings = cache.settings
    packed = float(cache.sequences.pages.mean()) * 16
    assert dense["candidates"] == dense["kept"] == dense["scored"]
    assert dense["coverage"] == [1.0] * 4
    for head in range(4):
        needed, kept, candidates, scored = (found[key][head] for key in ("needed", "kept", "candidates", "scored"))
        assert needed <= kept <= candidates <= scored <= packed + 1e-6
    if settings.selector != "full":
        assert sum(found["candidates"]) < sum(dense["candidates"])
    if settings.p == 1.0:
        assert found["kept"] == found["candidates"]
        assert all(abs(share - 1) < 1e-5 for share in found["mass"])
    estimates = name in ("full", "tactic", "tactic, alone", "double_sparse", "double_sparse, alone", "quest")
    assert (found["coverage"] is not None) == estimates
    if settings.selector != "full" and settings.budget is None:
        assert min(found["coverage"]) >= (1 + settings.p) / 2 - 1e-3
    assert bool(cache.memory().selector) == (settings.selector in ("tactic", "snapkv"))


def test_snapkv_chooses_anew_for_each_prompt(model: LlamaForCausalLM, decode: Decode) -> None:
    ids, mask = _inputs()
    cache = _prefilled(model, "snapkv", ids, mask, 250)
    state = cache.twilight_layers[1].store.selector_state  # type: ignore[union-attr]
    first, pages = state.tensors["chosen"].clone(), state.pages.copy()
    decode(cache, ids, mask, 250, 290)
    assert (state.pages == pages).all()
    assert torch.equal(state.tensors["chosen"][:, :, : first.shape[2]], first)
    with torch.inference_mode():
        model(ids[:, 290:310], attention_mask=mask[:, :310], past_key_values=cache)
    assert (state.pages > pages).all()
    assert not torch.equal(state.tensors["chosen"][:, :, : first.shape[2]], first)


def test_snapkv_sees_a_sparse_prompt(model: LlamaForCausalLM) -> None:
    ids, mask = _inputs()
    settings = TwilightConfig(**{**SMALL, **SETTINGS["snapkv"], "alpha": 0.9, "min_prefill_len": 0})
    cache = TwilightCache(model.config, settings)
    with torch.inference_mode():
        model(ids[:, :300], attention_mask=mask[:, :300], past_key_values=cache)
    layer = cache.twilight_layers[1]
    assert layer.prefill.stats() is not None
    assert layer.store is not None
    assert (layer.store.selector_state.pages > 0).all()
    assert layer.store.selector_state.tensors["chosen"].any()
