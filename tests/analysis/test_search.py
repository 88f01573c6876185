"""Plan sources: order, limits, resuming; our sampler against random choice on a planted table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import planted
import pytest

from sensitivity.analysis.search.frontier_sampler import FrontierSampler, PlanSizes
from sensitivity.analysis.search.plan_lists import grid, one_at_a_time
from sensitivity.analysis.search.plan_lists import plans as plans_
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Space
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size
from sensitivity.study.study import Study

PARTS = planted.parts()
SCHEMES = [Scheme("codes", bits) for bits in (2, 3, 4, 6, 8)]


def measure(study: Study, plans: object, formula: planted.Formula = planted.product) -> list[Plan]:
    """Answers what a search asks for, as the sweep would."""
    asked = []
    for plan in plans:  # type: ignore[attr-defined]
        score = formula(np.array([list(plan.bits().values())], dtype=float))[0]
        study.append([plan], [{"a": float(score)}])
        asked.append(plan)
    return asked


def asking(study: Study, *wish: object, **more: object) -> Iterator[Plan]:
    """What a search asks for, whether it knows all its plans beforehand or not."""
    found = plans_(PARTS, *wish, **more)  # type: ignore[arg-type]
    return iter(found(study) if callable(found) else found)


def listed(how: str, schemes: list[Scheme], trials: int, seed: int) -> list[Plan]:
    found = plans_(PARTS, schemes, how, trials, seed)
    assert isinstance(found, list)
    return found


def new(path: Path) -> Study:
    return Study.create(path, PARTS, ["a"], {"model": "planted"})


def test_grid_walks_depth_first_in_data_flow_order() -> None:
    plans = grid(PARTS, SCHEMES[::2][:2])
    assert plans[0].is_native
    rows = [tuple(plan.bits().values()) for plan in plans[1:]]
    assert rows == sorted(itertools.product((2, 4), repeat=3))
    assert sum(plan.is_uniform for plan in plans) == 3


def test_a_grid_too_large_says_what_to_type() -> None:
    many = planted.parts([f"language.{i}" for i in range(12)], [10] * 12)
    with pytest.raises(
        UserError, match=r"244,140,626 plans, more than 20,000.*--by part.*at most 2 widths.*--search front"
    ):
        grid(many, SCHEMES)
    with pytest.raises(UserError, match="no widths given"):
        grid(PARTS, [])


def test_one_at_a_time_and_random() -> None:
    plans = one_at_a_time(PARTS, SCHEMES[:2])
    assert len(plans) == len(set(plans)) == 1 + 2 + 6
    some = listed("random", SCHEMES, 20, 1)
    assert len(set(some)) == 20
    assert some == listed("random", SCHEMES, 20, 1)
    assert some != listed("random", SCHEMES, 20, 2)
    assert len(listed("random", SCHEMES[:1], 1000, 1)) == 8  # there are no more


@pytest.mark.parametrize("name", ["tpe", "nsga2", "frontier", "random", "one-at-a-time"])
def test_every_search_asks_for_new_plans_of_the_right_widths(tmp_path: Path, name: str) -> None:
    study = new(tmp_path)
    asked = measure(study, asking(study, SCHEMES, name, trials=14))
    assert len(asked) == len(set(asked)) == 14
    assert {scheme for plan in asked for _, scheme in plan.schemes} <= {None, *SCHEMES}


@pytest.mark.parametrize("name", ["tpe", "frontier"])
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    whole, broken = new(tmp_path / "whole"), new(tmp_path / "broken")
    undisturbed = measure(whole, asking(whole, SCHEMES, name, trials=16, seed=3))
    begun = measure(broken, itertools.islice(asking(broken, SCHEMES, name, trials=16, seed=3), 12))
    reopened = Study(tmp_path / "broken")
    assert begun + measure(reopened, asking(reopened, SCHEMES, name, trials=16, seed=3)) == undisturbed


@pytest.mark.parametrize("name", ["tpe", "nsga2", "frontier", "grid", "one-at-a-time", "random"])
def test_constraints_hold_by_construction(tmp_path: Path, name: str) -> None:
    study = new(tmp_path)
    study.append([Plan.uniform(PARTS, None)], [{"a": 1.0}])  # full precision is measured whether allowed or not
    plans = asking(
        study, SCHEMES, name, 13,
        allowed=lambda part, choice: choice is not None and (part != "vision" or choice.bits > 3),
        tied=[("connector", "language")],
    )  # fmt: skip
    asked = [plan for plan in measure(study, plans) if not plan.is_native]
    assert asked
    for plan in asked:
        assert plan["connector"] == plan["language"] is not None
        assert plan.bits()["vision"] in (4, 6, 8)


def test_a_small_space_is_exhausted_and_then_left(tmp_path: Path) -> None:
    study = new(tmp_path)
    assert len(measure(study, asking(study, SCHEMES[:1], "frontier", trials=100))) == 8
    assert list(asking(study, SCHEMES[:1], "frontier", trials=100)) == []


def test_wrong_wishes(tmp_path: Path) -> None:
    study = new(tmp_path)
    with pytest.raises(UserError, match=r"unknown search 'fronteir'.*did you mean frontier"):
        asking(study, SCHEMES, "fronteir")
    with pytest.raises(UserError, match="at least one trial"):
        asking(study, SCHEMES, "tpe", trials=0)
    with pytest.raises(UserError, match="no scheme is allowed for vision"):
        asking(study, SCHEMES, "tpe", allowed=lambda part, choice: part != "vision")
    with pytest.raises(UserError, match="vision is tied twice"):
        asking(study, SCHEMES, "tpe", tied=[("vision", "language"), ("vision", "connector")])


def table(noise: float) -> tuple[Space, PlanSizes, np.ndarray, np.ndarray, np.ndarray]:
    """A space, its weights, all plans as rows, their true scores and one noisy reading of each."""
    bits = planted.grid()
    plans = [planted.plan(PARTS.names, row) for row in bits]
    space = Space.of(plans)
    index, truth = space.encode(plans), planted.product(bits)
    kept = size(PARTS, Plan.uniform(PARTS, None)).bits - sum(16 * c.numel for c in PARTS.components)
    weights = PlanSizes(
        tuple(
            np.array([(o.bits if o else 16) * c.numel for o in options], dtype=float)
            for c, options in zip(PARTS.components, space.choices, strict=True)
        ),
        kept,
        PARTS.numel,
    )
    np.testing.assert_allclose(weights.bpw(index), [size(PARTS, plan).bpw for plan in plans])
    return space, weights, index, truth, truth + noise * np.random.default_rng(0).standard_normal(len(truth))


def regret(rows: list[int], seed: int = 0, noise: float = 0.03) -> float:
    """How far the plans that would be chosen after measuring these fall short, on average over budgets."""
    space, weights, index, truth, reading = table(noise)
    model = fit_surrogate(space, index[rows], reading[rows])
    belief, bpw = model.predict(index[rows]), weights.bpw(index)
    short = []
    for budget in np.arange(3.5, 8.1, 0.5):
        fits = bpw[rows] <= budget
        held = truth[np.array(rows)[fits][np.argmax(belief[fits])]] if fits.any() else 0.0
        short.append(truth[bpw <= budget].max() - held)
    return float(np.mean(short))


def test_frontier_needs_far_fewer_plans_than_chance() -> None:
    space, weights, index, _, reading = table(0.03)
    place = {tuple(row): i for i, row in enumerate(index)}
    sampler, rows = FrontierSampler(space, weights, seed=0), list[int]()
    while len(rows) < 22:  # a tenth of the grid
        rows.append(place[tuple(sampler.next(index[rows], reading[rows][:, None]))])
    assert len(set(rows)) == 22
    by_chance = [regret(list(np.random.default_rng(seed).permutation(len(index))[:22])) for seed in range(8)]
    assert regret(rows) < 0.02
    assert regret(rows) < np.mean(by_chance) / 2


def test_lucky_readings_are_not_chased() -> None:
    """The plan that is believed best is better in truth than the one with the highest reading."""
    space, _, index, truth, _ = table(0)
    by_belief, by_reading = [], []
    for seed in range(12):
        draw = np.random.default_rng(seed)
        rows = draw.choice(len(index), 80, replace=False)
        reading = truth[rows] + 0.05 * draw.standard_normal(80)
        belief = fit_surrogate(space, index[rows], reading, noise=0.05).predict(index[rows])
        by_belief.append(truth[rows].max() - truth[rows][np.argmax(belief)])
        by_reading.append(truth[rows].max() - truth[rows][np.argmax(reading)])
    assert np.mean(by_belief) < np.mean(by_reading) / 2


def test_frontier_is_an_optuna_sampler_for_large_spaces_too() -> None:
    names = tuple(f"language.{i}" for i in range(8))
    space = Space(names, ((None, *(Scheme("codes", b) for b in (8, 6, 4, 3, 2))),) * 8)
    weights = PlanSizes((np.array([16, 8, 6, 4, 3, 2.0]),) * 8, 4.0, 8.25)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=FrontierSampler(space, weights))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        row = np.array([[trial.suggest_int(name, 0, 5) for name in names]])
        harm = np.array([0, 0.01, 0.02, 0.1, 0.4, 2])[row[0]] * np.linspace(0.2, 1, 8)
        return float(np.exp(-harm.sum())), float(weights.bpw(row)[0])

    study.optimize(objective, n_trials=14)
    assert len({tuple(t.params.values()) for t in study.trials}) == 14
    assert all(set(t.params) == set(names) for t in study.trials)
