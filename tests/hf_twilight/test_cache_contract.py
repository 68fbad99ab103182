"""The ``Cache`` contract as a suite: what holds for the stock cache holds for ours, packed or not.

``DynamicCache`` is the oracle: most tests run on it too, so that one that asks too much fails there first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, T5Config

from hf_twilight import TwilightCache
from hf_twilight.attention import twilight_attention

L, B, K, H, D = 2, 3, 2, 4, 16
SMALL = {"page_size": 16, "window": 16, "num_sinks": 4, "min_sparse_len": 0, "dense_layers": ()}
TRANSFORMERS = Version(transformers.__version__)


def _config(attention: str) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=H * D, num_attention_heads=H, num_key_value_heads=K, num_hidden_layers=L,
        attn_implementation=attention, vocab_size=32, intermediate_size=32,
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A cache under test. ``is_lossless``: what it returns is what went in, bit for bit."""

    name: str
    make: Callable[[str], Cache]
    is_lossless: bool
    is_ours: bool = True


KINDS = [
    Kind("dynamic", lambda attention: DynamicCache(config=_config(attention)), True, is_ours=False),
    Kind("exact", lambda attention: TwilightCache(_config(attention), "exact", **SMALL), True),
    Kind("packed4", lambda attention: TwilightCache(_config(attention), "quality", **SMALL), False),
    Kind("packed2", lambda attention: TwilightCache(_config(attention), "compact", **SMALL), False),
]
OURS = [kind for kind in KINDS if kind.is_ours]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
each_of_ours = pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
each_attention = pytest.mark.parametrize("attention", ["sdpa", "twilight"])


def _states(
    count: int, seed: int = 0, rows: int = B, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, ``[B, K, T, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, K, count, D, generator=generator).to(dtype),
         torch.randn(rows, K, count, D, generator=generator).to(dtype))
        for _ in range(L)
    ]  # fmt: skip


def _feed(cache: Cache, states: list[tuple[Tensor, Tensor]], chunk: int | None = None) -> list[tuple[Tensor, Tensor]]:
    total = states[0][0].shape[2]
    found: list[tuple[Tensor, Tensor]] = []
    for at in range(0, max(total, 1), chunk or max(total, 1)):
        end = min(at + (chunk or total), total)
        found = [cache.update(k[:, :, at:end], v[:, :, at:end], layer) for layer, (k, v) in enumerate(states)]
    return found


