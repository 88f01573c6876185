"""compare_sides(): two plans by their answers, or two studies by full precision, shared plans and each budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sensitivity.analysis.comparing.sides import Paired, Pairing, Side
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.counting import count
from sensitivity.study.racing import frontier_trials
from sensitivity.study.scores import Score
from sensitivity.study.study import Study
from sensitivity.study.trial import Trial

SAME = "the same plan"
BEST = "best within "  # and a budget in bits per weight
MAX_ROWS = 5  # most rows of plans that both have measured; those that differ most are shown
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0)  # bits per weight at which frontiers are compared


@dataclass(frozen=True)
class Row:
    """One line of a comparison: what is compared, and both plans with their sizes."""

    what: str
    a: Plan
    b: Plan
    a_bpw: float
    b_bpw: float
    paired: Paired

    def to_json(self) -> dict[str, object]:
        """The row as JSON values."""
        return {
            "what": self.what,
            "a_plan": self.a.describe(),
            "b_plan": self.b.describe(),
            "a_key": self.a.key,
            "b_key": self.b.key,
            "a_bpw": self.a_bpw,
            "b_bpw": self.b_bpw,
            **self.paired.to_json(),
        }


@dataclass(frozen=True)
class Versus:
    """A comparison of two sides: its rows, and notes on what could not be compared."""

    a: str
    b: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def shown(self) -> list[Row]:
        """The rows to show; of the plans that both have measured, only those whose scores differ most."""
        rows = [row for row in self.rows if row.what != SAME]
        for task in self.tasks:
            different = [row for row in self._same(task) if row.paired.difference.mean != 0]
            rows += sorted(different, key=lambda row: -abs(row.paired.difference.mean))[:MAX_ROWS]
        return rows

    @property
    def words(self) -> list[str]:
        """The conclusion for each task: on full precision or the two plans, on budgets, and on plans of both."""
        lines = []
        for task in self.tasks:
            first = next(row for row in self.rows if row.paired.task == task)
            lines.append(f"{first.what[:1].upper()}{first.what[1:]}: {first.paired.words}")
            if budgets := [row for row in self.rows if row.what.startswith(BEST) and row.paired.task == task]:
                lines.append(_on_budgets(task, budgets))
            if same := self._same(task):
                lines.append(_on_same_plans(task, [row.paired.difference for row in same]))
        return lines

    @property
    def tasks(self) -> list[str]:
        """The tasks that are compared."""
        return list(dict.fromkeys(row.paired.task for row in self.rows))

    def _same(self, task: str) -> list[Row]:
        return [row for row in self.rows if row.what == SAME and row.paired.task == task]

    def to_json(self) -> dict[str, object]:
        """The comparison as JSON values, with all rows."""
        rows = [row.to_json() for row in self.rows]
        return {"a": self.a, "b": self.b, "rows": rows, "words": self.words, "notes": list(self.notes)}


def _on_budgets(task: str, rows: list[Row]) -> str:
    """Within which budgets B's best plan is clearly higher or lower than A's, and within which neither is."""
    every = [(row.what.removeprefix(BEST), row.paired.difference) for row in rows]
    higher = [f"{budget} ({d.signed})" for budget, d in every if d.low > 0]
    lower = [f"{budget} ({d.signed})" for budget, d in every if d.high < 0]
    unclear = [budget for budget, d in every if d.low <= 0 <= d.high]
    found = (
        f"{what} within {', '.join(budgets)}"
        for what, budgets in (
            ("B scores clearly higher", higher),
            ("B scores clearly lower", lower),
            ("no difference is shown", unclear),
        )
        if budgets
    )
    return f"{task}, the best plan of each within a budget: {'; '.join(found)}."


def _on_same_plans(task: str, differences: list[Score]) -> str:
    """What the plans that both measured say."""
    measured = f"{task}: {count(len(differences), 'plan')} measured by both"
    if not (differing := sum(one.mean != 0 for one in differences)):
        return f"{measured}, with equal scores."
    which = f", of which the {MAX_ROWS} that differ most are shown" if differing > MAX_ROWS else ""
    lower, higher = sum(one.high < 0 for one in differences), sum(one.low > 0 for one in differences)
    return (
        f"{measured}{which}; B scores clearly lower with {lower} of them and clearly higher with {higher} "
        "(by chance alone one in 20 would seem clear)."
    )


def compare_sides(a: Side, b: Side) -> Versus:
    """Compare two sides, B against A; if only one names a plan, the other side is the same plan of its study."""
    tasks = [task for task in a.study.tasks if task in b.study.tasks]
    if not tasks:
        ours, theirs = ", ".join(a.study.tasks), ", ".join(b.study.tasks)
        raise UserError(f"they share no task: {a.name} has {ours}, and {b.name} has {theirs}")
    notes = list(_notes(a, b))
    pairing = Pairing(a.study, b.study)
    if a.plan or b.plan:
        plan_a, plan_b = a.plan or _same(a.study, b), b.plan or _same(b.study, a)
        rows = [row for task in tasks for row in _row(pairing, task, "the plans", plan_a, plan_b)]
    else:
        rows = [row for task in tasks for row in _of_studies(pairing, task)]
    if not rows:
        raise UserError(f"{a.name} and {b.name} hold no answers that could be compared; imported tables have none")
    return Versus(a.name, b.name, tuple(rows), tuple(notes))


def _notes(first: Side, second: Side) -> Iterator[str]:
    """Sentences on what differs between the studies besides their plans."""
    a, b = first.study, second.study
    if Pairing(a, b).same_study and (None in (first.plan, second.plan) or first.plan == second.plan):
        what = "plan of the same study" if first.plan or second.plan else "study"
        how = "" if first.plan and second.plan else "; two plans of one study are compared as STUDY:KEY and STUDY:KEY"
        yield f"A and B are the same {what}{how}"
    for what in ("model", "dtype", "n", "seed"):
        ours, theirs = a.meta.get(what), b.meta.get(what)
        if ours != theirs:
            yield f"they differ in {what}: {ours} in A, {theirs} in B"
    ours, theirs = _methods(a, first.plan or second.plan), _methods(b, second.plan or first.plan)
    if ours and theirs and ours != theirs:
        yield f"they differ in method: {ours} in A, {theirs} in B"
    if a.format != b.format:
        ours, theirs = (f"as {one.format} files store it" if one.format else "of the plan alone" for one in (a, b))
        yield f"size is counted {ours} in A, {theirs} in B, so the same bpw is not the same size"
    if a.parts.names != b.parts.names:
        yield f"they differ in components: by {a.parts.by} in A, by {b.parts.by} in B"


def _methods(study: Study, plan: Plan | None) -> str:
    """The methods of a plan, or of all plans that a study measured."""
    plans = [plan] if plan else [trial.plan for trial in study.measured()]
    return ", ".join(sorted({scheme.method for one in plans for scheme in one.distinct_schemes}))


def _same(study: Study, other: Side) -> Plan:
    """The plan of the other side, as this study measured it."""
    assert other.plan is not None, "one side names a plan"
    if not any(trial.key == other.plan.key for trial in study.measured()):
        raise UserError(
            f"{study.path} has not measured the plan of {other.name} ({_methods(study, other.plan)}: "
            f"{other.plan.describe()}); beside STUDY:KEY, a study stands for the same plan in it, and another plan of "
            "it is STUDY:KEY, too"
        )
    return study.plan_named(other.plan.key)


def _of_studies(pairing: Pairing, task: str) -> Iterator[Row]:
    """Full precision, the best plan within each budget, and the plans that both have measured."""
    a, b = pairing.a, pairing.b
    yield from _row(pairing, task, "full precision", a.native, b.native)
    ours, theirs = frontier_trials(a.measured(), task), frontier_trials(b.measured(), task)
    before: tuple[str, str] | None = None
    for bpw in BUDGETS:
        best, rival = _within(ours, bpw), _within(theirs, bpw)
        if best is None or rival is None or (best.key, rival.key) == before:
            continue
        before = best.key, rival.key
        yield from _row(pairing, task, f"{BEST}{bpw:g} bpw", best.plan, rival.plan)
    known = {trial.key for trial in b.measured()}
    for trial in a.measured():
        if trial.key in known and not trial.plan.is_native:
            yield from _row(pairing, task, SAME, trial.plan, trial.plan)


def _within(frontier: list[Trial], bpw: float) -> Trial | None:
    """The best quantized frontier plan of at most this size."""
    fitting = [trial for trial in frontier if trial.bpw <= bpw and not trial.plan.is_native]
    return fitting[-1] if fitting else None


def _row(pairing: Pairing, task: str, what: str, a: Plan, b: Plan) -> Iterator[Row]:
    """The row of two plans; none where a side has no answers."""
    ours, theirs = pairing.a.examples(a), pairing.b.examples(b)
    if ours is not None and theirs is not None:
        sizes = (_bpw(pairing.a, a), _bpw(pairing.b, b))
        # of other components, full precision has another key
        itself = pairing.same_model and (a.key == b.key or (a.is_native and b.is_native))
        yield Row(what, a, b, *sizes, pairing.paired(ours, theirs, task, itself=itself))


def _bpw(study: Study, plan: Plan) -> float:
    return next(trial.bpw for trial in study.measured() if trial.key == plan.key)
