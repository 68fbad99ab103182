"""What the tests of kernels share: every device of this machine, poisoned memory, random pages."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import twilight_kernels
from twilight_kernels import (
    KeyCodec,
    KeyPages,
    PlainTokens,
    ValueCodec,
    ValuePages,
    _numba_decode,
    _numba_score,
    _reference,
    backend_name,
)
from twilight_kernels._numba_amx import has_tiles

IS_EMULATED = os.environ.get("TRITON_INTERPRET") == "0"
TRITON = "ptx" if IS_EMULATED else "interpreter"  # how Triton's kernels run on CPU tensors here
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of a ``device`` on every one, and those marked ``interpreted`` by Triton on CPU tensors, too."""
    if "device" in metafunc.fixturenames:
        interpreted = [TRITON] if metafunc.definition.get_closest_marker("interpreted") else []
        metafunc.parametrize("device", [*DEVICES, *interpreted], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run by Triton, of a marked test, only the cases that its mark names by a part of their id: it is slow."""
    items[:] = [item for item in items if not _is_left_out(item)]


def _is_left_out(item: pytest.Item) -> bool:
    marker, found = item.get_closest_marker("interpreted"), getattr(item, "callspec", None)
    if marker is None or found is None or TRITON not in found.id:
        return False
    named = found.id.replace(f"-{TRITON}", "").replace(f"{TRITON}-", "")
    return bool(marker.args) and named not in marker.args and named != TRITON


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Each device whose kernels can run here; the public functions pick the backend by it."""
    if request.param != TRITON:
        return str(request.param)
    return str(request.getfixturevalue("triton_on_cpu"))


@pytest.fixture
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton's kernels take CPU tensors: interpreted, or compiled and run instruction by instruction."""
    if importlib.util.find_spec("triton") is None or "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton is not there, or compiles for the GPU of this machine")
    monkeypatch.setenv("HF_TWILIGHT_BACKEND", "triton")
    with ExitStack() as stack:
        if IS_EMULATED:
            from ptx.launch import emulated

            for module in pkgutil.iter_modules(twilight_kernels.__path__):
                if module.name.startswith("_triton_"):  # to be compiled, not interpreted
                    importlib.import_module(f"twilight_kernels.{module.name}")
            monkeypatch.setenv("TRITON_INTERPRET", "1")  # else the backend asks for a GPU
            stack.enter_context(emulated())
        yield "cpu"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run on one thread, but for the tests of threads: the reference is many tiny operations that gain nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, or the largest integer: nothing may rely on its content."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Score keys as CPUs do that have no matrix tiles; where there are tiles, nothing else would test that."""
    if backend_name("cpu") != "numba" or not has_tiles("int8"):
        pytest.skip("the other tests run without tiles")
    for module in (_numba_decode, _numba_score):
        monkeypatch.setattr(module, "scores_on_tiles", lambda _: False)
    _numba_decode._prepared.cache_clear()
    yield
    _numba_decode._prepared.cache_clear()


@pytest.fixture
def make_scene(device: str) -> Callable[..., Scene]:
    """Return ``random_scene`` for the device of the test."""

    def make(**shape: Any) -> Scene:
        return random_scene(device=device, **shape)

    return make


@pytest.fixture
def make_scene_on() -> Callable[..., Scene]:
    """Return ``random_scene`` for tests that name the device themselves."""
    return lambda device, **shape: random_scene(device=device, **shape)


