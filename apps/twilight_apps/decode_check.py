"""Whether a decode kernel may be timed: its output against the float64 definition on the very same pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_cache import DecodePolicy, LayerStore, Selection, Step
from twilight_kernels import KeyPages, PlainTokens, ValuePages, _reference

from .synthetic import AttentionInputs

_ROUNDINGS = 4  # float32 roundings of the largest possible logit that an output may be off by


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        error: largest difference from the float64 definition.
        tolerance: what rounding explains, at the place of that difference.
        needed, kept: packed tokens that a query head needs, and that its KV head attends to; means over heads.
        scored: packed tokens scored, mean over heads.
        mass: share of the exact attention mass, over unquantized keys, that is attended to; mean over heads.
        bytes_read: bytes that the step reads.
    """

    error: float
    tolerance: float
    needed: float
    kept: float
    scored: float
    mass: float
    bytes_read: float


def check_decode(name: str, store: LayerStore, step: Step, inputs: AttentionInputs) -> Check:
    """Run one decode step and compare it with ``_reference.decode_attention``, KV head by KV head.

    Raises:
        ArithmeticError: the output is further from the definition than rounding explains; it must not be
        timed.
    """
    store.decodes.clear()
    out = store.attend(inputs.query, inputs.scaling, step, inputs.keys[:, :, -1], inputs.values[:, :, -1])
    assert store.decodes.sums is not None
    assert store.keys is not None
    assert store.plain is not None
    scored, needed, kept, _, _ = store.decodes.sums[0].T.tolist()
    policy = store.policy
    selection = store.select(inputs.query, inputs.scaling, step)
    candidates = None if selection is None else selection.pages
    worst, allowed, masses = 0.0, 0.0, []
    per_kv = out.shape[1] // store.plain.keys.shape[1]
    for k in range(store.plain.keys.shape[1]):
        heads = slice(k * per_kv, (k + 1) * per_kv)
        head = _one_head(store, k, store.widened(inputs.query)[:, heads])
        chosen = None if candidates is None else candidates[:, k : k + 1]
        error, tolerance = _compare(head, step, policy, inputs, k, chosen, out[:, heads])
        if not error <= tolerance:
            raise ArithmeticError(
                f"{name} must agree with its definition to be timed, got an error of {error:.3g} in KV "
                f"head {k}, where rounding explains {tolerance:.3g}; run the kernels' tests"
            )
        if error >= worst:
            worst, allowed = error, tolerance
        listed = _candidates(selection, step, store.key_codec.page_size, k)
        masses.append(_exact_mass(head, step, policy, inputs, heads, listed, store.sequences.layout.num_sinks))
    count = len(scored)
    num_bytes = store.bytes_read(scored, kept) + _plain_bytes(store, step)
    if candidates is not None:
        num_bytes += _bound_bytes(store, step)
    return Check(
        worst, allowed, sum(needed) / count, sum(kept) / count, sum(scored) / count,
        float(torch.cat(masses).mean()), num_bytes,
    )  # fmt: skip


def attended_mass(store: LayerStore, step: Step, inputs: AttentionInputs) -> Tensor:
    """Return the share ``[H]`` of each query head's mass over unquantized keys that the step attends to.

    The step must have been attended to already, and not yet flushed; ``inputs.keys`` are all keys so far.
    """
    assert store.plain is not None
    selection = store.select(inputs.query, inputs.scaling, step)
    kv_heads = store.plain.keys.shape[1]
    per_kv, sinks = inputs.query.shape[1] // kv_heads, store.sequences.layout.num_sinks
    masses = []
    for k in range(kv_heads):
        heads = slice(k * per_kv, (k + 1) * per_kv)
        head = _one_head(store, k, store.widened(inputs.query)[:, heads])
        chosen = _candidates(selection, step, store.key_codec.page_size, k)
        masses.append(_exact_mass(head, step, store.policy, inputs, heads, chosen, sinks))
    return torch.cat(masses)


def _candidates(selection: Selection | None, step: Step, size: int, k: int) -> Tensor | None:
    """Which packed tokens of row 0 are candidates of KV head ``k``: bool ``[S]``; None for all of them."""
    if selection is None:
        return None
    pages = selection.pages[0, k]
    listed = pages[pages >= 0].long()
    tokens = torch.zeros(int(step.num_pages[0]), size, dtype=torch.bool)
    if selection.tokens is None:
        tokens[listed] = True
    else:
        tokens[listed] = selection.tokens[0, k].unflatten(0, (-1, size))[: len(listed)]
    return tokens.flatten()


