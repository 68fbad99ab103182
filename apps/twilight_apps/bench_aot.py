"""Do the GPU kernels compile without spills, for GPUs that are not here, and what do they take of a chip?

Regime: every configuration that the Triton modules list, at every compute capability; nothing is run or timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import tables

if TYPE_CHECKING:
    from twilight_kernels._triton_aot import Usage


def run(capabilities: Sequence[int], only: str) -> dict[str, Any]:
    """Compile the configurations whose name contains ``only``; print a table.

    Returns:
        What ``--json`` prints; ``faults`` counts what must not ship.
    Raises:
        ValueError: an unknown capability, or no such configuration.
        ImportError: Triton is missing.
    """
    from twilight_kernels import _triton_aot

    chosen = [case for case in _triton_aot.cases() if only in case.name]
    if not chosen:
        names = sorted({case.name.split(",")[0] for case in _triton_aot.cases()})
        raise ValueError(f"only must be part of a configuration's name, got {only!r}; kernels: {', '.join(names)}")
    work = [(case, chip) for case in chosen for chip in capabilities if chip not in case.spared]
    found = []
    with tables.progress("Compiling", len(work)) as bar:
        for case, chip in work:
            found.append(_triton_aot.measure(case, chip))
            bar.advance(bar.task_ids[0])
    _print(found)
    rows = [{**asdict(usage), "fault": usage.fault} for usage in found]
    return {
        "configurations": len(work) // len(capabilities),  # of a chip: some kernels have others on another
        "faults": sum(row["fault"] is not None for row in rows),
        "results": rows,
    }


def _print(found: Sequence[Usage]) -> None:
    rows = [
        [
            usage.name, f"sm_{usage.capability}", usage.fault or "", str(usage.num_warps), str(usage.num_stages),
            str(usage.registers), f"{usage.shared_bytes:,}", str(usage.spill_bytes),
        ]
        for usage in found
    ]  # fmt: skip
    columns = ["configuration", "for", "fault", "warps", "stages", "registers", "shared, bytes", "spilled, bytes"]
    tables.print_table("Machine code of the GPU kernels", columns, rows, left=3)