@pytest.fixture(params=["cuda", TRITON])
def gpu(request: pytest.FixtureRequest) -> str:
    """Return a device whose kernels are Triton's, for tests of what other backends do not have."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda"
    return str(request.getfixturevalue("triton_on_cpu"))


@dataclasses.dataclass
class Scene:
    """Pages of one layer, block tables and plain tokens of a batch, and what a decode step gets."""

    key_pages: KeyPages
    value_pages: ValuePages
    plain: PlainTokens
    query: Tensor
    block_table: Tensor
    num_pages: Tensor
    plain_len: Tensor
    scaling: float
    new_key: Tensor
    new_value: Tensor

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of ``decode_attention``; the plain tokens are a copy, as it writes to them."""
        plain = PlainTokens(self.plain.keys.clone(), self.plain.values.clone())
        names = ("block_table", "num_pages", "plain_len", "scaling", "new_key", "new_value")
        return (
            (self.query, self.key_pages, self.value_pages, plain),
            {name: getattr(self, name) for name in names},
        )

    def wide(self) -> Scene:
        """The same numbers in float64, which the reference computes in."""

        def raw(pages: Any) -> Any:
            return dataclasses.replace(pages, codes=pages.codes.double()) if pages.codec.is_raw else pages

        return dataclasses.replace(
            self,
            key_pages=raw(self.key_pages),
            value_pages=raw(self.value_pages),
            plain=PlainTokens(self.plain.keys.double(), self.plain.values.double()),
            query=self.query.double(),
            new_key=self.new_key.double(),
            new_value=self.new_value.double(),
        )

    def logit_rounding(self) -> Tensor:
        """What float32 may lose on a logit, ``[B, H]``: eps times the magnitudes it is a sum of times root of D.

        Errors of random sign grow with the root of their number; the magnitudes are those of the terms that a
        kernel may sum, ``q . lo`` and ``(q * step) . code``, not of their sum, which may cancel.
        """
        used = self.block_table[self.block_table >= 0].long()
        largest = self.plain.keys.double().nan_to_num(0).abs().amax((0, 3))  # [K, D]
        if len(used) and self.key_pages.codec.is_raw:
            largest = largest.maximum(self.key_pages.codes[used].double().abs().amax((0, 3)))
        elif len(used):
            low, step = self.key_pages.lo[used].double(), self.key_pages.step[used].double()
            largest = largest.maximum((low.abs() + self.key_pages.codec.levels * step).amax(0))
        largest = largest.repeat_interleave(self.query.shape[1] // largest.shape[0], 0)  # [H, D]
        terms = (self.query.double().abs() * largest).sum(-1) * self.scaling
        return terms * torch.finfo(torch.float32).eps * self.query.shape[2] ** 0.5

    def row(self, row: int) -> Scene:
        """One row of the batch, alone, with a block table of its own length."""
        only = slice(row, row + 1)
        names = ("query", "num_pages", "plain_len", "new_key", "new_value")
        return dataclasses.replace(
            self,
            plain=PlainTokens(self.plain.keys[only].clone(), self.plain.values[only].clone()),
            block_table=self.block_table[only, : max(1, int(self.num_pages[row]))],
            **{name: getattr(self, name)[only] for name in names},
        )


def random_scene(
    *,
    kv_heads: int = 2,
    q_per_kv: int = 3,
    key_dim: int = 64,
    value_dim: int = 64,
    key_bits: int = 4,
    value_bits: int = 4,
    page_size: int = 64,
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
    pages: Sequence[int] = (3, 2),
    plain: Sequence[int] = (20, 65),
    sharpness: float = 3.0,
    device: str = "cpu",
    seed: int = 0,
) -> Scene:
    """Make pages in scattered slots, everything that no row owns being NaN.

    ``pages`` and ``plain`` are the pages and plain tokens of each row; queries and new tokens are strided.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    rows, slots = len(pages), sum(pages) + 3
    key_pages = KeyPages.empty(slots, kv_heads, key_dim, KeyCodec(key_bits, page_size), dtype, device)
    value_pages = ValuePages.empty(
        slots, kv_heads, value_dim, ValueCodec(value_bits, page_size, group_size), dtype, device
    )
    for tensor in (*key_pages.tensors().values(), *value_pages.tensors().values()):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
    owned = torch.randperm(slots, generator=draw)[: sum(pages)].to(device, torch.int32)
    offsets = normal(kv_heads, 1, key_dim) * 2  # channels have their own means, as in real keys
    _reference.store_key_pages(key_pages, owned, normal(len(owned), kv_heads, page_size, key_dim) + offsets)
    _reference.store_value_pages(value_pages, owned, normal(len(owned), kv_heads, page_size, value_dim))
    table = torch.full((rows, max(1, *pages)), -1, dtype=torch.int32, device=device)
    for row, part in enumerate(owned.split(list(pages))):
        table[row, : len(part)] = part
    tokens = PlainTokens.empty(rows, kv_heads, key_dim, value_dim, max(plain), dtype, device)
    for row, count in enumerate(plain):
        tokens.keys[row, :, :, :count] = normal(kv_heads, key_dim, count)
        tokens.values[row, :, :count] = normal(kv_heads, count, value_dim)
        tokens.keys[row, :, :, count:] = torch.nan
        tokens.values[row, :, count:] = torch.nan
    strided = normal(rows, 2, kv_heads * q_per_kv, key_dim)
    return Scene(
        key_pages,
        value_pages,
        tokens,
        query=strided.mul_(sharpness)[:, 1],
        block_table=table,
        num_pages=torch.tensor(pages, dtype=torch.int32, device=device),
        plain_len=torch.tensor(plain, dtype=torch.int32, device=device),
        scaling=key_dim**-0.5,
        new_key=normal(kv_heads, rows, key_dim).transpose(0, 1),
        new_value=normal(kv_heads, rows, value_dim).transpose(0, 1),
    )
