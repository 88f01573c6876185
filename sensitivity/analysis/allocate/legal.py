"""The best plan that a runtime can load, solved for under its constraints; and what it costs against another plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sensitivity.analysis.allocate.budget import Candidate, mean_share, solve
from sensitivity.analysis.allocate.infeasibility import NothingFits
from sensitivity.analysis.allocate.knapsack import Knapsack, Predicted
from sensitivity.analysis.observations import check_task
from sensitivity.analysis.search.plan_lists import Plans, plans
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, shell_word
from sensitivity.spec.limits import Allowed, intersection, merge_groups
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.loadable import restrict, searches
from sensitivity.spec.runtimes.rules import tied, violations
from sensitivity.spec.runtimes.table import RUNTIMES, abilities, files_of, sweep_flags
from sensitivity.spec.sizes import Size, budget_bits, size
from sensitivity.study.study import Study

LARGEST_GRID = 5  # components: over more, a grid of the five default widths has over 15,000 plans
FEWEST_TRIALS = 30  # of a search that is proposed to a study with fewer plans

WIDER = 1.02  # times the size of a plan, from which on its files hold more than it


@dataclass(frozen=True)
class Legal:
    """A plan that a runtime can load, and the one that was asked for."""

    runtime: str
    task: str
    asked: Plan
    violations: tuple[str, ...]  # why the plan that was asked for cannot be loaded; empty if it can
    too_large: bool  # whether it is larger than the budget, as the runtime's files hold it
    plan: Plan
    own: Size  # of the plan that was asked for, as its methods store it
    before: Size  # and as the runtime's files hold it
    after: Size
    predicted_before: Predicted | None  # None where the plan holds a scheme that was never measured
    predicted_after: Predicted | None

    @property
    def words(self) -> str:
        """What the change costs in score and bytes, as the end of a sentence."""
        if self.plan == self.asked and not _held_wider(self.own, self.before):
            return "nothing: the plan is legal as it is"
        if self.plan == self.asked:
            return f"nothing in score; {self.wider}"
        if not self.before.sized:
            words = f"{self.after.bpw:.3f} bpw instead of {self.before.bpw:.3f} {self.after.counted}"
            return f"{self._scores}{words}"
        change = 100 * (self.after.bytes - self.before.bytes) / self.before.bytes
        bytes_ = f"{self.after.bytes:,} bytes instead of {self.before.bytes:,} ({change:+.1f} %), {self.after.counted}"
        return f"{self._scores}{bytes_}"

    @property
    def wider(self) -> str:
        """How much more than the plan that was asked for its files hold, where a runtime has no codes so narrow."""
        more = 100 * (self.before.bits / self.own.bits - 1)
        return f"{self.before.bpw:.3f} bpw {self.before.counted} instead of its own {self.own.bpw:.3f} ({more:+.1f} %)"

    @property
    def _scores(self) -> str:
        """Both predicted scores, where they are known."""
        if self.predicted_before is None or self.predicted_after is None:
            return ""
        was, now = self.predicted_before.score, self.predicted_after.score
        return f"{self.task} {now:.4f} instead of {was:.4f} (predicted), "

    def to_json(self) -> dict[str, object]:
        """Both plans, their sizes and predictions as JSON values."""
        return {
            "runtime": self.runtime,
            "task": self.task,
            "asked": self.asked.to_json(),
            "breaches": list(self.violations),
            "plan": self.plan.to_json(),
            "describe": self.plan.describe(),
            "size": self.after.to_json(),
            "size_asked": self.before.to_json(),
            "own_size_asked": self.own.to_json(),
            "predicted": self.predicted_after and self.predicted_after.to_json(),
            "predicted_asked": self.predicted_before and self.predicted_before.to_json(),
            "cost": self.words,
        }


def legalize(study: Study, plan: Plan, runtime: str, bpw: float | None = None, task: str | None = None) -> Legal:
    """The plan itself if a runtime can load it, otherwise the best predicted one of at most its size, or of `bpw`.

    Sizes are counted as in the runtime's files. Where those hold the plan's codes wider than they are, wider codes
    cost no more there: then a plan of the same size that is predicted to score higher is preferred.
    """
    task = check_task(study, task)
    own, before = size(study.parts, plan), size(study.parts, plan, files_of(runtime))
    violated = tuple(violations(study.parts, plan, runtime))
    predicted = _predicted(study, plan, task)
    too_large = bpw is not None and before.bits > budget_bits(study.parts, bpw)
    itself = Legal(runtime, task, plan, (), False, plan, own, before, before, predicted, predicted)
    loads = not (violated or too_large)
    if loads and (predicted is None or not _held_wider(own, before)):
        return itself
    best = best_legal_plan(study, runtime, before.bpw if bpw is None or loads else bpw, task)
    now = best.predicted.get(task)
    if loads and (predicted is None or now is None or now.score <= predicted.score):
        return itself
    return Legal(runtime, task, plan, violated, too_large, best.plan, own, before, best.size, predicted, now)


def _held_wider(own: Size, held: Size) -> bool:
    """Whether files hold a plan's codes wider than they are, which is more than some bytes around them."""
    return held.bits > WIDER * own.bits


