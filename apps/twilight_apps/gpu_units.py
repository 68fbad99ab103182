"""What the GPU benchmarks are cut into: units that pass or fail by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import gpu_timing
from .gpu_sizes import Sizes


@dataclass(frozen=True)
class Setting:
    """What a unit is run with.

    Attributes:
        sizes: full or toy.
        device, dtype: of the tensors.
        seed: of all random numbers.
        excluded: entrants of ours that failed their check: nobody times them.
    """

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    seed: int
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Unit:
    """A piece of a part.

    Attributes:
        name: unique in its part.
        rank: units of lower rank are run first: they are worth more.
        run: returns the result, ready for JSON; ``"faults"`` in it, by entrant, fail the unit but not the result.
    """

    name: str
    rank: int
    run: Callable[[Setting], dict[str, Any]]


@contextmanager
def attempt(faults: dict[str, str], name: str, device: torch.device) -> Iterator[None]:
    """Note what goes wrong with one entrant and let the others go on, if the GPU still answers.

    Raises:
        RuntimeError: it does not: nothing that this process computes from now on means anything.
    """
    try:
        yield
    except Exception as error:  # compilers' and drivers' errors have no common kind; each is told
        faults[name] = told(error)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if name in faults:
            torch.cuda.empty_cache()


def prepare_all(
    runs: Mapping[str, Callable[[], object]], faults: dict[str, str], device: torch.device
) -> dict[str, gpu_timing.Entrant]:
    """Warm up and capture each; what fails is noted and left out."""
    found = dict[str, gpu_timing.Entrant]()
    for name, run in runs.items():
        with attempt(faults, name, device):
            found[name] = gpu_timing.prepare(run, device)
    return found


def told(error: BaseException) -> str:
    """An error in one line of bounded length: compilers append whole programs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:400]}"
