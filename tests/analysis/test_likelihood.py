"""Scores read with likelihoods: planted plans whose answers and likelihoods follow from one damage, and others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sensitivity import inspect, load, scheme, sweep
from sensitivity.analysis.likelihood import MIN_PLANS, link
from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.recommending.believed import steadied_rows
from sensitivity.spec.plan import Plan

PLANS, EXAMPLES = 30, 100


def planted(seed: int, own: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """True scores, measured ones, likelihoods and errors; `own`: what a plan does to scores, and not to likelihoods."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(3.0, 1.5, EXAMPLES)  # of the right answer over the best wrong one
    damage = rng.uniform(0.0, 1.2, PLANS)[:, None]
    wrong = rng.normal(0.0, own, PLANS)[:, None]
    moved = margins - damage + rng.normal(0.0, 1.0, (PLANS, EXAMPLES))
    right = moved - wrong > 0
    many = rng.normal(3.0, 1.5, 20_000) + rng.normal(0.0, 1.0, 20_000)
    true = np.array([(many - d - w > 0).mean() for d, w in zip(damage[:, 0], wrong[:, 0], strict=True)])
    nll = np.logaddexp(0.0, -moved).mean(1)
    return true, right.mean(1), nll, (right - right.mean(0)).std(1) / EXAMPLES**0.5


def errors(read: np.ndarray, true: np.ndarray) -> float:
    """Of differences between plans: all see the same examples."""
    return float(np.std(read - true))


def test_likelihoods_make_scores_less_noisy() -> None:
    before, after = [], []
    for seed in range(40):
        true, scores, nll, noise = planted(seed)
        found = link(scores, nll, noise, 1.0)
        assert found is not None
        before.append(errors(scores, true))
        after.append(errors(found.steadied(scores, nll, noise), true))
    assert np.mean(after) < 0.85 * np.mean(before)


def test_scores_that_do_not_follow_from_likelihoods_are_left_alone() -> None:
    before, after, moved = [], [], []
    for seed in range(40):
        true, scores, nll, noise = planted(seed, own=1.5)
        found = link(scores, nll, noise, 1.0)
        if found is not None:
            read = found.steadied(scores, nll, noise)
            before.append(errors(scores, true))
            after.append(errors(read, true))
            moved.append(np.abs(read - scores).mean() / noise.mean())
    assert np.mean(after) < 1.1 * np.mean(before)  # noise is not known exactly, so that a little is moved
    assert np.mean(moved) < 0.5


def test_exact_scores_are_not_moved() -> None:
    true, _, nll, noise = planted(0)
    found = link(true, nll, noise, 1.0)
    assert found is not None
    assert found.steadied(true, nll, np.zeros(PLANS)) == pytest.approx(true)


@pytest.mark.parametrize("case", ["rising", "few", "unknown", "alike", "far below"])
def test_without_a_relation_there_is_no_link(case: str) -> None:
    _, scores, nll, noise = planted(1)
    few = slice(0, MIN_PLANS - 1)
    asked = {
        "rising": (scores, -nll, noise),
        "few": (scores[few], nll[few], noise[few]),
        "unknown": (scores, np.full(PLANS, np.nan), noise),
        "alike": (scores, np.full(PLANS, 0.5), noise),
        "far below": (scores / 3, nll, noise),
    }[case]
    assert link(*asked, 1.0) is None


def test_plans_that_lose_most_are_read_as_they_are() -> None:
    _, scores, nll, noise = planted(2)
    scores[:3], nll[:3] = 0.1, 4.0
    found = link(scores, nll, noise, 1.0)
    assert found is not None
    assert found.steadied(scores, nll, noise)[:3] == pytest.approx(0.1)


def test_other_examples_may_all_be_harder() -> None:
    """On harder examples all scores lie lower; differences between plans are what likelihoods steady."""
    _, scores, nll, noise = planted(3)
    found = link(scores, nll, noise, 1.0)
    assert found is not None
    read = found.steadied(scores - 0.2, nll, noise, centered=True)
    assert read.mean() == pytest.approx(scores.mean() - 0.2, abs=1e-3)
    assert read - read.mean() == pytest.approx((lambda x: x - x.mean())(found.steadied(scores, nll, noise)), abs=1e-2)


def test_the_sweep_of_a_study_with_answers_has_a_link(tmp_path: Path) -> None:
    """End to end: likelihoods are stored with scores, and plans that fall in one fall in the other."""
    vlm = load("embedded:scenes-llava")
    parts = inspect(vlm, by="part")
    plans = [Plan.of(parts, {part: scheme("rtn", bits)}) for part in ("vision", "language") for bits in (2, 3, 4, 8)]
    study = sweep(vlm, parts, plans, ["vqa"], tmp_path / "study", n=40)
    observations = observations_of(study)
    assert observations.link is not None
    moved = np.abs(observations.steadied - observations.score)
    assert moved.max() > 0
    assert moved.max() < 0.15
    frames = [study.examples(plan) for plan in plans[-2:]]
    read = steadied_rows(study, ["vqa"], [frame for frame in frames if frame is not None])
    assert sum(one["score"].mean() for one in read) == pytest.approx(
        sum(frame["score"].mean() for frame in frames if frame is not None), abs=1e-3
    )
