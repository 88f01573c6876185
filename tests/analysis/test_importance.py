"""Estimators against planted truths and against the libraries they stand for; the published ranking; bad tables."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
from sklearn.ensemble import RandomForestRegressor
from sklearn.inspection import permutation_importance

from sensitivity.analysis.importance import estimators, robustness, tree_shap
from sensitivity.analysis.importance.estimators import CONSENSUS, ESTIMATORS, shares
from sensitivity.analysis.importance.random_forest import RandomForest
from sensitivity.analysis.importance.ranking import rank, rank_correlations
from sensitivity.analysis.importance.robustness import inseparable
from sensitivity.analysis.observations import observations_of, observations_of_table
from sensitivity.spec.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", PendingDeprecationWarning)  # of its import of matplotlib
    import shap

FORMULAS = {"additive": planted.additive, "product": planted.product, "tied": planted.tied, "crossed": planted.crossed}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_irrelevant_components_get_next_to_nothing(name: str) -> None:
    observations = planted.observations(planted.additive, noise=0.005)
    share = shares(ESTIMATORS[name](estimators.fit(observations.bits, observations.score)))
    assert share[1] == share.min() < 5
    assert share[0] > share[2] or name == "ped_anova"  # which looks at the best tenth only


@pytest.mark.parametrize("name", CONSENSUS)
def test_equal_components_share_equally(name: str) -> None:
    observations = planted.observations(planted.tied, noise=0.005)
    share = shares(ESTIMATORS[name](estimators.fit(observations.bits, observations.score)))
    assert share[0] == pytest.approx(share[2], abs=4)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_shares_of_an_additive_truth_are_its_variances(formula: planted.Formula) -> None:
    """Without noise the impurity share of an additive score is each term's share of the variance."""
    observations = planted.observations(formula)
    share = shares(estimators.forest(estimators.fit(observations.bits, observations.score)))
    means = [
        pd.Series(observations.score).groupby(column).transform("mean").to_numpy() for column in observations.bits.T
    ]
    variance = np.array([values.var() for values in means])
    if formula in (planted.additive, planted.tied):
        np.testing.assert_allclose(share, 100 * variance / variance.sum(), atol=2)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_the_table_of_games_and_the_leaves_are_treeshap(formula: planted.Formula) -> None:
    observations = planted.observations(formula, noise=0.02)
    draw = np.random.default_rng(1)
    rows = draw.integers(0, len(observations), 150)  # with repeats, as in a resample
    forest = RandomForestRegressor(20, random_state=0).fit(observations.bits[rows], observations.score[rows])
    explainer = shap.TreeExplainer(forest)
    values, pairs = explainer.shap_values(observations.bits), explainer.shap_interaction_values(observations.bits)
    for ours in (tree_shap.ShapleyTable(forest, observations.bits), tree_shap.Leaves(forest, observations.bits)):
        np.testing.assert_allclose(ours.values(), values, atol=1e-10)
        np.testing.assert_allclose(ours.interactions(), pairs, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 9, 125, 600])
def test_the_forest_is_scikit_learns(rows: int) -> None:
    draw = np.random.default_rng(rows)
    x = draw.choice([2, 3, 4, 6, 8], size=(rows, 4)).astype(float)
    y = x[:, 0] * x[:, 1] + draw.normal(size=rows)
    ours, theirs = RandomForest(30, 3).fit(x, y), RandomForestRegressor(30, random_state=3).fit(x, y)
    np.testing.assert_allclose(ours.predict(x + 0.5), theirs.predict(x + 0.5), rtol=1e-12)
    np.testing.assert_allclose(ours.feature_importances_, theirs.feature_importances_, rtol=1e-12)
    np.testing.assert_array_equal(ours.first(10).predict(x), RandomForest(10, 3).fit(x, y).predict(x))


