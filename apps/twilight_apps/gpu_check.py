"""Whether something may be timed on a GPU: its output against float64."""

from __future__ import annotations

import torch
from torch import Tensor

# of the largest output: what rounding of inputs' dtype in weights and sums explains
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def error_of(out: Tensor, exact: Tensor) -> float:
    """Largest difference; NaN stays NaN, which no tolerance admits."""
    return float((out.double() - exact.double()).abs().max())


def tolerance_of(exact: Tensor, dtype: torch.dtype) -> float:
    """What ``error_of`` may be for outputs of ``dtype``."""
    return _TOLERANCE[dtype] * float(exact.abs().max())


def reject_reason(out: Tensor, exact: Tensor) -> str | None:
    """Why ``out`` must not be timed, None if it may."""
    error, tolerance = error_of(out, exact), tolerance_of(exact, out.dtype)
    return None if error <= tolerance else f"wrong: an error of {error:.3g}, where rounding explains {tolerance:.3g}"
