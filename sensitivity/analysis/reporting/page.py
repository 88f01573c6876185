"""Writes the report of a study: one self-contained HTML file, with its figures as PNG, SVG and CSV beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from sensitivity.analysis.allocate.budget import Candidate, spend
from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.importance import robustness
from sensitivity.analysis.importance.estimators import ESTIMATORS
from sensitivity.analysis.importance.ranking import cached, rank
from sensitivity.analysis.importance.types import TITLES, Ranking
from sensitivity.analysis.observations import Observations, check_task, observations_of
from sensitivity.analysis.recommending import kept_recommendation
from sensitivity.analysis.recommending.recommendation import Recommendation, what_is_lost
from sensitivity.analysis.reporting import sentences
from sensitivity.analysis.reporting.environment import GENERATOR, rendered
from sensitivity.analysis.reporting.figure_files import FigureFiles
from sensitivity.analysis.reporting.frontier_table import FrontierRow, rows_of_frontier
from sensitivity.analysis.reporting.interactive import pareto
from sensitivity.analysis.reporting.static_figures import DrawnFigure, figures_of_task
from sensitivity.analysis.reporting.time_and_memory import TimeAndMemory, time_and_memory_section
from sensitivity.analysis.reporting.what_breaks import failing
from sensitivity.spec.components import LABELS, ComponentMap
from sensitivity.spec.errors import UserError, check_is, check_is_path
from sensitivity.spec.files import (
    check_may_write,
    is_unfinished,
    slug,
)
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import budget_bits
from sensitivity.study import exports
from sensitivity.study.storage import expected, layer_times
from sensitivity.study.study import Study

MANY_TRIALS = 1000  # beyond, half the resamples are drawn
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0)  # bpw; those that the study's widths can reach are shown


def report(
    study: Study,
    out: Path | str,
    recommendation: Recommendation | Sequence[Recommendation] = (),
    rankings: Mapping[str, Ranking] | None = None,
    bootstraps: int = 20,
) -> Path:
    """Write the report of a study into a folder; return the path of the page.

    Rankings that are not given are read from the study's cache, or else computed with fewer resamples.

    Examples:
        >>> from sensitivity import report
        >>> report(study, "runs/vqa/report", choice).name
        'index.html'
    """
    check_is("study", study, Study)
    recommendations = list(recommendation) if isinstance(recommendation, Iterable) else [recommendation]
    for one in recommendations:
        check_is("recommendation", one, Recommendation)
        _check_own(study, one)
    rankings = {} if rankings is None else rankings
    check_is("rankings", rankings, Mapping)
    for name in rankings:
        check_task(study, name)
    check_is_path("out", out)
    out = Path(out)
    check_may_write(out, True, _why_foreign, [study.path])
    table = study.table()
    if not len(table):
        raise UserError(f"no trial of {study.path} is finished yet: nothing to report")
    files = FigureFiles(out)
    files.check()
    grown = kept_recommendation.what_changed_since(study, recommendations)
    galleries, no_gallery = failing(study, recommendations)
    tasks = [_task_page(study, table, task, recommendations, rankings, bootstraps, files) for task in study.tasks]
    page = rendered(
        "report.html",
        model=study.parts.model,
        by=study.parts.by,
        sized=study.parts.sized,
        trials=len(study.measurements()),
        format=study.format,
        tasks=tasks,
        meta=study.meta,
        recommendations=[(one, what_is_lost(one), _plan_rows(study.parts, one.plan)) for one in recommendations],
        summary=sentences.summary(
            study, table, recommendations, [task.ranking for task in tasks], grown, any(task.budgets for task in tasks)
        ),
        galleries=galleries,
        no_gallery=no_gallery,
        exports=exports.notes_of(study.path),
        path_gain=exports.path_gain_sentences,
        kept=_kept(study.parts),
        plans=_plans(study),
        labels=LABELS,
        estimators=list(ESTIMATORS),
        titles=TITLES,
        time_and_memory=_time_and_memory(study, table, recommendations, files),
        provenance=_provenance(study),
    )
    return files.write(page)


def _check_own(study: Study, recommendation: Recommendation) -> None:
    """Raise an error for a recommendation that a study of another model, other tasks or other examples made."""
    recommendation.plan.check(study.parts)
    theirs = recommendation.provenance.get("study", study.meta)
    for name in ("model", "fingerprint", "tasks", "n", "seed"):
        if theirs.get(name) != study.meta.get(name):
            differs = f"its {name} was {theirs.get(name)}, and here it is {study.meta.get(name)}"
            raise UserError(f"this recommendation is not one for {study.path}: {differs}")


def _provenance(study: Study) -> str:
    """What a study is about, as JSON, and what it expected of its components before it measured, if it did."""
    origin = expected.origin_of(study.path)
    about = study.meta if origin is None else {**study.meta, "expected_from": origin}
    return json.dumps(about, indent=1, default=str)


def _time_and_memory(
    study: Study, table: pd.DataFrame, chosen: Sequence[Recommendation], files: FigureFiles
) -> TimeAndMemory | None:
    """What plans take in a runtime, if plans were chosen by its times; also adds its figures to the files."""
    times = layer_times.read(study.path)
    if times is None:
        return None
    measured = [(trial.key, trial.plan) for trial in study.measured()]
    keys = [one.plan.key for one in chosen]
    found = time_and_memory_section(study.parts, times, table, measured, study.tasks[0], keys)
    for picture in found.pictures if found else ():
        files.add(picture.name, picture)
    return found


def _why_foreign(out: Path) -> str:
    """Why a folder may not be replaced by a report; an empty string where it holds an earlier one."""
    if not out.is_dir():
        return "it is a file, and a folder is meant"
    if is_unfinished(out):
        return ""
    page = out / "index.html"
    with contextlib.suppress(OSError):
        if page.is_file() and GENERATOR.encode() in page.read_bytes()[:4096]:
            return ""
    return "it holds other things than an earlier report"


@dataclass
class TaskPage:
    """What the template needs about one task."""

    name: str
    slug: str  # in names of files and ids
    ranking: Ranking | None = None
    refusal: str = ""  # why there is no ranking
    tau: str = ""  # how far the estimators agree
    near: pd.DataFrame | None = None  # shares among plans that one would use
    methods: pd.DataFrame | None = None  # shares for each method
    pareto: dict[str, object] | None = None  # the interactive figure
    pictures: list[tuple[DrawnFigure, Markup]] = field(
        default_factory=list
    )  # static figures, and their SVG for the page
    best: list[FrontierRow] = field(default_factory=list)  # plans on the frontier
    left_out: str = ""  # a sentence on those that are not shown
    budgets: list[Candidate] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)  # by key of a plan in `budgets`: its score in this study

    @property
    def counted(self) -> bool:
        """Whether anything is known of the answers beside their mean score."""
        return any(row.empty is not None for row in self.best)

    @property
    def ends_known(self) -> bool:
        """Whether it is known of any plan how many answers were cut; earlier versions did not record it."""
        return any(row.cut is not None for row in self.best)


def _task_page(
    study: Study,
    table: pd.DataFrame,
    task: str,
    recommendations: Sequence[Recommendation],
    rankings: Mapping[str, Ranking],
    bootstraps: int,
    files: FigureFiles,
) -> TaskPage:
    """One task's rankings, figures and budgets; also adds the task's figures to the files."""
    page = TaskPage(task, slug(task))
    observations: Observations | None = None
    try:
        observations = observations_of(study, task)
        resamples = bootstraps if len(observations) <= MANY_TRIALS else max(1, bootstraps // 2)
        page.ranking = rankings.get(task) or cached(study, task) or rank(study, task, bootstraps=resamples)
        page.near, page.methods = _near(study, observations), _methods(study, observations)
        page.tau = sentences.agreement(page.ranking)
    except UserError as error:
        page.refusal = str(error)
    if observations is None or task not in table or not table[task].notna().any():
        return page
    rows = table[table[task].notna()]
    native = rows[rows["native"]]
    full = float(native[task].mean()) if len(native) else None
    drawn = figures_of_task(rows, observations, page.ranking, full, [one.plan.key for one in recommendations])
    for picture in drawn:
        files.add(f"{page.slug}-{picture.name}", picture)
    # sizes in the figure are counted as those of the study, so that a recommended plan compares with all others
    page.pareto = pareto(rows, task, full, [replace(one, size=study.size(one.plan)) for one in recommendations])
    page.pictures = [(picture, picture.inline(page.slug)) for picture in drawn if picture.name != "pareto"]
    page.best, page.left_out = rows_of_frontier(study, rows, task)
    page.budgets = _budgets(study, task)
    found = {trial.key: trial.scores[task]["mean"] for trial in study.measured() if task in trial.scores}
    page.measured = {one.plan.key: found[one.plan.key] for one in page.budgets if one.plan.key in found}
    return page


def _near(study: Study, observations: Observations) -> pd.DataFrame | None:
    """Consensus shares among plans that one would use: those near full precision, and those around a few budgets."""
    columns = {}
    with contextlib.suppress(UserError):  # too few such plans, or all with one score: no column
        close = rank(study, observations.task, near=robustness.NEAR, bootstraps=0, thorough=False)
        name = f"predicted within {100 * (1 - robustness.NEAR):.0f} % of full precision ({close.trials} trials)"
        columns[name] = close.table["consensus"]
    around = robustness.by_budget(observations, [3.0, 4.0, 6.0])
    for budget, row in around.iterrows():
        columns[f"around {budget:g} bpw ({row['trials']:.0f})"] = row.drop("trials")
    return pd.DataFrame(columns).reindex(list(observations.names)) if columns else None


def _methods(study: Study, observations: Observations) -> pd.DataFrame | None:
    """Consensus shares for each quantization method, where the study has several."""
    columns = {}
    methods = sorted(set(observations.methods) - {"native"})
    for method in methods if len(methods) > 1 else ():
        with contextlib.suppress(UserError):  # too few plans of this method: no column
            one = rank(study, observations.task, method=method, bootstraps=0, thorough=False)
            columns[f"{method} ({one.trials} trials)"] = one.table["consensus"]
    return pd.DataFrame(columns).reindex(list(observations.names)) if columns else None


def _budgets(study: Study, task: str) -> list[Candidate]:
    """The plan that is predicted to be best for each of BUDGETS that the study's widths can reach."""
    best_plans: list[Candidate] = []
    try:
        knapsack = Knapsack.of(study, [task], study.format)
    except UserError:  # full precision scored 0 or less: there are no shares of it
        return []
    for bpw in BUDGETS:
        try:
            best = spend(knapsack, budget_bits(study.parts, bpw), {task: 1.0}, top=1, asked=bpw)[0]
        except UserError:  # no plan of the study is so small
            continue
        if not best_plans or best.plan.key != best_plans[-1].plan.key:
            best_plans.append(best)
    return best_plans


def _plan_rows(parts: ComponentMap, plan: Plan) -> list[dict[str, object]]:
    """A row per component of a plan: its scheme, its weights, and their share of the model."""
    return [
        {"name": c.name, "scheme": plan[c.name], "numel": c.numel, "share": 100 * c.numel / parts.numel}
        for c in parts.components
    ]


def _kept(parts: ComponentMap) -> list[dict[str, object]]:
    """Kept weights, summed by the reason why they are kept."""
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


def _plans(study: Study) -> dict[str, object]:
    """All measured plans for the page's script, compact: each scheme once, and per trial the schemes' numbers."""
    schemes: dict[str, int] = {}
    rows = []
    for trial in study.measured():
        keys = [json.dumps(scheme and scheme.to_json()) for _, scheme in trial.plan.schemes]
        rows.append([schemes.setdefault(key, len(schemes)) for key in keys])
    return {"names": list(study.parts.names), "schemes": [json.loads(key) for key in schemes], "plans": rows}
