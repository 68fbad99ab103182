from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_twilight import TwilightCache
from hf_twilight.attention import register, twilight_attention, twilight_mask

SMALL = {"page_size": 16, "window": 16, "num_sinks": 4, "min_sparse_len": 0, "dense_layers": ()}
Inputs = dict[str, Tensor]


def _logits(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None, cache: Any, chunks: list[int]) -> Tensor:
    """Logits of every token, fed in ``chunks``, then one by one."""
    found, at = [], 0
    total = ids.shape[1]
    for count in [*chunks, *[1] * (total - sum(chunks))]:
        seen = None if mask is None else mask[:, : at + count]
        positions = None if mask is None else (mask[:, : at + count].cumsum(-1) - 1).clamp_min(0)[:, at:]
        with torch.no_grad():
            out = model(
                ids[:, at : at + count], attention_mask=seen, position_ids=positions, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
        found.append(out.logits)
        at += count
    return torch.cat(found, 1)


def _with(model: LlamaForCausalLM, attention: str) -> LlamaForCausalLM:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(attention)
    return twin


MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda mask: None,
    "ones": lambda mask: mask,
    "left": lambda mask: mask * (torch.arange(mask.shape[1]) >= torch.tensor([[0], [7], [31]])),
    "right": lambda mask: mask * ((torch.arange(mask.shape[1]) < 50) | (torch.arange(mask.shape[1]) >= 70)),
    "holes": lambda mask: mask * (torch.arange(mask.shape[1]) % 9 != torch.tensor([[4], [5], [100]])),
    "left and holes": lambda mask: (
        mask * (torch.arange(mask.shape[1]) >= torch.tensor([[0], [7], [31]])) * (torch.arange(mask.shape[1]) != 45)
    ),
}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 128, (3, 84), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("chunks", [[70], [25, 33, 12], [1]], ids=["whole", "chunks", "tokens"])
def test_exact_cache_equals_the_stock_cache_for_any_mask(
    llama: LlamaForCausalLM, ids: Tensor, mask: str, chunks: list[int]
) -> None:
    """Regular padding is answered by the handle, irregular masks by the dense path: the same bits."""
    given = MASKS[mask](torch.ones_like(ids))
    real = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
    expected = _logits(_with(llama, "sdpa"), ids, given, DynamicCache(config=llama.config), chunks)
    model = _with(llama, "twilight")
    found = _logits(model, ids, given, TwilightCache(model.config, "exact", **SMALL), chunks)
    assert torch.equal(found[real], expected[real])


@pytest.mark.parametrize("mask", MASKS)
def test_decode_kernel_equals_the_stock_cache_for_any_mask(llama: LlamaForCausalLM, ids: Tensor, mask: str) -> None:
    """Raw pages and p = 1 through the kernel (a selector keeps settings from being exact): rounding only."""
    given = MASKS[mask](torch.ones_like(ids))
    real = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
    expected = _logits(_with(llama, "sdpa"), ids, given, DynamicCache(config=llama.config), [70])
    model = _with(llama, "twilight")
    cache = TwilightCache(model.config, "exact", selector="quest", budget=1.0, **SMALL)
    assert not cache.settings.is_exact
    found = _logits(model, ids, given, cache, [70])
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert bool(cache.stats()) == (mask in ("none", "ones", "left")), "irregular masks take the dense path"


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_our_attention_with_a_stock_cache_is_stock(llama: LlamaForCausalLM, ids: Tensor, mask: str) -> None:
    given = MASKS[mask](torch.ones_like(ids))
    real = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
    caches: list[Callable[[], Any]] = [
        lambda: DynamicCache(config=llama.config),
        lambda: StaticCache(config=llama.config, max_cache_len=96),
        lambda: None,
    ]
    for make in caches:
        chunks = [84] if make() is None else [70]
        expected = _logits(_with(llama, "sdpa"), ids, given, make(), chunks)
        found = _logits(_with(llama, "twilight"), ids, given, make(), chunks)
        assert torch.equal(found[real], expected[real])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_our_cache_with_stock_attention_is_stock(
    llama: LlamaForCausalLM, ids: Tensor, mask: str, attention: str
) -> None:
    given = MASKS[mask](torch.ones_like(ids))
    real = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
    model = _with(llama, attention)
    expected = _logits(model, ids, given, DynamicCache(config=model.config), [25, 45])
    found = _logits(model, ids, given, TwilightCache(model.config, "exact", **SMALL), [25, 45])
    assert torch.equal(found[real], expected[real])


