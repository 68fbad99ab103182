"""k-means over the keys of one head (Tactic, arXiv 2502.12216, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 5


def cluster_keys(keys: Tensor, cluster_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each head's keys by Euclidean distance, the same way every time.

    Args:
        keys: ``[K, S, D]`` float32, S a multiple of ``cluster_tokens``.
        cluster_tokens: tokens of a cluster on average.
    Returns:
        centroids ``[K, C, D]`` with ``C = S / cluster_tokens``; the cluster of each key ``[K, S]`` int64; the mean
        over channels of the variance within each cluster ``[K, C]``. A cluster without keys is a zero vector.
    """
    centroids = keys[:, ::cluster_tokens]
    for _ in range(_ITERATIONS):
        centroids = _means(keys, _nearest(keys, centroids), centroids)
    member = _nearest(keys, centroids)
    centroids = _means(keys, member, torch.zeros_like(centroids))
    inside = (keys - centroids.gather(1, member[..., None].expand_as(keys))).square().mean(-1)  # [K, S]
    counts = _counts(member, centroids.shape[1])
    spread = torch.zeros_like(counts).scatter_add_(1, member, inside) / counts.clamp_min(1)
    return centroids, member, spread


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """The closest centroid of each key, ``[K, S]``."""
    return (keys @ centroids.transpose(1, 2) - 0.5 * centroids.square().sum(-1)[:, None]).argmax(-1)


def _means(keys: Tensor, member: Tensor, empty: Tensor) -> Tensor:
    """The mean of each cluster; what ``empty`` holds for one without keys."""
    counts = _counts(member, empty.shape[1])[..., None]
    sums = torch.zeros_like(empty).scatter_add_(1, member[..., None].expand_as(keys), keys)
    return torch.where(counts > 0, sums / counts.clamp_min(1), empty)


def _counts(member: Tensor, clusters: int) -> Tensor:
    ones = torch.ones(member.shape, device=member.device)
    return torch.zeros(member.shape[0], clusters, device=member.device).scatter_add_(1, member, ones)