def best_legal_plan(study: Study, runtime: str, bpw: float, task: str | None = None) -> Candidate:
    """The best plan for a budget among those that a runtime can load."""
    return candidates(study, runtime, bpw, task, top=1)[0]


def candidates(
    study: Study,
    runtime: str,
    bpw: float,
    task: str | None = None,
    top: int = 3,
    weights: Mapping[str, float] | None = None,
    floors: Mapping[str, float] | None = None,
    allow: Allowed | None = None,
    tie: Sequence[Sequence[str]] = (),
    knapsack: Knapsack | None = None,
) -> list[Candidate]:
    """The best few plans for a budget among those that a runtime can load, best first."""
    weights = weights or {check_task(study, task): 1.0}
    solved: list[Candidate] = []
    together = merge_groups([*tied(study.parts, runtime), *tie])
    knapsack = knapsack or Knapsack.of(study, list(dict.fromkeys([*weights, *(floors or {})])), files_of(runtime))
    failure: UserError | None = None
    usable = _usable(study, runtime, knapsack)
    # A runtime may offer alternatives, such as any single scheme for the whole model. Each is solved by itself; it is
    # an error only if none of them has a solution.
    for loadable in searches(study.parts, runtime, usable):
        try:
            solved += solve(
                study, bpw=bpw, weights=weights, floors=floors, allowed=allow, tied=together, top=top,
                knapsack=knapsack, loadable=loadable,
            )  # fmt: skip
        except UserError as error:
            failure = failure or error
    if not solved:
        if failure is not None and not RUNTIMES[runtime].title:  # it holds any plan, such as fake
            raise failure
        if isinstance(failure, NothingFits):
            raise NothingFits(f"that {runtime} can load {failure.predicate}") from failure
        raise UserError(f"of the plans that {runtime} can load: {failure}") from failure
    return sorted(solved, key=lambda candidate: -mean_share(candidate.predicted, weights))[:top]


def _usable(study: Study, runtime: str, knapsack: Knapsack) -> list[Scheme]:
    """The schemes that a runtime can load for some component; the error says what to sweep instead."""
    known = {choice for options in knapsack.space.choices for choice in options if choice is not None}
    try:
        return restrict(study.parts, sorted(known, key=str), runtime)[0]
    except UserError as error:
        model, tasks = study.meta.get("model", "MODEL"), study.meta.get("tasks")
        if not tasks:  # an imported table names none, and has a name of its own for a model
            model = "MODEL"
        typed = f"--by {study.parts.by} {sweep_flags(runtime)}"
        if tasks:
            typed = f"--task {shell_word(','.join(tasks))} --n {study.meta['n']} {typed}"
        if len(study.parts.names) > LARGEST_GRID:
            typed += f" --search frontier --trials {max(len(study.measured()), FEWEST_TRIALS)}"
        raise UserError(
            f"{runtime} can load no plan that this study measured; `sensitivity sweep {shell_word(model)} {typed} "
            f"--out {shell_word(f'{study.path}-{runtime}')}` measures some that it can load; it takes "
            f"{abilities(runtime)}"
        ) from error


def plans_for(
    runtime: str,
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    search: str = "grid",
    trials: int | None = None,
    seed: int = 0,
    allow: Allowed | None = None,
    tie: Sequence[Sequence[str]] = (),
) -> Plans:
    """The plans of a search that a runtime can load; `loadable.restrict` says what that leaves out."""
    together = merge_groups([*tied(parts, runtime), *tie])
    ways = [
        plans(parts, schemes, search, trials, seed, intersection(allowed, allow), together, files_of(runtime))
        for allowed in searches(parts, runtime, schemes)
    ]
    # one list of plans can be appended to another; a sampler has a single search space
    lists = [way for way in ways if not callable(way)]
    if len(ways) == 1:
        return ways[0]
    if len(lists) < len(ways):
        raise UserError(
            f"{runtime} takes one scheme for all quantized weights, and a search mixes several; give one width with "
            "--bits, or use --search grid"
        )
    return list(dict.fromkeys(plan for way in lists for plan in way))[:trials]


def _predicted(study: Study, plan: Plan, task: str) -> Predicted | None:
    """A plan's predicted score; None where nothing predicts it, since it holds a scheme that was never measured."""
    try:
        knapsack = Knapsack.of(study, [task])
    except UserError:  # nothing was measured, or full precision scored 0
        return None
    choices = zip(knapsack.space.names, knapsack.space.choices, strict=True)
    known = all(plan[name] in options for name, options in choices)
    return knapsack.predicted([plan])[0][task] if known else None
