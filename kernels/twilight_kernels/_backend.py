"""Which implementation of a kernel runs: numba on CPUs, Triton on CUDA, the reference for everything else."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import _reference
from .page_codec import RAW_DTYPES

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "numba", "triton")
OVERRIDE = "HF_TWILIGHT_BACKEND"  # for debugging: one of BACKENDS; what is computed is the same but for rounding
_INTERPRET = "TRITON_INTERPRET"


@cache
def override() -> str:
    """What ``HF_TWILIGHT_BACKEND`` says, read once: asked for at each kernel, the environment costs more than most."""
    return os.environ.get(OVERRIDE, "")


def backend_name(device: torch.device | str) -> str:
    """Name what runs the kernels for tensors on ``device``: ``"numba"``, ``"triton"`` or ``"reference"``.

    The environment variable ``HF_TWILIGHT_BACKEND``, set to one of these, overrides the choice for debugging;
    it is read once.

    Raises:
        ValueError: an override that does not exist, or that cannot run on ``device``.
    """
    return _name(torch.device(device).type, override())


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of ``dtype`` on ``device`` have kernels of their own, not only the slow reference."""
    return dtype in RAW_DTYPES and _name(device.type, override()) != "reference"


def has_prompt_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``prompt_attention`` has a kernel here, on CPUs with matrix tiles, and is more than its definition."""
    return dtype == torch.bfloat16 and has_matrix_tiles(device)


def has_matrix_tiles(device: torch.device) -> bool:
    """Whether ``attend_stripes`` runs on matrix tiles here: then it is fast also where every key is read."""
    if backend_name(device) != "numba":
        return False
    from ._numba_amx import has_tiles

    return bool(has_tiles())


def kernels(concept: str, tensor: Tensor, dtype: torch.dtype) -> ModuleType:
    """Return the module that holds the kernels of ``concept`` for ``dtype`` where ``tensor`` is.

    float64 runs on the reference, which is wide enough for it; the other kernels are not.
    """
    device = tensor.device.type
    name = _name(device, override())
    if name == "reference":
        return _say_reference(f"no other kernels for {device} here")
    if dtype not in RAW_DTYPES:
        return _say_reference(f"the {name} kernels do not take {dtype}")
    return _triton(concept, device) if name == "triton" else _numba(concept)


def release_threads() -> None:
    """Give the calling thread's idle compute threads back, because another thread computes from now on."""
    from ._numba_pool import release_team

    release_team()


@cache
def _name(device: str, override: str) -> str:
    if override not in ("", *BACKENDS):
        raise ValueError(f"{OVERRIDE} must be one of {', '.join(BACKENDS)} or unset, got {override!r}")
    if override == "numba" and device != "cpu":
        raise ValueError(f"{OVERRIDE}=numba runs on CPUs only, got tensors on {device}; unset it")
    if override == "triton":
        is_interpreted = device == "cpu" and os.environ.get(_INTERPRET) == "1"
        if device != "cuda" and not is_interpreted:
            raise ValueError(
                f"{OVERRIDE}=triton runs on cuda, and on cpu where {_INTERPRET}=1 is set before triton is "
                f"imported, got tensors on {device}; unset it"
            )
    if override:
        return override
    if device == "cpu":
        return "numba"
    if device != "cuda":
        return "reference"
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "triton is not installed: CUDA tensors run on the reference in plain torch, which is slow; "
            "install it with: pip install hf-twilight[gpu]"
        )
        return "reference"
    return "triton"


@cache
def _numba(concept: str) -> ModuleType:
    try:
        return importlib.import_module(f"._numba_{concept}", __package__)
    except ImportError as error:
        raise ImportError(f"numba is needed to run on CPUs: {error}; install it with: pip install numba") from error


@cache
def _triton(concept: str, device: str) -> ModuleType:
    name = f"._triton_{concept}"
    if importlib.util.find_spec(name, __package__) is None:
        return _say_reference(f"no Triton kernels of {concept}")
    try:
        module = importlib.import_module(name, __package__)
    except ImportError as error:
        raise ImportError(f"triton cannot be imported: {error}; install it with: pip install triton") from error
    _say_triton(device)
    return module


@cache
def _say_triton(device: str) -> None:
    logger.info("Triton kernels for %s%s", device, ", interpreted" if device == "cpu" else "")


@cache
def _say_reference(reason: str) -> ModuleType:
    logger.info("%s: running the reference in plain torch, which is slow", reason)
    return _reference
