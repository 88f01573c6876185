"""What the surrogate's formula misses: readings without noise are believed, noise is smoothed, intervals hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
from scipy.optimize import approx_fprime

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.allocate.knapsack import Knapsack, Predicted
from sensitivity.analysis.recommending.believed import shrunk_scores
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.misfit import Evidence, Hyperparameters, merged
from sensitivity.analysis.surrogate.space import Space
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import size

BITS = planted.grid()
PLANS = [planted.plan(planted.PARTS, row) for row in BITS]
SPACE = Space.of(PLANS)
INDEX = SPACE.encode(PLANS)


def worst(bits: np.ndarray) -> np.ndarray:
    """The worst part decides, and a little by chance for each width of each part: the formula cannot say that."""
    each = np.column_stack([planted.damage(bits[:, i], half) for i, half in enumerate((2.5, 2.0, 2.2))])
    luck = np.random.default_rng(5).normal(0, 0.02, (17, 17))
    pair = luck[bits[:, 0].astype(int), bits[:, 2].astype(int)] * each.max(axis=1)
    return np.asarray(np.exp(-each.max(axis=1)) + pair)


def test_readings_without_noise_are_believed_and_noisy_ones_smoothed() -> None:
    truth = worst(BITS)
    formula = fit_surrogate(SPACE, INDEX, truth)
    assert not formula.is_formula
    assert np.abs(formula.formula.predict(formula.theta, INDEX) - truth).max() > 0.03
    assert np.abs(formula.predict(INDEX) - truth).max() < 0.01
    noisy = truth + 0.03 * np.random.default_rng(0).standard_normal(len(truth))
    smooth = fit_surrogate(SPACE, INDEX, noisy)
    missed = [
        np.sqrt(np.mean((scores - truth) ** 2))
        for scores in (smooth.predict(INDEX), smooth.formula.predict(smooth.theta, INDEX))
    ]
    assert missed[0] < 0.02  # two thirds of the noise
    assert missed[0] < missed[1]
    assert smooth.sigma == pytest.approx(0.03, abs=0.008)


def test_where_the_formula_is_right_nothing_is_added() -> None:
    noisy = planted.product(BITS) + 0.03 * np.random.default_rng(0).standard_normal(len(BITS))
    for noise in (None, 0.03):
        model = fit_surrogate(SPACE, INDEX, noisy, noise=noise)
        assert model.is_formula
        np.testing.assert_array_equal(model.predict(INDEX), model.formula.predict(model.theta, INDEX))


@pytest.mark.parametrize("formula", [worst, planted.product])
def test_intervals_of_unmeasured_plans_hold_the_truth(formula: planted.Formula) -> None:
    held = []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        some, rest = np.split(draw.permutation(len(BITS)), [70])
        model = fit_surrogate(SPACE, INDEX[some], formula(BITS[some]) + 0.02 * draw.standard_normal(70), noise=0.02)
        low, high = np.quantile(model.draws(INDEX[rest]), [0.025, 0.975], axis=0)
        truth = formula(BITS[rest])
        held.append(np.mean((low - 1e-3 <= truth) & (truth <= high + 1e-3)))
    assert np.mean(held) > 0.88


def test_replicates_count_as_one_plan_with_less_noise() -> None:
    index = np.array([[1, 2], [0, 1], [1, 2]])
    rows, score, noise = merged(index, np.array([0.5, 0.9, 0.7]), np.array([0.1, 0.2, 0.1]))
    np.testing.assert_array_equal(rows, [[0, 1], [1, 2]])
    np.testing.assert_allclose(score, [0.9, 0.6])
    np.testing.assert_allclose(noise, [0.2, 0.1 / np.sqrt(2)])


def test_the_slope_of_the_evidence_is_its_derivative() -> None:
    draw = np.random.default_rng(0)
    places = draw.uniform(0, 3, 12)
    loose = draw.normal(0, 0.1, (12, 3))
    prior = np.array([0.5, -3.0, -2.0, 0.3, -2.5]), np.ones(5)
    evidence = Evidence(
        np.abs(places[:, None] - places), draw.uniform(0, 1, 12), loose @ loose.T, draw.normal(0, 0.1, 12),
        np.full(12, 0.05), prior, known=False,
    )  # fmt: skip
    logs = np.array([0.9, -2.5, -2.2, -0.1, -3.0])
    ours = evidence.cost(logs, True)[1]
    np.testing.assert_allclose(ours, approx_fprime(logs, lambda x: evidence.cost(x, True)[0], 1e-6), rtol=1e-3)
    assert Hyperparameters.of(np.zeros(5)).length_scale == 1.0


def test_the_best_plan_within_a_budget_is_that_of_brute_force_with_limits_too(tmp_path: Path) -> None:
    study = planted.study(tmp_path, {"a": worst, "b": planted.product})
    knapsack = Knapsack.of(study, ["a", "b"])
    assert not knapsack.models["a"].is_formula
    rows = np.array(list(itertools.product(*(range(len(options)) for options in knapsack.space.choices))))
    plans = [knapsack.space.decode(row) for row in rows]
    bits = np.array([size(study.parts, plan).bits for plan in plans])
    share = {task: model.predict(rows) / knapsack.full(task) for task, model in knapsack.models.items()}
    for bpw in (4.4, 6.0):
        fits = bits <= bpw * study.parts.numel
        (best,) = solve(study, bpw=bpw, tasks=["a"], top=1, knapsack=knapsack)
        assert best.predicted["a"].score == pytest.approx(share["a"][fits].max() * knapsack.full("a"))
        floor = 0.9 * float(share["b"][fits].max())
        mixed = (2 * share["a"] + share["b"])[fits & (share["b"] >= floor)].max()
        (best,) = solve(study, bpw=bpw, weights={"a": 2, "b": 1}, floors={"b": floor}, top=1, knapsack=knapsack)
        one = best.predicted
        assert 2 * one["a"].score / one["a"].full + one["b"].score / one["b"].full == pytest.approx(mixed)
    tied = solve(study, bpw=5.0, tasks=["a"], tied=[["vision", "language"]], allowed=_no_three, knapsack=knapsack)
    assert len({one.plan.key for one in tied}) == 3
    for one in tied:
        assert one.plan["vision"] == one.plan["language"]
        assert one.plan.bits()["vision"] != 3
        assert one.size.bits <= 5.0 * study.parts.numel


def _no_three(name: str, choice: Scheme | None) -> bool:
    return choice is None or choice.bits != 3


def test_a_space_too_large_to_list_is_searched_around_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = planted.study(tmp_path, {"a": worst})
    knapsack = Knapsack.of(study, ["a"])
    everything = solve(study, bpw=4.2, top=1, knapsack=knapsack)[0]
    monkeypatch.setattr("sensitivity.analysis.allocate.one_by_one.MAX_COMPARED", 1)
    assert solve(study, bpw=4.2, top=1, knapsack=knapsack)[0].plan == everything.plan


def test_families_are_apart_and_full_precision_is_between_them() -> None:
    schemes = [None, Scheme("rtn", 4), Scheme("gptq", 4), Scheme("rtn", 2)]
    space = Space.of([Plan((("a", scheme),)) for scheme in schemes])
    (apart,), place = space.distances(), {choice: i for i, choice in enumerate(space.choices[0])}
    between = {(a, b): apart[place[a], place[b]] for a in schemes for b in schemes}
    np.testing.assert_allclose(apart, apart.T)
    assert between[schemes[1], schemes[1]] == 0
    assert between[schemes[1], schemes[3]] == pytest.approx(1.0)  # one octave
    assert between[schemes[1], schemes[2]] == pytest.approx(1.0)  # another family, through full precision
    assert between[None, schemes[1]] == pytest.approx(2.5)


def _frames(scores: list[float], noise: float, seed: int) -> list[pd.DataFrame]:
    draw = np.random.default_rng(seed)
    luck = draw.standard_normal(50)
    return [
        pd.DataFrame({"example": range(50), "cluster": range(50), "score": s + luck + noise * draw.standard_normal(50)})
        for s in scores
    ]


def test_the_choice_among_verified_plans_is_worse_by_the_highest_reading() -> None:
    """The winner's curse: plans of known predictions, read with noise that hides their differences."""
    curse, cure, regret, without = [], [], [], []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        truth = draw.normal(0.8, 0.01, 3)
        expected = 0.8 + (truth - 0.8 + draw.normal(0, 0.01, 3)) / 2  # as good as can be told from another such reading
        predicted = [Predicted(score, score - 0.014, score + 0.014, 1.0) for score in expected]
        frames = _frames(list(truth), 0.3, seed)
        reading = [float(frame["score"].mean()) for frame in frames]
        likely = shrunk_scores(predicted, frames)
        top, best = int(np.argmax(reading)), int(np.argmax(likely))
        common = np.mean(reading) - np.mean(truth)  # what all plans owe to the examples
        curse.append(reading[top] - truth[top] - common)
        cure.append(likely[best] - truth[best] - common)
        regret.append(truth.max() - truth[best])
        without.append(truth.max() - truth[top])
    assert np.mean(curse) > 0.02
    assert abs(np.mean(cure)) < np.mean(curse) / 4
    assert np.mean(regret) < 0.8 * np.mean(without)


