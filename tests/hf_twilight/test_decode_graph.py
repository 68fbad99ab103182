"""Steps from static buffers: the plain ones to the bit, with what a graph captures held fast, and in ``generate``."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import CompileConfig, LlamaForCausalLM, StaticCache

from hf_twilight import TwilightCache, TwilightConfig, decode_graph
from hf_twilight.config import as_config
from hf_twilight.decode_graph import DecodeGraph, refusal
from twilight_cache import LayerStore

SMALL: dict[str, Any] = {"page_size": 16, "window": 16, "num_sinks": 4, "min_sparse_len": 32, "dense_layers": (0,)}
PACKED = TwilightConfig.preset("balanced", p=0.8, **SMALL)

MakeInputs = Callable[..., dict[str, Tensor]]


class _Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations with the very tensors and numbers that they once were given."""

    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.played.append((func, args, kwargs or {}, out))
        return out

    def kernel(self, func: Any, stats: Tensor) -> Any:
        """Record a call of a kernel, which numba or Triton runs and which adds to ``stats``, as one operation."""

        def recorded(*args: Any) -> Any:
            with _disable_current_modes():
                before = stats.clone()
                out = func(*args)
                stats.copy_(before)  # a GPU computes nothing while it captures
            self.played.append((func, args, {}, out))
            return out

        return recorded

    def replay(self) -> None:
        for func, args, kwargs, out in self.played:
            new = func(*args, **kwargs)
            for old, found in zip(_tensors(out), _tensors(new), strict=True):
                if old.data_ptr() != found.data_ptr():  # neither a view nor in place
                    old.copy_(found)


