"""Attention of neighbouring tokens of a prompt, each as a decode step would at its position (see ``_reference``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _reference
from ._backend import has_prompt_kernels, kernels
from .decode import check_pages, check_share, check_stats
from .layout import KeyPages, PlainTokens, ValuePages


def prompt_attention(
    query: Tensor,
    key_pages: KeyPages,
    value_pages: ValuePages,
    plain: PlainTokens,
    *,
    block_table: Tensor,
    plain_table: Tensor,
    start: int,
    num_sinks: int,
    window: int,
    scaling: float,
    p: float = 1.0,
    min_keep: int = 0,
    min_sparse_len: int = 0,
    stats: Tensor | None = None,
) -> Tensor:
    """Attend neighbouring tokens of one sequence, each to what a decode step at its position reads.

    The token at position ``t`` reads the ``max(0, (t - num_sinks - window) // page_size)`` pages that have left the
    window by then in packed form, sinks and window as they are, and is pruned as in ``decode_attention``. Where
    ``has_prompt_kernels`` says so, both products run on matrix tiles: keys, values and weights are rounded to the
    model's dtype, sums are float32, and a weight below ``2 ** -80`` of a row's largest counts as nothing. A row's
    output does not depend on which others are computed with it.

    Args:
        query: ``[T, H, D]`` model dtype, tokens ``start .. start + T`` of the sequence, which are stored already.
        key_pages, value_pages: the layer's pages.
        plain: pages of tokens in the model's dtype, ``page_size`` columns each.
        block_table: ``[P]`` int32 slots of packed pages, at least those that the last token reads.
        plain_table: ``[C]`` int32 slots of plain pages: the ``ceil(num_sinks / page_size)`` that hold the sinks, then
            those of the tokens after these, from the first page on that token ``start`` reads plain.
        start: position of the first token.
        num_sinks: first tokens of the sequence, which are never packed.
        window: tokens that are plain before a page leaves.
        scaling: factor of the logits, positive.
        p, min_keep, min_sparse_len: as in ``decode_attention``.
        stats: ``[T, H, 5]`` float64, added to as in ``decode_attention``.
    Returns:
        ``[T, H, Dv]`` in the query's dtype.
    Raises:
        ValueError: shapes or dtypes that disagree, tables that are too short, or a number outside its range.
    Source: Twilight, arXiv 2502.02770, section 4. Reference: ``_reference.prompt_attention``.
    """
    size = key_pages.codec.page_size
    check_share(p, min_keep)
    check_pages(query.shape, query.dtype, key_pages, value_pages, plain, in_pages=True)
    _check_place(start, num_sinks, window, scaling)
    first, last = (max(0, (at - num_sinks - window) // size) for at in (start, start + len(query) - 1))
    tokens = max(0, start + len(query) - num_sinks)
    _check_table("block_table", block_table, last)
    _check_table(
        "plain_table", plain_table, -(-min(num_sinks, start + len(query)) // size) + -(-tokens // size) - first
    )
    if stats is not None:
        check_stats(query.shape, stats)
    has_tiles = has_prompt_kernels(query.device, query.dtype)
    backend = kernels("prompt", query, query.dtype) if has_tiles else _reference
    out: Tensor = backend.prompt_attention(
        query, key_pages, value_pages, plain, block_table=block_table, plain_table=plain_table, start=start,
        num_sinks=num_sinks, window=window, scaling=scaling, p=p, min_keep=min_keep, min_sparse_len=min_sparse_len,
        stats=stats,
    )  # fmt: skip
    return out


def _check_place(start: int, num_sinks: int, window: int, scaling: float) -> None:
    for name, number, least in (("start", start, 0), ("num_sinks", num_sinks, 0), ("window", window, 1)):
        if number < least:
            raise ValueError(f"{name} must be {least} or more, got {number}")
    if not scaling > 0:
        raise ValueError(f"scaling must be positive, got {scaling}")


def _check_table(name: str, table: Tensor, least: int) -> None:
    if table.dim() != 1 or table.shape[0] < least or table.dtype != torch.int32:
        raise ValueError(f"{name} must be [{least} or more] int32, got {list(table.shape)} {table.dtype}")
