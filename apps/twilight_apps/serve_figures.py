"""The tables of ``bench serve`` in a document, from the JSON lines that it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ORDER = ("w1", "w2", "w3", "w10")


def render(folder: Path) -> str:
    """Return a Markdown table for each workload of each ``bench-serve*.json``."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("bench-serve*.json")]
    runs = [(run, result) for run in found for result in run["results"]]
    runs.sort(key=lambda pair: (_ORDER.index(pair[1]["workload"]), pair[0]["dtype"]))
    return "\n\n".join(_table(run, result) for run, result in runs)


def _table(run: dict[str, Any], result: dict[str, Any]) -> str:
    machine, rows = run["environment"], result["entrants"]
    is_chat = bool(rows) and rows[0]["recomputed_rows_per_later_turn"] is not None
    columns = ["", "prompt rows computed", *(["again a turn"] if is_chat else []), "forwards", "seconds"]
    columns += ["requests/s", "first token, s", "decode tokens/s", "x time", "x first token", "as alone"]
    lines = [
        f"**{result['title']}.** {run['model']}, {run['dtype']}, preset {run['preset']}, {machine['cpu']['model']}, "
        f"{machine['threads']['torch']} threads, torch {machine['versions']['torch']}, Transformers "
        f"{machine['versions']['transformers']}; in turns, {_runs(rows)}:",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for row in rows:
        again = [f"{row['recomputed_rows_per_later_turn']:.1f}"] if is_chat else []
        cells = [
            row["name"],
            f"{row['prefill_rows']:,}",
            *again,
            f"{row['forward_calls']:,}",
            f"{row['seconds']['median']:.1f}",
            f"{row['requests_per_s']:.2f}",
            f"{row['first_token_s']['median']:.2f}",
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['times_the_first']:.2f}",
            f"{row['first_token_times_the_first']:.2f}",
            "yes" if row["first_answer_is_as_alone"] else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{name} is left out: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def _runs(rows: list[dict[str, Any]]) -> str:
    least = min((row["runs"] for row in rows), default=0)
    return "one run each" if least == 1 else f"medians of {least} runs"
