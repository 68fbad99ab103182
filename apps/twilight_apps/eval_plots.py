"""Figures of drift: which method, at which size, costs how much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .eval_drift import ALL_TEXTS
from .eval_methods import DECODE, DENSE, PACKING, PEER, POLICY, PRESET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {PRESET: "#c2410c", PEER: "#1d4ed8", POLICY: "#4d7c0f", DENSE: "#57534e"}
KIND_NAMES = {
    PRESET: "Twilight presets",
    PEER: "Transformers' QuantizedCache",
    POLICY: "policies on unrounded keys, which store everything",
}
_FLOOR = 1e-5  # divergences below are drawn here: float32's own noise
_DPI = 130
_LINE_PX = 15.0  # between labels
_LIMITS = (0.005, 0.015, 0.06)  # of divergence, for which the smallest preset is named: what presets promise
_WAYS = {PACKING: "packing (read in chunks, nothing pruned)", DECODE: "decode (token by token, pruned)"}

Record = dict[str, Any]


def draw_drift(result: dict[str, Any], command: str, path: Path) -> None:
    """Draw the figure of ``ppl``, ``kl`` or ``pareto`` into ``path``."""
    if command == "pareto":
        _pareto(result, path)
    else:
        _bars(result, command, path)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", facecolor="white")


def _of(result: dict[str, Any], context: int, mode: str) -> list[Record]:
    """Records that were measured at a context and in a mode, of all texts together where there are several."""
    measured = [r for r in result["records"] if "kl" in r and (r["context"], r["mode"]) == (context, mode)]
    pooled = [r for r in measured if r["text"] == ALL_TEXTS]
    return pooled or measured


def _texts(result: dict[str, Any]) -> str:
    return " and ".join(dict.fromkeys(e["text"] for e in result["excerpts"]))


def _contexts(result: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(r["context"] for r in result["records"]))


def _pareto(result: dict[str, Any], path: Path) -> None:
    contexts = _contexts(result)
    rows = max(sum(r["kind"] == PRESET for r in _of(result, context, PACKING)) for context in contexts)
    heights = [6.2, 0.32 * (rows + 2.5)]
    figure = new_figure(15, 0.6 + sum(heights) * len(contexts))
    axes = figure.subplots(2 * len(contexts), 2, squeeze=False, height_ratios=heights * len(contexts))
    figure.suptitle(
        f"Which preset? {result['model']}, {result['dtype']}, {_texts(result)}\n"
        "lower: closer to the dense model; further right: fewer bytes; the line joins what nothing else beats",
        fontsize=12,
    )
    for index, context in enumerate(contexts):
        packing, decode = _of(result, context, PACKING), _of(result, context, DECODE)
        upper, lower = axes[2 * index], axes[2 * index + 1]
        _scatter(upper[0], packing, "smaller", f"{context:,} tokens, {_WAYS[PACKING]}")
        upper[0].set_xlabel("times smaller than a bfloat16 cache")
        _scatter(upper[1], decode, "reads_less", f"{context:,} tokens, {_WAYS[DECODE]}")
        upper[1].set_xlabel("times fewer bytes read a step than a bfloat16 cache")
        grid = axes[2 * index, 0].get_subplotspec().get_gridspec()
        for axis in lower:
            axis.remove()
        _choice_table(figure.add_subplot(grid[2 * index + 1, :]), packing, decode)
    save(figure, path)


def _scatter(axis: Axes, records: list[Record], size: str, title: str) -> None:
    """Draw divergence against a ratio of bytes, both logarithmic, with the frontier and a label at each point."""
    shown = [r for r in records if r["method"] != DENSE]
    axis.set_title(title, fontsize=11)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylabel("KL divergence from the dense model, nats a token")
    axis.axvline(1.0, color=COLOURS[DENSE], linestyle=":", linewidth=1)
    for kind in (PEER, POLICY, PRESET):
        of_kind = [r for r in shown if r["kind"] == kind]
        if of_kind:
            axis.errorbar(
                [r[size] for r in of_kind], [max(r["kl"], _FLOOR) for r in of_kind],
                yerr=[min(r["kl_error"], 0.9 * max(r["kl"], _FLOOR)) for r in of_kind], fmt="o", color=COLOURS[kind],
                markersize=9 if kind == PRESET else 6, elinewidth=1, label=KIND_NAMES[kind],
            )  # fmt: skip
    best = _frontier(shown, size)
    axis.plot([r[size] for r in best], [max(r["kl"], _FLOOR) for r in best], color="#a8a29e", linewidth=1, zorder=0)
    low, high = min([0.95, *(r[size] for r in shown)]), max([2.0, *(r[size] for r in shown)])
    axis.set_xlim(low * 0.97, high * (high / low) ** 0.35)  # room for the labels
    ticks = [x for x in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50) if low * 0.97 <= x <= high * 1.2]
    axis.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    axis.minorticks_off()
    axis.grid(color="#e7e5e4", linewidth=0.7)
    axis.legend(loc="upper left", fontsize=9)
    _label(axis, [r for r in shown if r["kind"] != POLICY], size)
    _label_policies(axis, [r for r in shown if r["kind"] == POLICY], size)


def _frontier(records: Iterable[Record], size: str) -> list[Record]:
    """The records that no other beats in both, from the largest cache to the smallest."""
    best: list[Record] = []
    for record in sorted(records, key=lambda r: (-r[size], r["kl"])):
        if not best or record["kl"] < best[-1]["kl"]:
            best.append(record)
    return best[::-1]


def _label(axis: Axes, records: list[Record], size: str) -> None:
    """Name each point, at the nearest place beside it that is free; a thin line leads back to a point."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    points = {r["method"]: axis.transData.transform((r[size], max(r["kl"], _FLOOR))) for r in records}
    taken = [(x - 8, x + 8, y) for x, y in points.values()]
    for record in sorted(records, key=lambda r: r["kl"]):
        text = f"{record['method']}  {record[size]:.1f}x"
        x, y = points[record["method"]]
        left, right = x + 12, x + 12 + 7.6 * len(text)
        shift = next(
            shift
            for step in count()
            for shift in (2.0 * step, -2.0 * step)
            if not any(abs(y + shift - used) < _LINE_PX and left < end and start < right for start, end, used in taken)
        )
        taken.append((left, right, y + shift))
        axis.annotate(
            text, (record[size], max(record["kl"], _FLOOR)), xytext=((left - x) * 72 / _DPI, shift * 72 / _DPI),
            textcoords="offset points", va="center", fontsize=8.5, color=COLOURS[record["kind"]],
            fontweight="bold" if record["kind"] == PRESET else "normal",
            arrowprops={"arrowstyle": "-", "color": "#d6d3d1", "linewidth": 0.7} if abs(shift) > 8 else None,
        )  # fmt: skip


