"""Benchmarks as Markdown tables, from the JSON lines they printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def render(folder: Path) -> str:
    """Return the tables as Markdown; runs that differ only in what was run share one."""
    tables: dict[str, list[tuple[Any, str]]] = {}
    for command, rows_of in (("generate", _generate), ("prefill", _prefill), ("decode", _decode)):
        for path in sorted(folder.glob(f"bench-{command}*.json")):
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            head, rows = rows_of(result)
            tables.setdefault(head, []).extend(rows)
    return "\n\n".join(
        "\n".join([head, *(row for _, row in sorted(rows, key=lambda r: r[0]))]) for head, rows in tables.items()
    )


def render_summary(folder: Path) -> str:
    """Return one Markdown table: what the whole model gains at each length, with the default preset."""
    found: dict[tuple[str, int], list[str]] = {}
    for run in _runs(folder, "generate"):
        rows = {row["name"]: row for row in run["entrants"]}
        stock, ours = rows["stock"], rows["balanced"]
        found[run["dtype"], run["context"]] = [
            _change(stock["ms_per_token"]["median"], ours["ms_per_token"]["median"], ".0f"),
            _change(stock["kv_bytes"] / 1e6, ours["kv_bytes"] / 1e6, ".0f"),
        ]
    timed = [run for run in _runs(folder, "prefill") if "ttft_ms" in run]
    first_token: dict[tuple[str, int], str] = {}
    for run in sorted(timed, key=lambda run: run["ttft_ms"]["stock"]["runs"]):  # the median of most runs stays
        stock, ours = (run["ttft_ms"][name]["median"] / 1e3 for name in ("stock", "twilight"))
        first_token[run["dtype"], run["context"]] = _change(stock, ours, ".2g" if stock < 1 else ".1f")
    lines = [_columns(("dtype", "tokens in the cache", "ms a token", "cache, MB", "first token, s"))]
    for (dtype, context), cells in sorted(found.items()):
        lines.append(_row([dtype, f"{context:,}", *cells, first_token.get((dtype, context), "not measured")]))
    return "\n".join(lines)


def _runs(folder: Path, command: str) -> list[dict[str, Any]]:
    paths = sorted(folder.glob(f"bench-{command}*.json"))
    return [run for path in paths for run in json.loads(path.read_text(encoding="utf-8"))["results"]]


def _change(before: float, after: float, digits: str) -> str:
    return f"{before:{digits}} → {after:{digits}} ({before / after:.2g}x)"


def render_machine_code(folder: Path) -> str:
    """Return what each GPU kernel takes at most, as Markdown."""
    result: dict[str, Any] = json.loads((folder / "bench-aot.json").read_text(encoding="utf-8"))
    head = _head(
        f"{result['configurations']} configurations for sm_80, sm_90 and sm_100, Triton "
        f"{result['environment']['versions']['triton']} (`hf-twilight bench aot`); the most over all of them:",
        ("kernel", "compiled", "registers a thread", "shared memory, bytes", "spilled, bytes"),
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["results"]:
        found.setdefault(row["kernel"], []).append(row)
    lines = [head]
    for kernel, rows in sorted(found.items()):
        most = [max(row[name] for row in rows) for name in ("registers", "shared_bytes", "spill_bytes")]
        lines.append(_row([f"`{kernel}`", str(len(rows)), *(f"{number:,}" for number in most)]))
    return "\n".join(lines)


Table = tuple[str, list[tuple[Any, str]]]  # what stands above the rows, and each row with its place


def _generate(result: dict[str, Any]) -> Table:
    head = _head(
        f"Whole model, {result['model']}, one request, {_machine(result)}; all caches take turns of a few tokens "
        "(`hf-twilight bench generate`):",
        ("dtype", "tokens in the cache", "cache", "ms a token", "faster", "smaller than bf16", "same next token"),
    )
    rows = []
    for run in result["results"]:
        for place, row in enumerate(run["entrants"]):
            smaller = f"{row['bf16_bytes_over_kv_bytes']:.2f}x" if "kv_bytes" in row else ""
            same = f"{row['agreement']:.0%}" if "agreement" in row else ""
            time, faster = f"{row['ms_per_token']['median']:.1f}", f"{row['speedup']:.2f}x"
            cells = [run["dtype"], f"{run['context']:,}", row["name"], time, faster, smaller, same]
            rows.append(((run["dtype"], run["context"], place), _row(cells)))
    return head, rows


def _prefill(result: dict[str, Any]) -> Table:
    head = _head(
        f"Time to the first token, {result['model']}, {_machine(result)}; both caches take turns, and the attention of "
        "single layers on the model's own queries, keys and values (`hf-twilight bench prefill`):",
        (
            "dtype",
            "tokens",
            "stock, s",
            "twilight, s",
            "faster",
            "pairs computed",
            "layers alone: x sdpa",
            "their error",
        ),
    )
    rows = []
    for run in result["results"]:
        layers, times = run.get("layers", []), run.get("ttft_ms")
        whole = ["", "", "", ""]
        if times is not None:
            seconds = [f"{times[name]['median'] / 1e3:.2f}" for name in ("stock", "twilight")]
            whole = [*seconds, f"{run['ttft_speedup']:.2f}x", f"{run['density']:.0%}"]
        alone = [_range([row[name] for row in layers], digits) for name, digits in (("speedup", 1), ("error", 3))]
        rows.append(((run["dtype"], run["context"]), _row([run["dtype"], f"{run['context']:,}", *whole, *alone])))
    return head, rows


def _decode(result: dict[str, Any]) -> Table:
    shape = result["shape"]
    head = _head(
        f"One layer's decode attention, {shape['query_heads']} query heads, {shape['kv_heads']} KV heads, head dim "
        f"{shape['head_dim']}, batch 1, {_machine(result)} (`hf-twilight bench decode`):",
        ("tokens", "attention", "ms", "x sdpa float32", "x float32 matmuls", "tokens kept", "exact mass"),
    )
    rows = []
    for run in result["results"]:
        for place, row in enumerate(run["entrants"]):
            check = row["check"]
            kept, mass = (f"{check['kept']:,.0f}", f"{check['mass']:.1%}") if check else ("all", "100 %")
            times = [f"{row[name]:.1f}" for name in ("speedup_over_sdpa_float32", "speedup_over_float32_matmuls")]
            cells = [f"{run['context']:,}", row["name"], f"{row['ms']['median']:.2f}", *times, kept, mass]
            rows.append(((run["context"], place), _row(cells)))
    return head, rows


def _head(title: str, columns: tuple[str, ...]) -> str:
    return f"{title}\n\n{_columns(columns)}"


def _columns(columns: tuple[str, ...]) -> str:
    return f"{_row(columns)}\n|{'---|' * len(columns)}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _range(numbers: list[float], digits: int) -> str:
    return f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}" if numbers else ""


def _machine(result: dict[str, Any]) -> str:
    machine = result["environment"]
    return (
        f"{machine['cpu']['model']}, {machine['threads']['torch']} threads, torch {machine['versions']['torch']}, "
        f"Transformers {machine['versions']['transformers']}"
    )
