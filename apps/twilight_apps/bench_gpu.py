"""What do the kernels do on a GPU? Checked against float64 first, then timed, in units that pass or fail by themselves.

The file is written anew after each unit, and a later call goes on from it. Units run in a child process, so that a
fault of a kernel, which ruins the CUDA context of its process, or one that hangs, costs that unit alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import twilight_kernels

from . import (
    bench_gpu_check,
    bench_gpu_decode,
    bench_gpu_generate,
    bench_gpu_memory,
    bench_gpu_prefill,
    bench_gpu_report,
    bench_gpu_step,
    gpu_worker,
    tables,
)
from .environment import environment
from .gpu_inputs import HOW
from .gpu_sizes import FULL, TOY
from .gpu_units import Setting, Unit, told

FILE_NAME = "bench-gpu.json"
PASSED, FAILED = "passed", "failed"
PARTS: dict[str, Any] = {  # of units of equal rank, those of the first part go first
    "check": bench_gpu_check, "decode": bench_gpu_decode, "step": bench_gpu_step, "prefill": bench_gpu_prefill,
    "generate": bench_gpu_generate, "memory": bench_gpu_memory,
}  # fmt: skip
_LEAST_S = 15.0  # a unit is not begun with less time left
_SAME = ("is_toy", "seed", "device", "kernels", "versions")  # what results must share to stand in one file

Call = Callable[[str, str, bool, int, list[str], float], dict[str, Any]]


def run(out: Path, parts: Sequence[str], *, is_toy: bool, budget_s: float, unit_s: float, seed: int) -> dict[str, Any]:
    """Run the units of ``parts`` that ``out`` does not hold yet, worth most first; print a table.

    Args:
        out: folder, made if missing; results of an earlier call in it are kept if they are of the same device,
            versions and kernels, and what passed is not run again.
        parts: names of ``PARTS``.
        is_toy: walk the whole path at toy sizes on the CPU; no time is kept then.
        budget_s: seconds that the call may take; a unit that runs at their end is stopped.
        unit_s: seconds that one unit may take.
        seed: of all random numbers.
    Returns:
        What was written.
    Raises:
        ValueError: an unknown part, or no CUDA device where one is needed.
    """
    start = time.monotonic()
    unknown = [name for name in parts if name not in PARTS]
    if unknown or not parts:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
    if not is_toy and not torch.cuda.is_available():
        raise ValueError(
            f"bench gpu needs a CUDA device, got torch {torch.__version__} without one; pass --toy to walk the path on "
            "the CPU, without times"
        )
    out.mkdir(parents=True, exist_ok=True)
    document = _document(is_toy, seed)
    document["units"] = _earlier(out / FILE_NAME, document)
    plan = _plan(parts, is_toy, document)
    document["not_reached"] = [f"{part} {name}" for part, name in plan if not _has_passed(document, part, name)]
    with gpu_worker.Worker() as worker:
        call = _in_process if is_toy else _in(worker)
        for part, name in plan:
            left = budget_s - (time.monotonic() - start)
            if _has_passed(document, part, name):
                continue
            if left < _LEAST_S:
                break
            tables.say(f"{part} {name} ...")
            failed = [found["name"] for found in document["units"] if _is_failed_check(found)]
            unit = call(part, name, is_toy, seed, failed, min(unit_s, left))
            if unit["status"] == FAILED and unit["seconds"] >= left - 1.0:
                break  # stopped by the budget, which says nothing of the unit
            document["units"] = [one for one in document["units"] if (one["part"], one["name"]) != (part, name)]
            document["units"].append(unit)
            document["not_reached"].remove(f"{part} {name}")
            document["seconds"] = time.monotonic() - start
            _write(out, document)
            reason = f": {unit['message']}" if unit["message"] else ""
            tables.say(f"  {unit['status']}, {unit['seconds']:.0f} s, {document['seconds']:.0f} s in{reason}")
    _write(out, document)
    bench_gpu_report.show(document)
    return document


def run_unit(part: str, name: str, is_toy: bool, seed: int, excluded: list[str]) -> dict[str, Any]:
    """Run one unit in this process; what goes wrong is told, not raised.

    Returns:
        ``part``, ``name``, ``status``, ``message`` (None if nothing went wrong), ``seconds``, ``result``, and
        ``is_clean``: whether this process may go on.
    """
    begin = time.monotonic()
    device, sizes = torch.device("cpu" if is_toy else "cuda"), TOY if is_toy else FULL
    setting = Setting(sizes, device, torch.float32 if is_toy else torch.bfloat16, seed, frozenset(excluded))
    unit: Unit = next(unit for unit in PARTS[part].units(sizes) if unit.name == name)
    result: dict[str, Any] = {}
    message, is_clean = None, True
    try:
        result = _finished(unit.run(setting), is_toy)
        faults = result.get("faults", {})
        message = "; ".join(f"{name}: {why}" for name, why in faults.items()) or None
    except Exception as error:  # compilers' and drivers' errors have no common kind; each is told
        message, is_clean = told(error), isinstance(error, ArithmeticError)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "part": part, "name": name, "status": FAILED if message else PASSED, "message": message,
        "seconds": time.monotonic() - begin, "result": result, "is_clean": is_clean,
    }  # fmt: skip


def _in_process(part: str, name: str, is_toy: bool, seed: int, excluded: list[str], limit_s: float) -> dict[str, Any]:
    return run_unit(part, name, is_toy, seed, excluded)


def _in(worker: gpu_worker.Worker) -> Call:
    """Run units in the child, which is replaced whenever it may have been harmed."""

    def call(part: str, name: str, is_toy: bool, seed: int, excluded: list[str], limit_s: float) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            found: dict[str, Any] = worker.call(run_unit, part, name, is_toy, seed, excluded, limit_s=limit_s)
        except (TimeoutError, gpu_worker.CallError) as error:
            found = {"part": part, "name": name, "status": FAILED, "message": told(error), "result": {}}
            found |= {"seconds": time.monotonic() - begin, "is_clean": False}
        if not found["is_clean"]:
            worker.stop()
        return found

    return call


def _plan(parts: Sequence[str], is_toy: bool, document: dict[str, Any]) -> list[tuple[str, str]]:
    """Part and name of every unit, worth most first; what failed before comes last."""
    places, tried = list(PARTS), [(unit["part"], unit["name"]) for unit in document["units"]]
    found = [
        (unit.rank, places.index(part), part, unit.name)
        for part in dict.fromkeys(parts)
        for unit in PARTS[part].units(TOY if is_toy else FULL)
    ]
    return [(part, name) for _, _, part, name in sorted(found, key=lambda one: (one[2:] in tried, *one[:2]))]


def _document(is_toy: bool, seed: int) -> dict[str, Any]:
    device = torch.device("cpu" if is_toy else "cuda")
    described = environment(device.type)
    return {
        "command": "bench gpu", "is_toy": is_toy, "dtype": "float32" if is_toy else "bfloat16", "inputs": HOW,
        "seed": seed, "device": _device(device), "kernels": _digest(), "versions": described["versions"],
        "environment": described, "seconds": 0.0, "not_reached": [], "units": [],
    }  # fmt: skip


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "cpu"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name, "capability": [found.major, found.minor], "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def _digest() -> str:
    """Of the kernels' sources: figures of other ones do not belong into the same file."""
    total = hashlib.sha256()
    for path in sorted(Path(str(twilight_kernels.__file__)).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _earlier(path: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Units of an earlier call that belong to this one."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in _SAME if before.get(name) != document[name]]
    if other:
        tables.say(f"{path} is of another {', '.join(other)}: begun anew")
        return []
    units: list[dict[str, Any]] = before["units"]
    tables.say(f"{path} holds {len(units)} units: what passed is kept")
    return units


def _has_passed(document: dict[str, Any], part: str, name: str) -> bool:
    return any((unit["part"], unit["name"], unit["status"]) == (part, name, PASSED) for unit in document["units"])


def _is_failed_check(unit: dict[str, Any]) -> bool:
    return (unit["part"], unit["status"]) == ("check", FAILED)


def _finished(result: dict[str, Any], is_toy: bool) -> dict[str, Any]:
    rows = result.get("entrants", [])
    if is_toy:  # at toy sizes on a CPU times say nothing of a GPU
        for row in rows:
            row["ms"] = None
        return result
    return bench_gpu_report.compared(result)


def _write(out: Path, document: dict[str, Any]) -> None:
    draft = out / f"{FILE_NAME}.tmp"
    draft.write_text(json.dumps(document, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    os.replace(draft, out / FILE_NAME)