def _label_policies(axis: Axes, records: list[Record], size: str) -> None:
    """Name the policies, which are many and close together, in a column at the left; a thin line leads to each."""
    if not records:
        return
    ordered = sorted(records, key=lambda r: r["kl"])
    heights = [float(axis.transData.transform((r[size], max(r["kl"], _FLOOR)))[1]) for r in ordered]
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + _LINE_PX) if places else height)
    down = (places[-1] - heights[-1]) / 2  # half of what the crowd was pushed up
    for record, height, place in zip(ordered, heights, places, strict=True):
        axis.annotate(
            record["method"], (record[size], max(record["kl"], _FLOOR)),
            xytext=(0.015, (place - down - height) * 72 / _DPI), textcoords=("axes fraction", "offset points"),
            va="center", fontsize=7, color=COLOURS[POLICY],
            arrowprops={"arrowstyle": "-", "color": "#a3b18a", "linewidth": 0.6},
        )  # fmt: skip


def _choice_table(axis: Axes, packing: list[Record], decode: list[Record]) -> None:
    """Write the presets' figures, the nearest to dense first, and the best peer that is no larger, if there are peers.

    The smallest caches within some limits of divergence are named above.
    """
    axis.axis("off")
    steps = {r["method"]: r for r in decode}
    peers = [r for r in packing if r["kind"] == PEER]
    rows = []
    presets = sorted((r for r in packing if r["kind"] == PRESET), key=lambda r: r["kl"])
    for record in presets:
        step = steps.get(record["method"])
        rivals = sorted((r for r in peers if r["smaller"] >= record["smaller"]), key=lambda r: r["kl"])
        rows.append([
            record["method"],
            f"{record['smaller']:.1f}x",
            f"{record['kl']:.4f}",
            f"{record['perplexity_change']:+.1%} ± {record['perplexity_change_error']:.1%}",
            f"{record['agreement']:.1%}",
            f"{step['reads_less']:.1f}x" if step else "-",
            f"{step['kl']:.4f}" if step else "-",
            *([f"{rivals[0]['method']}: {rivals[0]['kl']:.4f}" if rivals else "none is as small"] if peers else []),
        ])  # fmt: skip
    columns = [
        "preset", "smaller", "KL", "perplexity", "same likeliest token", "reads less", "KL, decode",
        *(["best peer no larger: KL"] if peers else []),
    ]  # fmt: skip
    if rows:
        axis.set_title(_advice(presets), fontsize=11, color=COLOURS[PRESET], fontweight="bold")
        table = axis.table(rows, colLabels=columns, loc="center", cellLoc="center")
        table.auto_set_font_size(False)
        table.set_fontsize(9.5)
        table.scale(1, 1.5)