def test_stock_attention_over_packed_pages_is_near_ours(llama: LlamaForCausalLM, ids: Tensor) -> None:
    """The same pages, dequantized for sdpa or read by our kernel."""
    found = []
    for attention in ("sdpa", "twilight"):
        model = _with(llama, attention)
        found.append(_logits(model, ids, None, TwilightCache(model.config, "quality", p=1.0, **SMALL), [70]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", [("twilight", "sdpa", "twilight"), ("sdpa", "twilight", "sdpa")])
@pytest.mark.parametrize("do_copy", [False, True])
def test_attention_may_change_under_a_cache(
    llama: LlamaForCausalLM, ids: Tensor, order: tuple[str, ...], do_copy: bool
) -> None:
    """A stand-in of NaN must never reach an attention function that does not know it."""
    expected = _logits(_with(llama, "sdpa"), ids, None, DynamicCache(config=llama.config), [70])
    cache: Any = TwilightCache(llama.config, "exact", **SMALL)
    llama.set_attn_implementation(order[0])
    found, at = [], 0
    for step, count in enumerate([70, 1, 1, 1, 1, 3, 1, 1, 1, 1, 3]):
        llama.set_attn_implementation(order[step % 3])
        if do_copy:
            cache = copy.deepcopy(cache)
        with torch.no_grad():
            found.append(llama(ids[:, at : at + count], past_key_values=cache).logits)
        at += count
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_four_dimensional_masks_are_obeyed(llama: LlamaForCausalLM, ids: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    total = ids.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    mask = causal & ((torch.rand(3, 1, total, total, generator=generator) > 0.3) | torch.eye(total, dtype=torch.bool))
    outputs = []
    for attention in ("sdpa", "twilight"):
        model = _with(llama, attention)
        cache: Any = DynamicCache(config=model.config)
        if attention == "twilight":
            cache = TwilightCache(model.config, "exact", **SMALL)
        with torch.no_grad():
            first = model(ids[:, :80], attention_mask=mask[:, :, :80, :80], past_key_values=cache).logits
            steps = [
                model(ids[:, i : i + 1], attention_mask=mask[:, :, i : i + 1, : i + 1], past_key_values=cache).logits
                for i in range(80, total)
            ]
        outputs.append(torch.cat([first, *steps], 1))
    assert torch.equal(*outputs)


def test_gradients_flow_as_with_the_stock_attention(llama: LlamaForCausalLM, ids: Tensor) -> None:
    """Training a prefix with a cache: pages hold no gradient, the forward's own tokens do."""
    gradients = []
    for attention in ("sdpa", "twilight"):
        model = _with(llama, attention)
        cache: Any = DynamicCache(config=model.config)
        if attention == "twilight":
            cache = TwilightCache(model.config, "exact", **SMALL)
        with torch.no_grad():
            model(ids[:, :60], past_key_values=cache)
        model(ids[:, 60:80], past_key_values=cache).logits.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_gradient_of_a_single_token_uses_the_dense_path(llama: LlamaForCausalLM, ids: Tensor) -> None:
    gradients = []
    for attention in ("sdpa", "twilight"):
        model = _with(llama, attention)
        cache: Any = DynamicCache(config=model.config)
        if attention == "twilight":
            cache = TwilightCache(model.config, "exact", **SMALL)
        with torch.no_grad():
            model(ids[:, :60], past_key_values=cache)
        model(ids[:, 60:61], past_key_values=cache).logits.logsumexp(-1).sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_dropout_is_applied_in_training(llama: LlamaForCausalLM, ids: Tensor) -> None:
    llama.config.attention_dropout = 0.5
    outputs = []
    for attention in ("sdpa", "twilight"):
        model = LlamaForCausalLM(llama.config)
        model.load_state_dict(llama.state_dict())
        model.set_attn_implementation(attention)
        model.train()
        torch.manual_seed(5)
        with torch.no_grad():
            outputs.append(model(ids).logits)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], _logits(_with(llama, "sdpa"), ids, None, None, [84]))


class _Module(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def test_attention_without_a_handle_is_sdpa() -> None:
    query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    expected, _ = sdpa_attention_forward(_Module(), query, key, key, None, scaling=0.3)
    found, weights = twilight_attention(_Module(), query, key, key, None, scaling=0.3)
    assert weights is None
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [0, 2]),
        ([[0, 0, 0, 0], [0, 0, 0, 1]], [4, 3]),
        ([[1, 1, 1, 0], [1, 1, 1, 1]], None),
        ([[0, 1, 0, 1], [1, 1, 1, 1]], None),
    ],
)
def test_mask_notes_left_padding_only(padding: list[list[int]], expected: list[int] | None) -> None:
    mask = twilight_mask(
        2, 1, 4, q_offset=3, attention_mask=torch.tensor(padding, dtype=torch.bool), dtype=torch.float32
    )
    assert mask is not None
    assert getattr(mask, "_twilight_padding", None) == expected


def test_mask_of_another_pattern_notes_nothing() -> None:
    def sliding(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (kv > q - 2)

    mask = twilight_mask(
        1, 2, 4, q_offset=2, mask_function=sliding, attention_mask=torch.ones(1, 4, dtype=torch.bool),
        allow_is_causal_skip=False, dtype=torch.float32,
    )  # fmt: skip
    assert mask is not None
    assert not hasattr(mask, "_twilight_padding")


def test_register_is_done_on_import_and_repeats() -> None:
    register()
    register()
    assert AttentionInterface()["twilight"] is twilight_attention
    assert AttentionMaskInterface()["twilight"] is twilight_mask
