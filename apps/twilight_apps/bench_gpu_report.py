"""What a GPU benchmark's results say, for people: entrants compared, and the table."""

from __future__ import annotations

from typing import Any

from . import tables
from .gpu_dense import REPEATED

_COLUMNS = ("part", "what", "how", "launched", "ms [p20, p80]", "x sdpa, repeated", "x fastest dense")


def compared(result: dict[str, Any]) -> dict[str, Any]:
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


def show(document: dict[str, Any]) -> None:
    """Print one table of all units, and below it what failed and what was not reached."""
    rows = [row for unit in document["units"] for row in _rows(unit)]
    title = f"{document['device']['name']}, {document['dtype']}"
    if document["is_toy"]:
        title += ", toy sizes: the path was walked, nothing was measured"
    tables.print_table(title, list(_COLUMNS), rows, left=4)
    for unit in document["units"]:
        if unit["message"]:
            tables.say(f"{unit['part']} {unit['name']} failed: {unit['message']}")
    if document["not_reached"]:
        tables.say(f"not reached: {', '.join(document['not_reached'])}; the same command goes on with them")


def _rows(unit: dict[str, Any]) -> list[list[str]]:
    part, name, result = unit["part"], unit["name"], unit["result"]
    if "entrants" not in result:
        return [[part, name, f"{unit['status']}{_size(result)}", *[""] * (len(_COLUMNS) - 3)]]
    rows = []
    for row in result["entrants"]:
        how = row["name"] + (" (fastest dense)" if row["name"] == result.get("fastest_dense") else "")
        ms, launch = row["ms"], row["launch"].split(":")[0]
        rows.append([
            part, name, how, launch, tables.spread(ms) if ms else "-", _times(row, "speedup_over_repeated"),
            _times(row, "speedup_over_fastest"),
        ])  # fmt: skip
    for entrant, share in result.get("top_p_share", {}).items():
        if share is not None:
            rows.append([part, name, f"{entrant}: top-p takes {share:.1%}", *[""] * (len(_COLUMNS) - 3)])
    return rows


def _size(result: dict[str, Any]) -> str:
    if "fits" not in result:
        return ""
    size = f"{result['cache_bytes_closed_form'] / 1e9:.1f} GB beside {result['weight_bytes'] / 1e9:.1f} GB"
    return f": {size} {'fits' if result['fits'] else 'does not fit'}"


def _times(row: dict[str, Any], key: str) -> str:
    return "-" if row.get(key) is None else f"{row[key]:.2f}"