def _advice(presets: list[Record]) -> str:
    """Name the smallest cache within each limit of divergence."""
    parts = []
    for limit in _LIMITS:
        within = [r for r in presets if r["kl"] <= limit]
        best = max(within, key=lambda r: r["smaller"], default=None)
        parts.append(f"at most {limit:g}: " + (f"{best['method']} {best['smaller']:.1f}x" if best else "none"))
    return f"smallest with KL {';  '.join(parts)}"


def _bars(result: dict[str, Any], command: str, path: Path) -> None:
    """Draw one bar a method, sorted, in a panel for each context and mode."""
    contexts = _contexts(result)
    modes = list(dict.fromkeys(r["mode"] for r in result["records"]))
    panels = [(context, mode, _of(result, context, mode)) for context in contexts for mode in modes]
    tallest = max(len(records) for *_, records in panels)
    figure = new_figure(7.5 * len(modes), (0.9 + 0.3 * tallest) * len(contexts) + 0.6)
    axes = figure.subplots(len(contexts), len(modes), squeeze=False).flatten()
    figure.suptitle(f"{result['model']}, {result['dtype']}, {_texts(result)}", fontsize=12)
    for axis, (context, mode, records) in zip(axes, panels, strict=True):
        _bar_panel(axis, records, command, f"{context:,} tokens, {_WAYS[mode]}")
    save(figure, path)


def _bar_panel(axis: Axes, records: list[Record], command: str, title: str) -> None:
    from matplotlib.patches import Patch

    key = "perplexity_change" if command == "ppl" else "kl"
    factor = 100.0 if command == "ppl" else 1.0
    shown = sorted((r for r in records if r["method"] != DENSE), key=lambda r: -r[key])
    places = range(len(shown))
    values: Sequence[float] = [r[key] * factor for r in shown]
    if command == "kl":
        values = [max(value, _FLOOR) for value in values]
        axis.set_xscale("log")
        axis.set_xlabel("KL divergence from the dense model, nats a token (less is better)")
    else:
        dense = next(r["perplexity"] for r in records if r["method"] == DENSE)
        axis.axvline(0.0, color=COLOURS[DENSE], linewidth=1)
        axis.set_xlabel(f"change of perplexity, %, with its standard error (dense: {dense:.2f})")
        axis.set_xscale("symlog", linthresh=1.0)
        axis.xaxis.set_major_formatter("{x:g} %")
    axis.barh(
        places, values, xerr=[r[f"{key}_error"] * factor for r in shown], color=[COLOURS[r["kind"]] for r in shown],
        height=0.7, error_kw={"elinewidth": 1},
    )  # fmt: skip
    axis.set_yticks(places, [f"{r['method']} ({r['smaller']:.1f}x smaller)" for r in shown], fontsize=9)
    axis.set_title(title, fontsize=11)
    kinds = dict.fromkeys(r["kind"] for r in shown)
    axis.legend([Patch(color=COLOURS[kind]) for kind in kinds], [KIND_NAMES[kind] for kind in kinds], fontsize=8)
    axis.grid(axis="x", color="#e7e5e4", linewidth=0.7)
    axis.set_axisbelow(True)
