"""Rows in, figure out: static figures in colours that a colour-blind reader can tell apart."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#666666")  # Okabe and Ito
INK, FAINT, PAPER = "#1a1c20", "#c9ccd1", "#fefefe"  # a page may replace these three to suit its background
BPW_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": FAINT,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "axes.grid": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sensitivity",
    "font.family": "sans-serif",
    "legend.frameon": False,
    "axes.titlesize": 11,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a name with two dollar signs is a name
}


@contextmanager
def canvas(width: float = 7, height: float = 4.2) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def frontier(table: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows that no smaller or equal row outscores, by rising size."""
    known = table[table[task].notna() & table["bpw"].notna()]
    rows = known.sort_values(["bpw", task], ascending=[True, False])
    best = rows[task].cummax()
    return rows[rows[task] > best.shift(fill_value=-np.inf)]


def colours(names: Sequence[str]) -> dict[str, str]:
    if len(names) <= len(PALETTE):
        return dict(zip(names, PALETTE, strict=False))
    return dict(zip(names, sns.color_palette("husl", len(names)).as_hex(), strict=True))


def pareto(table: pd.DataFrame, task: str, full: float | None = None, chosen: str | None = None) -> Figure:
    """Score against bits per weight: all plans, uniform ones, the frontier, full precision, the chosen plan."""
    with canvas() as (figure, axes):
        mixed = table[~table["uniform"]]
        uniform = table[table["uniform"] & ~table["native"]]
        axes.scatter(mixed["bpw"], mixed[task], s=14, color=PALETTE[5], alpha=0.7, linewidth=0, label="mixed plans")
        best = frontier(table, task)
        axes.step(best["bpw"], best[task], where="post", color=PALETTE[0], linewidth=1.6, label="frontier")
        _whiskers(axes, pd.concat([best, uniform]), task)
        axes.scatter(uniform["bpw"], uniform[task], s=46, marker="s", color=PALETTE[1], label="uniform plans", zorder=3)
        if full is not None:
            axes.axhline(full, color=INK, linestyle="--", linewidth=1, label="full precision")
        mine = table[table["key"] == chosen] if chosen else table.iloc[:0]
        axes.scatter(mine["bpw"], mine[task], s=150, marker="*", color=PALETTE[2], label="recommended", zorder=4)
        if not len(mine):
            axes.collections[-1].remove()
        bpw_axis(axes, table["bpw"])
        axes.set(xlabel="bits per weight, everything counted", ylabel=task)
        axes.legend(loc="lower right")
        return figure


def _whiskers(axes: Axes, rows: pd.DataFrame, task: str) -> None:
    if f"{task}.low" in rows:
        known = rows[rows[f"{task}.low"].notna()]
        axes.vlines(
            known["bpw"],
            known[f"{task}.low"].astype(float),
            known[f"{task}.high"].astype(float),
            color=INK,
            linewidth=0.7,
            alpha=0.5,
        )


def bpw_axis(axes: Axes, bpw: pd.Series) -> None:
    """Logarithmic: the step from 2 to 3 bits matters as much as from 8 to 12."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(BPW_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlim(bpw.min() * 0.94, bpw.max() * 1.06)


def importance(ranking: pd.DataFrame, names: Sequence[str] = ("consensus", "forest", "permutation", "shap")) -> Figure:
    """Shares of each component by several estimators, with their intervals."""
    with canvas(7, max(2.4, 0.45 * len(ranking) + 1.3)) as (figure, axes):
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            place = np.arange(len(ranking)) + (i - (len(names) - 1) / 2) * height
            share = ranking[name].to_numpy(dtype=float)
            colour = PALETTE[0] if name == "consensus" else sns.light_palette(PALETTE[i], n_colors=3).as_hex()[1]
            error = None
            if f"{name}.low" in ranking:
                error = np.abs(np.stack([share - ranking[f"{name}.low"], ranking[f"{name}.high"] - share]))
            axes.barh(
                place,
                share,
                height * 0.92,
                color=colour,
                xerr=error,
                label=name,
                error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 2},
            )
        axes.set_yticks(np.arange(len(ranking)), [str(name) for name in ranking.index])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="share of the score's differences, %")
        axes.legend(loc="lower right")
        return figure


def by_bits(table: pd.DataFrame, task: str, names: Sequence[str], alone: bool = False) -> Figure:
    """Score against the width of each component: over all plans, or with the others at full precision."""
    colour = colours(names)
    with canvas() as (figure, axes):
        for i, name in enumerate(names):
            rows = table
            if alone:
                others = [other for other in names if other != name]
                rows = table[(table[others] == 16).all(axis=1)]
            curve = rows.groupby(name)[task].agg(["mean", "std", "count"])
            if len(curve) < 2:
                continue
            at = np.arange(len(curve)) if not alone else curve.index.to_numpy(dtype=float)
            at = curve.index.to_numpy(dtype=float)
            axes.plot(at, curve["mean"], marker="os^Dvp*X"[i % 8], color=colour[name], label=name, linewidth=1.4)
        axes.set_xscale("log")
        widths = np.unique(table[list(names)].to_numpy(dtype=float))
        axes.xaxis.set_major_locator(FixedLocator(list(widths)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set(
            xlabel="bits of one component" + (", others native" if alone else ", mean over the others"), ylabel=task
        )
        axes.legend(loc="lower right", ncols=1 + len(names) // 7)
        return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG element without prologue, for a page."""
    with mpl.rc_context(cast(Any, STYLE)):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def png(figure: Figure, dpi: int = 144) -> bytes:
    with mpl.rc_context(cast(Any, STYLE)):
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()
