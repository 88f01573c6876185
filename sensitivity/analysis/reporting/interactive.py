"""Coordinates of the report's interactive figure: plans, frontier, full precision and recommended plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import pandas as pd
from matplotlib.ticker import MaxNLocator

from sensitivity.analysis.recommending.recommendation import Recommendation
from sensitivity.analysis.reporting import figures
from sensitivity.analysis.reporting.table_rows import frontier_rows

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 66, 16, 16, 78
MANY_POINTS = 400  # with more points, they are small, and only the frontier and uniform plans have intervals
Scale = Callable[[float], float]


class PlotPoint(TypedDict):
    """A plan in the figure."""

    i: int  # its row in the study's table
    x: float
    y: float
    kind: str  # native, uniform or mixed
    best: bool  # whether it is on the frontier
    bpw: float
    score: float
    low: float | None
    high: float | None
    y1: float | None  # the ends of its interval
    y2: float | None


def pareto(
    table: pd.DataFrame, task: str, full: float | None, recommendations: Sequence[Recommendation] = ()
) -> dict[str, object] | None:
    """All that the template draws for one task, in pixels; None where no plan's size is known."""
    rows = table[table["bpw"].notna()]
    if not len(rows):
        return None
    shown = [one for one in recommendations if task in one.candidate.predicted]
    scores = [rows[task].min(), rows[task].max(), *([full] if full is not None else [])]
    scores += [value for one in shown for value in one.score_on(task)[1:] if math.isfinite(value)]
    sizes = [rows["bpw"].min(), rows["bpw"].max(), *(one.size.bpw for one in shown)]
    if min(scores) == max(scores):  # all scores are equal: the axis needs a span
        scores += [scores[0] - 0.1, scores[0] + 0.1]
    across = _scale(math.log(min(sizes) * 0.95), math.log(max(sizes) * 1.05), LEFT, WIDTH - RIGHT)
    pad = 0.04 * (max(scores) - min(scores))
    up = _scale(min(scores) - pad, max(scores) + pad, HEIGHT - BOTTOM, TOP)
    points = _points(table, rows, task, across, up)
    ticks = [float(tick) for tick in MaxNLocator(6).tick_values(min(scores), max(scores))]
    return {
        "points": points,
        "line": [(p["x"], p["y"]) for p in sorted((p for p in points if p["best"]), key=lambda p: p["x"])],
        "stars": [_star(one, task, across, up) for one in shown],
        "fresh": any(one.fresh and task in one.by_task for one in shown),
        "full": None if full is None else up(full),
        "task": task,
        "xticks": [
            (f"{t:g}", across(math.log(t))) for t in figures.BPW_TICKS if LEFT <= across(math.log(t)) <= WIDTH - RIGHT
        ],
        "yticks": [(f"{t:.4g}", up(t)) for t in ticks if TOP <= up(t) <= HEIGHT - BOTTOM],
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "top": TOP,
        "many": len(points) > MANY_POINTS,
        "bars": any(point["y1"] is not None for point in points),
    }


def _points(table: pd.DataFrame, rows: pd.DataFrame, task: str, across: Scale, up: Scale) -> list[PlotPoint]:
    """A point per plan, with its interval where one is known."""
    missing = pd.Series(math.nan, rows.index)
    low, high = (rows[name].astype(float) if (name := f"{task}.{end}") in rows else missing for end in ("low", "high"))
    best = set(frontier_rows(rows, task).index)
    place = {index: i for i, index in enumerate(table.index)}
    columns = (rows.index, rows["bpw"], rows[task], rows["native"], rows["uniform"], low, high)
    return [
        {
            "i": place[index],
            "x": round(across(math.log(bpw)), 1),
            "y": round(up(score), 1),
            "kind": "native" if native else "uniform" if uniform else "mixed",
            "best": index in best,
            "bpw": round(float(bpw), 3),
            "score": round(float(score), 4),
            "low": _rounded(least),
            "high": _rounded(most),
            "y1": _placed(up, least),
            "y2": _placed(up, most),
        }
        for index, bpw, score, native, uniform, least, most in zip(*columns, strict=True)
    ]


def _star(one: Recommendation, task: str, across: Scale, up: Scale) -> dict[str, object]:
    """The mark of a recommended plan."""
    kind, score, low, high = one.score_on(task)
    x, y = across(math.log(one.size.bpw)), up(score)
    label = f"{kind} {score:.3f} at {one.size.bpw:.2f} bpw"
    return {"x": x, "y": y, "y1": _placed(up, low), "y2": _placed(up, high), "label": label}


def _placed(up: Scale, value: float) -> float | None:
    """The pixel of an interval's end, cut off at the figure's edge; None where the end is infinite or unknown."""
    return None if not math.isfinite(value) else round(min(max(up(value), TOP), HEIGHT - BOTTOM), 1)


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """A linear scale that maps low to the pixel `start` and high to `end`."""
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * (value - low) / span
