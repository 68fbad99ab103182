"""Figures by layer and head: attention mass that is reached, tokens that are attended to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .eval_plots import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#c2410c", "#1d4ed8", "#4d7c0f", "#7e22ce", "#0f766e", "#a16207")

_FULL_COLOUR, _NOTED = 10.0, 2.0  # percentage points of mass: where colours end, and below which a cell has its number


def draw_mass(result: dict[str, Any], path: Path) -> None:
    """Draw asked against achieved mass, and where by layer and head it falls short, for the last setting."""
    names = list(dict.fromkeys(r["setting"] for r in result["records"]))
    shares = sorted({r["p"] for r in result["records"]})
    figure = new_figure(13, 6.5)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    figure.suptitle(f"Attention mass, {_where(result)}; weighed with unrounded keys", fontsize=12)
    for number, name in enumerate(names):
        _mass_lines(left, [r for r in result["records"] if r["setting"] == name], name, number, len(names), shares)
    left.set_xticks(range(len(shares)), [f"{p:g}" for p in shares])
    left.set_xlim(-0.5, len(shares) - 0.5)
    left.set_xlabel("share of the mass that is asked for, p")
    left.set_ylabel("share that is attended to")
    left.set_title("dot: median of all heads and steps; bar: 1st to 99.9th percentile; black line: p", fontsize=10)
    left.legend(loc="lower right", fontsize=9)
    left.grid(axis="y", color="#e7e5e4", linewidth=0.7)
    p = min(shares, key=lambda share: abs(share - 0.95))
    layers = [r for r in result["layers"] if r["setting"] == names[-1] and r["p"] == p]
    short = np.array([[100 * (m - p) for m in r["mass_q05"]] for r in layers])
    image = right.imshow(short, aspect="auto", cmap="RdBu", vmin=-_FULL_COLOUR, vmax=_FULL_COLOUR)
    for (layer, head), value in np.ndenumerate(short):
        if value < -_NOTED:
            colour = "white" if value < -0.7 * _FULL_COLOUR else "black"
            right.text(head, layer, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    _layer_axes(right, [r["layer"] for r in layers], short.shape[1])
    right.set_title(f"{names[-1]}, p = {p:g}: 5th percentile over steps, in points above p (red: below)", fontsize=10)
    figure.colorbar(image, ax=right, label="percentage points", extend="both")
    save(figure, path)


def draw_budget(result: dict[str, Any], path: Path) -> None:
    """Draw attended tokens by layer and head at the longest context, and their growth with context."""
    from matplotlib.ticker import LogLocator

    names = list(dict.fromkeys(r["setting"] for r in result["records"]))
    contexts = sorted({r["context"] for r in result["records"]})
    figure = new_figure(6.5 * (len(names) + 1), 6.5)
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    figure.suptitle(f"Tokens attended to, {_where(result)}", fontsize=12)
    for number, name in enumerate(names):
        records = [r for r in result["records"] if r["setting"] == name]
        _growth(axes[0], records, name, SERIES[number % len(SERIES)])
        layers = [r for r in result["layers"] if r["setting"] == name and r["context"] == contexts[-1]]
        _kept_map(figure, axes[number + 1], layers, f"{name}, {contexts[-1]:,} tokens: needed by each head")
    axes[0].plot(contexts, contexts, color="#57534e", linestyle=":", label="all tokens")
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    axes[0].set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes[0].minorticks_off()
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_xlabel("tokens in the cache")
    axes[0].set_ylabel("packed tokens attended to by a KV head")
    axes[0].set_title("line: mean of heads in sparse layers; band: 10th to 90th percentile", fontsize=10)
    axes[0].legend(loc="upper left", fontsize=9)
    axes[0].grid(color="#e7e5e4", linewidth=0.7)
    save(figure, path)


def _where(result: dict[str, Any]) -> str:
    context = f", {result['context']:,} tokens" if "context" in result else ""
    return f"{result['model']}, {result['dtype']}, {result['text']}{context}, {result['steps']} decode steps"


def _mass_lines(
    axis: Axes, records: list[dict[str, Any]], name: str, number: int, count: int, shares: list[float]
) -> None:
    """Draw one setting's medians and low percentiles beside the others' at each share."""
    shift = 0.18 * (number - (count - 1) / 2)
    places = [shares.index(r["p"]) + shift for r in records]
    colour = SERIES[number % len(SERIES)]
    axis.plot(places, [r["median"] for r in records], "o", color=colour, label=name)
    axis.vlines(places, [r["q01"] for r in records], [r["q999"] for r in records], color=colour, linewidth=2)
    axis.plot(places, [r["q05"] for r in records], "_", color=colour, markersize=10)
    for place, share in enumerate(shares):
        axis.hlines(share, place - 0.45, place + 0.45, color="black", linewidth=1)


def _growth(axis: Axes, records: list[dict[str, Any]], name: str, colour: str) -> None:
    contexts = [r["context"] for r in records]
    axis.plot(contexts, [max(1.0, r["kept_mean"]) for r in records], "o-", color=colour, label=name)
    low, high = ([max(1.0, r[key]) for r in records] for key in ("kept_p10", "kept_p90"))
    axis.fill_between(contexts, low, high, color=colour, alpha=0.15)
    for record in records:
        note = f"{record['kept_share']:.0%}" if record["is_sparse"] else "dense"
        place = record["context"], max(1.0, record["kept_mean"])
        axis.annotate(note, place, xytext=(4, -12), textcoords="offset points", fontsize=8, color=colour)


def _kept_map(figure: Figure, axis: Axes, layers: list[dict[str, Any]], title: str) -> None:
    from matplotlib.colors import LogNorm

    kept = np.array([[max(1.0, value) for value in layer["needed"]] for layer in layers])
    image = axis.imshow(kept, aspect="auto", cmap="viridis", norm=LogNorm(1.0, max(2.0, float(kept.max()))))
    _layer_axes(axis, [layer["layer"] for layer in layers], kept.shape[1])
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, label="packed tokens that the head needs")


def _layer_axes(axis: Axes, layers: list[int], heads: int) -> None:
    step = max(1, len(layers) // 30)
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axis.set_xticks(range(0, heads, max(1, heads // 16)))
    axis.set_xlabel("query head")
    axis.set_ylabel("layer")
