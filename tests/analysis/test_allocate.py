"""The knapsack against brute force, floors, ties and limits; budgets; verdicts."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
from planted import frame

from sensitivity.analysis.allocate import neighbors
from sensitivity.analysis.allocate.budget import Candidate, best_uniform, solve, spend
from sensitivity.analysis.allocate.knapsack import Knapsack, Predicted
from sensitivity.analysis.allocate.neighbors import changed_at_most_twice, plans_near
from sensitivity.analysis.allocate.program import Program
from sensitivity.analysis.recommending.judging import judge, unmeasured
from sensitivity.analysis.recommending.recommendation import Recommendation, what_is_lost
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Space
from sensitivity.spec.errors import UserError
from sensitivity.spec.limits import allowed_by, merge_groups, tied_groups
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.plan_file import why_foreign, write_file
from sensitivity.spec.sizes import budget_bits, size
from sensitivity.study.storage.expected import save as save_expected
from sensitivity.study.study import Study

FOUR = planted.parts(("vision.front", "vision.end", "connector", "language"), (700, 900, 100, 2500))


def rough(seed: int) -> planted.Formula:
    """Damages at random, and a pair that hurts each other more than the sum."""
    draw = np.random.default_rng(seed)
    half = draw.uniform(0, 3.5, 6)

    def formula(bits: np.ndarray) -> np.ndarray:
        each = np.column_stack([planted.damage(bits[:, i], half[i]) for i in range(bits.shape[1])])
        return np.asarray(np.exp(-each.sum(axis=1) - 2 * each[:, 0] * each[:, -1]))

    return formula


def test_plans_near_the_best_are_all_that_differ_in_two_components(tmp_path: Path) -> None:
    study = planted.study(tmp_path, {"a": rough(0)}, 0.01, levels=(2, 3, 8), components=FOUR)
    knapsack = Knapsack.of(study, ["a"])
    every = np.array(list(itertools.product(*(range(len(o)) for o in knapsack.space.choices))))
    best, budget = study.measured()[5].plan, budget_bits(FOUR, 4)
    known = {best: 0.3}
    apart = (every != knapsack.space.encode([best])[0]).sum(axis=1)
    near = [knapsack.space.decode(row) for row in every[(apart > 0) & (apart <= 2)]]
    fitting = {plan for plan in near if size(FOUR, plan).bits <= budget}
    found = plans_near(knapsack, budget, {"a": 1.0}, known, best, lambda plan: True, np.random.default_rng(0))
    assert {plan for _, plan in found} == fitting
    assert len(found) == len(fitting) > 4
    first = max(found, key=lambda one: one[0])[1]  # what gains most is predicted to score more than most
    predicted = {plan: one["a"].score for plan, one in zip(fitting, knapsack.predicted(list(fitting)), strict=True)}
    assert predicted[first] > np.median(list(predicted.values()))
    allowed = plans_near(
        knapsack, budget, {"a": 1.0}, known, best, lambda plan: plan == first, np.random.default_rng(0)
    )
    assert [plan for _, plan in allowed] == [first]


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_brute_force(tmp_path: Path, seed: int) -> None:
    study = planted.study(tmp_path, {"a": rough(seed)}, 0.01, levels=(2, 3, 4, 8, 16), components=FOUR)
    knapsack = Knapsack.of(study, ["a"])
    model = knapsack.models["a"]
    index = np.array(list(itertools.product(*(range(len(o)) for o in knapsack.space.choices))))
    bits = np.array([size(FOUR, knapsack.space.decode(row)).bits for row in index])
    scores = model.predict(index)
    for bpw in (3.4, 4.1, 6.0, 9.0):
        budget = int(bpw * FOUR.numel)
        found = spend(knapsack, budget, {"a": 1.0}, top=3)
        best = np.sort(scores[bits <= budget])[::-1][:3]
        np.testing.assert_allclose([c.predicted["a"].score for c in found], best, atol=1e-6)
        assert all(c.size.bits <= budget for c in found)


def test_interactions_join_where_the_data_support_them(tmp_path: Path) -> None:
    def crossing(bits: np.ndarray) -> np.ndarray:
        each = [planted.damage(bits[:, i], 1.5) for i in range(3)]
        return np.asarray(np.exp(-(each[0] + each[1] + each[2]) - 6 * each[0] * each[2]))

    study = planted.study(tmp_path / "one", {"a": crossing}, 0.01)
    assert Knapsack.of(study, ["a"]).models["a"].pairs == ((0, 2),)
    plain = planted.study(tmp_path / "two", {"a": planted.product}, 0.01)
    assert Knapsack.of(plain, ["a"]).models["a"].pairs == ()


def test_the_surrogate_learns_from_few_trials() -> None:
    bits = planted.grid()
    plans = [planted.plan(planted.PARTS, row) for row in bits]
    space = Space.of(plans)
    index, draw = space.encode(plans), np.random.default_rng(0)
    truth = planted.product(bits)
    rows = draw.choice(len(bits), 40, replace=False)
    model = fit_surrogate(space, index[rows], truth[rows] + 0.02 * draw.standard_normal(40))
    error = model.predict(index) - truth
    assert 1 - np.mean(error**2) / truth.var() > 0.97
    assert model.sigma == pytest.approx(0.02, abs=0.01)
    low, high = np.quantile(model.draws(index), [0.025, 0.975], axis=0)
    assert np.mean((low <= truth + 1e-3) & (truth - 1e-3 <= high)) > 0.8


def test_the_jacobian_is_the_derivative() -> None:
    space = Space.of([planted.plan(planted.PARTS, row) for row in planted.grid()])
    index = space.encode([planted.plan(planted.PARTS, row) for row in planted.grid()[::7]])
    formula = fit_surrogate(space, index, np.linspace(0.2, 1, len(index)), pairs=False).formula
    formula = type(formula)(formula.sizes, formula.parents, formula.bits, formula.above, ((0, 1), (1, 2)))
    theta = np.random.default_rng(0).normal(0, 0.3, formula.length)
    theta[:2] = 1.0, 0.1
    step = 1e-6
    columns = [
        (formula.predict(theta + step * unit, index) - formula.predict(theta - step * unit, index)) / (2 * step)
        for unit in np.eye(formula.length)
    ]
    np.testing.assert_allclose(formula.jacobian(theta, index), np.column_stack(columns), atol=1e-6)


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Study:
    def grounding(bits: np.ndarray) -> np.ndarray:
        return np.asarray(0.9 * np.exp(-planted.damage(bits[:, 0], 4.5) - planted.damage(bits[:, 2], 1)))

    return planted.study(tmp_path_factory.mktemp("two"), {"vqa": planted.product, "grounding": grounding}, 0.005)


def test_several_budgets_at_once_and_bytes(two_tasks: Study) -> None:
    found = solve(two_tasks, bpw=[4, 6], top=2)
    assert [(c.budget, c.rank) for c in found] == [(4, 0), (4, 1), (6, 0), (6, 1)]
    assert found[0].predicted["vqa"].score <= found[2].predicted["vqa"].score
    same = solve(two_tasks, bytes=4 * two_tasks.parts.numel / 8, top=1)[0]
    assert same.plan == found[0].plan
    p = found[0].predicted["vqa"]
    assert p.low <= p.score <= p.high
    json.dumps(found[0].to_json())


@pytest.mark.parametrize("bpw", [6.2, 7.0, 9.0])
def test_floors_are_kept_at_the_least_cost(two_tasks: Study, bpw: float) -> None:
    bound = solve(two_tasks, bpw=bpw, tasks=["vqa"], floors={"grounding": 0.9}, top=1)[0]
    knapsack = Knapsack.of(two_tasks, ["vqa", "grounding"])
    index = np.array(list(itertools.product(*(range(len(o)) for o in knapsack.space.choices))))
    bits = np.array([size(two_tasks.parts, knapsack.space.decode(row)).bits for row in index])
    kept = knapsack.models["grounding"].predict(index) >= 0.9 * knapsack.full("grounding") - 1e-9
    fine = kept & (bits <= int(bpw * two_tasks.parts.numel))
    assert bound.predicted["vqa"].score == pytest.approx(knapsack.models["vqa"].predict(index)[fine].max(), abs=1e-6)
    assert bound.predicted["grounding"].score >= 0.9 * bound.predicted["grounding"].full - 1e-6


def test_weights_over_several_tasks_are_solved_exactly(two_tasks: Study) -> None:
    wish = {"vqa": 1.0, "grounding": 3.0}
    knapsack = Knapsack.of(two_tasks, list(wish))
    index = np.array(list(itertools.product(*(range(len(o)) for o in knapsack.space.choices))))
    bits = np.array([size(two_tasks.parts, knapsack.space.decode(row)).bits for row in index])
    native = np.zeros((1, 3), dtype=int)
    value = sum(
        w / 4 * knapsack.models[t].predict(index) / knapsack.models[t].predict(native)[0] for t, w in wish.items()
    )
    for bpw in (3.5, 4.2, 5.0, 7.0):
        best = solve(two_tasks, bpw=bpw, weights=wish, top=2)
        got = [sum(w / 4 * c.predicted[t].score / c.predicted[t].full for t, w in wish.items()) for c in best]
        fitting = np.sort(value[bits <= int(bpw * two_tasks.parts.numel)])[::-1]
        np.testing.assert_allclose(got, fitting[:2], atol=1e-6)


@pytest.mark.parametrize("bpw", [4.5, 9.0])
def test_nearly_equal_plans_for_several_tasks_are_not_listed_one_by_one(
    bpw: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = planted.parts(tuple(f"language.{i}" for i in range(13)), tuple(range(300, 950, 50)))
    draw = np.random.default_rng(0)
    rows = np.concatenate([[[16] * 13], draw.choice([2, 3, 4, 6, 8], (2, 13))])
    worth = draw.uniform(0.2, 3, 13)
    gentle = {
        task: lambda bits, scale=scale: np.exp(-scale * (worth * planted.damage(bits, 2)).sum(axis=1))
        for task, scale in (("a", 0.01), ("b", 0.006))
    }
    study = planted.study(tmp_path / "s", gentle, components=many, rows=rows)
    expected = {
        name: {Scheme("codes", bits): float(each * np.exp(2 - bits)) for bits in (2, 3, 4, 6, 8)}
        for name, each in zip(many.names, worth, strict=True)
    }
    save_expected(study.path, expected, "a guess")
    knapsack, solved = Knapsack.of(study, ["a", "b"]), list[object]()
    minimize = Program.minimize

    def counted(self: Program, *given: Any, **more: Any) -> object:
        solved.append(given)
        assert len(solved) < 20  # with a loose bound there were hundreds
        return minimize(self, *given, **more)

    monkeypatch.setattr(Program, "minimize", counted)
    best = solve(study, bpw=bpw, tasks=["a", "b"], top=1, knapsack=knapsack)[0]

    def share(index: np.ndarray) -> np.ndarray:
        return np.asarray(sum(knapsack.models[task].predict(index) / knapsack.full(task) for task in "ab"))

    row = knapsack.space.encode([best.plan])
    near = changed_at_most_twice(knapsack, row[0], budget_bits(many, bpw), share)
    assert share(row)[0] >= share(near).max() - 2e-3


def test_of_very_many_plans_near_one_those_are_compared_that_promise_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = planted.study(tmp_path, {"a": rough(0)}, 0.01, levels=(2, 3, 8), components=FOUR)
    knapsack, budget = Knapsack.of(study, ["a"]), budget_bits(FOUR, 4)
    row = knapsack.space.encode([study.measured()[5].plan])[0]
    expected = knapsack.models["a"].predict
    every = changed_at_most_twice(knapsack, row, budget, expected)
    monkeypatch.setattr(neighbors, "MOST", len(every) // 2)
    some = changed_at_most_twice(knapsack, row, budget, expected)
    assert len(some) == len(every) // 2
    assert {tuple(one) for one in some} < {tuple(one) for one in every}
    assert expected(some).mean() > expected(every).mean()
    assert expected(some).max() == expected(every).max()


LOWER = r", or sweep lower widths \(--bits\)"
OTHER = ", or name another runtime or format: in this one, no lower widths would be small enough"


@pytest.mark.parametrize(
    ("bpw", "limits", "advice"),
    [
        # 3 to 8 bits were measured: 4.3 bpw with all kept weights, and 2 bits would be 3.4 bpw
        (4.0, {}, LOWER),
        (1.0, {}, ""),
        (3.3, {"allowed": lambda name, choice: name != "vision" or choice is None}, ""),
        (5.0, {"allowed": lambda name, choice: choice is None}, r", or allow lower widths \(--allow\)"),
        (4.0, {"allowed": lambda name, choice: choice is not None}, LOWER),
        (4.0, {"allowed": lambda name, choice: choice is None or choice.bits != 2}, ""),
        (4.0, {"loadable": lambda name, choice: choice is None or choice.bits < 8}, LOWER),
        (4.0, {"loadable": lambda name, choice: choice is None or choice.bits > 3}, OTHER),
        (3.0, {"loadable": lambda name, choice: choice is None or choice.bits > 3}, ""),
    ],
)
def test_what_is_advised_where_nothing_fits_would_help(
    tmp_path: Path, bpw: float, limits: dict[str, Any], advice: str
) -> None:
    study = planted.study(tmp_path, {"vqa": planted.product}, levels=(3, 4, 8, 16))
    with pytest.raises(UserError, match=rf"^no plan fits {bpw:.2f} bpw .* can be reached; ask for more{advice}$"):
        solve(study, bpw=bpw, **limits)


def test_limits_hold_by_construction(two_tasks: Study) -> None:
    only = {Scheme("codes", 4), Scheme("codes", 8)}
    for c in solve(two_tasks, bpw=7, allowed=lambda name, choice: choice in only, top=3):
        assert set(c.plan.bits().values()) <= {4, 8}
    for c in solve(two_tasks, bpw=6, tied=[["vision", "language"]], top=3):
        assert c.plan["vision"] == c.plan["language"]


def test_infeasible_wishes_say_what_is_reachable(two_tasks: Study) -> None:
    with pytest.raises(UserError, match=r"no plan fits 1.00 bpw .* 3.40 to 16.00 bpw .* can be reached"):
        solve(two_tasks, bpw=1.0)
    told = r"predicted to keep grounding at 99 % of full precision; by prediction, that takes \d+\.\d+ bpw"
    with pytest.raises(UserError, match=told):
        solve(two_tasks, bpw=3.6, floors={"grounding": 0.99})
    with pytest.raises(UserError, match="unknown task 'ocr'; choose from vqa, grounding"):
        solve(two_tasks, bpw=4, floors={"ocr": 0.9})
    with pytest.raises(UserError, match="needs one budget"):
        solve(two_tasks)
    with pytest.raises(UserError, match="a budget must be above 0, not -1"):
        solve(two_tasks, bytes=-1)
    with pytest.raises(UserError, match="no measured width of vision is allowed"):
        solve(two_tasks, bpw=4, allowed=lambda name, choice: name != "vision")
    with pytest.raises(UserError, match=r"unknown component 'visoin'.*did you mean vision"):
        solve(two_tasks, bpw=4, tied=[["visoin", "language"]])


def test_a_study_that_has_measured_nothing_yet_says_how_to_go_on(tmp_path: Path) -> None:
    made = Study.create(tmp_path, planted.parts(), ["vqa"], {"model": "planted"})
    with pytest.raises(UserError, match=r"has no measured plan yet, .*: run the command that made it again"):
        solve(made, bpw=4.0)


# -- verdicts -------------------------------------------------------------------------------------------------------


def test_verdicts(two_tasks: Study) -> None:
    candidates = solve(two_tasks, bpw=5, top=2)
    rival = best_uniform(Knapsack.of(two_tasks, ["vqa"]), 5, {"vqa": 1.0})
    assert rival is not None
    assert rival.plan.is_uniform
    assert rival.size.bpw <= 5
    mine, other, them = (c.plan.key for c in (*candidates, rival))
    native = Plan.uniform(two_tasks.parts, None).key

    found = judge(
        two_tasks, candidates, rival, {mine: frame(0.9), other: frame(0.7), them: frame(0.6), native: frame(0.95)}
    )
    assert found.uniform is not None
    assert (found.plan.key, found.uniform.verdict) == (mine, "better")
    assert "Clearly better than the best uniform plan: +0.300" in found.words
    assert "paired examples (interval widened for the best of 2 plans)." in found.words
    assert found.full is not None
    assert found.full.mean == pytest.approx(0.95)
    assert found.others[0].verdict == "better"
    data = json.loads(found.dumps())
    assert data["provenance"]["trials"] == len(two_tasks.trials())
    assert data["measured"]["mean"] == pytest.approx(0.9)

    noisy = {mine: frame(0.62, noise=0.3, seed=1), them: frame(0.6, noise=0.3, seed=2)}
    found = judge(two_tasks, candidates, rival, noisy)
    assert found.uniform is not None
    assert found.uniform.verdict == "tied"
    assert found.uniform.more is not None
    assert found.uniform.more > 100
    assert f"about {found.uniform.more:,} more examples would decide" in found.words
    assert "widened" not in found.words  # only one of them was run

    close = {mine: frame(0.58, noise=0.3, seed=1), them: frame(0.62, noise=0.3, seed=2)}
    found = judge(two_tasks, candidates, rival, close)
    assert found.uniform is not None
    assert found.uniform.verdict == "no worse"
    assert "The best uniform plan did no worse" in found.words

    assert "Predicted only" in judge(two_tasks, candidates, rival, {}).words
    assert unmeasured(two_tasks, candidates).measured is None


def test_a_uniform_plan_that_is_clearly_better_is_recommended(two_tasks: Study) -> None:
    candidates = solve(two_tasks, bpw=5, top=2)
    rival = best_uniform(Knapsack.of(two_tasks, ["vqa"]), 5, {"vqa": 1.0})
    assert rival is not None
    mine, them = candidates[0].plan.key, rival.plan.key
    found = judge(two_tasks, candidates, rival, {mine: frame(0.5), them: frame(0.8)})
    assert found.plan == rival.plan
    assert found.uniform is None
    assert found.others[0].verdict == "better"
    assert "A uniform plan is the best choice here. The best uniform plan is clearly better: -0.300" in found.words


def test_a_smaller_uniform_plan_that_scores_no_lower_is_recommended(two_tasks: Study) -> None:
    best, *_ = solve(two_tasks, bpw=5, top=1)
    rival = best_uniform(Knapsack.of(two_tasks, ["vqa"]), 5, {"vqa": 1.0})
    assert rival is not None
    assert rival.size.bits < best.size.bits
    mine, them = best.plan.key, rival.plan.key

    def judged(
        ours: pd.DataFrame, theirs: pd.DataFrame, uniform: Candidate = rival, first: Candidate = best
    ) -> Recommendation:
        return judge(two_tasks, [first], uniform, {mine: ours, them: theirs})

    for n in (1, 3, 60):
        found = judged(frame(1.0, n=n), frame(1.0, n=n))
        assert found.plan == rival.plan
        sizes = f"{rival.size.bpw:.2f} bpw instead of {best.size.bpw:.2f}"
        assert found.words.startswith(f"A uniform plan is chosen: it is smaller, {sizes}, and scores no lower. ")
    # no smaller: no reason to prefer it
    assert judged(frame(1.0), frame(1.0), replace(rival, size=best.size)).plan == best.plan
    # a little lower is lower
    assert judged(frame(0.62, noise=0.3, seed=1), frame(0.6, noise=0.3, seed=2)).plan == best.plan
    # a little higher is luck, where it is predicted to score less, and predictions are more certain than readings
    certain = [replace(one, predicted={"vqa": Predicted(score, score - 0.01, score + 0.01, 1.0)})
               for one, score in ((rival, 0.57), (best, 0.6))]  # fmt: skip
    readings = frame(0.58, noise=0.3, seed=1), frame(0.63, noise=0.3, seed=2)
    assert readings[0]["score"].mean() < readings[1]["score"].mean()
    assert judged(*readings).plan == rival.plan
    found = judged(*readings, *certain)
    assert found.plan == best.plan
    assert found.uniform is not None
    assert found.uniform.verdict == "no worse"
    # nor is it preferred where it misses a floor that the best plan keeps
    native = Plan.uniform(two_tasks.parts, None).key
    both = {key: pd.concat([frame(1.0), frame(value, n=200).assign(task="grounding")])
            for key, value in ((native, 0.8), (mine, 0.8), (them, 0.5))}  # fmt: skip
    assert judge(two_tasks, [best], rival, both).plan == rival.plan
    assert judge(two_tasks, [best], rival, both, floors={"grounding": 0.95}).plan == best.plan


def test_several_tasks_are_judged_by_their_weighted_shares(two_tasks: Study) -> None:
    weights = {"vqa": 3.0, "grounding": 1.0}
    candidates = solve(two_tasks, bpw=5, weights=weights, top=2)
    native = Plan.uniform(two_tasks.parts, None).key

    def both(vqa: float, grounding: float) -> pd.DataFrame:
        return pd.concat([frame(vqa), frame(grounding, n=200).assign(task="grounding")])

    one, other = (candidate.plan.key for candidate in candidates)
    frames = {native: both(0.9, 0.5), one: both(0.45, 0.5), other: both(0.81, 0.25)}
    found = judge(two_tasks, candidates, None, frames, weights)
    assert found.plan.key == other  # 0.75 * 0.9 + 0.25 * 0.5 against 0.75 * 0.5 + 0.25
    assert found.measured is not None
    assert found.measured.mean == pytest.approx(0.8)
    assert found.full_by_task["grounding"].mean == 0.5
    saved = json.loads(found.dumps())
    read = Recommendation.from_json(saved | {"stored_size": saved["size"]}, two_tasks.parts)
    assert read.full_by_task == found.full_by_task
    # a plan with the answers of full precision keeps all of it, about which only unseen examples leave a doubt
    same = judge(two_tasks, candidates[:1], None, {native: frames[native], one: frames[native]}, weights).measured
    assert same is not None
    assert (same.mean, same.se) == (1.0, 0.0)
    assert 0.95 < same.low < 1 < same.high < 1.05
    assert found.others[0].difference.mean == pytest.approx(0.8 - 0.625)
    assert found.by_task["grounding"].mean == 0.25
    assert found.task == "0.75 vqa + 0.25 grounding"
    assert found.predicted.low <= found.predicted.score <= found.predicted.high


def test_a_floor_is_checked_on_what_was_measured(two_tasks: Study) -> None:
    candidates = solve(two_tasks, bpw=5, top=2)
    first, second = (candidate.plan.key for candidate in candidates)
    native = Plan.uniform(two_tasks.parts, None).key

    def both(vqa: float, grounding: float) -> pd.DataFrame:
        return pd.concat([frame(vqa), frame(grounding, n=200).assign(task="grounding")])

    frames = {native: both(0.9, 0.8), first: both(0.9, 0.7), second: both(0.85, 0.79)}
    found = judge(two_tasks, candidates, None, frames)
    assert found.plan.key == first
    assert "floor" not in found.words
    found = judge(two_tasks, candidates, None, frames, floors={"grounding": 0.95})
    assert found.plan.key == second  # 99 % of full precision in grounding, where the first keeps 88 %
    assert "The floor of 0.95 on grounding is kept: 98.8 % [" in found.words
    found = judge(two_tasks, candidates, None, frames, floors={"grounding": 1.0})
    assert found.plan.key == first  # none keeps it
    assert (
        "The floor of 1 on grounding is missed: 87.5 % [82.3 %, 92.7 %] of full precision's 0.800, 200 paired examples."
        in found.words
    )
    noisy = pd.concat([frame(0.9), frame(0.78, n=200, noise=0.4, seed=1).assign(task="grounding")])
    found = judge(two_tasks, candidates[:1], None, frames | {first: noisy}, floors={"grounding": 0.99})
    assert "is missed on these examples, within their noise: " in found.words
    # a uniform plan that is clearly better is not recommended if it misses a floor that the candidate keeps
    (rival,) = solve(two_tasks, bpw=9, top=1)
    frames = {native: both(0.9, 0.8), first: both(0.5, 0.79), rival.plan.key: both(0.9, 0.5)}
    assert judge(two_tasks, candidates[:1], rival, frames).plan == rival.plan
    found = judge(two_tasks, candidates[:1], rival, frames, floors={"grounding": 0.95})
    assert found.plan.key == first
    assert "It misses a floor that this plan keeps. The floor of 0.95 on grounding is kept: 98.8 % [" in found.words


def test_a_plan_at_chance_is_said_to_be_useless(two_tasks: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = solve(two_tasks, bpw=5, top=1)
    native = Plan.uniform(two_tasks.parts, None).key
    monkeypatch.setattr(two_tasks, "meta", two_tasks.meta | {"chance": {"vqa": 0.3, "grounding": 0.0}})
    frames = {native: frame(0.9), candidates[0].plan.key: frame(0.28)}
    words = judge(two_tasks, candidates, None, frames).words
    assert (
        "Do not use it: it scores 0.280 on vqa, no better than chance (0.300), where full precision scores 0.900."
    ) in words
    frames[candidates[0].plan.key] = frame(0.8)
    assert "chance" not in judge(two_tasks, candidates, None, frames).words
    monkeypatch.setattr(two_tasks, "meta", two_tasks.meta | {"chance": {"vqa": None, "grounding": 0.0}})
    words = judge(two_tasks, candidates, None, frames).words
    assert words.endswith(" What chance would score on vqa is not known from one example.")
    monkeypatch.setattr(two_tasks, "meta", two_tasks.meta | {"chance": {"vqa": 0.3, "grounding": 0.0}})
    # nor is it where full precision itself is at chance
    found = judge(two_tasks, candidates, None, {native: frame(0.28), candidates[0].plan.key: frame(0.25)})
    itself = "it scores 0.250 on vqa, where full precision itself scores 0.280, no better than chance (0.300)."
    assert found.words.endswith(f"Do not use it: {itself}")
    assert what_is_lost(found)
    # one image says nothing, and the most common of its answers is always right
    one = {key: rows.head(1) for key, rows in frames.items()}
    assert not what_is_lost(judge(two_tasks, candidates, None, one))


def test_a_prediction_can_be_of_no_use(two_tasks: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_tasks, "meta", two_tasks.meta | {"chance": {"vqa": 0.99}})
    words = unmeasured(two_tasks, solve(two_tasks, bpw=5, top=1)).words
    assert re.search(
        r"Predicted only: nothing was run .*\. Do not use it: it is predicted to score 0\.\d+ on vqa, no better", words
    )


def test_predictions_stay_among_the_scores_that_can_be(tmp_path: Path) -> None:
    def full(bits: np.ndarray) -> np.ndarray:
        return np.minimum(1.0, 1.4 * planted.product(bits))

    made = planted.study(tmp_path, {"a": full, "cider": lambda bits: 1.1 * full(bits)}, noise=0.0)
    raw = {task: Predicted(1.02, 0.9, 1.05, 1.013, bounded=True) for task in ("a", "b")}
    one = replace(unmeasured(made, solve(made, bpw=14, top=1)), weights={"a": 1.0, "b": 1.0})
    shown = replace(one, candidate=replace(one.candidate, predicted=raw)).predicted
    assert (shown.score, shown.high, shown.full) == (1.0, 1.0, 1.0)
    assert raw["a"].to_json() == {"score": 1.0, "low": 0.9, "high": 1.0, "full": 1.0}
    predicted = solve(made, bpw=14, top=1, tasks=["a", "cider"])[0].predicted
    assert predicted["a"].bounded
    assert predicted["a"].to_json()["full"] <= 1
    assert not predicted["cider"].bounded  # scores above 1 were measured
    assert predicted["cider"].to_json()["full"] > 1.05


def test_few_images_are_too_few_for_a_verdict(two_tasks: Study, tmp_path: Path) -> None:
    candidates = solve(two_tasks, bpw=5, top=2)
    rival = best_uniform(Knapsack.of(two_tasks, ["vqa"]), 5, {"vqa": 1.0})
    assert rival is not None
    for right, images, told in ((0.0, 1, "1 paired example of 1 image"), (0.8, 5, "5 paired examples of 5 images")):
        frames = {candidates[0].plan.key: frame(1.0, n=images), rival.plan.key: frame(right, n=images)}
        found = judge(two_tasks, candidates, rival, frames)
        assert found.plan == candidates[0].plan
        assert found.uniform is not None
        assert found.uniform.verdict == "too few"
        written = write_file(two_tasks.parts, found.plan, dict(found.to_json()), tmp_path / "plan.json")
        assert why_foreign(written) == ""  # else the same command could not replace it
        assert found.words == f"Too few images to compare with the best uniform plan: {1 - right:+.3f}, {told}."
    frames = {candidates[0].plan.key: frame(1.0, n=6), rival.plan.key: frame(0.0, n=6)}
    found = judge(two_tasks, candidates, rival, frames)
    assert found.words == "Clearly better than the best uniform plan: +1.000 [+0.610, +1.000], 6 paired examples."


def test_a_uniform_plan_that_is_chosen_is_compared_with_the_runner_up(two_tasks: Study) -> None:
    rival = best_uniform(Knapsack.of(two_tasks, ["vqa"]), 5, {"vqa": 1.0})
    other = solve(two_tasks, bpw=5, top=1)[0]
    assert rival is not None
    frames = {rival.plan.key: frame(0.5, n=50), other.plan.key: frame(0.48, n=50)}
    words = judge(two_tasks, [rival, other], rival, frames).words
    assert words.startswith(
        f"The chosen plan is a uniform one; the runner-up is {other.plan.describe()}. Tied with the runner-up: +0.020 ["
    )
    del frames[other.plan.key]
    assert judge(two_tasks, [rival], rival, frames).words == "The chosen plan is a uniform one; no other plan was run."


def test_that_no_uniform_plan_keeps_a_floor_is_a_prediction(two_tasks: Study) -> None:
    candidates = solve(two_tasks, bpw=5, top=1)
    frames = {Plan.uniform(two_tasks.parts, None).key: frame(0.9), candidates[0].plan.key: frame(0.9)}
    predicted = judge(two_tasks, candidates, None, frames, floors={"vqa": 0.9}).words
    assert predicted.startswith(
        "No uniform plan is predicted to meet these conditions. The floor of 0.9 on vqa is kept: "
    )
    assert judge(two_tasks, candidates, None, frames).words == "No uniform plan meets these conditions."


def test_the_best_uniform_plan_meets_the_same_conditions(two_tasks: Study) -> None:
    knapsack, wish = Knapsack.of(two_tasks, ["vqa", "grounding"]), {"vqa": 1.0}

    def bits(found: Candidate | None) -> set[int]:
        return set(found.plan.bits().values()) if found else set()

    assert bits(best_uniform(knapsack, 9, wish)) == {8}
    assert bits(best_uniform(knapsack, 9, wish, fits=lambda plan: plan.bits()["vision"] < 8)) == {6}
    assert bits(best_uniform(knapsack, 5, wish, floors={"grounding": 0.9})) == set()


def test_a_wish_survives_the_journey_through_json() -> None:
    wish = PlanRequest(
        (3.0, 4.0), {"vqa": 1.0}, {"ground": 0.9}, {"vision": (4, 8)}, [("vision", "language")], "vllm", 2
    )
    again = PlanRequest.from_json(json.loads(json.dumps(wish.to_json())))
    assert again.to_json() == json.loads(json.dumps(wish.to_json()))
    assert (again.bpw, again.runtime, again.top) == (wish.bpw, wish.runtime, wish.top)


def test_limits_are_named_by_patterns() -> None:
    names = ("vision.front.attn", "vision.front.ff", "connector", "language.end.ff")
    allow = allowed_by(names, {"vision": (4, 8), "vision.front.ff": (16,), "*.ff": (2,)})
    assert allow is not None
    assert allow("vision.front.attn", Scheme("codes", 4))
    assert not allow("vision.front.attn", None)
    assert allow("vision.front.ff", None)  # the longest pattern decides
    assert not allow("language.end.ff", Scheme("codes", 4))
    assert allow("connector", Scheme("codes", 3))
    assert tied_groups(names, [("*.ff", "connector")]) == [("vision.front.ff", "language.end.ff", "connector")]
    assert merge_groups([("a", "b"), ("c", "d"), ("b", "c")]) == [("a", "b", "c", "d")]
    choices = "choose from vision, vision.front, language, language.end, vision.front.attn, "
    with pytest.raises(UserError, match=f"unknown component 'languag'; {choices}.*did you mean language"):
        tied_groups(names, [("vision", "languag")])
    with pytest.raises(UserError, match=r"unknown component 'visoin'.*"):
        allowed_by(names, {"visoin": (4,)})
    with pytest.raises(UserError, match="'connector' is a single component"):
        tied_groups(names, [("connector",)])


def test_the_number_of_examples_that_decide_is_about_right() -> None:
    """With so many, four out of five repetitions find the difference."""
    from sensitivity.analysis.recommending.comparison import more_examples
    from sensitivity.study.scores import paired_difference

    draw = np.random.default_rng(0)
    sample = draw.normal(0.05, 0.5, 200)
    sample += 0.05 - sample.mean()
    difference = paired_difference(sample, np.zeros(200), np.arange(200))
    more = more_examples(difference)
    assert more is not None
    wins = 0
    for _ in range(300):
        again = draw.normal(0.05, float(sample.std()), 200 + more)
        wins += paired_difference(again, np.zeros(len(again)), np.arange(len(again))).low > 0
    assert 0.7 < wins / 300 < 0.9


def test_two_ruined_parts_never_make_a_good_model(tmp_path: Path) -> None:
    """Where damage adds up to less than its sum, no term may promise that a second ruined part heals the first."""

    def worst(bits: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-np.maximum(planted.damage(bits[:, 0], 4), planted.damage(bits[:, 2], 4))))

    study = planted.study(tmp_path, {"a": worst}, 0.01)
    model = Knapsack.of(study, ["a"]).models["a"]
    assert (model.gammas() >= 0).all()
    alone, both = (model.space.encode([planted.plan(planted.PARTS, b)]) for b in ((2, 16, 16), (2, 16, 2)))
    assert model.formula.predict(model.theta, both)[0] <= model.formula.predict(model.theta, alone)[0] + 1e-9
    # readings correct the formula, and may differ by their noise: here all that is left is within .01 of 0
    assert model.predict(both)[0] <= model.predict(alone)[0] + model.sigma


def test_a_budget_is_remembered_as_it_was_asked_for(two_tasks: Study) -> None:
    """It is rarely a whole number of bits: 2.6 bits per weight came back as 2.59999986."""
    asked = 5.20001
    assert (asked * two_tasks.parts.numel) % 1 > 0.01
    assert {one.budget for one in solve(two_tasks, bpw=asked)} == {asked}


def test_examples_that_a_task_does_not_have_are_not_asked_for(two_tasks: Study) -> None:
    """Where the examples of the verification had a part in the choice, the task has less than twice as many."""
    best, *_ = solve(two_tasks, bpw=5, top=1)
    rival = best_uniform(Knapsack.of(two_tasks, ["vqa"]), 5, {"vqa": 1.0})
    assert rival is not None
    frames = {
        best.plan.key: frame(0.62, n=100, noise=0.3, seed=1),
        rival.plan.key: frame(0.6, n=100, noise=0.3, seed=2),
    }
    found = judge(two_tasks, [best], rival, frames).uniform
    assert found is not None
    assert found.more is not None
    assert found.more >= 100
    assert found.words.endswith(" more examples would decide with a probability of 80 %.")
    found = judge(two_tasks, [best], rival, frames, fresh=False).uniform
    assert found is not None
    assert found.more is None
    assert found.words.endswith(" more examples would decide with a probability of 80 %, and are not there.")


def test_plans_that_an_earlier_call_ran_on_these_examples_widen_the_interval(tmp_path: Path) -> None:
    """The same plan beside the same rival on the same examples has the same verdict, however many are asked for now."""
    made = planted.study(tmp_path / "run", {"vqa": planted.product})
    candidates = solve(made, bpw=5, top=2)
    rival = best_uniform(Knapsack.of(made, ["vqa"]), 5, {"vqa": 1.0})
    assert rival is not None
    too_large = planted.plan(planted.PARTS, [8, 8, 8])
    plans = [*(one.plan for one in (*candidates, rival)), made.native, too_large]
    right = dict(zip([plan.key for plan in plans], (0.7, 0.6, 0.55, 0.9, 0.8), strict=True))
    verified = Study.create(tmp_path / "verify", made.parts, ["vqa"], {"model": "planted"})
    verified.enqueue(plans)
    while (trial := verified.ask()) is not None:
        rows = frame(right[trial.key], n=60).assign(kind="k", nll=0.1, answer="yes")
        verified.tell(trial, {name: rows[name].tolist() for name in rows}, {"seconds": 0.1})
    first, later = judge(made, candidates, rival, verified), judge(made, candidates[:1], rival, verified)
    assert first.plan == later.plan == candidates[0].plan
    assert first.uniform is not None
    assert first.uniform == later.uniform
    assert "(interval widened for the best of 2 plans)" in later.words
    # a plan that is asked for alone, and ran alone, was not picked from others
    alone = {key: frame(right[key], n=60) for key in (candidates[0].plan.key, rival.plan.key)}
    assert "widened" not in judge(made, candidates[:1], rival, alone).words
