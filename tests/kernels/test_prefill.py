"""Sparse prefill: stripes against their definition, and what must hold whatever is chosen."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_kernels import StripePlan, _numba_prefill, _reference, attend_stripes, backend_name, select_stripes
from twilight_kernels._numba_amx import has_tiles
from twilight_kernels._reference_prefill import unpack_bits

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.interpreted  # what runs on GPUs is small enough to be interpreted, all of it

PLAN = StripePlan(alpha=0.9, floor=0.8, window=32, num_sinks=4, strip=128, samples=16)


@dataclasses.dataclass
class Prompt:
    """Inputs of a prefill whose attention is concentrated, as a model's is."""

    query: Tensor
    keys: Tensor
    values: Tensor
    padding: Tensor

    @property
    def scaling(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    def select(self, plan: StripePlan = PLAN) -> tuple[Tensor, Tensor]:
        return select_stripes(self.query, self.keys, plan, scaling=self.scaling, padding=self.padding)

    def attend(self, mask: Tensor, plan: StripePlan = PLAN) -> Tensor:
        return attend_stripes(
            self.query, self.keys, self.values, mask, plan, scaling=self.scaling, padding=self.padding
        )

    def wide(self) -> Prompt:
        return Prompt(self.query.double(), self.keys.double(), self.values.double(), self.padding)

    def rounding(self, *, on_tiles: bool = has_tiles()) -> float:
        """What sums of ``D`` products may lose on a logit, and so on a weight."""
        terms = float(self.query.double().norm(dim=-1).max() * self.keys.double().norm(dim=-1).max()) * self.scaling
        is_split = on_tiles and backend_name(self.query.device) == "numba" and self.query.dtype == torch.float32
        error = 2.0**-16 if is_split else torch.finfo(torch.float32).eps  # of a product, see _numba_stripe_amx
        return terms * error * float(self.values.double().abs().max())

    def dense(self) -> Tensor:
        """Plain causal attention in float64, ``[B, H, T, Dv]``, zero in rows of padding."""
        wide = self.wide()
        rows, total = self.query.shape[2], self.keys.shape[2]
        per_kv = self.query.shape[1] // self.keys.shape[1]
        position = torch.arange(total)
        seen = position <= position[total - rows :, None]
        seen = seen & (position >= self.padding[:, None, None]).expand(-1, rows, -1)  # [B, T, S]
        logits = wide.query @ wide.keys.repeat_interleave(per_kv, 1).mT * self.scaling
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
        return weights @ wide.values.repeat_interleave(per_kv, 1)


def make_prompt(
    device: str,
    *,
    batch: int = 1,
    heads: int = 3,
    kv_heads: int = 1,
    rows: int = 300,
    total: int = 300,
    dim: int = 64,
    value_dim: int | None = None,
    pads: tuple[int, ...] = (0,),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Prompt:
    torch.manual_seed(seed)
    if dtype == torch.bfloat16 and IS_INTERPRETED and os.environ.get("HF_TWILIGHT_BACKEND") == "triton":
        dtype = torch.float16  # Triton's interpreter multiplies bfloat16 wrongly
    keys = torch.randn(batch, kv_heads, total, dim)
    keys[:, :, ::17] *= 3.0  # some keys matter to many rows
    query = torch.randn(batch, heads, rows, dim) + 0.5 * keys[:, :1, 17:18]
    values = torch.randn(batch, kv_heads, total, dim if value_dim is None else value_dim)
    padding = torch.tensor(pads, dtype=torch.int32, device=device)
    return Prompt(query.to(device, dtype), keys.to(device, dtype), values.to(device, dtype), padding)


SHAPES: list[dict[str, Any]] = [
    {"heads": 3},
    {"heads": 3, "kv_heads": 3, "dtype": torch.bfloat16, "value_dim": 48, "rows": 65, "total": 333},
    {"heads": 16, "kv_heads": 2, "dim": 80, "dtype": torch.bfloat16},
    {"heads": 6, "kv_heads": 2, "batch": 2, "rows": 200, "total": 523, "pads": (0, 37), "dtype": torch.bfloat16},
    {"heads": 3, "kv_heads": 3, "dtype": torch.float16, "dim": 32, "rows": 257, "total": 257},
    {"heads": 8, "kv_heads": 1, "batch": 2, "rows": 140, "total": 140, "pads": (139, 13), "dim": 128},
    {"heads": 5, "rows": 129, "total": 129, "dim": 96, "value_dim": 256},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_select_stripes_chooses_what_the_definition_chooses(device: str, shape: dict[str, Any]) -> None:
    prompt = make_prompt(device, **shape)
    wide = prompt.wide()
    mask, report = prompt.select()
    expected, told = _reference.select_stripes(
        wide.query, wide.keys, PLAN, scaling=prompt.scaling, padding=prompt.padding
    )
    assert torch.equal(mask, expected)
    assert torch.equal(report[..., 0], told[..., 0])
    torch.testing.assert_close(report, told, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_attend_stripes_is_as_close_to_float64_as_the_definition(device: str, shape: dict[str, Any]) -> None:
    prompt = make_prompt(device, **shape)
    mask, _ = prompt.select()
    wide = prompt.wide()
    exact = _reference.attend_stripes(
        wide.query, wide.keys, wide.values, mask, PLAN, scaling=prompt.scaling, padding=prompt.padding
    )
    eager = _reference.attend_stripes(
        prompt.query, prompt.keys, prompt.values, mask, PLAN, scaling=prompt.scaling, padding=prompt.padding
    )
    allowed = float((eager.double() - exact).abs().max()) + prompt.rounding()
    if prompt.query.dtype != torch.float32:  # the weights are rounded to the model's dtype too, as in flash attention
        allowed += torch.finfo(prompt.query.dtype).eps / 2 * float(exact.abs().max())
    assert float((prompt.attend(mask).double() - exact).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_stripes_without_matrix_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Vectors do what most CPUs have no tiles for; where there are tiles, nothing else would test them."""
    prompt = make_prompt("cpu", dtype=dtype)
    if backend_name("cpu") != "numba" or not has_tiles():
        pytest.skip("the tests above ran without tiles")
    mask, _ = prompt.select()
    on_tiles = prompt.attend(mask)
    monkeypatch.setattr(_numba_prefill, "has_tiles", lambda: False)
    monkeypatch.setattr(_numba_prefill, "_attend_worker", _numba_prefill._attend_worker.__wrapped__)
    wide = prompt.wide()
    exact = _reference.attend_stripes(
        wide.query, wide.keys, wide.values, mask, PLAN, scaling=prompt.scaling, padding=prompt.padding
    )
    out = prompt.attend(mask)
    assert not torch.equal(out, on_tiles)  # they are others' sums
    error = torch.finfo(dtype).eps / 2 * float(exact.abs().max()) if dtype != torch.float32 else 0.0
    assert float((out.double() - exact).abs().max()) <= prompt.rounding(on_tiles=False) + error


def test_stripes_of_strips_of_an_odd_size(device: str) -> None:
    """48 samples of 192 rows: neither is a power of two, and rows begin and end amid a strip."""
    prompt = make_prompt(device, heads=8, rows=300, total=400, dim=32)
    plan = dataclasses.replace(PLAN, strip=192, samples=48)
    wide = prompt.wide()
    expected, _ = _reference.select_stripes(wide.query, wide.keys, plan, scaling=prompt.scaling, padding=prompt.padding)
    mask, _ = prompt.select(plan)
    assert torch.equal(mask, expected)
    exact = _reference.attend_stripes(
        wide.query, wide.keys, wide.values, mask, plan, scaling=prompt.scaling, padding=prompt.padding
    )
    assert float((prompt.attend(mask, plan) - exact).abs().max()) <= prompt.rounding()


def test_stripes_of_waves_and_chunks_are_those_of_one(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips share what is read of the keys, and scratch; which of them are there together must not matter to a bit."""
    kernels = pytest.importorskip("twilight_kernels._triton_prefill")
    prompt = make_prompt(gpu, heads=1, batch=2, rows=560, total=600, pads=(0, 70), dtype=torch.bfloat16)
    mask, report = prompt.select()
    out = prompt.attend(mask)
    assert int((report[..., 0] > 0).sum()) > 6, "too few strips choose anything"
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_SCRATCH_BYTES", 1)
        again, told = prompt.select()
        assert torch.equal(again, mask)
        assert torch.equal(told, report)
        assert torch.equal(prompt.attend(mask), out)
    later = Prompt(prompt.query[:1, :, 344:], prompt.keys[:1], prompt.values[:1], prompt.padding[:1])  # from strip 3 on
    own, told = later.select()
    count = len(PLAN.strips(216, 600, 0))
    assert torch.equal(own[:, :, :count], mask[:1, :, 3 : 3 + count])
    assert torch.equal(told[:, :, :count], report[:1, :, 3 : 3 + count])


def test_select_stripes_everything_at_alpha_one_is_dense_attention(device: str) -> None:
    prompt = make_prompt(device, batch=2, rows=300, total=400, pads=(0, 45))
    plan = dataclasses.replace(PLAN, alpha=1.0, floor=0.0)
    mask, report = prompt.select(plan)
    assert float((prompt.attend(mask, plan) - prompt.dense()).abs().max()) <= prompt.rounding()
    assert float(report[..., 2][report[..., 2] > 0].min()) > 1 - 1e-5


def test_select_stripes_keeps_what_it_promises_on_average(device: str) -> None:
    prompt = make_prompt(device, rows=512, total=512)
    _, report = prompt.select()
    assert float(report[0, 0, 1:4, 2].min()) >= PLAN.alpha
    assert float(report[0, 0, 1:4, 3].min()) >= PLAN.floor


def test_select_stripes_more_alpha_never_drops_a_key(device: str) -> None:
    prompt, before = make_prompt(device, rows=512, total=512), None
    for alpha in (0.6, 0.8, 0.95, 1.0):
        mask, _ = prompt.select(dataclasses.replace(PLAN, alpha=alpha, floor=0.0))
        chosen = unpack_bits(mask, 512)
        assert before is None or bool((chosen | ~before).all())
        before = chosen


def test_select_stripes_finds_a_planted_needle(device: str) -> None:
    prompt = make_prompt(device, rows=640, total=640)
    prompt.keys[:, :, 201] = 6.0 * prompt.query[:, :1, 500:].mean(2)
    chosen = unpack_bits(prompt.select()[0], 640)
    assert bool(chosen[0, 0, 3:5, 201].all())


def test_stripes_of_a_padded_row_are_those_of_the_row_alone(device: str) -> None:
    padded = make_prompt(device, batch=2, rows=523, total=523, pads=(0, 37), dtype=torch.bfloat16)
    alone = Prompt(padded.query[1:, :, 37:], padded.keys[1:, :, 37:], padded.values[1:, :, 37:], padded.padding[1:] * 0)
    (mask, _), (own, _) = padded.select(), alone.select()
    count = len(PLAN.strips(486, 486, 0))
    chosen = unpack_bits(mask, 523)[1, :, :count, 37:]
    assert torch.equal(chosen, unpack_bits(own, 486)[0, :, :count])
    assert torch.equal(padded.attend(mask)[1, :, 37:], alone.attend(own)[0])
    assert not padded.attend(mask)[1, :, :37].any()


def test_stripes_of_chunks_are_those_of_the_whole(device: str) -> None:
    whole = make_prompt(device, rows=640, total=640, dtype=torch.bfloat16)
    mask, _ = whole.select()
    out, first, parts = whole.attend(mask), 0, []
    for end in (256, 384, 640):  # multiples of a strip
        part = Prompt(whole.query[:, :, first:end], whole.keys[:, :, :end], whole.values[:, :, :end], whole.padding)
        parts.append(part.attend(part.select()[0]))
        first = end
    assert torch.equal(torch.cat(parts, 2), out)


def test_stripes_see_nothing_of_later_strips(device: str) -> None:
    prompt = make_prompt(device, rows=384, total=384)
    mask, _ = prompt.select()
    out = prompt.attend(mask)
    for tensor in (prompt.query, prompt.keys, prompt.values):
        tensor[:, :, 256:] = 7.0
    changed, _ = prompt.select()
    assert torch.equal(changed[:, :, :2], mask[:, :, :2])
    assert torch.equal(prompt.attend(changed)[:, :, :256], out[:, :, :256])


def test_attend_stripes_row_sees_no_later_key(device: str) -> None:
    prompt = make_prompt(device, rows=200, total=200)
    mask, _ = prompt.select()
    out = prompt.attend(mask)
    prompt.keys[:, :, 150:], prompt.values[:, :, 150:] = 5.0, torch.nan
    assert torch.equal(prompt.attend(mask)[:, :, :128], out[:, :, :128])


def test_stripes_of_strided_tensors(device: str) -> None:
    prompt = make_prompt(device)
    mask, _ = prompt.select()
    strided = Prompt(
        *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (prompt.query, prompt.keys, prompt.values)),
        prompt.padding,
    )  # type: ignore[arg-type]
    assert torch.equal(strided.select()[0], mask)
    assert torch.equal(strided.attend(mask), prompt.attend(mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0.0"),
        ({"floor": 0.95}, r"floor must be in \[0, alpha = 0.9\]"),
        ({"strip": 100}, "strip must be a positive multiple of 64, got 100"),
        ({"samples": 24}, "samples must be a multiple of 16"),
        ({"window": -1}, "window and num_sinks must be 0 or more"),
    ],
)
def test_stripe_plan_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **change)


def test_attend_stripes_rejects_what_does_not_fit(device: str) -> None:
    prompt = make_prompt(device)
    mask, _ = prompt.select()
    with pytest.raises(ValueError, match="mask must be"):
        prompt.attend(mask[:, :, :1])
    with pytest.raises(ValueError, match="K a divisor of 3"):
        dataclasses.replace(prompt, keys=prompt.keys.expand(-1, 2, -1, -1)).select()
    with pytest.raises(ValueError, match="of one dtype"):
        dataclasses.replace(prompt, keys=prompt.keys.half()).select()
    with pytest.raises(ValueError, match=r"padding must be \[1\] int32"):
        dataclasses.replace(prompt, padding=prompt.padding.long()).select()
    with pytest.raises(ValueError, match=r"scaling must be above 0, got -1.0; pass D \*\* -0.5 = 0.125"):
        select_stripes(prompt.query, prompt.keys, PLAN, scaling=-1.0, padding=prompt.padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_right_where_later_keys_outweigh_earlier_ones_by_far(dtype: torch.dtype) -> None:
    """Weights are relative to a logit of the first keys, which must give way to one that is 2 ** 100 as heavy."""
    draw = torch.Generator().manual_seed(0)
    plan, padding = StripePlan(), torch.tensor([0, 77], dtype=torch.int32)
    query, keys, values = (torch.randn(2, n, 600, 64, generator=draw) for n in (6, 2, 2))
    query *= torch.linspace(1, 60, 600)[:, None]
    keys[:, :, 300] *= 20
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    mask = torch.full((2, 2, plan.max_strips(600), 75), 255, dtype=torch.uint8)
    found = attend_stripes(query, keys, values, mask, plan, scaling=0.125, padding=padding).double()
    exact = _reference.attend_stripes(
        query.double(), keys.double(), values.double(), mask, plan, scaling=0.125, padding=padding
    )
    assert (found - exact).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-2) * exact.abs().max()
