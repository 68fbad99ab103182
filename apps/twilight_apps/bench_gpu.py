"""What do the kernels do on a GPU? Every part checked against float64 first, then timed; one table, one JSON file.

The file is written anew after each result, so that a run that is cut short loses nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import bench_gpu_decode, bench_gpu_memory, bench_gpu_prefill, bench_gpu_step, tables
from .environment import environment
from .gpu_dense import REPEATED
from .gpu_inputs import HOW
from .gpu_sizes import FULL, TOY, Sizes

FILE_NAME = "bench-gpu.json"

Part = Callable[[Sizes, torch.device, torch.dtype, int], Iterator[dict[str, Any]]]
PARTS: dict[str, Part] = {
    "decode": bench_gpu_decode.run, "prefill": bench_gpu_prefill.run, "step": bench_gpu_step.run,
    "memory": bench_gpu_memory.run,
}  # fmt: skip


def run(out: Path, parts: Sequence[str], *, is_toy: bool, budget_s: float, seed: int) -> dict[str, Any]:
    """Run ``parts`` in order; print a table and write ``out / FILE_NAME``.

    Args:
        out: folder, made if missing.
        parts: names of ``PARTS``.
        is_toy: walk the whole path at toy sizes on the CPU; no time is kept then.
        budget_s: seconds after which no further result is begun.
        seed: of all random numbers.
    Returns:
        What was written.
    Raises:
        ValueError: an unknown part, or no CUDA device where one is needed.
    """
    unknown = [name for name in parts if name not in PARTS]
    if unknown or not parts:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
    if not is_toy and not torch.cuda.is_available():
        raise ValueError(
            f"bench gpu needs a CUDA device, got torch {torch.__version__} without one; pass --toy to walk the path on "
            "the CPU, without times"
        )
    device = torch.device("cpu" if is_toy else "cuda")
    sizes, dtype = (TOY, torch.float32) if is_toy else (FULL, torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "command": "bench gpu", "is_toy": is_toy, "dtype": str(dtype).removeprefix("torch."), "inputs": HOW,
        "seed": seed, "results": [], "failures": {}, "not_reached": list(parts), "device": _device(device),
        "environment": environment(device.type),
    }  # fmt: skip
    start = time.monotonic()
    for name in parts:
        if time.monotonic() - start > budget_s:
            break
        tables.say(f"{name} ...")
        try:
            for result in PARTS[name](sizes, device, dtype, seed):
                result = _compared(result)
                document["results"].append(_without_times(result) if is_toy else result)
                tables.say(f"  {_headline(document['results'][-1])}, {time.monotonic() - start:.0f} s in")
                _write(out, document)
                if time.monotonic() - start > budget_s:
                    break
            else:
                document["not_reached"].remove(name)
        except (
            Exception
        ) as error:  # compilers' and drivers' errors have no common kind; each is told, and fails the run
            document["failures"][name] = f"{type(error).__name__}: {error}"
            tables.say(f"  failed: {document['failures'][name].splitlines()[0]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _write(out, document)
    _print(document)
    return document


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "cpu"}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name, "capability": [found.major, found.minor], "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    """Add the fastest dense entrant and how much faster each entrant is than it and than repeated KV heads."""
    rows = result.get("entrants", [])
    dense = {row["name"]: row["ms"]["median"] for row in rows if not row["is_ours"]}
    if not dense:
        return result
    fastest = min(dense, key=lambda name: dense[name])
    for row in rows:
        row["speedup_over_fastest"] = dense[fastest] / row["ms"]["median"]
        if REPEATED in dense:
            row["speedup_over_repeated"] = dense[REPEATED] / row["ms"]["median"]
    return {**result, "fastest_dense": fastest}


def _without_times(result: dict[str, Any]) -> dict[str, Any]:
    """Drop what was timed: at toy sizes on a CPU it says nothing of a GPU."""
    rows = [
        {name: None if name == "ms" or name.startswith("speedup") else found for name, found in row.items()}
        for row in result.pop("entrants", [])
    ]
    result.pop("fastest_dense", None)
    return {**result, "entrants": rows} if rows else result


def _write(out: Path, document: dict[str, Any]) -> None:
    draft = out / f"{FILE_NAME}.tmp"
    draft.write_text(json.dumps(document, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    os.replace(draft, out / FILE_NAME)


def _headline(result: dict[str, Any]) -> str:
    about = [f"{name} {result[name]:,}" for name in ("context", "batch", "tokens") if name in result]
    return ", ".join([*([result["name"]] if "name" in result else []), *about]) or result["part"]


def _print(document: dict[str, Any]) -> None:
    rows: list[list[str]] = []
    for result in document["results"]:
        if result["part"] == "memory":
            size = f"{result['cache_bytes_closed_form'] / 1e9:.1f} GB beside {result['weight_bytes'] / 1e9:.1f} GB"
            fits = "fits" if result["fits"] else "does not fit"
            rows.append(["memory", _headline(result), f"{size}: {fits}", "", "", "", ""])
            continue
        for row in result["entrants"]:
            ms = row["ms"]
            how = row["name"] + (" (fastest dense)" if row["name"] == result.get("fastest_dense") else "")
            rows.append([
                result["part"], _headline(result), how,
                row["launch"].split(":")[0], tables.spread(ms) if ms else "-", _times(row, "speedup_over_repeated"),
                _times(row, "speedup_over_fastest"),
            ])  # fmt: skip
        for name, share in result.get("top_p_share", {}).items():
            if share is not None:
                rows.append([result["part"], _headline(result), f"{name}: top-p takes {share:.1%}", "", "", "", ""])
    title = f"{document['device']['name']}, {document['dtype']}"
    if document["is_toy"]:
        title += ", toy sizes: the path was walked, nothing was measured"
    columns = ["part", "what", "how", "launched", "ms [p20, p80]", "x sdpa, repeated", "x fastest dense"]
    tables.print_table(title, columns, rows, left=4)
    for name, reason in document["failures"].items():
        tables.say(f"{name} failed: {reason}")
    if document["not_reached"]:
        tables.say(f"not finished: {', '.join(document['not_reached'])}")


def _times(row: dict[str, Any], key: str) -> str:
    return "-" if row.get(key) is None else f"{row[key]:.2f}"
