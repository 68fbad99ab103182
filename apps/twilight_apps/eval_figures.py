"""Markdown tables of evaluations, from the JSON that ``hf-twilight eval`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .eval_answers import means

Record = dict[str, Any]


def render(folder: Path) -> str:
    """Return the tables of every ``eval-*.json`` that has one: drift, mass, needle and ruler."""
    tables = {"pareto": _drift, "kl": _drift, "ppl": _drift, "mass": _mass, "needle": _answers, "ruler": _answers}
    parts = []
    for name, table in tables.items():
        for path in sorted(folder.glob(f"eval-{name}*.json")):
            parts.append(table(json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(parts)


def _drift(result: Record) -> str:
    """One row a method: packing and decode side by side, at each context and text."""
    parts = []
    for text, context in dict.fromkeys((r["text"], r["context"]) for r in result["records"]):
        records = [r for r in result["records"] if (r["text"], r["context"]) == (text, context)]
        lines = [
            f"{_where(result)}, {text}, {context:,} tokens; decode over {result['positions']} tokens:",
            "",
            "| method | smaller | KL | perplexity | KL in decode | reads less | candidates | attended |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(r["method"] for r in records):
            own = {r["mode"]: r for r in records if r["method"] == name}
            packing, decode = own.get("packing", {}), own.get("decode", {})
            if "kl" not in packing and "kl" not in decode:
                lines.append(f"| {name} | {next(iter(own.values()))['status'].partition(':')[0]} | | | | | | |")
                continue
            both = packing if "kl" in packing else decode
            less = f"{decode['reads_less']:.1f}x" if "kl" in decode else ""
            figures = [f"{both['smaller']:.2f}x", _kl(packing), _change(packing), _kl(decode), less]
            figures += [_count(decode, "candidate_tokens"), _count(decode, "kept_tokens")]
            lines.append(f"| {name} | {' | '.join(figures)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _kl(record: Record) -> str:
    return f"{max(0.0, record['kl']):.4f} ± {record['kl_error']:.4f}" if "kl" in record else ""


def _count(record: Record, name: str) -> str:
    return "" if record.get(name) is None else f"{record[name]:,.0f}"


def _change(record: Record) -> str:
    if "kl" not in record:
        return ""
    change = round(record["perplexity_change"], 3) + 0.0  # no minus before a zero
    return f"{change:+.1%} ± {record['perplexity_change_error']:.1%}"


def _mass(result: Record) -> str:
    lines = [
        f"Attention mass, {_where(result)}, {result['text']}, {result['context']:,} tokens, {result['steps']} steps:",
        "",
        "| keys | asked p | median | 5th percentile | 1st percentile | at least p - 0.005 | tokens attended |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['setting']} | {r['p']:g} | {r['median']:.3f} | {r['q05']:.3f} | {r['q01']:.3f} | "
        f"{r['share_reached']:.1%} | {r['kept_tokens']:,.0f} |"
        for r in result["records"]
    ]
    return "\n".join(lines)


def _answers(result: Record) -> str:
    """One row a method: score at each length, and the mean."""
    what = "Ruler" if "tasks" in result else "Needle"
    overall = means(result["records"], ("method",))
    by_length = means(result["records"], ("method", "length"))
    count = sum(record["method"] == "dense" for record in result["records"])
    lines = [
        f"{what}, {_where(result)}, {' and '.join(result['texts'])}, {count} questions, per cent:",
        "",
        "| method | " + " | ".join(f"{length:,} tokens" for length in result["lengths"]) + " | mean | to dense |",
        "|---|" + "---|" * (len(result["lengths"]) + 2),
    ]
    for (name,), mean in overall.items():
        cells = " | ".join(f"{100 * by_length[name, length]:.0f}" for length in result["lengths"])
        lines.append(f"| {name} | {cells} | {100 * mean:.1f} | {100 * (mean - overall[('dense',)]):+.1f} |")
    return "\n".join(lines)


def _where(result: Record) -> str:
    return f"{result['model']}, {result['dtype']}"
