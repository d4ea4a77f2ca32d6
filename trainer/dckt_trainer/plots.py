"""The plots of a report: each function turns figures into the bytes of a PNG file.

Nothing here knows a run. Colours are those of Okabe and Ito, which colour-blind readers tell apart, and lines differ in
their marks as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> x and y
Bands = Mapping[str, Sequence[tuple[float, float, float, float]]]  # name -> x, y and the two ends of y's interval

WIDTH = 7.0  # inches; at 110 dpi a text of 9 points is as large as the page's own
NAMED_CLASSES = 25  # more names than these overlap on an axis
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=_COLOURS, marker=_MARKS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


def curves(panels: Mapping[str, Series], *, x: str, y: str, whole_x: bool = True, unit: bool = False) -> bytes:
    """Lines, a panel for each kind, two panels a row.

    Args:
        panels: by title; an empty title for a single panel.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        whole_x: the horizontal axis counts something.
        unit: both axes run from 0 to 1.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(_STYLE):
        plot, axes = _plot(rows, columns, 3.3 * rows)
        for place, (title, series) in enumerate(panels.items()):
            panel: Axes = axes[place]
            for name, (at, values) in series.items():
                panel.plot(at, values, label=name)
            panel.set(title=title, xlabel=x, ylabel=y if place % columns == 0 else "")
            # Below, for lines cross every corner of a panel sooner or later.
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2 if columns == 2 else 4)
            if whole_x:
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            if unit:
                panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for panel in axes[len(panels) :]:
            panel.remove()
        return _png(plot)


def score_history(
    rounds: Sequence[int],
    counts: NDArray[np.int64],
    edges: NDArray[np.float64],
    quantiles: NDArray[np.float64],
    selected_mean: Sequence[float],
    selected: Sequence[int],
) -> bytes:
    """How scores spread in each round, and how many pairs were selected.

    Args:
        rounds: R numbers.
        counts: (R, bins) pairs in each bin of the score.
        edges: (bins + 1,) borders of the bins.
        quantiles: (R, 5) minimum, quartiles and maximum.
        selected_mean: R mean scores of the selected pairs.
        selected: R numbers of selected pairs.
    """
    with mpl.rc_context(_STYLE):
        plot, (left, right) = _plot(1, 2, 3.1, ratios=(3, 2))
        left.grid(visible=False)
        shares = counts / counts.sum(axis=1, keepdims=True)
        borders = np.append(np.asarray(rounds) - 0.5, rounds[-1] + 0.5)
        mesh = left.pcolormesh(borders, edges, shares.T, cmap="Blues", vmin=0)
        plot.colorbar(mesh, ax=left, label="share of pairs")
        left.plot(rounds, quantiles[:, 2], color="#000000", label="median")
        left.plot(rounds, quantiles[:, 1], color="#000000", linestyle=":", marker="", label="quartiles")
        left.plot(rounds, quantiles[:, 3], color="#000000", linestyle=":", marker="")
        left.plot(rounds, selected_mean, color=_COLOURS[1], marker=_MARKS[1], label="mean of the selected")
        # The scores seldom fill their whole range; a margin shows that nothing is cut off.
        margin = 0.05 * max(np.ptp(quantiles), edges[1] - edges[0])
        left.set(xlabel="round", ylabel="score", ylim=(quantiles.min() - margin, quantiles.max() + margin))
        left.legend(loc="lower right")  # "best" is a search, and warns on a busy machine
        right.bar(rounds, selected, color=_COLOURS[0])
        right.set(xlabel="round", ylabel="pairs selected")
        for panel in (left, right):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _png(plot)


def selection_strip(rounds: Sequence[int], selected: NDArray[np.bool_], sizes: Mapping[str, int]) -> bytes:
    """Which pairs each round took: pairs from left to right, class by class, rounds from top to bottom.

    Args:
        rounds: R numbers.
        selected: (R, Q), the pairs in the order of their classes.
        sizes: pairs of each class, in that order; they add up to Q.
    """
    borders = np.cumsum([0, *sizes.values()])
    middles = (borders[:-1] + borders[1:]) / 2
    shares = [selected[:, first:last].mean() for first, last in pairwise(borders)]
    with mpl.rc_context(_STYLE):
        plot, (above, below) = _plot(2, 1, 2.7 + 0.14 * min(len(rounds), 20), ratios=(1, 1.6))
        above.bar(middles, shares, width=np.diff(borders) * 0.92, color=_COLOURS[0])
        above.set(ylabel="share", xlim=(0, borders[-1]), ylim=(0, None), xticks=[])
        below.imshow(
            selected,
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            extent=(0, borders[-1], rounds[-1] + 0.5, rounds[0] - 0.5),
        )
        below.grid(visible=False)
        below.vlines(borders[1:-1], rounds[0] - 0.5, rounds[-1] + 0.5, color="#999999", linewidth=0.4)
        below.yaxis.set_major_locator(MaxNLocator(integer=True))
        below.set(ylabel="round", xlabel="pairs, by class")
        if len(sizes) <= NAMED_CLASSES:
            below.set_xticks(middles, drawable(list(sizes)), rotation=90, fontsize=7)
        else:
            below.set_xticks([])
        return _png(plot)