def _tensors(out: Any) -> list[Tensor]:
    found = list(out) if isinstance(out, tuple | list) else [out]
    return [one for one in found if isinstance(one, Tensor)]


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Callable[[DecodeGraph], None]:
    """Give a ``DecodeGraph`` tapes for graphs."""

    def capture(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        tape, prepared = _Tape(), LayerStore.prepared

        def recording(store: LayerStore, heads: int, scaling: float, stats: Tensor) -> Any:
            return tape.kernel(prepared(store, heads, scaling, stats), stats)

        with monkeypatch.context() as patch, tape:
            patch.setattr(LayerStore, "prepared", recording)
            logits = forward()
        return tape.replay, logits

    def use(graph: DecodeGraph) -> None:
        graph._capture = capture

    return use


def _filled(model: LlamaForCausalLM, settings: TwilightConfig, inputs: dict[str, Tensor]) -> TwilightCache:
    model.set_attn_implementation("twilight")
    cache = TwilightCache(model.config, settings)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        # the first decode step proves that nothing stands between cache and attention
        _plain(model, cache, torch.full((len(mask), 1), 7), mask)
    return cache


def _plain(model: LlamaForCausalLM, cache: TwilightCache, ids: Tensor, mask: Tensor) -> Tensor:
    tokens = cache.get_seq_length()
    whole = torch.cat([mask, mask.new_ones(len(mask), tokens + 1 - mask.shape[1])], 1)
    out = model(
        input_ids=ids, attention_mask=whole, position_ids=whole.sum(-1, keepdim=True) - 1, past_key_values=cache,
        use_cache=True,
    )  # fmt: skip
    logits: Tensor = out.logits[:, -1]
    return logits


def _state(cache: TwilightCache) -> dict[str, Any]:
    """All that a cache holds, but for columns and pages of nobody."""
    used = sorted({int(page) for row in cache.sequences.table for page in row if page >= 0})
    found: dict[str, Any] = {"pages": cache.sequences.pages.tolist(), "tokens": cache.get_seq_length()}
    for layer in cache.twilight_layers:
        assert layer.store is not None and layer.store.plain is not None
        name = layer.layer_idx
        stored = {k: t for k, t in layer.store.tensors().items() if not k.startswith("plain")}
        found |= {f"{name}.{k}": t if k == "refined.index" else t[used] for k, t in stored.items()}
        plain = int(cache.sequences.plain.max())
        found[f"{name}.plain"] = layer.store.plain.values[:, :, :plain]
        found[f"{name}.sums"], found[f"{name}.steps"] = layer.store.decodes.sums, layer.store.decodes.steps
    return found


def _compare(model: LlamaForCausalLM, settings: TwilightConfig, inputs: dict[str, Tensor], steps: int, use: Any) -> int:
    """Decode greedily from two equal caches; return how many graphs were captured."""
    plain = _filled(model, settings, inputs)
    other = copy.deepcopy(plain)
    graph = DecodeGraph(model, other)
    use(graph)
    mask = inputs["attention_mask"]
    ids = torch.full((len(mask), 1), 9)
    with torch.no_grad():
        for _ in range(steps):
            positions = other.sequences.lengths[:, None]
            found = graph.step(ids, torch.from_numpy(positions))
            expected = _plain(model, plain, ids, mask)
            assert torch.equal(found, expected)
            ids = expected.argmax(-1, keepdim=True)
    left, right = _state(plain), _state(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        assert same, name
    assert plain.stats() == other.stats()
    return graph.captures


@pytest.mark.parametrize("pad", [[0], [0, 11, 30]], ids=str)
def test_static_steps_are_the_plain_ones_to_the_bit(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, pad: list[int]
) -> None:
    assert _compare(llama, PACKED, make_inputs(90, pad), 40, lambda graph: None) == 0


@pytest.mark.parametrize("pad", [[0], [0, 11, 30]], ids=str)
def test_replayed_steps_are_the_plain_ones_to_the_bit(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, taped: Any, monkeypatch: pytest.MonkeyPatch, pad: list[int]
) -> None:
    """Nothing but the buffers may change between replays; page tensors grow now and then, and so does the table."""
    monkeypatch.setattr(decode_graph, "_SPARE_PAGES", 2)
    captures = _compare(llama, PACKED, make_inputs(90, pad), 120, taped)
    assert 2 <= captures <= 8


@pytest.mark.parametrize("refined", [[list(range(8)), list(range(4, 12))], 0.5], ids=["named", "chosen"])
def test_replayed_steps_are_the_plain_ones_with_refined_channels(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, taped: Any, refined: Any
) -> None:
    layer = {"key_bits": 2, "value_bits": 4, "key_refined": refined}
    settings = as_config(PACKED, layers={"1": layer})
    assert _compare(llama, settings, make_inputs(90, [0]), 20, taped) == 1


def test_the_first_page_of_a_row_chooses_between_replays(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, taped: Any
) -> None:
    """Graphs must read the choice where it stands, not as it was when they were captured."""
    settings = as_config(PACKED, key_refined=0.5)
    assert _compare(llama, settings, make_inputs(8, [0, 5]), 60, taped) >= 1


def test_replayed_steps_of_triton_kernels_are_the_plain_ones(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, taped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not there, or compiles for the GPU of this machine")
    monkeypatch.setenv("HF_TWILIGHT_BACKEND", "triton")
    assert _compare(llama, PACKED, make_inputs(60, [0]), 4, taped) == 1


def test_steps_from_buffers_and_plain_ones_may_follow_each_other(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, taped: Any
) -> None:
    """Also where rows changed or tokens were taken back between them: what moved is captured anew."""
    inputs = make_inputs(90, [0, 11])
    plain, mask, ids = _filled(llama, PACKED, inputs), inputs["attention_mask"], torch.full((2, 1), 9)
    other = copy.deepcopy(plain)
    graph = DecodeGraph(llama, other)
    taped(graph)
    with torch.no_grad():
        for index in range(24):
            if index == 8:
                for cache in (plain, other):
                    cache.crop(-5)
            if index == 16:
                for cache in (plain, other):
                    cache.reorder_cache(torch.tensor([1, 0]))
                mask = mask.flip(0)
            expected = _plain(llama, plain, ids, mask)
            positions = torch.from_numpy(other.sequences.lengths[:, None])
            found = _plain(llama, other, ids, mask) if index % 5 == 4 else graph.step(ids, positions)
            assert torch.equal(found, expected)
    assert graph.captures == 2


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch, taped: Any) -> list[DecodeGraph]:
    """Let ``generate`` take steps from buffers on CPUs, too; return those that it made."""
    made: list[DecodeGraph] = []
    init = DecodeGraph.__init__

    def begin(self: DecodeGraph, model: Any, cache: TwilightCache) -> None:
        init(self, model, cache)
        taped(self)
        made.append(self)

    monkeypatch.setattr(DecodeGraph, "__init__", begin)
    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
    return made


def _generate(model: LlamaForCausalLM, inputs: dict[str, Tensor], **changes: Any) -> Tensor:
    compiles = CompileConfig()
    compiles._compile_all_devices = True
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "compile_config": compiles}
    ours = {"cache_implementation": "twilight", "cache_config": PACKED.to_dict()}
    torch.manual_seed(0)
    found: Tensor = model.generate(**inputs, **{**settings, **ours, **changes})
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 17}], ids=str
)
@pytest.mark.parametrize("pad", [[0], [0, 30]], ids=str)
def test_generate_takes_steps_from_graphs_and_gives_the_same_tokens(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, offered: list[DecodeGraph], pad: list[int], changes: Any
) -> None:
    inputs = make_inputs(90, pad)
    found = _generate(llama, inputs, **changes)
    assert [graph.captures > 0 for graph in offered] == [True]
    plain = _generate(llama, inputs, disable_compile=True, **changes)
    assert torch.equal(found, plain)
    assert offered[1].captures == 0


