"""Checks of a ranking: near full precision, without single levels, interactions, agreement of estimators, warnings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import kendalltau
from sklearn.ensemble import RandomForestRegressor

from sensitivity.analysis.importance import estimators
from sensitivity.analysis.observations import Observations
from sensitivity.spec.errors import UserError
from sensitivity.study.counting import count

if TYPE_CHECKING:
    from sensitivity.analysis.importance.types import Ranking

Floats = np.ndarray
NEAR = 0.9  # share of full precision that counts as near it
TRUSTED_R2 = 0.5  # of the forest on unseen plans; a ranking by a worse one is not to be trusted
MOVED = 15.0  # percentage points; the ranking rests on a level if some share changes by so much without it


def near_operating_point(observations: Observations, share: float) -> Observations:
    """Only trials that are predicted to score at least this share of full precision.

    They are selected by the forest's out-of-bag prediction and not by the measured score: a threshold on noisy scores
    keeps the trials that were lucky, and the ranking would then explain luck.
    """
    if not 0 < share < 1:
        raise UserError(f"near must be a share of full precision between 0 and 1, such as 0.9, not {share:g}")
    forest = RandomForestRegressor(estimators.TREES, oob_score=True, random_state=0)
    kept = observations.where(_expected(forest, observations) >= share * observations.full)
    if len(kept) < 8:
        raise UserError(
            f"only {count(len(kept), 'trial')} would keep {100 * share:.0f} % of full precision's score, as a forest "
            "that has not seen them predicts: too few to rank"
        )
    return kept


def _expected(forest: RandomForestRegressor, observations: Observations) -> Floats:
    """Each trial's score as predicted by the trees that were grown without it."""
    return np.asarray(forest.fit(observations.bits, observations.score).oob_prediction_)


def by_budget(observations: Observations, budgets: Sequence[float], reach: float = 0.15) -> pd.DataFrame:
    """Consensus shares among the plans whose bpw differs from a budget by at most `reach` of it; a row per budget.

    Budgets with fewer than eight such plans, or whose plans all score the same, are left out.
    """
    rows = {}
    for budget in budgets:
        around = observations.where(np.abs(observations.bpw / budget - 1) <= reach)
        if len(around) >= 8 and np.ptp(around.score) > 0:
            fitted = estimators.fit(around.bits, around.score, shap_plans=estimators.FEW_SHAP_PLANS, trees=50)
            share = estimators.consensus(fitted)
            rows[budget] = dict(zip(observations.names, share, strict=True)) | {"trials": len(around)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*observations.names, "trials"]).rename_axis("bpw")


def without_levels(
    observations: Observations, names: Sequence[str], groups: Sequence[Sequence[int]], seed: int
) -> pd.DataFrame:
    """Rank again without the trials of one level (a component at one width): how far shares move, and who leads.

    Shares are those of forest importance alone, which is quick and agrees with the consensus on what a single level
    decides. With more than six components, only the two lowest levels of each are left out: scores collapse there.
    """

    def share(rest: Observations) -> Floats:
        # of all trials, the forest is the ranking's own, so that a change starts from a share that the reader sees
        trees = estimators.TREES if rest is observations else estimators.tree_count(40, len(observations))
        return estimators.shares(estimators.forest(estimators.fit(rest.bits, rest.score, groups, seed, trees=trees)))

    left_out = []
    for name, group in zip(names, groups, strict=True):
        for bits in np.unique(observations.bits[:, list(group)])[: 2 if len(names) > 6 else None]:
            touched = (observations.bits[:, list(group)] == bits).any(axis=1)
            rest = observations.where(~touched)
            # half of the trials at least must remain, or the ranking moves for lack of data
            if len(rest) >= max(8, len(observations) / 2) and np.ptp(rest.score) > 0:
                left_out.append((name, int(bits), int(touched.sum()), rest))
    tables = [observations, *(rest for *_, rest in left_out)]
    base, *remaining = estimators.map_in_threads(share, tables, len(observations))
    rows = []
    for (name, bits, trials, _), shares in zip(left_out, remaining, strict=True):
        most = int(np.argmax(np.abs(shares - base)))
        rows.append({
            "component": name, "bits": bits, "trials": trials, "shift": float((shares - base)[most]),
            "moves": names[most], "before": float(base[most]), "after": float(shares[most]),
            "tau": float(kendalltau(shares, base).statistic),
            "changes_first": int(np.argmax(shares)) != int(np.argmax(base)),
        })  # fmt: skip
    columns = ["component", "bits", "trials", "shift", "moves", "before", "after", "tau", "changes_first"]
    return pd.DataFrame(rows, columns=columns)


def decisive_level(levels: pd.DataFrame) -> pd.Series | None:
    """The level without which a share moves most; None if no level moves a share by MOVED points."""
    if not len(levels):
        return None
    worst = levels.iloc[int(levels["shift"].abs().argmax())]
    return worst if abs(worst["shift"]) >= MOVED else None


def width_in_words(bits: float) -> str:
    """The width of a level in words: 16 bits stand for weights that were left as they are."""
    return "native precision" if bits == 16 else f"{bits:g} bits"