def _content(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    if isinstance(cache, TwilightCache):
        cache.commit()  # the attention function does so; before it, an update is still what was passed
    return [(layer[0], layer[1]) for layer in cache]


def _assert_same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> None:
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            assert a.shape == b.shape
            assert torch.equal(a, b)


def _join(*parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [tuple(torch.cat(tensors, 2) for tensors in zip(*layer, strict=True)) for layer in zip(*parts, strict=True)]


def _rows(states: list[tuple[Tensor, Tensor]], index: Any) -> list[tuple[Tensor, Tensor]]:
    return [(k[index], v[index]) for k, v in states]


@each_kind
@each_attention
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_update_returns_and_keeps_all_tokens(kind: Kind, attention: str, chunk: int | None) -> None:
    cache, states = kind.make(attention), _states(70)
    found = _feed(cache, states, chunk)
    assert [(k.shape, v.shape) for k, v in found] == [(k.shape, v.shape) for k, v in states]
    if kind.is_lossless:
        _assert_same(found, states)
        _assert_same(_content(cache), states)
    else:
        whole = kind.make(attention)
        _feed(whole, states)
        _assert_same(_content(cache), _content(whole))
        for (k, v), (found_k, found_v) in zip(states, _content(cache), strict=True):
            assert torch.equal(found_k[:, :, :4], k[:, :, :4])
            assert torch.equal(found_v[:, :, -16:], v[:, :, -16:])
            assert not torch.equal(found_k, k)


@each_kind
@each_attention
def test_update_of_the_first_tokens_returns_them_unrounded(kind: Kind, attention: str) -> None:
    states = _states(70)
    _assert_same(_feed(kind.make(attention), states), states)


@each_kind
@each_attention
def test_lengths_count_logical_tokens(kind: Kind, attention: str) -> None:
    cache = kind.make(attention)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    total = 0
    for count in (33, 1, 1, 20):
        _feed(cache, _states(count, seed=count))
        total += count
        for layer in range(L):
            assert cache.get_seq_length(layer) == total
            assert cache.get_mask_sizes(3, layer) == (total + 3, 0)
    assert cache.get_max_length() == -1 if hasattr(cache, "get_max_length") else True
    assert len(cache) == L


@each_kind
def test_flags_are_the_stock_ones(kind: Kind) -> None:
    cache = kind.make("twilight")
    assert isinstance(cache, DynamicCache)
    assert not cache.is_compileable
    assert cache.is_sliding == [False] * L
    assert not cache.is_initialized
    _feed(cache, _states(3))
    assert cache.is_initialized
    if hasattr(Cache, "is_croppable"):
        assert cache.is_croppable
    if hasattr(Cache, "is_linear"):
        assert cache.is_linear == [False] * L


@each_of_ours
def test_batch_size_is_that_of_the_rows(kind: Kind) -> None:
    cache = kind.make("sdpa")
    assert cache.batch_size == -1
    _feed(cache, _states(3))
    assert cache.batch_size == B
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2 * B
    cache.reset()
    assert cache.batch_size == -1


@each_kind
@each_attention
@pytest.mark.parametrize("count", [0, 1, 15, 16, 40, 69, 70])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_crop_removes_the_last_tokens(kind: Kind, attention: str, count: int, as_tensor: bool) -> None:
    cache, states = kind.make(attention), _states(70)
    _feed(cache, states)
    before = _content(cache)
    cache.crop(torch.tensor(-count) if as_tensor else -count)
    left = 70 - count
    assert cache.get_seq_length() == left
    assert cache.get_mask_sizes(1, 0) == (left + 1, 0)
    _assert_same(_content(cache), [(k[:, :, :left], v[:, :, :left]) for k, v in before])
    more = _states(30, seed=1)
    found = _feed(cache, more)
    assert cache.get_seq_length() == left + 30
    assert [k.shape[2] for k, _ in found] == [left + 30] * L
    if kind.is_lossless:
        _assert_same(_content(cache), _join([(k[:, :, :left], v[:, :, :left]) for k, v in states], more))


@each_kind
@pytest.mark.parametrize("count", [1, 5, torch.tensor(3)])
def test_crop_refuses_a_positive_number(kind: Kind, count: Any) -> None:
    if not kind.is_ours and Version("5.18") > TRANSFORMERS:
        pytest.skip("Transformers 5.17 still takes a positive number as the length to crop to")
    cache, states = kind.make("sdpa"), _states(20)
    _feed(cache, states)
    with pytest.raises(ValueError, match=r"negative"):
        cache.crop(count)
    assert cache.get_seq_length() == 20
    _assert_same(_content(cache), states)


@each_kind
def test_crop_before_the_first_update_does_nothing(kind: Kind) -> None:
    cache = kind.make("sdpa")
    cache.crop(0)
    if Version("5.18") <= TRANSFORMERS or kind.is_ours:
        cache.crop(-3)
    assert cache.get_seq_length() == 0
    _feed(cache, _states(5))
    assert cache.get_seq_length() == 5


@each_kind
@each_attention
@pytest.mark.parametrize("draft", [1, 5, 40])
def test_crop_of_a_draft_leaves_no_trace_when_recording(kind: Kind, attention: str, draft: int) -> None:
    """What assisted decoding does: record, draft, take back, at every place in a page."""
    plain, drafting = kind.make(attention), kind.make(attention)
    drafting.activate_past_recording()
    for cache in (plain, drafting):
        _feed(cache, _states(40))
    for step in range(20):
        _feed(drafting, _states(draft, seed=100 + step))
        drafting.crop(-draft)
        for cache in (plain, drafting):
            _feed(cache, _states(3, seed=step))
        drafting.crop(0)
        assert drafting.get_seq_length() == plain.get_seq_length() == 43 + 3 * step
        _assert_same(_content(drafting), _content(plain))


@each_kind
@each_attention
@pytest.mark.parametrize("index", [[2, 0, 1], [0, 0, 2], [1, 1, 1]])
def test_reorder_cache_moves_whole_rows(kind: Kind, attention: str, index: list[int]) -> None:
    cache = kind.make(attention)
    _feed(cache, _states(70))
    before = _content(cache)
    cache.reorder_cache(torch.tensor(index))
    _assert_same(_content(cache), _rows(before, index))
    more = _states(30, seed=1)
    _feed(cache, more)
    if kind.is_lossless:
        _assert_same(_content(cache), _join(_rows(before, index), more))
    assert cache.get_seq_length() == 100


@each_kind
@each_attention
@pytest.mark.parametrize("repeats", [1, 3])
def test_batch_repeat_interleave_repeats_rows_in_place(kind: Kind, attention: str, repeats: int) -> None:
    cache = kind.make(attention)
    _feed(cache, _states(70))
    before = _content(cache)
    cache.batch_repeat_interleave(repeats)
    index = torch.arange(B).repeat_interleave(repeats)
    _assert_same(_content(cache), _rows(before, index))
    more = _states(30, seed=1, rows=B * repeats)
    _feed(cache, more)
    if kind.is_lossless:
        _assert_same(_content(cache), _join(_rows(before, index), more))


@each_attention
@each_of_ours
@pytest.mark.parametrize("operation", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_batch_operations_right_after_update_equal_those_after_attention(
    kind: Kind, attention: str, operation: str
) -> None:
    """Models that process keys further never show them to our attention function: tokens stay pending."""
    settled, pending = kind.make(attention), kind.make(attention)
    for cache in (settled, pending):
        _feed(cache, _states(70))
    _content(settled)
    settled.crop(0)
    argument = 2 if operation == "batch_repeat_interleave" else torch.tensor([2, 0])
    for cache in (settled, pending):
        getattr(cache, operation)(argument)
    _assert_same(_content(pending), _content(settled))
    assert _content(pending)[0][0].shape[0] == (2 * B if operation == "batch_repeat_interleave" else 2)


@each_kind
@each_attention
@pytest.mark.parametrize(
    "index",
    [torch.tensor([1]), torch.tensor([2, 0]), torch.tensor([-1]), torch.tensor([True, False, True])],
    ids=["one", "two", "negative", "bool"],
)
def test_batch_select_indices_keeps_rows(kind: Kind, attention: str, index: Tensor) -> None:
    cache = kind.make(attention)
    _feed(cache, _states(70))
    before = _content(cache)
    cache.batch_select_indices(index)
    _assert_same(_content(cache), _rows(before, index))
    rows = _content(cache)[0][0].shape[0]
    _feed(cache, _states(30, seed=1, rows=rows))
    assert cache.get_seq_length() == 100


@each_kind
def test_batch_operations_before_the_first_update_do_nothing(kind: Kind) -> None:
    cache = kind.make("sdpa")
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    _feed(cache, _states(5))
    assert cache.get_seq_length() == 5


@each_kind
@each_attention
def test_reset_forgets_everything_and_the_cache_serves_again(kind: Kind, attention: str) -> None:
    if not kind.is_ours and Version("5.20") > TRANSFORMERS:
        pytest.skip("Transformers 5.17 zeroes the tensors of a dynamic cache and keeps its length")
    cache, states = kind.make(attention), _states(70)
    _feed(cache, _states(50, seed=9))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    if isinstance(cache, TwilightCache):
        assert cache.memory().total == 0
        assert cache.sequences.pool.num_used == 0
        assert cache.stats() == []
    fresh = kind.make(attention)
    for one in (cache, fresh):
        _feed(one, states)
    _assert_same(_content(cache), _content(fresh))


@each_of_ours
def test_reset_takes_another_batch_size_dtype_and_shape(kind: Kind) -> None:
    cache = kind.make("sdpa")
    _feed(cache, _states(50))
    cache.reset()
    states = _states(40, rows=5, dtype=torch.bfloat16)
    _feed(cache, states)
    assert _content(cache)[0][0].shape == (5, K, 40, D)
    assert _content(cache)[0][0].dtype == torch.bfloat16


@each_kind
@each_attention
def test_deepcopy_goes_its_own_way(kind: Kind, attention: str) -> None:
    cache = kind.make(attention)
    _feed(cache, _states(70))
    before = _content(cache)
    twin = copy.deepcopy(cache)
    _assert_same(_content(twin), before)
    one, other = _states(40, seed=1), _states(33, seed=2)
    _feed(cache, one)
    _assert_same(_content(twin), before)
    _feed(twin, other)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (110, 103)
    for copied, more in ((cache, one), (twin, other)):
        alone = kind.make(attention)
        _feed(alone, _states(70))
        _feed(alone, more)
        _assert_same(_content(copied), _content(alone))
    cache.reset()
    assert twin.get_seq_length() == 103
    assert _content(twin)[0][0].shape[2] == 103


@each_of_ours
def test_deepcopy_follows_the_attention_of_the_model(kind: Kind) -> None:
    """The config says which attention the model uses now; a copied one would go on saying what it was."""
    cache = kind.make("twilight")
    _feed(cache, _states(70))
    twin = copy.deepcopy(cache)
    assert isinstance(cache, TwilightCache)
    assert isinstance(twin, TwilightCache)
    assert twin.model_config is cache.model_config
    assert all(layer.model_config is cache.model_config for layer in twin.twilight_layers)
    assert all(layer.sequences is twin.sequences for layer in twin.twilight_layers)
    assert twin.sequences is not cache.sequences


@each_kind
@each_attention
def test_offload_and_prefetch_keep_the_content(kind: Kind, attention: str) -> None:
    cache = kind.make(attention)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    _feed(cache, _states(70))
    before = _content(cache)
    for index, layer in enumerate(cache.layers):
        cache.offload(index)
        layer.prefetch()
    _assert_same(_content(cache), before)
    _feed(cache, _states(3, seed=1))
    assert cache.get_seq_length() == 73


@each_kind
@each_attention
def test_zero_length_updates_change_nothing(kind: Kind, attention: str) -> None:
    cache, states = kind.make(attention), _states(40)
    found = _feed(cache, _states(0))
    assert [k.shape for k, _ in found] == [(B, K, 0, D)] * L
    assert cache.get_seq_length() == 0
    _feed(cache, states)
    found = _feed(cache, _states(0))
    assert [k.shape for k, _ in found] == [(B, K, 40, D)] * L
    assert cache.get_seq_length() == 40
    expected = kind.make(attention)
    _feed(expected, states)
    _assert_same(_content(cache), _content(expected))


@each_kind
@each_attention
def test_early_initialization_changes_nothing(kind: Kind, attention: str) -> None:
    cache, states = kind.make(attention), _states(40)
    cache.early_initialization(B, K, D, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    _assert_same(_feed(cache, states), states)
    assert cache.get_seq_length() == 40


@each_kind
def test_iteration_gives_keys_and_values_of_each_layer(kind: Kind) -> None:
    cache, states = kind.make("sdpa"), _states(20)
    _feed(cache, states)
    layers = list(cache)
    assert len(layers) == L
    assert all(len(layer) >= 2 for layer in layers)
    _assert_same([(layer[0], layer[1]) for layer in layers], states)


@each_of_ours
@each_attention
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.zeros(B + 1, K, 1, D), f"holds {B} sequences, got a batch of {B + 1}; use a new cache"),
        (
            torch.zeros(B, K, 1, D, dtype=torch.bfloat16),
            r"dtype torch\.float32 and got torch\.bfloat16; use a new",
        ),
        (torch.zeros(B, K + 1, 1, D), "KV heads 2 and got 3; use a new"),
        (torch.zeros(B, K, 1, D + 8), "key dim 16 and got 24, .*; use a new"),
    ],
    ids=["batch", "dtype", "heads", "dim"],
)
def test_update_refuses_what_does_not_continue_the_cache(kind: Kind, attention: str, other: Tensor, words: str) -> None:
    cache, states = kind.make(attention), _states(40)
    _feed(cache, states)
    before = _content(cache)
    with pytest.raises(ValueError, match=words):
        cache.update(other, other, 0)
    assert cache.get_seq_length() == 40
    _assert_same(_content(cache), before)
    _feed(cache, _states(1, seed=1))
    assert cache.get_seq_length() == 41


@pytest.mark.parametrize("kind", [kind for kind in OURS if not kind.is_lossless], ids=lambda kind: kind.name)
@each_attention
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("count", [2, 60])
def test_update_refuses_numbers_that_cannot_be_packed_and_writes_nothing(
    kind: Kind, attention: str, bad: float, which: int, count: int
) -> None:
    cache = kind.make(attention)
    _feed(cache, _states(40))
    before = _content(cache)
    poisoned = [tensor.clone() for tensor in _states(count, seed=1)[0]]
    poisoned[which][1, 0, count // 2, 3] = bad
    with pytest.raises(ValueError, match=r"finite .*'exact'"):
        cache.update(*poisoned, 0)
    assert cache.get_seq_length() == 40
    _assert_same(_content(cache), before)
    _feed(cache, _states(5, seed=2))
    assert cache.get_seq_length() == 45


@pytest.mark.parametrize("kind", [kind for kind in OURS if not kind.is_lossless], ids=lambda kind: kind.name)
@each_attention
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_single_token_that_cannot_be_packed_is_refused_with_its_page(kind: Kind, attention: str, bad: float) -> None:
    """Looking at every decoded token would cost time at every step: it is checked when its page is due."""
    cache = kind.make(attention)
    _feed(cache, _states(40))
    poisoned = [tensor.clone() for tensor in _states(1, seed=1)[0]]
    poisoned[0][1, 0, 0, 3] = bad
    cache.update(*poisoned, 0)
    cache.update(*_states(1, seed=1)[1], 1)
    with pytest.raises(ValueError, match="finite"):
        _feed(cache, _states(40, seed=2), 1)
    cache.reset()
    _feed(cache, _states(40))
    fresh = kind.make(attention)
    _feed(fresh, _states(40))
    _assert_same(_content(cache), _content(fresh))


@each_of_ours
@each_attention
def test_update_beyond_max_pages_says_so_and_keeps_the_cache(kind: Kind, attention: str) -> None:
    example = kind.make(attention)
    assert isinstance(example, TwilightCache)
    cache = TwilightCache(_config(attention), example.settings, max_pages=2 * B)
    _feed(cache, _states(60))
    before = _content(cache)

    def update() -> None:
        cache.update(*_states(40, seed=1)[0], 0)
        cache.commit()  # what our attention function does

    with pytest.raises(MemoryError, match="page pool needs"):
        update()
    assert cache.get_seq_length() == 60
    _assert_same(_content(cache), before)
    cache.batch_select_indices(torch.tensor([1]))
    _feed(cache, _states(40, seed=1, rows=1))
    assert cache.get_seq_length() == 100


def test_cache_refuses_what_is_no_decoder_config() -> None:
    with pytest.raises(ValueError, match="decoder-only models, got encoder-decoder 't5'"):
        TwilightCache(T5Config())
    with pytest.raises(TypeError, match=r"must be a model's config, got .*; pass model\.config"):
        TwilightCache({"hidden_size": 8})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="settings or preset, not both"):
        TwilightCache(_config("sdpa"), "exact", preset="exact")
    with pytest.raises(ValueError, match="did you mean 'window'"):
        TwilightCache(_config("sdpa"), windo=3)


def test_caches_of_one_config_share_nothing() -> None:
    config = _config("sdpa")
    one, other = TwilightCache(config), TwilightCache(config)
    _feed(one, _states(70))
    assert other.get_seq_length() == 0
    assert other.memory().total == 0


@each_of_ours
def test_nbytes_counts_every_tensor(kind: Kind) -> None:
    cache = kind.make("sdpa")
    assert isinstance(cache, TwilightCache)
    assert cache.nbytes == 0
    _feed(cache, _states(200))
    stores = [layer.store for layer in cache.twilight_layers]
    counted = sum(tensor.nbytes for store in stores if store for tensor in store.tensors().values())
    assert cache.memory().total == counted
    assert cache.nbytes == counted + cache.sequences.table.nbytes
    dense = sum(tensor.nbytes for layer in _content(cache) for tensor in layer)
    if not kind.is_lossless:
        assert cache.nbytes < dense
    assert all(layer.keys is None and layer.values is None for layer in cache.twilight_layers)


class _Attention(nn.Module):
    """As much of an attention module as the interface needs."""

    is_causal = True
    num_key_value_groups = H // K
    training = False


def _attend(cache: Cache, states: list[tuple[Tensor, Tensor]], seed: int = 0) -> list[Tensor]:
    """One forward through our attention function, with a query for each token of each layer."""
    module, outputs = _Attention(), []
    for index, (keys, values) in enumerate(states):
        count, start = keys.shape[2], cache.get_seq_length(index)
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(keys.shape[0], H, count, D, generator=generator)
        k, v = cache.update(keys, values, index)
        causal = torch.arange(start + count) <= torch.arange(start, start + count)[:, None]
        mask = None
        if count > 1 and start:
            mask = causal.expand(keys.shape[0], 1, -1, -1)
        outputs.append(twilight_attention(module, query, k, v, mask, scaling=D**-0.5)[0])
    return outputs


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2]], ids=["exact", "packed4"])
def test_decode_through_the_handle_never_shows_numbers_to_the_model(kind: Kind) -> None:
    cache = kind.make("twilight")
    _attend(cache, _states(60))
    for step in range(3):
        keys, values = _states(1, seed=step)[0]
        k, v = cache.layers[0].update(keys, values)
        assert k.shape == v.shape == (B, K, 61 + step, D)
        assert torch.isnan(k).all()
        assert torch.isnan(v).all()
        query = torch.randn(B, H, 1, D, generator=torch.Generator().manual_seed(step))
        out = twilight_attention(_Attention(), query, k, v, None, scaling=D**-0.5)[0]
        assert out.shape == (B, 1, H, D)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select", "crop", "deepcopy", "reset", "offload"])
