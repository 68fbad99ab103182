"""Decode attention over packed pages: select, prune, attend (definition in ``_reference``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._backend import kernels
from ._reference import decode_call
from .layout import DecodeCall, KeyPages, PlainTokens, ValuePages
from .page_codec import RAW_BITS
from .score import check_tables


def decode_attention(
    query: Tensor,
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    block_table: Tensor,
    num_pages: Tensor,
    plain_len: Tensor,
    scaling: float,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    candidates: Tensor | None = None,
    candidate_tokens: Tensor | None = None,
    stats: Tensor | None = None,
    plain_table: Tensor | None = None,
    num_sinks: int = 0,
    strips: Tensor | None = None,
    refined: Tensor | None = None,
) -> Tensor:
    """Attend one query token a row to its plain tokens and to the packed tokens that carry the mass.

    The key pages are scored once; each query head keeps the fewest packed tokens that, with the plain tokens,
    carry ``p`` of the attention mass; the heads on one KV head attend to the union, renormalised over it.

    Args:
        query: ``[B, H, D]`` model dtype.
        key_pages, value_pages: the layer's pages.
        plain: sinks and window; with ``new_key`` given, column ``plain_len - 1`` of each row is written
            first.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        plain_len: ``[B]`` int32, valid columns of ``plain`` (new token included), at least 1.
        scaling: factor of the logits.
        new_key, new_value: ``[B, K, Dk]``, ``[B, K, Dv]`` model dtype, the step's token; both or neither.
        p: mass to keep, in ``(0, 1]``; 1.0 attends to every candidate.
        min_keep: packed tokens each head keeps at least.
        min_sparse_len: rows with fewer packed tokens than this keep them all.
        candidates: ``[B, K, N]`` int32 logical pages to score, -1 padded, ascending; None scores every page.
            Rows below ``min_sparse_len`` ignore it.
        candidate_tokens: ``[B, K, N * page_size]`` bool, which tokens of those pages are candidates, needs
            ``candidates``; None means all of them.
        stats: ``[B, H, 5]`` float64, added to: packed tokens scored, whole pages; packed tokens the head itself
            needs; packed tokens attended, the union over the query heads of its KV head; share of the
            candidates' and plain tokens' mass attended; packed tokens that are candidates.
        plain_table: ``[B, C]`` int32; given, ``plain`` is no row each but pages of ``page_size`` columns, and row b's
            plain tokens are the first ``num_sinks`` of its first ``ceil(num_sinks / page_size)`` pages, then those of
            the next pages.
        num_sinks: plain tokens in those first pages.
        strips: ``[S + 1]`` int32, ascending, the rows at which strips begin, and the end. Rows of a strip list the
            same pages, as far as each goes: a page is then unpacked once for up to 16 of them. The output is the
            same to the bit. Not with ``candidates``.
        refined: ``[B, K, R]`` int64, below D: keys that are stored, packed or plain, have ``D + R`` channels, of
            which the last are rests of these, see ``write_rests``; ``query`` and ``new_key`` have D. Numbers are not
            looked at.
    Returns:
        ``[B, H, Dv]`` in the query's dtype.
    Raises:
        ValueError: shapes or dtypes that disagree, or a number outside its range. Page numbers and lengths
            are not looked at: on a GPU that would wait for the device.
    Source: Twilight, arXiv 2502.02770, section 4. Reference: ``_reference.decode_attention``.
    """
    check_share(p, min_keep)
    count = 0 if refined is None else _check_refined(query.shape[0], plain.form[1], refined)
    in_pages = plain_table is not None
    check_pages(query.shape, query.dtype, key_pages, value_pages, plain, in_pages=in_pages, refined=count)
    if plain_table is not None and (
        plain_table.dim() != 2 or plain_table.shape[0] != query.shape[0] or plain_table.dtype != torch.int32
        or not plain_table.shape[1]
    ):  # fmt: skip
        raise ValueError(
            f"plain_table must be [{query.shape[0]}, C] int32, got {list(plain_table.shape)} {plain_table.dtype}"
        )
    check_tables(query.shape[0], block_table, num_pages)
    if plain_len.shape != num_pages.shape or plain_len.dtype != torch.int32:
        raise ValueError(
            f"plain_len must be {list(num_pages.shape)} int32, got {list(plain_len.shape)} {plain_len.dtype}"
        )
    if new_key is not None or new_value is not None:
        if plain_table is not None:
            raise ValueError("new_key must be None with a plain_table; write the tokens into their pages first")
        _check_new(new_key, new_value, plain, count)
    if candidates is not None or candidate_tokens is not None:
        _check_candidates(query.shape[0], plain.form[1], candidates, candidate_tokens, key_pages.codec.page_size)
    if stats is not None:
        check_stats(query.shape, stats)
    if strips is not None:
        _check_strips(query.shape[0], strips, candidates)
    out: Tensor = kernels("decode", query, query.dtype).decode_attention(
        query, key_pages, value_pages, plain, block_table=block_table, num_pages=num_pages,
        plain_len=plain_len, scaling=scaling, new_key=new_key, new_value=new_value, p=p, min_keep=min_keep,
        min_sparse_len=min_sparse_len, candidates=candidates, candidate_tokens=candidate_tokens, stats=stats,
        plain_table=plain_table, num_sinks=num_sinks, strips=strips, refined=refined,
    )  # fmt: skip
    return out


def prepare_decode(
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    heads: int,
    scaling: float,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    stats: Tensor | None = None,
    refined: Tensor | None = None,
) -> DecodeCall:
    """Check once what stays the same from step to step of ``decode_attention``, and work out what follows from it.

    Args:
        key_pages, value_pages, plain: the layer's tensors; what is returned holds for them alone.
        heads: query heads, H.
        scaling, p, min_keep, min_sparse_len, stats, refined: see ``decode_attention``.
    Returns:
        A function of ``query, new_key, new_value, block_table, num_pages, plain_len`` that is ``decode_attention``.
    Raises:
        ValueError: as ``decode_attention``; the function, too, for other shapes or dtypes.
    Source: plan and run of FlashInfer, arXiv 2501.01005, section 3.4. Reference: ``_reference.prepare_decode``.
    """
    check_share(p, min_keep)
    rows, kv_heads, key_dim, value_dim = plain.form
    dtype, count = plain.keys.dtype, 0 if refined is None else _check_refined(rows, kv_heads, refined)
    shape = torch.Size((rows, heads, key_dim - count))
    check_pages(shape, dtype, key_pages, value_pages, plain, in_pages=False, refined=count)
    if stats is not None:
        check_stats(shape, stats)
    pages, module = (key_pages, value_pages, plain), kernels("decode", plain.keys, dtype)
    options: dict[str, Any] = {
        "scaling": scaling, "p": p, "min_keep": min_keep, "min_sparse_len": min_sparse_len, "stats": stats,
        "refined": refined,
    }  # fmt: skip
    call: DecodeCall
    if hasattr(module, "prepare_decode"):
        call = module.prepare_decode(*pages, heads=heads, **options)
    else:
        call = decode_call(module.decode_attention, pages, **options)
    key, value, lengths = ((rows, kv_heads, key_dim - count), (rows, kv_heads, value_dim), (rows,))
    taken = shape, key, value, lengths, lengths, rows, *(dtype,) * 3, *(torch.int32,) * 3

    def step(
        query: Tensor, new_key: Tensor, new_value: Tensor, block_table: Tensor, num_pages: Tensor, plain_len: Tensor
    ) -> Tensor:
        given = (
            query.shape, new_key.shape, new_value.shape, num_pages.shape, plain_len.shape, block_table.shape[0],
            query.dtype, new_key.dtype, new_value.dtype, num_pages.dtype, plain_len.dtype, block_table.dtype,
        )  # fmt: skip
        if given != taken:
            raise ValueError(
                "query, new_key, new_value, num_pages, plain_len, rows of block_table and all dtypes must be what "
                f"the step was prepared for, {taken}, got {given}; prepare another one"
            )
        return call(query, new_key, new_value, block_table, num_pages, plain_len)

    return step


def check_share(p: float, min_keep: int) -> None:
    """Raise ValueError for a mass or a number of tokens to keep that is out of range."""
    if not 0.0 < p <= 1.0:
        raise ValueError(f"p must be in (0, 1], got {p}; pass p=1.0 to keep everything")
    if min_keep < 0:
        raise ValueError(f"min_keep must be 0 or more, got {min_keep}")


def check_pages(
    shape: torch.Size,
    dtype: torch.dtype,
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    in_pages: bool,
    refined: int = 0,
) -> None:
    """Raise ValueError unless queries of that shape, pages and plain tokens, a row each or ``in_pages``, fit.

    Keys have ``refined`` channels more than queries.
    """
    rows, kv_heads, key_dim, value_dim = plain.form
    if in_pages:
        rows = shape[0]
        if plain.capacity != key_pages.codec.page_size:
            raise ValueError(
                f"plain pages must hold {key_pages.codec.page_size} tokens like the key pages, got {plain.capacity}"
            )
    is_fitting = len(shape) == 3 and shape[0] == rows and shape[1] % kv_heads == 0 and shape[2] + refined == key_dim
    if not is_fitting or dtype != plain.keys.dtype:
        raise ValueError(
            f"query must be [{rows}, H, {key_dim - refined}] of {plain.keys.dtype} like the plain tokens, H a multiple "
            f"of {kv_heads} KV heads, got {list(shape)} {dtype}"
        )
    form = key_pages.form
    if form[1] != kv_heads or form[2] != key_dim:
        raise ValueError(f"key pages must have K, D = {[kv_heads, key_dim]} like the plain keys, got {list(form[1:3])}")
    if value_pages.form != (form[0], kv_heads, value_dim, form[3]):
        raise ValueError(
            f"value pages must have P, K, D, page_size = {[form[0], kv_heads, value_dim, form[3]]} like the "
            f"key pages and plain values, got {list(value_pages.form)}"
        )
    for name, pages in (("key", key_pages), ("value", value_pages)):
        if pages.codec.bits == RAW_BITS and pages.codes.dtype != dtype:
            raise ValueError(f"raw {name} pages must be of the query's dtype, {dtype}, got {pages.codes.dtype}")


def _check_refined(rows: int, kv_heads: int, refined: Tensor) -> int:
    """Return how many channels are refined."""
    if refined.dim() != 3 or refined.shape[:2] != (rows, kv_heads) or refined.dtype != torch.int64:
        raise ValueError(f"refined must be [{rows}, {kv_heads}, R] int64, got {list(refined.shape)} {refined.dtype}")
    return refined.shape[2]


def _check_new(new_key: Tensor | None, new_value: Tensor | None, plain: PlainTokens, refined: int) -> None:
    if new_key is None or new_value is None:
        raise ValueError("new_key and new_value must be given together, got only one; pass both or neither")
    rows, kv_heads, key_dim, value_dim = plain.form
    for name, x, dim in (("new_key", new_key, key_dim - refined), ("new_value", new_value, value_dim)):
        if x.shape != (rows, kv_heads, dim) or x.dtype != plain.keys.dtype:
            raise ValueError(
                f"{name} must be {[rows, kv_heads, dim]} of {plain.keys.dtype}, got {list(x.shape)} {x.dtype}"
            )


def _check_candidates(
    rows: int, kv_heads: int, candidates: Tensor | None, candidate_tokens: Tensor | None, page_size: int
) -> None:
    if candidates is None:
        raise ValueError("candidate_tokens must come with candidates, the pages they are of, got only the tokens")
    if candidates.dim() != 3 or candidates.shape[:2] != (rows, kv_heads) or candidates.dtype != torch.int32:
        raise ValueError(
            f"candidates must be [{rows}, {kv_heads}, N] int32, got {list(candidates.shape)} {candidates.dtype}"
        )
    if candidate_tokens is None:
        return
    shape = (rows, kv_heads, candidates.shape[2] * page_size)
    if candidate_tokens.shape != shape or candidate_tokens.dtype != torch.bool:
        raise ValueError(
            f"candidate_tokens must be {list(shape)} bool, a token of each candidate page, got "
            f"{list(candidate_tokens.shape)} {candidate_tokens.dtype}"
        )


def check_stats(query: torch.Size, stats: Tensor) -> None:
    """Raise ValueError unless ``stats`` can count for ``query [B, H, D]``."""
    if stats.shape != (query[0], query[1], 5) or stats.dtype != torch.float64 or not stats.is_contiguous():
        raise ValueError(
            f"stats must be contiguous [{query[0]}, {query[1]}, 5] float64, got {list(stats.shape)} {stats.dtype}"
        )


def _check_strips(rows: int, strips: Tensor, candidates: Tensor | None) -> None:
    if candidates is not None:
        raise ValueError("strips must be None with candidates: rows choose pages of their own; leave one of them out")
    if strips.dim() != 1 or not 2 <= strips.shape[0] <= rows + 1 or strips.dtype != torch.int32:
        raise ValueError(f"strips must be [2 .. {rows + 1}] int32, got {list(strips.shape)} {strips.dtype}")
