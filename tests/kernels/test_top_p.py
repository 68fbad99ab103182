"""Top-p thresholds on every backend: what is kept, whatever the row looks like."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from twilight_kernels import _reference, top_p_flags, top_p_threshold

PS = [0.5, 0.9, 0.95, 0.999]
TOLERANCE = 1e-5  # of the mass: float32 sums


def _rows() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(4, 1000, generator=draw)
    ragged = normal.clone()
    ragged[:, 700:] = -torch.inf
    ragged[1] = -torch.inf
    ragged[1, 33] = 2.0
    return {
        "flat": normal * 0.1,
        "mild": normal * 2,
        "peaky": normal * 20,
        "extreme": normal * 3000,
        "ties": (normal * 2).round(),
        "constant": torch.full((2, 65), 3.25),
        "ragged": ragged,
        "one": torch.tensor([[5.0], [-1e4]]),
        "sixty-three": normal[:, :63],
        "far": normal + 1e4,
        "outlier": torch.cat([normal, torch.full((4, 1), 50.0)], 1),
    }


ROWS = _rows()


def _mass(logits: Tensor, kept: Tensor, forced: Tensor | None = None) -> Tensor:
    """Share of the mass that is kept, forced tokens included."""
    forced = torch.full(logits.shape[:1], -math.inf) if forced is None else forced
    forced = forced.double()
    whole = torch.logaddexp(logits.double().logsumexp(-1), forced)
    part = torch.logaddexp(logits.double().masked_fill(~kept, -math.inf).logsumexp(-1), forced)
    return (part - whole).exp()


def _kept(logits: Tensor, limit: Tensor) -> Tensor:
    return (logits >= limit[:, None]) & (logits > -math.inf)


@pytest.mark.interpreted(
    "mild-0.9",
    "extreme-0.95",
    "ties-0.5",
    "ragged-0.999",
)
@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("name", ROWS)
def test_kept_mass_is_enough_and_no_token_is_spare(name: str, p: float, device: str) -> None:
    logits = ROWS[name]
    kept = _kept(logits, top_p_threshold(logits.to(device), p).cpu())
    assert bool((_mass(logits, kept) >= p - TOLERANCE).all())
    # without the smallest logits that are kept, ties and near ties together, too little would be left
    smallest = logits.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    spread = logits.masked_fill(logits == -math.inf, 0).abs().amax(-1, keepdim=True)
    fewer = kept & (logits > smallest + spread * 2.0**-20)
    assert bool((_mass(logits, fewer) < p + TOLERANCE).all())


@pytest.mark.interpreted
@pytest.mark.parametrize("count", [1, 3, 257, 16451])
def test_rows_of_any_length_keep_nearly_all(count: int, device: str) -> None:
    """Wherever the parts of a row begin and end that are looked at together, nothing is lost or seen twice."""
    logits = torch.linspace(0, 1, 2 * count)[torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))]
    rows = logits.view(2, count)
    kept, exact = (_kept(rows, found(rows.to(x), 0.999).cpu()) for found, x in
                   ((top_p_threshold, device), (_reference.top_p_threshold, "cpu")))  # fmt: skip
    assert torch.equal(kept, exact)


@pytest.mark.interpreted(
    "outlier-0.95",
)
@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("name", ROWS)
def test_keeps_what_the_reference_keeps(name: str, p: float, device: str) -> None:
    """But for tokens that rounding may put on either side: those whose mass reaches p to one part in 1e5."""
    logits = ROWS[name]
    kept = _kept(logits, top_p_threshold(logits.to(device), p).cpu())
    less = _kept(logits, _reference.top_p_threshold(logits, p - TOLERANCE))
    more = _kept(logits, _reference.top_p_threshold(logits, min(p + TOLERANCE, 1 - 1e-9)))
    near = (
        logits
        >= logits.masked_fill(~more, math.inf).amin(-1, keepdim=True)
        - logits.abs().nan_to_num(posinf=0).amax(-1, keepdim=True) * 2.0**-20
    )
    assert bool((kept | ~less).all()), "a token is missing"
    assert bool((near | ~kept).all()), "a token is too many"


def test_is_monotone_in_p(device: str) -> None:
    for logits in ROWS.values():
        limits = [top_p_threshold(logits.to(device), p).cpu() for p in (0.1, 0.5, 0.9, 0.99, 0.9999, 1.0)]
        for tight, loose in itertools.pairwise(limits):
            assert bool((loose <= tight).all())


@pytest.mark.interpreted
def test_p_of_one_keeps_everything(device: str) -> None:
    for logits in ROWS.values():
        assert bool((top_p_threshold(logits.to(device), 1.0) == -math.inf).all())


def test_shift_of_all_logits_changes_nothing(device: str) -> None:
    logits = (ROWS["mild"] * 64).round() / 64  # so that adding 8 is exact
    kept = _kept(logits, top_p_threshold(logits.to(device), 0.9).cpu())
    shifted = _kept(logits + 8, top_p_threshold((logits + 8).to(device), 0.9).cpu())
    assert torch.equal(kept, shifted)


def test_order_of_tokens_changes_nothing(device: str) -> None:
    logits = ROWS["outlier"]
    limit = top_p_threshold(logits.to(device), 0.9).cpu()
    for place in (0, 1, 15, 16, 17, 500, 999):
        moved = logits.roll(place + 1, -1)  # the largest, last in the row, is now at this place
        assert int(moved[0].argmax()) == place
        assert torch.equal(
            _kept(moved, top_p_threshold(moved.to(device), 0.9).cpu()).sum(-1), _kept(logits, limit).sum(-1)
        )


@pytest.mark.parametrize("p", PS)
def test_forced_tokens_count_as_kept_mass(p: float, device: str) -> None:
    logits = ROWS["mild"]
    alone = _kept(logits, top_p_threshold(logits.to(device), p).cpu())
    for share in (0.01, 0.3, p, 0.9999):  # of the whole mass
        forced = (logits.double().logsumexp(-1) + math.log(share / (1 - share))).float()
        limit = top_p_threshold(logits.to(device), p, forced_lse=forced.to(device)).cpu()
        kept = _kept(logits, limit)
        assert bool((_mass(logits, kept, forced) >= p - TOLERANCE).all())
        assert bool((kept.sum(-1) <= alone.sum(-1)).all())
        if share > p + TOLERANCE:
            assert bool((limit == math.inf).all())
    nothing = torch.full((4,), -math.inf, device=device)
    assert torch.equal(_kept(logits, top_p_threshold(logits.to(device), p, forced_lse=nothing).cpu()), alone)


@pytest.mark.parametrize("min_keep", [1, 7, 64, 699, 10_000])
def test_min_keep_is_kept_as_far_as_tokens_exist(min_keep: int, device: str) -> None:
    for logits in ROWS.values():
        forced = torch.full(logits.shape[:1], 1e5, device=device)  # they alone would suffice
        limit = top_p_threshold(logits.to(device), 0.9, forced_lse=forced, min_keep=min_keep).cpu()
        kept, present = _kept(logits, limit).sum(-1), (logits > -math.inf).sum(-1)
        wanted = present.clamp_max(min_keep)
        assert bool((kept >= wanted).all())
        ranked = logits.sort(-1, descending=True).values
        last = ranked.gather(-1, wanted[:, None] - 1).squeeze(-1)
        spread = logits.masked_fill(logits == -math.inf, 0).abs().amax(-1)
        assert bool((limit >= last - spread * 2.0**-20).all())


@pytest.mark.interpreted
def test_rows_of_nothing_keep_everything_there_is(device: str) -> None:
    limit = top_p_threshold(torch.full((3, 70), -math.inf, device=device), 0.5)
    assert limit.tolist() == [-math.inf] * 3
    assert top_p_threshold(torch.empty(2, 0, device=device), 0.5).tolist() == [-math.inf] * 2
    assert top_p_threshold(torch.empty(0, 5, device=device), 0.5).shape == (0,)


def test_strided_rows_are_read_as_they_lie(device: str) -> None:
    logits = ROWS["mild"].to(device)
    wide = torch.full((4, 2000), 99.0, device=device)
    wide[:, ::2] = logits
    expected = top_p_threshold(logits, 0.9)
    assert torch.equal(top_p_threshold(wide[:, ::2], 0.9), expected)
    wide[:, :1000] = logits
    assert torch.equal(top_p_threshold(wide[:, :1000], 0.9), expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"p": 0.0}, r"p must be in \(0, 1\], got 0.0"),
        ({"p": 1.1}, r"p must be in \(0, 1\], got 1.1"),
        ({"p": 0.9, "min_keep": -1}, "min_keep must be 0 or more, got -1"),
        ({"p": 0.9, "forced_lse": torch.zeros(3)}, r"forced_lse must be \[2\]"),
        ({"p": 0.9, "logits": torch.zeros(5)}, r"logits must be \[R, S\] float32, got \[5\]"),
        ({"p": 0.9, "logits": torch.zeros(2, 5).half()}, "got .* torch.float16; call float"),
    ],
)
def test_refuses(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        top_p_threshold(**{"logits": torch.zeros(2, 5), **arguments})  # type: ignore[arg-type]


@pytest.mark.interpreted(
    "one-0.95",
)
@pytest.mark.parametrize("p", [*PS, 1.0])
@pytest.mark.parametrize("name", ROWS)
def test_flags_are_the_union_over_the_query_heads(name: str, p: float, device: str) -> None:
    """The rows are heads: all of one KV head, or each of its own."""
    logits, forced = ROWS[name], ROWS[name].amax(-1) - 1.0
    for shape in ((1, 1, len(logits)), (1, len(logits), 1), (len(logits), 1, 1)):
        grouped, given = logits.view(*shape, -1).to(device), forced.view(shape).to(device)
        flags, share = (x.cpu() for x in top_p_flags(grouped, p, forced_lse=given))
        assert flags.dtype == torch.bool
        assert flags.shape == (*shape[:2], logits.shape[1])
        limit = top_p_threshold(logits.to(device), p, forced_lse=forced.to(device)).cpu()
        own = _kept(logits, limit).view(*shape, -1)
        assert torch.equal(flags, own.any(2))
        kept = flags.unsqueeze(2).expand_as(own).reshape(logits.shape)
        true = _mass(logits, kept, forced)
        assert torch.allclose(share.flatten().double(), true, atol=TOLERANCE, rtol=0)
        assert bool((share >= p - TOLERANCE).all())


@pytest.mark.interpreted
def test_flags_of_nothing_are_not_set(device: str) -> None:
    logits = torch.full((2, 1, 3, 20), -torch.inf, device=device)
    flags, share = top_p_flags(logits, 0.9, forced_lse=torch.zeros(2, 1, 3, device=device))
    assert not flags.any()
    assert bool((share == 1).all())


@pytest.mark.parametrize(
    ("logits", "forced", "p", "said"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), 0.5, r"logits must be \[B, K, G, N\] float32"),
        (torch.zeros(1, 2, 3, 4).half(), torch.zeros(1, 2, 3), 0.5, "logits must be .* got .* torch.float16"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 6), 0.5, r"forced_lse must be \[1, 2, 3\] torch.float32"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3), 0.0, r"p must be in \(0, 1\], got 0.0"),
    ],
)
def test_flags_refuse_what_does_not_fit(logits: Tensor, forced: Tensor, p: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        top_p_flags(logits, p, forced_lse=forced)