def test_clear_readings_overrule_predictions() -> None:
    predicted = [Predicted(0.9, 0.899, 0.901, 1.0), Predicted(0.8, 0.799, 0.801, 1.0)]
    likely = shrunk_scores(predicted, _frames([0.5, 0.8], 0.01, 0))
    assert likely[1] > likely[0]


@pytest.mark.parametrize("seed", range(3))
def test_small_damages_in_noise_are_not_taken_for_a_floor(seed: int) -> None:
    """Eight noisy readings of plans of 20 components that lose 1 to 7 %: more bits are predicted to be better."""
    draw, names = np.random.default_rng(seed), [f"part.{i}" for i in range(20)]
    schemes = {bits: Scheme("codes", bits) for bits in (2, 3, 4, 6, 8)}
    expected = {name: {s: sure * np.exp(2 - b) for b, s in schemes.items()} for name, sure in
                zip(names, draw.lognormal(0, 1, 20), strict=True)}  # fmt: skip
    true = {name: {s: 0.002 * damage * draw.lognormal(0, 0.5) for s, damage in row.items()}
            for name, row in expected.items()}  # fmt: skip

    def plan(widths: Iterable[int]) -> Plan:
        return Plan(tuple((name, schemes.get(int(bits))) for name, bits in zip(names, widths, strict=True)))

    def score(one: Plan) -> float:
        return 0.97 * math.exp(-sum(true[name][s] for name, s in one.schemes if s))

    plans = [plan([16] * 20), *(plan(draw.choice([2, 3, 4] if i < 5 else [3, 4, 6], 20)) for i in range(8))]
    space = Space.of(plans[:1], expected)
    readings = np.array([0.97, *(score(one) + 0.027 * draw.standard_normal() for one in plans[1:])])
    model = fit_surrogate(space, space.encode(plans), readings, 0.97, np.full(9, 0.027), expected=expected)
    uniform = [plan([bits] * 20) for bits in schemes]
    predicted = model.predict(space.encode(uniform))
    assert (np.diff(predicted) >= 0).all()
    assert predicted[2] > predicted[0] + 0.01
    assert predicted == pytest.approx([score(one) for one in uniform], abs=0.06)
    low, high = np.quantile(model.draws(space.encode(uniform)), [0.025, 0.975], axis=0)
    assert ((low < [score(one) for one in uniform]) & ([score(one) for one in uniform] < high)).all()
    assert (high - low)[1:].max() < 0.2
    wide = np.quantile(model.draws(space.encode(uniform), explore=True), [0.025, 0.975], axis=0)
    assert (wide[1] - wide[0])[1] > 2 * (high - low)[1]  # some draw predicts half of every measured score
    weights = model.formula.slopes_by_exponent(model.theta, model.measured) ** 2
    weights /= weights.sum()
    slopes = approx_fprime(model.theta, lambda x: model.formula.mean_exponent(x, model.measured, weights), 1e-6)
    ours = model.formula.exponent_slopes(model.theta, model.measured, weights)
    np.testing.assert_allclose(ours, slopes, rtol=1e-3, atol=1e-4)
