"""Draws static figures from tables, in colors that color-blind readers can tell apart."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from sensitivity.analysis.importance.types import TITLES
from sensitivity.analysis.reporting.table_rows import frontier_rows, quantized, single

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#666666")  # Okabe and Ito
INK, FAINT, PAPER = "#1a1c20", "#c9ccd1", "#fefefe"  # the page replaces these three colors by CSS variables
BPW_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
STYLE: dict[RcKeyType, object] = {
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
    "text.parse_math": False,  # a name with two dollar signs is no formula
}


@contextmanager
def canvas(width: float = 7, height: float = 4.2) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure with its axes, in the report's style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def short(name: object, length: int = 30) -> str:
    """A name, shortened in its middle where it would take the figure's room."""
    text = str(name)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 2 + 1 :]}"


def colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each name."""
    if len(names) <= len(PALETTE):
        return dict(zip(names, PALETTE, strict=False))
    return dict(zip(names, sns.color_palette("husl", len(names)).as_hex(), strict=True))


def pareto(table: pd.DataFrame, task: str, full: float | None = None, chosen: Sequence[str] = ()) -> Figure:
    """Score against bits per weight: all plans, uniform ones, the frontier, full precision, the chosen plan."""
    with canvas() as (figure, axes):
        _score_against(axes, table, task, "bpw", full, chosen)
        bpw_axis(axes, table["bpw"])
        axes.set(xlabel="bits per weight, everything counted", ylabel=short(task))
        return figure


def frontiers(best: Mapping[str, pd.DataFrame], task: str) -> Figure:
    """The frontiers of several studies, each with its own color, line and mark, and its intervals."""
    with canvas() as (figure, axes):
        for i, (name, rows) in enumerate(best.items()):
            axes.step(rows["bpw"], rows[task], where="post", color=PALETTE[i], linestyle=("-", "--", "-.", ":")[i % 4],
                      marker="os^D"[i % 4], markersize=5, linewidth=1.6, label=name)  # fmt: skip
            _whiskers(axes, rows, task, "bpw")
        bpw_axis(axes, pd.concat([rows["bpw"] for rows in best.values()]))
        axes.set(xlabel="bits per weight, everything counted", ylabel=short(task))
        axes.legend(loc="lower right")
        return figure


def against_cost(
    table: pd.DataFrame, task: str, cost: str, label: str, full: float | None = None, chosen: Sequence[str] = ()
) -> Figure:
    """Score against a predicted cost of running a plan, such as milliseconds per answer."""
    with canvas() as (figure, axes):
        _score_against(axes, table, task, cost, full, chosen)
        axes.set(xlabel=label, ylabel=short(task))
        return figure


def _score_against(
    axes: Axes, table: pd.DataFrame, task: str, column: str, full: float | None, chosen: Sequence[str]
) -> None:
    """Draw all plans, uniform ones, the frontier, full precision and the chosen plan."""
    mixed = table[~table["uniform"]]
    uniform = table[table["uniform"] & ~table["native"]]
    axes.scatter(mixed[column], mixed[task], s=14, color=PALETTE[5], alpha=0.7, linewidth=0, label="mixed plans")
    best = frontier_rows(table, task, column)
    axes.step(best[column], best[task], where="post", color=PALETTE[0], linewidth=1.6, label="frontier")
    _whiskers(axes, pd.concat([best, uniform]), task, column)
    axes.scatter(uniform[column], uniform[task], s=46, marker="s", color=PALETTE[1], label="uniform plans", zorder=3)
    if full is not None:
        axes.axhline(full, color=INK, linestyle="--", linewidth=1, label="full precision")
    if len(stars := table[table["key"].isin(list(chosen))]):
        axes.scatter(stars[column], stars[task], s=150, marker="*", color=PALETTE[2], label="recommended", zorder=4)
    axes.legend(loc="lower right")


def _whiskers(axes: Axes, rows: pd.DataFrame, task: str, column: str) -> None:
    """Confidence intervals as vertical lines."""
    if f"{task}.low" in rows:
        rows = rows[rows[f"{task}.low"].notna()]
        axes.vlines(
            rows[column],
            rows[f"{task}.low"].astype(float),
            rows[f"{task}.high"].astype(float),
            color=INK,
            linewidth=0.7,
            alpha=0.5,
        )


def bpw_axis(axes: Axes, bpw: pd.Series) -> None:
    """A logarithmic axis of bits per weight: the step from 2 to 3 bits matters as much as that from 8 to 12."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(BPW_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlim(bpw.min() * 0.94, bpw.max() * 1.06)


def importance_shares(
    ranking: pd.DataFrame, names: Sequence[str] = ("consensus", "forest", "permutation", "shap")
) -> Figure:
    """Shares of each component by several estimators, with their intervals."""
    with canvas(7, max(2.4, 0.45 * len(ranking) + 1.3)) as (figure, axes):
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            place = np.arange(len(ranking)) + (i - (len(names) - 1) / 2) * height
            share = ranking[name].to_numpy(dtype=float)
            color = PALETTE[0] if name == "consensus" else sns.light_palette(PALETTE[i], n_colors=3).as_hex()[1]
            error = None
            if f"{name}.low" in ranking:
                error = np.abs(np.stack([share - ranking[f"{name}.low"], ranking[f"{name}.high"] - share]))
            axes.barh(
                place,
                share,
                height * 0.92,
                color=color,
                xerr=error,
                label=TITLES.get(name, name),
                error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 2},
            )
        axes.set_yticks(np.arange(len(ranking)), [short(name) for name in ranking.index])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="share of the score's differences, %")
        figure.legend(loc="outside upper center", ncols=len(names))
        return figure


