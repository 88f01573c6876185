"""SAMPLERS: searches that choose each plan after the last one was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import StudyDirection

from sensitivity.analysis.search.frontier_sampler import FrontierSampler
from sensitivity.analysis.search.search_space import POPULATION, SearchSpace
from sensitivity.spec.plan import Plan
from sensitivity.study.storage.expected import read as read_expected
from sensitivity.study.study import Study

MAXIMIZE, MINIMIZE = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE


# name -> a function of search space and seed that makes an Optuna sampler
SAMPLERS: dict[str, Callable[[SearchSpace, int], BaseSampler]] = {
    "tpe": lambda space, seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda space, seed: NSGAIISampler(seed=seed, population_size=POPULATION),
    "gp": lambda space, seed: GPSampler(seed=seed, deterministic_objective=False),
    "frontier": lambda space, seed: FrontierSampler(
        space.joint, space.sizes, low=space.low, seed=seed, expected=space.expected
    ),
}


def sampled_plans(study: Study, space: SearchSpace, search: str, trials: int, seed: int) -> Iterator[Plan]:
    """Yield plans, each chosen after the last one was measured, until the study holds `trials` of them.

    The sampler works on a mirror: an Optuna study in memory whose parameters are positions among the allowed choices,
    one per axis, where the study itself has bits. So whatever it proposes is allowed, and tied components share their
    scheme, by construction. The sampler is made anew for every plan, seeded by the number of measured plans: a
    resumed search continues like one that was never stopped.
    """
    space = space.expecting(read_expected(study.path))
    mirror = optuna.create_study(directions=[MAXIMIZE] * len(study.tasks) + [MINIMIZE])
    asked: dict[str, optuna.Trial] = {}
    seen: set[str] = set()
    while True:
        # our own proposals get their scores; trials of earlier runs and other processes are added as finished
        for trial in study.trials():
            if trial.key in asked:
                mirror.tell(asked.pop(trial.key), trial.values)
            elif trial.key not in seen and (row := space.row(trial.plan)) is not None:
                mirror.add_trial(space.finished_trial(row, trial.values, len(mirror.get_trials(deepcopy=False))))
            seen.add(trial.key)
        if len(seen) >= trials or space.exhausted(seen):
            return
        mirror.sampler = SAMPLERS[search](space, seed + len(seen))
        plan, ours = space.ask(mirror, seen, seed + len(seen))
        if ours is not None:
            asked[plan.key] = ours
        yield plan
