"""Scoring packed keys: Quest's bound of a page, the logits of all tokens (definitions in ``_reference``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import kernels
from .layout import KeyPages


def page_scores(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """Bound from above the logits that each page can hold.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits, the module's ``scaling``.
    Returns:
        ``[B, H, P]`` float32, at least the largest logit of the page's dequantized keys, but for rounding;
        ``-inf`` where no page is.
    Raises:
        ValueError: shapes or dtypes that disagree.
    Source: Quest, arXiv 2406.10774, section 3.2, algorithm 1. Reference: ``_reference.page_scores``.
    """
    _check(query, pages, block_table, num_pages)
    module = kernels("score", query, query.dtype)
    scores: Tensor = module.page_scores(query, pages, block_table, num_pages, scaling)
    return scores


def page_masses(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """Estimate the attention mass of each page from its bounds.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits.
    Returns:
        ``[B, H, P]`` float32, log of the estimated sum of ``exp(logit)`` over the page's tokens; ``-inf`` where no
        page is.
    Raises:
        ValueError: shapes or dtypes that disagree.
    Reference: ``_reference.page_masses``.
    """
    _check(query, pages, block_table, num_pages)
    module = kernels("score", query, query.dtype)
    masses: Tensor = module.page_masses(query, pages, block_table, num_pages, scaling)
    return masses


def channel_logits(
    query: Tensor, pages: KeyPages, num_channels: int, block_table: Tensor, num_pages: Tensor, scaling: float
) -> Tensor:
    """Approximate the logits of all packed keys from a few of their channels.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        num_channels: channels to read, ``1 .. D``: those in which, within 1,024 tokens, the keys differ most for
            the query heads of their KV head. All others count as the middle of a page's range.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits.
    Returns:
        ``[B, H, P * page_size]`` float32, ``-inf`` past the last page of a row.
    Raises:
        ValueError: ``num_channels`` out of range, or shapes or dtypes that disagree.
    Source: Double Sparsity, arXiv 2408.07092, section 3.1; SparQ, arXiv 2312.04985, section 4. Reference:
    ``_reference.channel_logits``.
    """
    _check(query, pages, block_table, num_pages)
    if not 1 <= num_channels <= query.shape[2]:
        raise ValueError(f"num_channels must be 1 to {query.shape[2]}, the head dim, got {num_channels}")
    module = kernels("channels", query, query.dtype)
    logits: Tensor = module.channel_logits(query, pages, num_channels, block_table, num_pages, scaling)
    return logits


def key_logits(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor, scaling: float) -> Tensor:
    """Compute the logits of all packed keys.

    Args:
        query: ``[B, H, D]`` model dtype.
        pages: the layer's key pages.
        block_table: ``[B, P]`` int32, logical page to slot.
        num_pages: ``[B]`` int32, pages of each row.
        scaling: factor of the logits.
    Returns:
        ``[B, H, P * page_size]`` float32, ``-inf`` past the last page of a row.
    Raises:
        ValueError: shapes or dtypes that disagree.
    Reference: ``_reference.key_logits``.
    """
    _check(query, pages, block_table, num_pages)
    module = kernels("score", query, query.dtype)
    logits: Tensor = module.key_logits(query, pages, block_table, num_pages, scaling)
    return logits


def _check(query: Tensor, pages: KeyPages, block_table: Tensor, num_pages: Tensor) -> None:
    kv_heads, head_dim = pages.codes.shape[1:3]
    if query.dim() != 3 or query.shape[1] % kv_heads or query.shape[2] != head_dim:
        raise ValueError(
            f"query must be [B, H, {head_dim}], H a multiple of {kv_heads} KV heads, got {list(query.shape)}"
        )
    check_tables(query.shape[0], block_table, num_pages)


def check_tables(rows: int, block_table: Tensor, num_pages: Tensor) -> None:
    """Raise ValueError unless block table and page counts describe ``rows`` rows."""
    shape = block_table.shape
    if len(shape) != 2 or shape[0] != rows or block_table.dtype != torch.int32:
        raise ValueError(f"block_table must be [{rows}, P] int32, got {list(shape)} {block_table.dtype}")
    if num_pages.shape != (rows,) or num_pages.dtype != torch.int32:
        raise ValueError(f"num_pages must be [{rows}] int32, got {list(num_pages.shape)} {num_pages.dtype}")
