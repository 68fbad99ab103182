"""Write a document's figures from the JSON lines that benchmarks and evaluations printed.

    python -m twilight_apps.figures README.md docs/results
    python -m twilight_apps.figures docs/evaluation.md docs/results
    python -m twilight_apps.figures docs/serving.md docs/results
    python -m twilight_apps.figures docs/decisions.md docs/results

reads ``bench-*.json``, ``eval-*.json``, ``bench-serve*.json`` and ``bench-aot.json`` in turn, and replaces what stands
between the markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import eval_figures, serve_figures

START, END = "<!-- figures -->", "<!-- end of figures -->"
EVALUATION_START, EVALUATION_END = "<!-- evaluation -->", "<!-- end of evaluation -->"
SERVING_START, SERVING_END = "<!-- serving -->", "<!-- end of serving -->"
CODE_START, CODE_END = "<!-- machine code -->", "<!-- end of machine code -->"


def main() -> None:
    """Replace the figures of the document named first by those of the folder named second."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m twilight_apps.figures DOCUMENT.md docs/results")
    document = Path(sys.argv[1])
    document.write_text(with_figures(document.read_text(encoding="utf-8"), Path(sys.argv[2])), encoding="utf-8")


def with_figures(text: str, folder: Path) -> str:
    """Return the document's text with the figures of ``folder``.

    Raises:
        ValueError: the markers are missing.
    """
    sections = [
        (START, END, render),
        (EVALUATION_START, EVALUATION_END, eval_figures.render),
        (SERVING_START, SERVING_END, serve_figures.render),
        (CODE_START, CODE_END, render_machine_code),
    ]
    present = [section for section in sections if section[0] in text and section[1] in text]
    if not present:
        pairs = " or ".join(f"{start} and {end}" for start, end, _ in sections)
        raise ValueError(f"the document must hold {pairs}, got a text without them")
    for start, end, draw in present:
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{draw(folder)}\n{end}{rest.split(end, 1)[1]}"
    return text


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
        f"Whole model, {result['model']}, one request, {_machine(result)}; all caches take turns token by token "
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
    return f"{title}\n\n{_row(columns)}\n|{'---|' * len(columns)}"


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


if __name__ == "__main__":
    main()
