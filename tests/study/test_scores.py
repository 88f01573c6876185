"""Intervals cover what they claim, clusters widen them, and pairing narrows them."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import answered
import numpy as np
import pytest

from sensitivity.study.racing import uncertainty
from sensitivity.study.scores import clustered_se, independent_difference, paired_difference, summarize
from sensitivity.tasks.table import task


def test_without_clusters_the_error_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(size=50)
    se, count = clustered_se(values, np.arange(50))
    assert count == 50
    assert se == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_copies_of_an_example_add_no_knowledge() -> None:
    values = np.random.default_rng(0).normal(size=40)
    single = clustered_se(values, np.arange(40))
    assert clustered_se(np.repeat(values, 5), np.repeat(np.arange(40), 5)) == pytest.approx(single)


@pytest.mark.parametrize(("p", "spread"), [(0.5, 0.0), (0.9, 0.0), (0.8, 0.1), (0.98, 0.02)])
def test_intervals_cover_the_truth_at_about_their_rate(p: float, spread: float) -> None:
    """150 scenes of 5 questions; scenes differ in difficulty, so that questions of one scene move together."""
    rng = np.random.default_rng(1)
    clusters, hits, rounds = np.repeat(np.arange(150), 5), 0, 600
    for _ in range(rounds):
        easy = np.clip(p + rng.choice([-spread, spread], 150), 0, 1)
        score = summarize(rng.random(750) < np.repeat(easy, 5), clusters)
        hits += score.low <= p <= score.high
    assert 0.92 <= hits / rounds <= 0.98


def test_paired_intervals_cover_the_true_difference() -> None:
    rng = np.random.default_rng(2)
    clusters, hits, widths, rounds = np.repeat(np.arange(100), 4), 0, [], 500
    for _ in range(rounds):
        base = rng.random(400) < 0.8
        ours = np.where(rng.random(400) < 0.05, ~base, base)  # 4 % of the right ones lost, 1 % of the wrong ones won
        difference = paired_difference(ours, base, clusters)
        hits += difference.low <= -0.03 <= difference.high
        widths.append(difference.high - difference.low)
        alone = summarize(ours, clusters)
    assert 0.92 <= hits / rounds <= 0.98
    assert np.mean(widths) < 0.75 * (alone.high - alone.low)


def test_all_right_is_not_without_error() -> None:
    score = summarize(np.ones(100), np.arange(100) // 5)
    assert score.se == 0
    assert score.high == 1
    assert 0.8 < score.low < 0.9  # as for 20 scenes, not for 100 questions


def test_intervals_of_few_images_rise_with_the_score() -> None:
    """60 questions on 12 images: one wrong answer does not make surer how many are right than none does."""
    images = np.repeat(np.arange(12), 5)
    found = [summarize(np.arange(60) % 5 * 12 + np.arange(60) // 5 >= wrong, images) for wrong in range(61)]
    for more, fewer in pairwise(found):
        assert fewer.low <= more.low + 1e-12
        assert fewer.high <= more.high + 1e-12
    assert found[0].low == found[1].low
    assert str(found[1]) == f"0.983 [{found[1].low:.3f}, {found[1].high:.3f}] (n 60 on 12 images)"
    assert str(summarize([1.0, 0.0], ["a", "b"])).endswith("(n 2)")


@pytest.mark.parametrize(("p", "alike"), [(0.9, 0.7), (0.95, 0.3), (0.95, 0.7), (0.98, 0.7), (0.05, 0.7)])
def test_intervals_of_few_images_cover_scores_near_the_ends(p: float, alike: float) -> None:
    """Questions of one image are answered alike; without the limit of all right, 0.9 of the intervals cover."""
    rng, images, rounds = np.random.default_rng(5), np.repeat(np.arange(12), 5), 1000
    right = rng.beta(p * (1 / alike - 1), (1 - p) * (1 / alike - 1), (rounds, 12))
    found = [summarize(rng.random(60) < np.repeat(row, 5), images) for row in right]
    assert np.mean([one.low <= p <= one.high for one in found]) > 0.94


def test_each_image_with_one_question_keeps_wilsons_interval() -> None:
    found = summarize(np.arange(60) > 0, np.arange(60))
    assert (found.low, found.high) == pytest.approx((0.911, 0.997), abs=1e-3)  # Wilson's for 59 of 60


def test_no_difference_in_a_few_examples_is_not_without_error() -> None:
    scores, clusters = np.tile([1.0, 0.0], 50), np.arange(100) // 2
    found = paired_difference(scores, scores, clusters)
    assert (found.mean, found.se) == (0, 0)
    assert found.high == pytest.approx(summarize(np.zeros(100), np.arange(100)).high)
    assert found.low == -found.high
    assert paired_difference(scores, scores, clusters, tries=3).high > found.high
    assert paired_difference(10 * scores, 10 * scores, clusters).high == pytest.approx(10 * found.high)
    assert paired_difference(10 * scores, 10 * scores, np.zeros(100)).high == math.inf


def test_the_same_difference_in_a_few_examples_is_not_without_error() -> None:
    found = paired_difference(np.full(30, 0.7), np.full(30, 0.5), np.arange(30))
    none = paired_difference(np.full(30, 0.7), np.full(30, 0.7), np.arange(30))
    assert found.low == pytest.approx(0.2 + none.low)
    assert found.high == pytest.approx(0.2 + none.high)
    all_lost = paired_difference(np.zeros(30), np.ones(30), np.arange(30))
    assert (all_lost.low, all_lost.high) == (-1, pytest.approx(-1 + none.high))


def test_no_interval_of_a_difference_is_wider_where_fewer_answers_changed() -> None:
    widths = []
    for lost in range(8):
        scores = np.ones(100)
        scores[np.arange(lost) * 11] = 0
        found = paired_difference(scores, np.ones(100), np.arange(100) // 5)
        widths.append(found.high - found.low)
    assert widths == sorted(widths)
    assert widths[0] > 0.07


@pytest.mark.parametrize("rate", [0.002, 0.01, 0.03])
def test_differences_in_few_answers_cover_the_truth(rate: float) -> None:
    rng, hits, rounds = np.random.default_rng(5), 0, 300
    for _ in range(rounds):
        found = paired_difference(rng.random(100) >= rate, np.ones(100), np.arange(100) // 5)
        hits += found.low <= -rate <= found.high
    assert hits / rounds > 0.93  # by Student's t alone .16, .62 and .87


def test_equal_answers_on_a_few_images_are_not_known_for_certain(tmp_path: Path) -> None:
    """A sweep that ends once errors are small goes on until this one is, too."""
    study = answered.study(tmp_path, [task("vqa", n=60)], lambda plan, example: example.answers[0], n=60)
    row = study.table().set_index("key").loc[answered.FOUR.key]
    assert row["vqa.delta"] == row["vqa.delta.se"] == 0
    assert uncertainty(study) == pytest.approx(row["vqa.delta.high"])
    assert uncertainty(study) > 0.02


def test_a_plan_does_not_differ_from_itself() -> None:
    found = paired_difference([1.0, 0.0], [1.0, 0.0], ["a", "b"], itself=True)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_a_difference_of_scores_from_0_to_1_is_at_most_1() -> None:
    few = paired_difference([1.0, 1.0, 1.0], [0.0, 1.0, 1.0], list("abc"))
    assert (few.low, few.high) == (-1, 1)
    alone = paired_difference([1.0], [0.0], ["a"])
    assert (alone.low, alone.high, alone.se) == (-1, 1, math.inf)
    assert paired_difference([30.0, 10.0, 10.0], [0.0, 10.0, 10.0], list("abc")).high > 10


@pytest.mark.parametrize(("p", "q", "n"), [(1.0, 1.0, 30), (0.98, 0.9, 60), (0.5, 0.7, 40)])
def test_differences_of_independent_samples_cover_the_truth_and_have_a_width(p: float, q: float, n: int) -> None:
    rng, hits, rounds = np.random.default_rng(4), 0, 400
    for _ in range(rounds):
        a, b = (summarize(rng.random(n) < truth, np.arange(n)) for truth in (p, q))
        found = independent_difference(a, b)
        assert -1 <= found.low < found.mean < found.high <= 1 or found.mean in (-1, 1)
        hits += found.low <= q - p <= found.high
    assert hits / rounds > 0.93


def test_intervals_of_rare_differences_cover_them() -> None:
    """Most draws have no answer that differs, or one: an interval without a width would then miss."""
    rng, base, rounds = np.random.default_rng(3), np.ones(100), 500
    found = [paired_difference(rng.random(100) >= 0.01, base, np.arange(100)) for _ in range(rounds)]
    assert np.mean([one.low <= -0.01 <= one.high for one in found]) > 0.9


def test_one_cluster_tells_nothing_about_the_spread() -> None:
    assert clustered_se(np.array([1.0, 0.0]), np.zeros(2)) == (math.inf, 1)
    assert summarize([5.0, 7.0], ["a", "a"]).high == math.inf


def test_a_score_needs_examples() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        summarize([], [])