@dataclass(frozen=True)
class _Head:
    """One KV head of a layer as a layer of its own."""

    query: Tensor
    keys: KeyPages
    values: ValuePages
    plain: PlainTokens


def _one_head(store: LayerStore, k: int, query: Tensor) -> _Head:
    assert isinstance(store.keys, KeyPages)
    assert isinstance(store.values, ValuePages)
    assert store.plain is not None

    def narrow(x: Tensor) -> Tensor:
        return x[:, k : k + 1].contiguous() if x.ndim > 1 else x

    def part(pages: KeyPages | ValuePages) -> tuple[Tensor, Tensor, Tensor]:
        return narrow(pages.codes), narrow(pages.lo), narrow(pages.step)

    return _Head(
        query,
        KeyPages(store.keys.codec, *part(store.keys)),
        ValuePages(store.values.codec, *part(store.values)),
        PlainTokens(narrow(store.plain.keys), narrow(store.plain.values)),
    )


def _compare(
    head: _Head,
    step: Step,
    policy: DecodePolicy,
    inputs: AttentionInputs,
    k: int,
    chosen: Tensor | None,
    out: Tensor,
) -> tuple[float, float]:
    """Return the largest error and what rounding explains there."""

    def define(p: float) -> Tensor:
        return _reference.decode_attention(
            head.query.double(), head.keys, head.values, head.plain, block_table=step.block_table,
            num_pages=step.num_pages, plain_len=step.plain_len, scaling=inputs.scaling, p=p,
            min_keep=policy.min_keep, min_sparse_len=policy.min_sparse_len, candidates=chosen,
        )  # fmt: skip

    error = (out.double() - define(policy.p)).abs()
    largest_logit = inputs.scaling * head.query.norm(dim=-1).max() * inputs.keys[0, k].norm(dim=-1).max()
    rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * float(1 + largest_logit)
    tolerance = torch.full_like(error, rounding * float(inputs.values[0, k].abs().max()))
    if policy.p < 1.0 and not bool((error <= tolerance).all()):
        # weights are off by what their logits are, and so is the share that tokens carry: where that decides whether
        # p is reached, a token may fall on either side of the threshold and moves the output by what it weighs
        tolerance += (define(min(1.0, policy.p * (1 + rounding))) - define(policy.p * (1 - rounding))).abs()
    place = int((error - tolerance).argmax())
    return float(error.flatten()[place]), float(tolerance.flatten()[place])


def _exact_mass(
    head: _Head, step: Step, policy: DecodePolicy, inputs: AttentionInputs, heads: slice, chosen: Tensor | None,
    num_sinks: int,
) -> Tensor:  # fmt: skip
    """Share ``[G]`` of the softmax over unquantized keys that the attended tokens carry; ``chosen [S]`` is bool."""
    columns, pages = int(step.plain_len[0]), int(step.num_pages[0])
    packed = _reference.key_logits(head.query, head.keys, step.block_table[:, :pages], step.num_pages, inputs.scaling)[
        0
    ]
    if chosen is not None:
        packed = packed.masked_fill(~chosen, -torch.inf)
    forced = head.query[0] @ head.plain.keys[0, 0, :, :columns] * inputs.scaling
    is_sparse = packed.shape[-1] >= policy.min_sparse_len
    limit = _reference.top_p_threshold(
        packed, policy.p if is_sparse else 1.0, forced_lse=forced.logsumexp(-1), min_keep=policy.min_keep
    )
    kept = ((packed >= limit[:, None]) & (packed > -torch.inf)).any(0)
    weights = inputs.logits[heads].double().softmax(-1)  # [G, S]
    inner = weights[:, num_sinks : num_sinks + packed.shape[-1]]
    return 1.0 - inner[:, ~kept].sum(-1)


def _plain_bytes(store: LayerStore, step: Step) -> int:
    """Bytes of the sinks and the window."""
    assert store.plain is not None
    one = store.plain.keys.element_size() * (store.plain.keys.shape[2] + store.plain.values.shape[3])
    return int(step.plain_len[0]) * store.plain.keys.shape[1] * one


def _bound_bytes(store: LayerStore, step: Step) -> int:
    """Bytes of the page bounds that a selector looks at: all pages' key scales."""
    assert store.keys is not None
    _, kv_heads, head_dim = store.keys.codes.shape[:3]
    return 2 * store.keys.lo.element_size() * step.most_pages * kv_heads * head_dim
