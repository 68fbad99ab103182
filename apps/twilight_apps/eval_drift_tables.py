"""Tables of drift for people: one for each text, context and mode."""

from __future__ import annotations

from typing import Any

from . import tables
from .eval_methods import PACKING


def print_results(result: dict[str, Any], figure: str) -> None:
    """Print a table for each text, context and mode; ``figure`` is ``"ppl"`` or ``"kl"``."""
    groups = dict.fromkeys((r["text"], r["context"], r["mode"]) for r in result["records"])
    for text, context, mode in groups:
        rows = [r for r in result["records"] if (r["text"], r["context"], r["mode"]) == (text, context, mode)]
        _print_group(f"{result['model']}, {result['dtype']}, {text}, {context:,} tokens", mode, rows, figure, result)


def _print_group(title: str, mode: str, rows: list[dict[str, Any]], figure: str, result: dict[str, Any]) -> None:
    way = (
        f"packing: chunks of {result['chunk']} tokens, nothing pruned"
        if mode == PACKING
        else f"decode: the last {result['positions']} tokens one by one, pruned"
    )
    drift = ["perplexity", "change ± error"] if figure == "ppl" else ["KL to dense ± error", "99th pct"]
    columns = ["method", *drift, "same top-1"]
    columns += ["KV", "smaller"] if mode == PACKING else ["read a step", "reads less", "candidates", "attended"]
    lines = []
    for row in rows:
        if "kl" not in row:
            lines.append([row["method"], row["status"].partition(":")[0], *[""] * (len(columns) - 2)])
            continue
        if figure == "ppl":
            change, error = row["perplexity_change"], row["perplexity_change_error"]
            shown = [f"{row['perplexity']:.3f}", f"{change:+.2%} ± {error:.2%}"]
        else:
            shown = [f"{max(0.0, row['kl']):.4f} ± {row['kl_error']:.4f}", f"{row['kl_p99']:.4f}"]
        line = [row["method"], *shown, f"{row['agreement']:.1%}"]
        if mode == PACKING:
            line += [tables.size(row["stored_bytes"]), f"{row['smaller']:.2f}x"]
        else:
            counts = [row["candidate_tokens"], row["kept_tokens"]]
            line += [tables.size(row["read_bytes"]), f"{row['reads_less']:.1f}x"]
            line += ["all" if count is None else f"{count:,.0f}" for count in counts]
        lines.append(line)
    tables.print_table(f"{title}\n{way}", columns, lines)
    for row in rows:
        if "kl" not in row:
            tables.say(f"{row['method']}: {row['status']}")
