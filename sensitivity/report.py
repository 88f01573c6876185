"""Study to a page that a person reads: one self-contained HTML file, and its figures as PNG, SVG and CSV beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sensitivity import figures, robustness, words
from sensitivity.allocate import Candidate, spend
from sensitivity.components import LABELS, ComponentMap
from sensitivity.errors import UserError
from sensitivity.files import write_whole
from sensitivity.importance import Ranking, rank
from sensitivity.knapsack import Knapsack
from sensitivity.plan import Plan
from sensitivity.readings import of_study
from sensitivity.surrogate import Space, learn
from sensitivity.trials import Study
from sensitivity.verdict import Recommendation

MANY = 1000  # trials beyond which fewer resamples have to do
NEAR = 0.9  # share of full precision that counts as near the operating point
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0)  # bpw; those that the study's widths can reach are shown
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 66, 16, 16, 62  # of the interactive figure


@dataclass(frozen=True)
class Picture:
    """A static figure on the page: drawing, what it shows in words, and its numbers."""

    name: str
    title: str
    alt: str
    svg: Markup
    rows: pd.DataFrame


def report(
    study: Study,
    out: Path | str,
    recommendation: Recommendation | None = None,
    rankings: Mapping[str, Ranking] | None = None,
    bootstraps: int = 20,
) -> Path:
    """Write the report of a study into a folder; return the page. Rankings that are not given are made here."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table = study.table()
    if not len(table):
        raise UserError(f"no trial of {study.path} is finished yet: nothing to report")
    tasks = [_task(study, table, task, recommendation, rankings or {}, bootstraps, out) for task in study.tasks]
    page = (
        _environment()
        .get_template("report.html")
        .render(
            model=study.parts.model,
            by=study.parts.by,
            trials=len(table),
            tasks=tasks,
            meta=study.meta,
            recommendation=recommendation,
            chosen=recommendation and _plan_rows(study.parts, recommendation.plan),
            summary=words.summary(study, table, recommendation, [task["ranking"] for task in tasks]),
            kept=_kept(study.parts),
            plans=_plans(study, table),
            labels=LABELS,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            version=version("sensitivity"),
            provenance=json.dumps(study.meta, indent=1, default=str),
        )
    )
    target = out / "index.html"
    write_whole(target, page.encode())
    return target


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("sensitivity"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"score": _score, "percent": lambda x: "–" if x is None or math.isnan(x) else f"{x:.1f} %"}
    return found


def _score(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}"