def test_decode_after_operations_equals_the_stock_cache(operation: str) -> None:
    """Through the attention function, with the exact preset: token for token what the stock cache gives."""
    outputs = []
    for kind in KINDS[:2]:
        if operation == "reset" and Version("5.20") > TRANSFORMERS:
            pytest.skip("Transformers 5.17 zeroes the tensors of a dynamic cache and keeps its length")
        cache, rows = kind.make("twilight"), B
        _attend(cache, _states(60))
        if operation == "reorder":
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        elif operation == "repeat":
            cache.batch_repeat_interleave(2)
            rows = 2 * B
        elif operation == "select":
            cache.batch_select_indices(torch.tensor([2, 1]))
            rows = 2
        elif operation == "crop":
            cache.crop(-31)
        elif operation == "deepcopy":
            cache = copy.deepcopy(cache)
        elif operation == "offload":
            for layer in cache.layers:
                layer.offload()
        else:
            cache.reset()
            _attend(cache, _states(20, seed=8))
        outputs.append([_attend(cache, _states(1, seed=s, rows=rows), seed=s) for s in range(20)])
    for one, other in zip(*outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@each_kind
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("second", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@each_attention
def test_cache_filled_in_one_autograd_mode_serves_in_another(
    kind: Kind, first: Any, second: Any, attention: str
) -> None:
    cache, expected = kind.make(attention), kind.make(attention)
    states, more, last = _states(40), _states(30, seed=1), _states(1, seed=2)
    for one in (states, more, last):
        _feed(expected, one)
    with first():
        _feed(cache, states)
    with second():
        _feed(cache, more)
        _feed(cache, last)
        cache.reorder_cache(torch.arange(B))
        cache.crop(0)
    _assert_same(_content(cache), _content(expected))
