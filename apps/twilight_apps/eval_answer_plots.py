"""Figures of needle and ruler: every method's grid beside the dense model's, on one scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .eval_answers import means, to_dense
from .eval_plots import COLOURS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP = 0.8  # of the room between two tasks that bars take


def draw_needle(result: dict[str, Any], path: Path) -> None:
    """Draw a heat map of depth and length for each method, the dense model's first."""
    records = result["records"]
    found, overall = means(records, ("method", "depth", "length")), means(records, ("method",))
    names = [name for (name,) in overall]
    lengths, depths = result["lengths"], result["depths"]
    figure = new_figure(max(7.0, (1.6 + 0.7 * len(lengths)) * len(names)), 2.4 + 0.38 * len(depths))
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    figure.suptitle(
        f"Needles found, per cent: {result['model']}, {result['dtype']}, {' and '.join(result['texts'])}", fontsize=12
    )
    for axis, name in zip(axes, names, strict=True):
        grid = np.array([[100 * found[name, depth, length] for length in lengths] for depth in depths])
        dense = np.array([[100 * found["dense", depth, length] for length in lengths] for depth in depths])
        _grid(axis, grid, dense)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=9)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=9)
        axis.set_xlabel("tokens")
        note = "" if name == "dense" else f" ({to_dense(records, name)} points)"
        axis.set_title(f"{name}: {100 * overall[(name,)]:.1f} %\n{note}", fontsize=10)
    axes[0].set_ylabel("depth of the needle")
    figure.supxlabel("a cell with a red number differs from the dense model's", fontsize=9)
    save(figure, path)


def draw_ruler(result: dict[str, Any], path: Path) -> None:
    """Draw scores by task, one bar a method, a panel for each length."""
    records = result["records"]
    scores, overall = means(records, ("method", "task", "length")), means(records, ("method",))
    names, tasks = [name for (name,) in overall], result["tasks"]
    kinds = {record["method"]: record["kind"] for record in records}
    figure = new_figure(max(9.0, 1.6 * len(tasks) + 2), 3.3 * len(result["lengths"]) + 1.2)
    axes = figure.subplots(len(result["lengths"]), 1, squeeze=False)[:, 0]
    figure.suptitle(
        f"{result['model']}, {result['dtype']}: score, per cent, questions a bar: {result['samples']}", fontsize=12
    )
    width = _GAP / len(names)
    shades = {name: 1.0 - 0.25 * ([n for n in names if kinds[n] == kinds[name]].index(name) % 4) for name in names}
    for axis, length in zip(axes, result["lengths"], strict=True):
        for number, name in enumerate(names):
            places = [place - _GAP / 2 + (number + 0.5) * width for place in range(len(tasks))]
            values = [100 * scores[name, task, length] for task in tasks]
            difference = "" if name == "dense" else f" ({to_dense(records, name)})"
            label = f"{name}: {100 * overall[(name,)]:.1f}{difference}"
            axis.bar(places, values, width, color=COLOURS[kinds[name]], alpha=shades[name], label=label)
        axis.set_xticks(range(len(tasks)), tasks, fontsize=9)
        axis.set_ylim(0, 105)
        axis.set_ylabel("score")
        axis.set_title(f"{length:,} tokens", fontsize=10)
        axis.grid(axis="y", color="#e7e5e4", linewidth=0.7)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, ncols=min(3, len(names)), loc="outside lower center",
        title="mean over everything (to dense)",
    )  # fmt: skip
    save(figure, path)


def _grid(axis: Axes, grid: np.ndarray[Any, Any], dense: np.ndarray[Any, Any]) -> None:
    """Draw one method's cells with their numbers; those that are not the dense model's are red."""
    axis.imshow(grid, aspect="auto", cmap="YlGn", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(grid):
        differs = bool(value != dense[row, column])
        colour = "#b91c1c" if differs else "white" if value > 70 else "black"
        weight = "bold" if differs else "normal"
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour, fontweight=weight)