def test_generate_goes_on_with_a_given_cache_and_graph(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, offered: list[DecodeGraph]
) -> None:
    """A second turn; its cache is asked for statistics, which count each step once."""
    inputs = make_inputs(90, [0])
    caches, answers = [], []
    for is_disabled in (False, True):
        cache = TwilightCache(llama.config, PACKED)
        ids, steps = inputs["input_ids"], 0
        for _ in range(2):
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = _generate(llama, given, past_key_values=cache, cache_config=None, disable_compile=is_disabled)
            steps += 39
            ids = torch.cat([ids, inputs["input_ids"][:, :11]], 1)
        caches.append(cache)
        answers.append(ids)
    assert torch.equal(*answers)
    assert sum(graph.captures for graph in offered) >= 2
    assert caches[0].stats() == caches[1].stats()


def test_generate_asks_the_model_where_no_graph_can_serve(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, offered: list[DecodeGraph]
) -> None:
    inputs = make_inputs(90, [0])
    told = _generate(llama, inputs, output_hidden_states=True, return_dict_in_generate=True)
    assert [graph.captures for graph in offered] == [0]
    assert torch.equal(told.sequences, _generate(llama, inputs))  # type: ignore[attr-defined]


def test_a_step_that_cannot_be_captured_is_taken_all_the_same(
    llama: LlamaForCausalLM, make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graph: DecodeGraph) -> None:
        def capture(forward: Callable[[], Tensor]) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                # the first layer is captured, the second waits for the host
                calls = iter((lambda query, *_: torch.zeros_like(query), _synchronize))
                patch.setattr(LayerStore, "prepared", lambda *_: next(calls))
                forward()
            raise AssertionError("it must not come here")

        graph._capture = capture

    def _synchronize(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with caplog.at_level("INFO", "hf_twilight"):
        assert _compare(llama, PACKED, make_inputs(90, [0]), 10, refuse) == 0
    said = [record.message for record in caplog.records if "one by one" in record.message]
    assert said == [
        "twilight: decode steps are launched one by one: operation not permitted when stream is capturing"
    ]  # fmt: skip


def test_refusal_names_what_stands_in_the_way(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(settings: Any) -> str | None:
        return refusal(llama, TwilightCache(llama.config, settings))

    assert told(PACKED) == "the model is on cpu"
    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
    assert told(PACKED) == "the model does not take our attention function"
    llama.set_attn_implementation("twilight")
    assert told(PACKED) is None
    assert told("exact") == "decode does not run in our kernels"
    assert told(as_config(PACKED, selector="tactic")) == "the selector 'tactic' may wait for the device"


def test_other_caches_get_what_transformers_compiles(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: seen.append(call) or call)
    inputs = {"input_ids": torch.full((1, 1), 5), "past_key_values": StaticCache(llama.config, max_cache_len=32)}
    with torch.no_grad():
        found = llama.get_compiled_call(None)(**inputs).logits
        assert len(seen) == 1
        assert torch.equal(found, llama(input_ids=inputs["input_ids"]).logits)