def by_bits(table: pd.DataFrame, task: str, names: Sequence[str], alone: bool = False) -> Figure:
    """Score against the width of each component: over all plans, or with the others at full precision."""
    color = colors(names)
    with canvas() as (figure, axes):
        for i, name in enumerate(names):
            curve = (single(table, names, name) if alone else quantized(table)).groupby(name)[task].mean()
            if len(curve) > 1:
                axes.plot(
                    curve.index.to_numpy(dtype=float), curve, marker="os^Dvp*X"[i % 8], color=color[name],
                    label=short(name), linewidth=1.4,
                )  # fmt: skip
        width_axis(axes, np.unique(table[list(names)].to_numpy(dtype=float)))
        axes.set(xlabel=f"bits of one part, {'others native' if alone else 'mean over the others'}", ylabel=short(task))
        if axes.lines:
            axes.legend(loc="lower right", ncols=1 + len(names) // 7, fontsize=8 if len(names) > 6 else 10)
        return figure


def width_axis(axes: Axes, widths: np.ndarray) -> None:
    """A logarithmic axis with a tick at each width."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(widths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def colored(table: pd.DataFrame, task: str, name: str) -> Figure:
    """Score against bits per weight, each plan in the color of one component's width."""
    widths = sorted(table[name].unique())
    shades = dict(zip(widths, sns.color_palette("viridis", len(widths) + 1).as_hex()[:-1], strict=True))
    with canvas(5, 3.4) as (figure, axes):
        for i, width in enumerate(widths):
            rows = table[table[name] == width]
            label = "native" if width == 16 else f"{width:g} bits"
            axes.scatter(rows["bpw"], rows[task], s=16, color=shades[width], marker="os^Dvp*X"[i % 8], label=label,
                         linewidth=0, alpha=0.8)  # fmt: skip
        bpw_axis(axes, table["bpw"])
        axes.set(xlabel="bits per weight", ylabel=short(task), title=short(name))
        figure.legend(fontsize=8, loc="outside right center")
        return figure


def pairwise(table: pd.DataFrame, task: str, one: str, other: str) -> Figure:
    """Mean score for every combination of the widths of two components."""
    grid = quantized(table).pivot_table(index=one, columns=other, values=task, aggfunc="mean")
    with canvas(5.2, 3.6) as (figure, axes):
        heat(axes, grid, ".2f" if grid.size <= 64 else "")
        axes.set(xlabel=f"bits of {short(other)}", ylabel=f"bits of {short(one)}", title=f"mean {short(task)}")
        return figure


def heat(axes: Axes, grid: pd.DataFrame, form: str, center: float | None = None) -> None:
    """A heat map; with `center`, in diverging colors that are equally strong on both sides of it."""
    axes.grid(visible=False)
    grid = grid.rename(index=_name, columns=_name)
    limit = None if center is None else max(float(np.nanmax(np.abs(grid.to_numpy(dtype=float)))), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # seaborn uses an old interface of matplotlib
        sns.heatmap(
            grid, ax=axes, annot=bool(form), fmt=form or ".2g", cmap="viridis" if center is None else "PuOr",
            center=center, vmin=limit and -limit, vmax=limit, linewidths=0.5, annot_kws={"size": 8},
            cbar_kws={"shrink": 0.8},
        )  # fmt: skip
    axes.tick_params(axis="y", rotation=0)


def _name(label: object) -> object:
    return short(label, 20) if isinstance(label, str) else label


def interactions(pairs: pd.DataFrame, names: Sequence[str]) -> Figure:
    """The effect of each pair beyond the sum of its two effects where both widths are low; negative is worse."""
    grid = pd.DataFrame(np.nan, index=list(names), columns=list(names))
    for pair in pairs.itertuples():
        grid.loc[pair.a, pair.b] = grid.loc[pair.b, pair.a] = pair.both_low
    size = max(3.2, 0.55 * len(names) + 1.8)
    with canvas(size + 1.4, size) as (figure, axes):
        heat(axes, grid, ".2g" if len(names) <= 10 else "", center=0)
        return figure


def predicted_against_measured(predicted: pd.DataFrame, task: str) -> Figure:
    """Measured scores of plans that the surrogate had not seen, against its predictions."""
    with canvas(4.6, 4.2) as (figure, axes):
        ends = [predicted[["expected", "measured"]].min().min(), predicted[["expected", "measured"]].max().max()]
        axes.plot(ends, ends, color=INK, linewidth=1, linestyle="--")
        seen = predicted["measured"]
        axes.vlines(seen, predicted["low"], predicted["high"], color=PALETTE[5], linewidth=0.7, alpha=0.5)
        axes.scatter(predicted["measured"], predicted["expected"], s=12, color=PALETTE[0], linewidth=0)
        axes.set(xlabel=f"measured {short(task)}", ylabel=f"expected {short(task)}")
        return figure


def effect_of_widths(moves: pd.DataFrame) -> Figure:
    """By how many points a share changes when the trials with one width of one component are left out."""
    grid = moves.pivot_table(index="component", columns="bits", values="shift", sort=False)
    grid = grid[sorted(grid.columns)]
    with canvas(6, max(2.2, 0.42 * len(grid) + 1.2)) as (figure, axes):
        heat(axes, grid, ".0f" if grid.size <= 80 else "", center=0)
        axes.set(xlabel="bits left out", ylabel="")
        return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG element without XML prologue, to be placed into the page."""
    with mpl.rc_context(STYLE):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # `png` reuses the layout found here
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def png(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as PNG; without the version of matplotlib in it, so that equal figures are equal files."""
    with mpl.rc_context(STYLE):
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()