def test_permutation_is_scikit_learns() -> None:
    observations = planted.observations(planted.product, noise=0.02)
    fitted = estimators.fit(observations.bits, observations.score)
    forest = RandomForestRegressor(estimators.TREES, random_state=0).fit(fitted.x, fitted.y)
    theirs = permutation_importance(forest, fitted.x, fitted.y, n_repeats=50, random_state=0)
    np.testing.assert_allclose(estimators.permutation(fitted), theirs.importances_mean, rtol=0.1, atol=0.002)


@pytest.mark.parametrize("columns", [9, 17])
def test_a_grid_too_large_for_a_table_is_treeshap_leaf_by_leaf(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    bits = draw.choice([2, 3, 4, 6, 8], size=(200, columns)).astype(float)
    score = np.tanh(bits @ draw.random(columns) / 20) + bits[:, 0] * bits[:, 1] / 50
    forest = RandomForestRegressor(10, random_state=0).fit(bits, score)
    explainer, some = shap.TreeExplainer(forest), bits[:12]
    monkeypatch.setattr(tree_shap, "MAX_ENTRIES", 60_000)  # in several portions
    leaves = tree_shap.Leaves(forest, some)
    assert len(leaves._portions()) > 1
    np.testing.assert_allclose(leaves.values(), explainer.shap_values(some), atol=1e-10)
    np.testing.assert_allclose(leaves.interactions(), explainer.shap_interaction_values(some), atol=1e-10)


def test_a_large_grid_ranks() -> None:
    draw = np.random.default_rng(0)
    bits = draw.choice([2, 3, 4, 6, 8], size=(60, 9)).astype(float)
    assert not tree_shap.fits(bits)
    fitted = estimators.fit(bits, bits[:, 0] + 0.1 * bits[:, 1], shap_plans=30, trees=10)
    assert int(np.argmax(estimators.shap(fitted))) == 0
    assert robustness.interactions(fitted, [f"c{i}" for i in range(9)]).shape == (36, 4)


def test_groups_rank_as_one() -> None:
    observations = planted.observations(planted.additive, noise=0.01)
    alone = estimators.fit(observations.bits, observations.score)
    joint = estimators.fit(observations.bits, observations.score, [[0, 2], [1]])
    np.testing.assert_allclose(estimators.forest(joint)[0], estimators.forest(alone)[[0, 2]].sum())
    assert shares(estimators.permutation(joint))[0] > 95


def test_intervals_hold_the_planted_shares() -> None:
    """Of an irrelevant, an important and a middling component; the experiment on coverage has the rates."""
    truth = rank(planted.observations(planted.additive), bootstraps=0, thorough=False).table["consensus"]
    found = rank(planted.observations(planted.additive, noise=0.02), bootstraps=40, thorough=False).table
    for name in planted.PARTS:
        assert found["consensus.low"][name] <= truth[name] + 0.5, name
        assert found["consensus.high"][name] >= truth[name] - 0.5, name
    assert found["consensus.low"]["connector"] < 0.5  # not told from nothing


def test_pairs_that_hurt_each_other_are_found() -> None:
    observations = planted.observations(planted.crossed)
    pairs = robustness.interactions(estimators.fit(observations.bits, observations.score), planted.PARTS)
    assert set(pairs.iloc[0][["a", "b"]]) == {"vision", "language"}
    assert pairs.iloc[0]["both_low"] < -0.05
    assert pairs.iloc[1]["strength"] < 0.01


def test_a_ranking_that_rests_on_one_level_says_so() -> None:
    def cliff(bits: np.ndarray) -> np.ndarray:
        return np.asarray(1.0 * (bits[:, 0] > 2) - 0.1 * planted.damage(bits[:, 2], 3))

    found = rank(planted.observations(cliff, noise=0.005), bootstraps=0)
    assert found.order[0] == "vision"
    worst = found.levels.loc[found.levels["shift"].abs().idxmax()]
    assert (worst["component"], worst["bits"], worst["changes_first"]) == ("vision", 2, True)
    share = found.table["forest"]["vision"]  # the note starts from a share that the table shows
    note = "rests on vision at 2 bits: without those 36 trials the forest importance of vision goes from"
    assert f"{note} {share:.0f} to" in " ".join(found.warnings)
    assert robustness.cliffs(found.levels) == [("vision", 2)]
    near = rank(planted.observations(cliff, noise=0.005), bootstraps=0, near=0.7, thorough=False)
    assert near.order[0] == "language"
    assert near.trials < found.trials


def test_one_trial_at_native_precision_is_named_as_such() -> None:
    observations = planted.observations(planted.additive)
    found = rank(observations, bootstraps=0)
    level = found.levels.head(1).assign(component="connector", bits=16, trials=1, shift=25.0, before=5.0, after=30.0)
    told = " ".join(robustness.cautions(observations, found, level))
    assert "rests on connector at native precision: without that trial the forest importance" in told
    assert "goes from 5 to 30 %" in told


def test_untouched_components_are_suspected() -> None:
    """As in a published table: some attention and feed-forward layers were never quantized, and nobody noticed."""
    found = rank(planted.observations(planted.additive), bootstraps=0)
    assert "connector alone never moved the score" in " ".join(found.warnings)
    assert "vision alone" not in " ".join(found.warnings)


def test_components_that_always_move_together_are_named() -> None:
    bits = planted.grid()[:, [0, 0, 2]]
    table = pd.DataFrame(bits, columns=list(planted.PARTS)).assign(score=planted.additive(bits))
    found = rank(observations_of_table(table, planted.PARTS, "score"), bootstraps=0)
    assert "vision and connector always had the same bits" in " ".join(found.warnings)
    table["language"] = table["vision"]
    told = " ".join(inseparable(observations_of_table(table, planted.PARTS, "score")))
    assert told == "vision, connector and language always had the same bits: their shares cannot be told apart"


def test_per_megabyte_and_coarser_parts(tmp_path: Path) -> None:
    names = ("vision.front", "vision.end", "language")
    study = planted.study(
        tmp_path, {"a": planted.additive, "b": planted.tied}, 0.01, components=planted.parts(names, (10**6,) * 3)
    )
    found = rank(study, "a", bootstraps=2, thorough=False)
    assert found.table["gain_per_mb"]["vision.front"] > found.table["gain_per_mb"]["language"] > 0
    coarse = rank(study, "a", by="part", bootstraps=0, thorough=False)
    assert set(coarse.order) == {"vision", "language"}
    both = rank(study, "b", by="part", bootstraps=0, thorough=False)
    tau = rank_correlations({"a": coarse, "b": both})
    assert tau.loc["a", "b"] in (-1.0, 1.0)
    data = json.loads(found.dumps())
    assert data["components"]["vision.front"]["consensus"] > 50
    with pytest.raises(UserError, match="unknown granularity"):
        rank(study, "a", by="thirds")
    with pytest.raises(UserError, match="unknown task 'c'"):
        rank(study, "c")
    with pytest.raises(UserError, match="unknown method of this study 'gptq'; choose from codes"):
        rank(study, "a", method="gptq")


def test_importance_budget_by_budget(tmp_path: Path) -> None:
    study = planted.study(tmp_path, {"a": planted.product}, 0.01)
    found = robustness.by_budget(observations_of(study), [3.0, 5.0, 8.0, 99.0])
    assert list(found.index) == [5.0, 8.0]  # too few plans are as small as 3
    np.testing.assert_allclose(found[list(planted.PARTS)].sum(axis=1), 100)
    assert (found["trials"] >= 8).all()


def test_the_same_seed_gives_the_same_ranking() -> None:
    one, two = (rank(planted.observations(planted.product, 0.02), bootstraps=2, thorough=False) for _ in range(2))
    assert one.dumps() == two.dumps()


def test_noise_is_not_ranked() -> None:
    with pytest.raises(UserError, match="predicts unseen plans worse than the mean does"):
        rank(planted.observations(lambda bits: 0 * bits[:, 0], noise=1.0))


def test_bad_tables_are_refused_with_a_sentence() -> None:
    bits = planted.grid()
    good = pd.DataFrame(bits, columns=list(planted.PARTS)).assign(score=planted.product(bits))
    with pytest.raises(UserError, match="3 usable trials for 'score': a ranking needs at least 8"):
        rank(observations_of_table(good.head(3), planted.PARTS, "score"))
    with pytest.raises(UserError, match=r"unknown column 'visoin'.*did you mean vision"):
        observations_of_table(good, ("visoin",), "score")
    with pytest.raises(UserError, match="two columns named 'vision'"):
        observations_of_table(pd.concat([good, good[["vision"]]], axis=1), planted.PARTS, "score")
    with pytest.raises(UserError, match=r"column 'score' holds 'n/a.' in row 2, not a number"):
        observations_of_table(
            good.astype(object).replace({"score": {good["score"][1]: "n/a?"}}), planted.PARTS, "score"
        )
    with pytest.raises(UserError, match="no trial has a score"):
        observations_of_table(good.assign(score=np.nan), planted.PARTS, "score")
    with pytest.raises(UserError, match="every trial scored 1 on 'score'"):
        rank(observations_of_table(good.assign(score=1.0), planted.PARTS, "score"))
    with pytest.raises(UserError, match="every component had the same bits"):
        rank(observations_of_table(good.assign(vision=4, connector=4, language=4), planted.PARTS, "score"))


def test_what_is_left_out_is_counted() -> None:
    bits = planted.grid()
    table = pd.DataFrame(bits, columns=list(planted.PARTS)).assign(score=planted.product(bits))
    table.loc[:4, "score"] = np.nan
    table.loc[5:7, "vision"] = np.nan
    table["language"] = 4
    found = rank(observations_of_table(table, planted.PARTS, "score"), bootstraps=2, thorough=False)
    told = " / ".join(found.warnings)
    assert "3 trials left out: no bits" in told
    assert "5 trials left out: no number as score" in told
    assert "language always had 4 bits: not ranked" in told


def test_replicates_tell_the_noise(tmp_path: Path) -> None:
    rows = np.repeat(planted.grid((3, 4, 8)), 4, axis=0)
    study = planted.study(tmp_path, {"a": planted.product}, noise=0.03, rows=rows)
    assert observations_of(study).noise == pytest.approx(0.03, rel=0.25)


def test_the_published_ranking_is_reproduced(published: Path) -> None:
    table = pd.read_csv(published / "blip2_gptq_coco.csv")
    observations = observations_of_table(table, ["vit_bits", "qformer_bits", "llm_bits"], "cider")
    found = rank(observations, bootstraps=0)
    consensus = found.table["consensus"]
    assert consensus["vit_bits"] == pytest.approx(50.4, abs=1)
    assert consensus["qformer_bits"] == pytest.approx(2.0, abs=1)
    assert consensus["llm_bits"] == pytest.approx(47.6, abs=1)
    assert found.linear_r2 == pytest.approx(0.20, abs=0.01)
    assert "rests on vit_bits at 2 bits" in " ".join(found.warnings)


@pytest.mark.slow
def test_importing_loads_no_torch() -> None:
    """And neither does a whole ranking."""
    code = (
        "import sys; import planted; from sensitivity.analysis.importance.ranking import rank;"
        "rank(planted.observations(planted.product, 0.02), bootstraps=2); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_part_that_moves_another_task_was_quantized() -> None:
    bits = planted.grid((2, 4, 16))
    still = replace(planted.observations(lambda rows: 1.0 - 0.1 * (rows[:, 0] == 2), levels=(2, 4, 16)), task="still")
    assert "language alone never moved the score" in " ".join(robustness.without_effect(still))
    moving = replace(still, score=1.0 - 0.2 * (bits[:, 2] == 2))
    told = " ".join(robustness.without_effect(still, [moving]))
    assert "language" not in told
    assert "connector alone never moved the score" in told