def _task(
    study: Study,
    table: pd.DataFrame,
    task: str,
    recommendation: Recommendation | None,
    rankings: Mapping[str, Ranking],
    bootstraps: int,
    out: Path,
) -> dict[str, Any]:
    """Everything that the page says about one task."""
    refusal, ranking = "", rankings.get(task)
    try:
        few = bootstraps if len(table) <= MANY else max(1, bootstraps // 2)
        ranking = ranking or rank(study, task, bootstraps=few)
    except UserError as error:
        refusal = str(error)
    known = table[table[task].notna()] if task in table else table.iloc[:0]
    if not len(known):
        nothing: dict[str, Any] = {"near": None, "pareto": None, "pictures": [], "ranking": None, "budgets": []}
        return {"name": task, "refusal": refusal, **nothing}
    native = known[known["native"]]
    full = float(native[task].mean()) if len(native) else None
    chosen = recommendation.plan.key if recommendation else None
    pictures = _pictures(study, known, task, ranking, full, chosen)
    folder = _slug(task)
    for picture, figure in pictures:
        write_whole(out / f"{folder}-{picture.name}.png", figures.png(figure))
        write_whole(out / f"{folder}-{picture.name}.svg", figures.svg(figure).encode())
        write_whole(out / f"{folder}-{picture.name}.csv", picture.rows.to_csv(index=False).encode())
    return {
        "name": task,
        "near": _near(study, task) if ranking else None,
        "tau": words.agreement(ranking) if ranking else "",
        "slug": folder,
        "ranking": ranking,
        "refusal": refusal,
        "full": full,
        "pareto": _pareto(known, task, full, recommendation),
        "pictures": [picture for picture, _ in pictures],
        "budgets": _budgets(study, task),
    }


def _near(study: Study, task: str) -> pd.DataFrame | None:
    """Consensus shares where plans are really used: close to full precision, and around single budgets."""
    readings = of_study(study, task)
    columns = {}
    try:
        close = rank(study, task, near=NEAR, bootstraps=0, thorough=False)
        columns[f"within {1 - NEAR:.0%} of full precision ({close.trials} trials)"] = close.table["consensus"]
    except UserError:  # too few such plans, or nothing to explain among them: the column stays away
        pass
    around = robustness.by_budget(readings, [3.0, 4.0, 6.0])
    for budget, row in around.iterrows():
        columns[f"around {budget:g} bpw ({row['trials']:.0f})"] = row.drop("trials")
    return pd.DataFrame(columns).reindex(list(study.parts.names)) if columns else None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "task"


def _pictures(
    study: Study, table: pd.DataFrame, task: str, ranking: Ranking | None, full: float | None, chosen: str | None
) -> list[tuple[Picture, Figure]]:
    """The static figures, in the order in which they are read."""
    names = [name for name in study.parts.names if table[name].nunique() > 1]
    drawn: list[tuple[str, str, str, Figure, pd.DataFrame]] = [
        ("pareto", "Score against size", words.PARETO_ALT, figures.pareto(table, task, full, chosen), table)
    ]
    if ranking is not None:
        drawn.append((
            "importance", "Importance of the parts", words.importance_alt(ranking),
            figures.importance(ranking.table), ranking.table.reset_index(),
        ))  # fmt: skip
        if len(ranking.levels):
            drawn.append(("levels", "How far the ranking rests on single levels", words.levels_alt(ranking),
                          figures.levels(ranking.levels), ranking.levels))  # fmt: skip
    if names:
        means = table.melt(id_vars=[task], value_vars=names, var_name="part", value_name="bits")
        means = means.groupby(["part", "bits"], as_index=False)[task].agg(["mean", "count"])
        drawn.append(("by-bits", "Sensitivity to the width of each part", words.by_bits_alt(means, task),
                      figures.by_bits(table, task, names), means))  # fmt: skip
        alone = pd.concat([figures.single(table, names, name).assign(part=name) for name in names])
        if alone.groupby("part").size().max() > 2:
            drawn.append(("alone", "One part at a time, the others native", words.ALONE_ALT,
                          figures.by_bits(table, task, names, alone=True), alone))  # fmt: skip
    if ranking is not None and len(ranking.pairs):
        drawn.append(("interactions", "Parts that hurt each other", words.interactions_alt(ranking),
                      figures.interactions(ranking.pairs, list(ranking.order)), ranking.pairs))  # fmt: skip
        first, second = ranking.pairs.iloc[0][["a", "b"]]
        if {first, second} <= set(names):
            drawn.append(("pair", f"Widths of {first} and {second} together", words.PAIR_ALT,
                          figures.pairwise(table, task, first, second), table[[first, second, task]]))  # fmt: skip
    for name in list(ranking.order if ranking else names)[:3]:
        if name in names and table["bpw"].notna().all():
            drawn.append((f"widths-{_slug(name)}", f"Score against size by the width of {name}", words.WIDTHS_ALT,
                          figures.coloured(table, task, name), table[["bpw", name, task]]))  # fmt: skip
    if (checked := unseen(study, task)) is not None:
        drawn.append(("calibration", "What was expected of unseen plans, and what they scored",
                      words.calibration_alt(checked), figures.calibration(checked, task), checked))  # fmt: skip
    return [
        (Picture(name, title, alt, _inline(figures.svg(figure), f"{_slug(task)}-{name}", alt), rows), figure)
        for name, title, alt, figure, rows in drawn
    ]


def unseen(study: Study, task: str, folds: int = 5) -> pd.DataFrame | None:
    """Each plan as expected by a surrogate that learnt from four fifths of the others; None where plans are few."""
    readings = of_study(study, task)
    keys = np.array(readings.keys)
    groups = np.unique(keys)
    if len(groups) < 4 * folds:
        return None
    space = Space.of(readings.plans)
    index = space.encode(readings.plans)
    lot = dict(zip(groups, np.random.default_rng(0).permutation(len(groups)) % folds, strict=True))
    fold = np.array([lot[key] for key in keys])
    found = pd.DataFrame({"key": keys, "measured": readings.score, "expected": 0.0, "low": 0.0, "high": 0.0})
    pairs = len(space.names) <= 6  # finding them takes long where there are many
    for out in range(folds):
        model = learn(space, index[fold != out], readings.score[fold != out], noise=readings.noise, pairs=pairs)
        draws = model.draws(index[fold == out])
        noise = model.sigma * np.random.default_rng(out).standard_normal(draws.shape)
        low, high = np.quantile(draws + noise, [0.025, 0.975], axis=0)
        expected = model.predict(index[fold == out])
        found.loc[fold == out, ["expected", "low", "high"]] = np.column_stack([expected, low, high])
    return found


def _inline(svg: str, prefix: str, alt: str) -> Markup:
    """An SVG for the page: ids of its own, colours that follow the page's, a text alternative."""
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in ((figures.INK, "--ink"), (figures.FAINT, "--faint"), (figures.PAPER, "--paper")):
        svg = svg.replace(colour, f"var({variable})")
    opening = Markup('<svg role="img" aria-label="{}"').format(alt)
    return Markup(svg.replace("<svg", opening, 1))


def _budgets(study: Study, task: str) -> list[Candidate]:
    """The predicted best plan for each budget that can be reached."""
    found: list[Candidate] = []
    knapsack = Knapsack.of(study, [task])
    for bpw in BUDGETS:
        try:
            best = spend(knapsack, int(bpw * study.parts.numel), {task: 1.0}, top=1)[0]
        except UserError:
            continue
        if not found or best.plan.key != found[-1].plan.key:
            found.append(best)
    return found


def _plan_rows(parts: ComponentMap, plan: Plan) -> list[dict[str, Any]]:
    return [
        {"name": c.name, "scheme": plan[c.name], "numel": c.numel, "share": 100 * c.numel / parts.numel}
        for c in parts.components
    ]


def _kept(parts: ComponentMap) -> list[dict[str, Any]]:
    """Kept weights by reason."""
    if not parts.kept:
        return []
    rows = pd.DataFrame([{"reason": k.reason, "numel": k.numel} for k in parts.kept])
    sums = rows.groupby("reason")["numel"].agg(["sum", "count"]).sort_values("sum", ascending=False)
    return [
        {
            "reason": reason,
            "numel": int(row["sum"]),
            "count": int(row["count"]),
            "share": 100 * row["sum"] / parts.numel,
        }
        for reason, row in sums.iterrows()
    ]


def _plans(study: Study, table: pd.DataFrame) -> dict[str, Any]:
    """Every plan once, small: names, the schemes in use, and per trial which scheme each component has."""
    schemes: dict[str, int] = {}
    rows = []
    for number in table["number"]:
        plan = study.plan(number)
        keys = [json.dumps(scheme and scheme.to_json()) for _, scheme in plan.schemes]
        rows.append([schemes.setdefault(key, len(schemes)) for key in keys])
    return {"names": list(study.parts.names), "schemes": [json.loads(key) for key in schemes], "plans": rows}


def _pareto(
    table: pd.DataFrame, task: str, full: float | None, recommendation: Recommendation | None
) -> dict[str, Any] | None:
    """Places of everything in the interactive figure."""
    rows = table[table["bpw"].notna()]
    if not len(rows):
        return None
    best = figures.frontier(rows, task)
    low = rows[f"{task}.low"].astype(float) if f"{task}.low" in rows else pd.Series(math.nan, rows.index)
    high = rows[f"{task}.high"].astype(float) if f"{task}.high" in rows else pd.Series(math.nan, rows.index)
    measured = recommendation.measured if recommendation and recommendation.task == task else None
    scores = [rows[task].min(), rows[task].max(), *([full] if full is not None else [])]
    if measured:
        scores += [measured.low, measured.high]
    across = _scale(math.log(rows["bpw"].min() * 0.95), math.log(rows["bpw"].max() * 1.05), LEFT, WIDTH - RIGHT)
    ticks = _ticks(min(scores), max(scores))
    pad = 0.04 * (max(scores) - min(scores) or 1)
    up = _scale(min(scores) - pad, max(scores) + pad, HEIGHT - BOTTOM, TOP)
    points = [
        {
            "i": place,
            "x": round(across(math.log(row["bpw"])), 1),
            "y": round(up(row[task]), 1),
            "kind": "native" if row["native"] else "uniform" if row["uniform"] else "mixed",
            "best": index in best.index,
            "bpw": round(float(row["bpw"]), 3),
            "score": round(float(row[task]), 4),
            "low": _rounded(low[index]),
            "high": _rounded(high[index]),
            "y1": _placed(up, low[index]),
            "y2": _placed(up, high[index]),
        }
        for place, (index, row) in zip((table.index.get_loc(i) for i in rows.index), rows.iterrows(), strict=True)
    ]
    line = [(p["x"], p["y"]) for p in sorted((p for p in points if p["best"]), key=lambda p: p["x"])]
    star = None
    if recommendation and recommendation.task == task:
        expected = recommendation.candidate.predicted[task]
        score = measured.mean if measured else expected.score
        low_, high_ = (measured.low, measured.high) if measured else (expected.low, expected.high)
        star = {
            "x": across(math.log(recommendation.size.bpw)),
            "y": up(score),
            "y1": up(low_),
            "y2": up(high_),
            "label": f"{'measured' if measured else 'predicted'} {score:.3f} at {recommendation.size.bpw:.2f} bpw",
        }
    return {
        "points": points,
        "line": line,
        "star": star,
        "full": full is not None and up(full),
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
        "clouded": len(points) > 400,
    }


def _placed(up: Any, value: float) -> float | None:
    return None if not math.isfinite(value) else round(min(max(up(value), TOP), HEIGHT - BOTTOM), 1)


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _scale(low: float, high: float, start: float, end: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * (value - low) / span


def _ticks(low: float, high: float) -> Sequence[float]:
    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high)]
