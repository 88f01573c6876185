"""The report's section on what plans take in a runtime: where the time of an answer goes, and what bits buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sensitivity.analysis.reporting import figures
from sensitivity.analysis.reporting.static_figures import DrawnFigure
from sensitivity.analysis.reporting.table_rows import frontier_rows
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.layer_times import ANSWER, RESIDENT, LayerTimes
from sensitivity.spec.runtimes.rules import violations
from sensitivity.spec.sizes import GB
from sensitivity.spec.threads import threads_in_words

WORTH = 0.02  # a saving that is a smaller share of full precision's time or memory is not worth a mention
Measured = Sequence[tuple[str, Plan]]  # key and plan of each trial


@dataclass(frozen=True)
class PlanCost:
    """What a plan takes, and the share of each stage in the time of an answer."""

    plan: str
    key: str
    score: float
    ms_per_token: float
    ms_per_answer: float
    resident: float  # bytes
    shares: dict[str, float]


@dataclass(frozen=True)
class Bought:
    """What the narrowest width of a part saves, with all others at full precision."""

    name: str
    scheme: Scheme
    ms: float
    bytes: float
    words: str


@dataclass(frozen=True)
class TimeAndMemory:
    """The contents of the section."""

    runtime: str
    machine: str
    tokens: str
    bought: list[Bought]
    plans: list[PlanCost]
    pictures: list[DrawnFigure]


def time_and_memory_section(
    parts: ComponentMap, times: LayerTimes, table: pd.DataFrame, measured: Measured, task: str, chosen: Sequence[str]
) -> TimeAndMemory | None:
    """The section on plans that the runtime can run and whose layers were timed; None with fewer than two of them."""
    runs = {key: plan for key, plan in measured if _known(parts, times, plan)}
    rows = table[table["key"].isin(list(runs)) & table[task].notna()].copy()
    if len(rows) < 2:
        return None
    rows["ms"] = [times.plan_cost(parts, runs[key], ANSWER) for key in rows["key"]]
    rows["gb"] = [times.plan_cost(parts, runs[key], RESIDENT) for key in rows["key"]]
    best = pd.concat([frontier_rows(rows, task, cost) for cost in ("ms", "gb")])
    best = pd.concat([best[~best.index.duplicated()], rows[rows["key"].isin(list(chosen))]])
    best = best[~best.index.duplicated()].sort_values("ms")
    machine, tokens = times.machine, times.tokens
    return TimeAndMemory(
        times.runtime,
        f"{machine.get('processor')}, {threads_in_words(times.threads)}",
        f"{tokens['image']} tokens per image, {tokens['prompt']} per prompt, {tokens['answer']} per answer",
        _bought(parts, times, list(runs.values())),
        [_plan_cost(parts, times, runs[row["key"]], row, task) for _, row in best.iterrows()],
        _pictures(rows, task, chosen, times.runtime),
    )


def _known(parts: ComponentMap, times: LayerTimes, plan: Plan) -> bool:
    """Whether the runtime can run a plan, and all of its layers were timed."""
    return not violations(parts, plan, times.runtime) and times.knows(parts, plan)


def _plan_cost(parts: ComponentMap, times: LayerTimes, plan: Plan, row: pd.Series, task: str) -> PlanCost:
    """One row of the table of plans."""
    each = {name: max(ms, 0.0) for name, ms in times.answer_by_stage(parts, plan).items()}
    total = sum(each.values()) or 1.0
    return PlanCost(
        plan.describe(),
        plan.key,
        float(row[task]),
        times.plan_cost(parts, plan, "ms_per_token"),
        float(row["ms"]),
        GB * float(row["gb"]),
        {name: ms / total for name, ms in each.items()},
    )


def _bought(parts: ComponentMap, times: LayerTimes, plans: Sequence[Plan]) -> list[Bought]:
    """For each part, what its narrowest measured width saves of full precision's time and memory."""
    native, found = Plan.uniform(parts, None), []
    full = {cost: times.plan_cost(parts, native, cost) for cost in (ANSWER, RESIDENT)}
    for name in parts.names:
        schemes = {plan[name] for plan in plans} - {None}
        if not schemes:
            continue
        narrow = min((one for one in schemes if one is not None), key=lambda one: (one.bits, str(one)))
        saved = {
            cost: times.component_cost(parts, name, None, cost) - times.component_cost(parts, name, narrow, cost)
            for cost in full
        }
        buys = [
            word for cost, word in ((RESIDENT, "memory"), (ANSWER, "time")) if saved[cost] > WORTH * abs(full[cost])
        ]
        words = " and ".join(buys) or "hardly anything"
        if saved[ANSWER] < -WORTH * abs(full[ANSWER]):
            words += ", and costs time"
        found.append(Bought(name, narrow, saved[ANSWER], GB * saved[RESIDENT], words))
    return found


def _pictures(rows: pd.DataFrame, task: str, chosen: Sequence[str], runtime: str) -> list[DrawnFigure]:
    """Score against time, and against memory."""
    native = rows[rows["native"]]
    full = float(native[task].mean()) if len(native) else None
    made = []
    for name, cost, label in (
        ("time", "ms", f"milliseconds per answer in {runtime}, predicted"),
        ("memory", "gb", f"GB resident in {runtime}, predicted"),
    ):
        figure = figures.against_cost(rows, task, cost, label, full, chosen)
        alt = f"Score on {task} of {len(rows)} plans against {label}, with the frontier of the best."
        data = rows[[cost, task, "plan", "key"]]
        made.append(DrawnFigure(name, f"Score against {label}", alt, figures.svg(figure), figures.png(figure), data))
    return made
