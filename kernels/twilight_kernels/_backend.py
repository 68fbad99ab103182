"""Which implementation of a kernel runs: numba on CPUs, the reference for everything else."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import _reference
from .layout import RAW_DTYPES

logger = logging.getLogger(__name__)


def backend_name(device: torch.device | str) -> str:
    """Name what runs the kernels for tensors on ``device``: ``"numba"`` or ``"reference"``."""
    return "numba" if torch.device(device).type == "cpu" else "reference"


def kernels(concept: str, tensor: Tensor, dtype: torch.dtype) -> ModuleType:
    """Return the module that holds the kernels of ``concept`` for ``dtype`` where ``tensor`` is.

    float64 runs on the reference, which is wide enough for it; the CPU kernels are not.
    """
    if not tensor.is_cpu:
        return _say_reference(f"no kernels for {tensor.device.type} here")
    if dtype not in RAW_DTYPES:
        return _say_reference(f"the CPU kernels do not take {dtype}")
    return _numba(concept)


def release_threads() -> None:
    """Give the calling thread's idle compute threads back, because another thread computes from now on."""
    from ._numba_pool import release_team

    release_team()


@cache
def _numba(concept: str) -> ModuleType:
    try:
        return importlib.import_module(f"._numba_{concept}", __package__)
    except ImportError as error:
        raise ImportError(f"numba is needed to run on CPUs: {error}; install it with: pip install numba") from error


@cache
def _say_reference(reason: str) -> ModuleType:
    logger.info("%s: running the reference in plain torch, which is slow", reason)
    return _reference
