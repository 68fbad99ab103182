"""Markdown tables of evaluations, from the JSON that ``hf-twilight eval`` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .eval_answers import means, to_dense
from .eval_drift import ALL_TEXTS
from .eval_methods import DECODE, PACKING, POLICY

Record = dict[str, Any]


def render(folder: Path) -> str:
    """Return a section for each evaluation that ``eval-*.json`` holds: drift, mass, needle, ruler, prefill."""
    sections: dict[str, tuple[tuple[str, ...], Callable[[Record], str]]] = {
        "Bytes and drift: which preset": (("pareto", "kl", "ppl"), _drift),
        "Attention mass": (("mass",), _mass),
        "Needle": (("needle",), _answers),
        "Ruler": (("ruler",), _answers),
        "Sparse prefill": (("prefill",), _prefill),
    }
    parts = []
    for title, (names, table) in sections.items():
        paths = [path for name in names for path in sorted(folder.glob(f"eval-{name}*.json"))]
        if paths:
            parts.append(f"### {title}")
            results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            parts += [table(result) for result in (_joined(results) if table is _drift else results)]
    return "\n\n".join(parts)


def _joined(results: list[Record]) -> list[Record]:
    """Put together the runs that differ only in which methods and modes they measured."""
    found: dict[str, Record] = {}
    for result in results:
        key = json.dumps([result[name] for name in ("model", "dtype", "seed", "chunk", "positions", "excerpts")])
        if key in found:
            found[key]["records"] += result["records"]
        else:
            found[key] = result
    return list(found.values())


def _drift(result: Record) -> str:
    """A table a context: packing and decode of stored caches side by side; policies, which only decode, below."""
    parts = []
    for context in dict.fromkeys(r["context"] for r in result["records"]):
        records = [r for r in result["records"] if r["context"] == context]
        texts = list(dict.fromkeys(r["text"] for r in records if r["text"] != ALL_TEXTS))
        pooled = texts[0] if len(texts) == 1 else ALL_TEXTS
        where = f"{_where(result)}, {' and '.join(texts)}, {context:,} tokens"
        if any(r["mode"] == DECODE for r in records):
            where += f"; decode over {result['positions']}"
        each = "" if len(texts) == 1 else " of each; KL by text, the rest of both together"
        modes = {(r["text"], r["method"], r["mode"]): r for r in records}
        stored = dict.fromkeys(r["method"] for r in records if r["kind"] != POLICY)
        lines = [f"{where}{each}:", "", *_stored_rows(modes, list(stored), texts, pooled)]
        policies = dict.fromkeys(r["method"] for r in records if r["kind"] == POLICY)
        if policies:
            lines += ["", "Policies on unrounded pages, decode, same texts:", ""]
            lines += _policy_rows(modes, list(policies), texts, pooled)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _stored_rows(
    modes: dict[tuple[str, str, str], Record], names: list[str], texts: list[str], pooled: str
) -> list[str]:
    titles = ["method", "smaller", *_by_text("KL", texts), "perplexity", "KL in decode", "reads less", "attended"]
    lines = _head(titles)
    for name in names:
        packing, decode = modes.get((pooled, name, PACKING), {}), modes.get((pooled, name, DECODE), {})
        if "kl" not in packing and "kl" not in decode:
            lines.append(_row([name, (packing or decode)["status"].partition(":")[0], *[""] * (len(titles) - 2)]))
            continue
        cells = [f"{(packing if 'kl' in packing else decode)['smaller']:.2f}x"]
        cells += [_kl(modes.get((text, name, PACKING), {})) for text in texts]
        cells += [_change(packing), _kl(decode), _times(decode), _count(decode, "kept_tokens")]
        lines.append(_row([name, *cells]))
    return lines


def _policy_rows(
    modes: dict[tuple[str, str, str], Record], names: list[str], texts: list[str], pooled: str
) -> list[str]:
    lines = _head(["policy", *_by_text("KL", texts), "reads less", "candidates", "attended"])
    for name in names:
        both = modes[pooled, name, DECODE]
        cells = [_kl(modes[text, name, DECODE]) for text in texts]
        cells += [_times(both), _count(both, "candidate_tokens"), _count(both, "kept_tokens")]
        lines.append(_row([name, *cells]))
    return lines


def _by_text(name: str, texts: list[str]) -> list[str]:
    return [name] if len(texts) == 1 else [f"{name}, {text.removesuffix('.txt')}" for text in texts]


def _head(titles: list[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _times(record: Record) -> str:
    return f"{record['reads_less']:.1f}x" if "reads_less" in record else ""


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
        f"{_where(result)}, {result['text']}, {result['context']:,} tokens, {result['steps']} steps:",
        "",
        *_head(["keys", "asked p", "median", "5th percentile", "1st percentile", "at least p - 0.005", "attended"]),
    ]
    for r in result["records"]:
        shares = [f"{r[name]:.3f}" for name in ("median", "q05", "q01")]
        lines.append(
            _row([r["setting"], f"{r['p']:g}", *shares, f"{r['share_reached']:.1%}", f"{r['kept_tokens']:,.0f}"])
        )
    return "\n".join(lines)


def _answers(result: Record) -> str:
    """One row a method: score at each length, the mean, and how many answers are the dense model's."""
    records, lengths = result["records"], result["lengths"]
    overall, by_length = means(records, ("method",)), means(records, ("method", "length"))
    same = {name: [r["is_same"] for r in records if r["method"] == name] for (name,) in overall}
    count = sum(record["method"] == "dense" for record in records)
    of = f" ({', '.join(result['tasks'])})" if "tasks" in result else ""
    lines = [
        f"{_where(result)}, {' and '.join(result['texts'])}, {count} questions{of}, per cent:",
        "",
        *_head(["method", *(f"{length:,} tokens" for length in lengths), "mean", "to dense", "same answer"]),
    ]
    for (name,), mean in overall.items():
        cells = [f"{100 * by_length[name, length]:.0f}" for length in lengths]
        cells += [f"{100 * mean:.1f}", to_dense(records, name)]
        lines.append(_row([name, *cells, f"{sum(same[name]) / len(same[name]):.0%}"]))
    return "\n".join(lines)


def _prefill(result: Record) -> str:
    """One row for each text and alpha, and the mean of all; of needles under sparse prefill, what was found."""
    if "depths" in result:
        return _answers(result)
    records = result["records"]
    positions = f"last {result['positions']}"
    titles = [
        "text",
        "alpha",
        "KL, next token",
        f"KL, {positions}",
        "same argmax",
        "perplexity",
        "mass",
        "worst 5 %",
        "pairs",
    ]
    lines = [f"{_where(result)}, {result['context']:,} tokens, against dense prefill:", "", *_head(titles)]
    for alpha in dict.fromkeys(r["alpha"] for r in records):
        own = [r for r in records if r["alpha"] == alpha]
        for text, rows in [*((r["text"], [r]) for r in own), ("mean", own)]:
            mean = {name: sum(r[name] for r in rows) / len(rows) for name in _PREFILL}
            figures = [spec.format(mean[name]) for name, spec in _PREFILL.items()]
            lines.append(_row([text, f"{alpha:g}", *figures]))
    return "\n".join(lines)


_PREFILL = {
    "kl_next": "{:.4f}", "kl": "{:.4f}", "agreement": "{:.1%}", "perplexity_change": "{:+.1%}", "mass": "{:.1%}",
    "mass_q05": "{:.1%}", "density": "{:.0%}",
}  # fmt: skip


def _where(result: Record) -> str:
    return f"{result['model']}, {result['dtype']}"