def bars_by_class(values: Mapping[str, Sequence[float]], classes: Sequence[str], *, x: str) -> bytes:
    """Horizontal bars, a group for each class.

    Args:
        values: for each series a value of each class.
        classes: their names, the first at the top.
        x: what the values are.
    """
    with mpl.rc_context(_STYLE):
        plot, (axes,) = _plot(1, 1, 0.9 + 0.24 * len(classes))
        thick = 0.8 / len(values)
        places = np.arange(len(classes))
        for number, (name, series) in enumerate(values.items()):
            axes.barh(places + (number - (len(values) - 1) / 2) * thick, series, height=thick, label=name)
        axes.set_yticks(places, drawable(classes), fontsize=7.5)
        axes.set(xlabel=x, xlim=(0, None), ylim=(len(classes) - 0.5, -0.5))
        axes.grid(visible=False, axis="y")
        plot.legend(loc="outside upper right", ncols=len(values))
        return _png(plot)


def confusion(counts: Mapping[str, NDArray[np.int64]], classes: Sequence[str]) -> bytes:
    """A heat map for each medium: rows are true classes, columns are what the network answered.

    Args:
        counts: for each medium (C, C).
        classes: C names.
    """
    names = drawable(classes) if len(classes) <= NAMED_CLASSES else []
    with mpl.rc_context(_STYLE):
        plot, axes = _plot(1, len(counts), 4.1 if names else 3.6)
        for place, (panel, (medium, cells)) in enumerate(zip(axes, counts.items(), strict=True)):
            shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
            image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            panel.grid(visible=False)
            panel.set(title=medium, xlabel="answered", ylabel="true" if place == 0 else "")
            panel.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            panel.set_yticks(range(len(names)), names if place == 0 else [""] * len(names), fontsize=7)
        plot.colorbar(image, ax=list(axes), label="share of the class", shrink=0.7)
        return _png(plot)


def interval_bars(panels: Mapping[str, Sequence[tuple[float, float, float] | None]], names: Sequence[str]) -> bytes:
    """Horizontal bars with intervals, a panel for each kind of value.

    Args:
        panels: by title; for each name the value and the two ends of its interval, or None where there is no value.
        names: one for each bar, the first at the top.
    """
    with mpl.rc_context(_STYLE):
        plot, axes = _plot(1, len(panels), 0.9 + 0.3 * len(names))
        for place, (panel, (title, values)) in enumerate(zip(axes, panels.items(), strict=True)):
            for row, value in enumerate(values):
                if value is not None:
                    middle, low, high = value
                    panel.barh(row, middle, height=0.7, color=_COLOURS[0], alpha=0.5)
                    panel.errorbar(
                        middle, row, xerr=[[middle - low], [high - middle]], color="#000000", marker=".", capsize=2
                    )
            panel.grid(visible=False, axis="y")
            panel.set_yticks(range(len(names)), drawable(names, 48) if place == 0 else [""] * len(names), fontsize=7.5)
            panel.set(xlabel=drawable([title], 48)[0], ylim=(len(names) - 0.5, -0.5))
            panel.axvline(0, color="#999999", linewidth=0.8, marker="")
        return _png(plot)


def bands(panels: Mapping[str, Bands], *, x: str, y: str, log_ticks: Sequence[float] = ()) -> bytes:
    """Lines with a band around each, panels side by side.

    Args:
        panels: by title.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        log_ticks: the places to name on a logarithmic horizontal axis; without them it is a linear one.
    """
    with mpl.rc_context(_STYLE):
        plot, axes = _plot(1, len(panels), 3.4)
        for place, (panel, (title, series)) in enumerate(zip(axes, panels.items(), strict=True)):
            for name, label in zip(series, drawable(list(series), 48), strict=True):
                points = np.asarray(series[name], dtype=np.float64)
                (line,) = panel.plot(points[:, 0], points[:, 1], label=label)
                panel.fill_between(points[:, 0], points[:, 2], points[:, 3], color=line.get_color(), alpha=0.15)
            panel.set(title=title, xlabel=x, ylabel=y if place == 0 else "")
            if log_ticks:
                panel.set_xscale("log")
                panel.set_xticks(log_ticks, [f"{tick:g}" for tick in log_ticks])
                panel.minorticks_off()
            if series:
                panel.legend(loc="lower right")
        return _png(plot)


def drawable(names: Sequence[str], longest: int = 22) -> list[str]:
    """Names as a plot can write them: short, without formulas, and by number where the font lacks a letter."""
    known = _letters()
    lines = [" ".join(name.split()) for name in names]
    return [
        f"class {number}"
        if any(ord(letter) not in known for letter in line)
        else (line if len(line) <= longest else line[: longest - 1] + "…").replace("$", r"\$")
        for number, line in enumerate(lines)
    ]


@cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _plot(
    rows: int, columns: int, height: float, *, ratios: tuple[float, float] | None = None
) -> tuple[Plot, NDArray[Any]]:
    plot = Plot(figsize=(WIDTH, height), layout="constrained")
    axes = plot.subplots(
        rows,
        columns,
        squeeze=False,
        width_ratios=ratios if rows == 1 else None,
        height_ratios=ratios if columns == 1 else None,
    )
    return plot, axes.ravel()


def _png(plot: Plot) -> bytes:
    FigureCanvasAgg(plot)
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
