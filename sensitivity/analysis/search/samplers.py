"""SAMPLERS: searches that choose each plan after the last one was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import StudyDirection

from sensitivity.analysis.search.frontier_sampler import FrontierSampler
from sensitivity.analysis.search.search_space import POPULATION, SearchSpace
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study

MAXIMIZE, MINIMIZE = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE


# name -> the sampler that asks for the next plan
SAMPLERS: dict[str, Callable[[SearchSpace, int], BaseSampler]] = {
    "tpe": lambda ground, seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda ground, seed: NSGAIISampler(seed=seed, population_size=POPULATION),
    "gp": lambda ground, seed: GPSampler(seed=seed, deterministic_objective=False),
    "frontier": lambda ground, seed: FrontierSampler(ground.joint, ground.weights, low=ground.low, seed=seed),
}


def searching(study: Study, ground: SearchSpace, search: str, trials: int, seed: int) -> Iterator[Plan]:
    """Plans to measure, each chosen after the last one was told, until the study holds so many.

    The sampler sees a mirror of the study in which parameters are positions among the allowed choices, so that what
    it asks for is allowed, and shared where parts must share, by construction. It is seeded anew for every plan: a
    resumed search goes on as if it had never stopped.
    """
    mirror = optuna.create_study(directions=[MAXIMIZE] * len(study.tasks) + [MINIMIZE])
    asked: dict[str, optuna.Trial] = {}
    seen: set[str] = set()
    while True:
        for trial in study.trials():
            key = trial.user_attrs["key"]
            if key in asked:
                mirror.tell(asked.pop(key), trial.values)
            elif key not in seen and (row := ground.row(Plan.from_json(trial.user_attrs["plan"]))) is not None:
                mirror.add_trial(ground.told(row, trial.values, len(mirror.get_trials(deepcopy=False))))
            seen.add(key)
        if len(seen) >= trials or ground.exhausted(seen):
            return
        mirror.sampler = SAMPLERS[search](ground, seed + len(seen))
        plan, ours = ground.ask(mirror, seen, seed + len(seen))
        if ours is not None:
            asked[plan.key] = ours
        yield plan