def cliffs(levels: pd.DataFrame) -> list[tuple[str, int]]:
    """Components whose share comes from their lowest widths alone, each with the highest of these widths."""
    edges = []
    for name, rows in levels.groupby("component", sort=False) if len(levels) else ():
        rows = rows.sort_values("bits")
        deciding = ((rows["shift"] <= -MOVED) & (rows["moves"] == name)).cummin()  # without a gap
        # where every width decides, there is no edge to stay away from
        if deciding.any() and not deciding.all():
            edges.append((str(name), int(rows["bits"][deciding].max())))
    return edges


def interactions(fitted: estimators.Fitted, names: Sequence[str]) -> pd.DataFrame:
    """How far the joint effect of each pair of components is from the sum of the two effects, strongest pair first.

    strength: mean absolute SHAP interaction (both halves). both_low: the mean of the interaction, with its sign, over
    the plans in which both are in the lower half of their widths; negative means that together they hurt more than the
    sum says.
    """
    values, weight, plans = fitted.shap_pairs
    low = plans <= np.median(plans, axis=0)
    rows = []
    for (i, one), (j, two) in itertools.combinations(enumerate(fitted.groups), 2):
        # shap gives half of an interaction to [i, j] and half to [j, i]
        joint = 2 * values[:, list(one)][:, :, list(two)].sum(axis=(1, 2))
        both = low[:, list(one)].all(axis=1) & low[:, list(two)].all(axis=1)
        rows.append(
            {
                "a": names[i],
                "b": names[j],
                "strength": float(np.average(np.abs(joint), weights=weight)),
                "both_low": float(np.average(joint[both], weights=weight[both])) if both.any() else np.nan,
            }
        )
    pairs = pd.DataFrame(rows, columns=["a", "b", "strength", "both_low"])
    return pairs.sort_values("strength", ascending=False, ignore_index=True)


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau between the columns of a table: estimators, tasks or methods."""
    names = list(table.columns)
    tau = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for a, b in itertools.combinations(names, 2):
        both = table[[a, b]].dropna()
        tau.loc[a, b] = tau.loc[b, a] = kendalltau(both[a], both[b]).statistic if len(both) > 1 else np.nan
    return tau


def cautions(
    observations: Observations, ranking: Ranking, levels: pd.DataFrame, others: Sequence[Observations] = ()
) -> list[str]:
    """Warnings to the reader of a ranking, as sentences; `others` are the same trials' scores on other tasks."""
    warnings = []
    if (worst := decisive_level(levels)) is not None:
        first = ", and another component comes first" if worst["changes_first"] else ""
        those = "that trial" if worst["trials"] == 1 else f"those {worst['trials']:,} trials"
        warnings.append(
            f"this ranking rests on {worst['component']} at {width_in_words(worst['bits'])}: without {those} the "
            f"forest importance of {worst['moves']} goes from {worst['before']:.0f} to {worst['after']:.0f} %{first}"
        )
    if ranking.r2 < TRUSTED_R2:
        warnings.append(
            f"the forest explains little of unseen plans (cross-validated R2 {ranking.r2:.2f}): read with care"
        )
    warnings += without_effect(observations, others) + inseparable(observations)
    return warnings


def without_effect(observations: Observations, others: Sequence[Observations] = ()) -> list[str]:
    """Warn of components that, quantized alone, leave the score the same to its last digit: likely not quantized.

    One that moves the score on another task was quantized.
    """
    moving = {name for other in others for name in _that_move(other)}
    native = np.all(observations.bits == 16, axis=1)
    if not native.any():
        return []
    full = observations.score[native]
    if np.ptp(full) > 0:
        return []  # scores are noisy: an equal one would be chance
    warnings = []
    changed = observations.bits != 16
    equal = (observations.score == full[0]) & ~native
    for i, name in enumerate(observations.names):
        # trials that quantized this component alone: one equal score could be chance, and at 8 bits even several
        alone = changed[:, i] & (changed.sum(axis=1) == 1)
        if name not in moving and alone.sum() >= 2 and equal[alone].all() and observations.bits[alone, i].min() <= 6:
            warnings.append(
                f"{name} alone never moved the score, down to {observations.bits[alone, i].min():g} bits, not even "
                "in the last digit: was it quantized at all?"
            )
    return warnings


def _that_move(observations: Observations) -> set[str]:
    """Components that, quantized alone, change the score of full precision."""
    changed = observations.bits != 16
    full = observations.score[~changed.any(axis=1)]
    moved = (changed.sum(axis=1) == 1) & ~np.isin(observations.score, full) if len(full) else np.zeros(len(changed))
    return {name for i, name in enumerate(observations.names) if (moved * changed[:, i]).any()}


def inseparable(observations: Observations) -> list[str]:
    """Warn of components that had equal bits in every trial: no data can tell their importance apart."""
    alike: dict[bytes, list[str]] = {}  # by what bits a component had
    for name, bits in zip(observations.names, observations.bits.T, strict=True):
        alike.setdefault(bits.tobytes(), []).append(name)
    return [
        f"{', '.join(names[:-1])} and {names[-1]} always had the same bits: their shares cannot be told apart"
        for names in alike.values()
        if len(names) > 1
    ]
