"""Ranks the components of a study by importance: several estimators, their consensus, and bootstrap intervals."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sensitivity.analysis.importance import estimators, kept_rankings, robustness
from sensitivity.analysis.importance.estimators import CONSENSUS, ESTIMATORS, Fitted, shares
from sensitivity.analysis.importance.method_choice import METHOD, with_methods
from sensitivity.analysis.importance.types import Ranking
from sensitivity.analysis.observations import Observations, check_task, observations_of
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, check_is, check_least
from sensitivity.spec.plan import split_ending
from sensitivity.spec.sizes import codes_in_mb
from sensitivity.study.counting import count
from sensitivity.study.study import Study

Floats = np.ndarray
BOOTSTRAPS = 100  # resamples of the trials, for the intervals
RESAMPLED_TREES = 50  # of a resample's forest: with half the usual trees, intervals are slightly too wide
MIN_TRIALS = 8  # fewer trials are not ranked


@dataclass(frozen=True)
class RankOptions:
    """The arguments of `rank`, which are a part of a cached ranking's key."""

    by: str | None = None
    method: str | None = None
    near: float | None = None
    bootstraps: int = BOOTSTRAPS
    seed: int = 0
    thorough: bool = True


def rank(
    source: Study | Observations,
    task: str | None = None,
    *,
    by: str | None = None,
    method: str | None = None,
    near: float | None = None,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    thorough: bool = True,
) -> Ranking:
    """Rank the components of a study by how much of a task's score each decides.

    by: a coarser granularity than the study's own. near: use only trials that are predicted to score at least this
    share of full precision, such as 0.9, where a plan would really be used. thorough=False leaves out what only
    explains the ranking (levels, pairs, Optuna's estimators). Where plans differ in their methods too, that choice has
    a share of its own (`Ranking.choice`). The ranking of a study is cached in its folder. A table that is no study is
    ranked by way of `analysis.observations.observations_of_table`.

    Examples:
        >>> from sensitivity import rank
        >>> blame = rank(study, bootstraps=10)
        >>> sorted(blame.order)
        ['connector', 'language', 'vision']
        >>> round(blame.table["consensus"].sum())  # shares in percent
        100
    """
    check_least("bootstraps", bootstraps, 0)
    check_least("seed", seed, 0)
    options = RankOptions(by, method, near, bootstraps, seed, thorough)
    if isinstance(source, Observations):
        return _rank(source, None, options)
    check_is("source", source, Study)
    file = kept_rankings.file_of(source, check_task(source, task), options)
    if (kept := kept_rankings.read(file)) is not None:
        return Ranking.from_json(kept)
    observations = observations_of(source, task, method)
    others = []
    for other in source.tasks:
        with contextlib.suppress(UserError):  # no trial has a score of it
            others += [observations_of(source, other, method)] if other != observations.task else []
    ranking = _rank(observations, source.parts, options, others)
    kept_rankings.write(file, ranking.to_json())
    return ranking


def cached(study: Study, task: str) -> Ranking | None:
    """The cached ranking of a study's present trials by `rank` with its default arguments; None without one."""
    kept = kept_rankings.read(kept_rankings.file_of(study, task, RankOptions()))
    return None if kept is None else Ranking.from_json(kept)


def _rank(
    observations: Observations, parts: ComponentMap | None, options: RankOptions, others: Sequence[Observations] = ()
) -> Ranking:
    """Rank the components of these observations: check them, fit the forest, estimate, resample, collect warnings."""
    warnings, seed = list(observations.notes), options.seed
    if options.near is not None:
        observations = robustness.near_operating_point(observations, options.near)
    observations, dropped = _rankable(observations)
    warnings += dropped
    names, groups, granularity = grouping(observations.names, parts, options.by)
    widths, (observations, columns) = observations, with_methods(observations)
    r2 = estimators.cross_validated(observations.bits, observations.score, observations.keys, seed)
    if r2 <= 0:
        raise UserError(
            f"no ranking for '{observations.task}': the forest predicts unseen plans worse than the mean does "
            f"(cross-validated R2 {r2:.2f} over {count(len(observations), 'trial')}); measure more plans, or lower "
            "widths"
        )
    labels = (*names, METHOD) if columns else names
    fitted, table = _estimated(observations, [*groups, columns] if columns else groups, labels, options)
    choice = {str(name): float(share) for name, share in table.loc[METHOD].items()} if columns else None
    table = table.drop(index=[METHOD] if columns else [])
    fitted = replace(fitted, groups=tuple(map(tuple, groups)))  # what follows is about components
    table = table.join(_gains(fitted, names, parts, widths.names)).sort_values("consensus", ascending=False)
    not_computed = pd.DataFrame()
    ranking = Ranking(
        widths.task,
        granularity,
        len(widths),
        widths.full,
        widths.noise,
        r2,
        estimators.linear(observations.bits, observations.score),
        table,
        not_computed,
        not_computed,
        not_computed,
        tuple(warnings),
        options.method,
        options.near,
        choice,
    )
    if not options.thorough:
        return ranking
    levels = robustness.without_levels(widths, names, groups, seed)
    return replace(
        ranking,
        tau=robustness.agreement(table[list(ESTIMATORS)]),
        levels=levels,
        pairs=robustness.interactions(fitted, names),
        warnings=(*warnings, *robustness.cautions(widths, ranking, levels, others)),
    )


def _estimated(
    observations: Observations, groups: Sequence[Sequence[int]], labels: Sequence[str], options: RankOptions
) -> tuple[Fitted, pd.DataFrame]:
    """The fitted forest, and the shares of each group of columns with their intervals."""
    x, y, seed = observations.bits, observations.score, options.seed
    fitted = estimators.fit(x, y, groups, seed)
    raw = {name: ESTIMATORS[name](fitted) for name in (ESTIMATORS if options.thorough else CONSENSUS)}
    least = int(np.argmin(fitted.forest.feature_importances_))
    by_chance = estimators.chance(x, y, least, seed) if options.bootstraps else {}
    # chance is known for one column; a component of several columns gets as much for each
    sizes = np.array([len(group) for group in groups])
    floor = {name: share * sizes for name, share in by_chance.items()}
    return fitted, _table(labels, raw, bootstrap(observations, groups, options.bootstraps, seed), floor)


def rank_correlations(rankings: Mapping[str, Ranking]) -> pd.DataFrame:
    """Kendall's tau between rankings of the same components, such as those for different tasks or methods."""
    return robustness.agreement(pd.DataFrame({name: ranking.table["consensus"] for name, ranking in rankings.items()}))


def _rankable(observations: Observations) -> tuple[Observations, list[str]]:
    """Drop components that never changed, with a note for each; raise where nothing can be ranked."""
    constant = [i for i, column in enumerate(observations.bits.T) if np.ptp(column) == 0]
    notes = [f"{observations.names[i]} always had {observations.bits[0, i]:g} bits: not ranked" for i in constant]
    if len(observations) < MIN_TRIALS:
        raise UserError(
            f"{count(len(observations), 'usable trial')} for '{observations.task}': a ranking needs at least "
            f"{MIN_TRIALS}; measure more plans (sensitivity sweep)"
        )
    if len(constant) == len(observations.names):
        raise UserError("every component had the same bits in all trials: there is nothing to rank")
    if np.ptp(observations.score) == 0:
        raise UserError(
            f"every trial scored {observations.score[0]:g} on '{observations.task}': there is nothing to explain"
        )
    return observations.without([observations.names[i] for i in constant]), notes


def grouping(
    names: Sequence[str], parts: ComponentMap | None, by: str | None
) -> tuple[tuple[str, ...], list[list[int]], str]:
    """Names of the components at a coarser granularity, the columns that make up each, and the granularity's name."""
    native = parts.by if parts else "component"
    if by is None or by == native:
        return tuple(names), [[i] for i in range(len(names))], native
    if parts is None:
        raise UserError("a bare table has only its own granularity; leave out --by")
    coarse = parts.regroup(by)
    owner = {weight.name: component.name for component in coarse.components for weight in component.weights}
    columns: dict[str, list[int]] = {}
    for column, (name, ending) in enumerate(map(split_ending, names)):
        owners = {owner[weight.name] for weight in parts[name].weights}
        if len(owners) > 1:
            raise UserError(f"'{by}' is finer than this study's '{native}': {name} lies in {', '.join(sorted(owners))}")
        columns.setdefault(owners.pop() + ending, []).append(column)
    return tuple(columns), list(columns.values()), by


def bootstrap(observations: Observations, groups: Sequence[Sequence[int]], times: int, seed: int) -> dict[str, Floats]:
    """Bootstrap over trials: shares, resamples x components, by the consensus and its three estimators."""

    def once(number: int) -> Floats:
        rows = np.random.default_rng([seed, number]).integers(0, len(observations), len(observations))
        x, y = observations.bits[rows], observations.score[rows]
        trees = estimators.tree_count(RESAMPLED_TREES, len(x))
        fitted = estimators.fit(x, y, groups, number, estimators.FEW_SHAP_PLANS, trees)
        return np.stack([shares(ESTIMATORS[name](fitted)) for name in CONSENSUS])

    drawn = np.array(estimators.map_in_threads(once, range(times), len(observations)))
    drawn = drawn.reshape(times, len(CONSENSUS), len(groups))
    return {"consensus": drawn.mean(axis=1), **{name: drawn[:, i] for i, name in enumerate(CONSENSUS)}}


def _table(
    names: Sequence[str], raw: dict[str, Floats], drawn: dict[str, Floats], chance: dict[str, Floats]
) -> pd.DataFrame:
    """A row per component: shares, intervals where they were resampled, and raw values (see Ranking)."""
    share = {name: shares(values) for name, values in raw.items()}
    share = {"consensus": np.mean([share[name] for name in CONSENSUS], axis=0), **share}
    columns: dict[str, Floats] = {}
    for name, values in share.items():
        columns[name] = np.full(len(names), np.nan) if name in raw and np.isnan(raw[name]).any() else values
        if name in drawn and len(drawn[name]):
            columns[f"{name}.low"], columns[f"{name}.high"] = interval(values, drawn[name], chance[name])
    columns |= {f"{name}.raw": values for name, values in raw.items()}
    return pd.DataFrame(columns, index=pd.Index(names, name="component"))


def interval(point: Floats, drawn: Floats, chance: Floats) -> tuple[Floats, Floats]:
    """A 95 % interval: the middle of the resamples, widened to hold the estimate and to allow for fitted noise.

    A forest also fits noise with every component, and resampling does not show this. So the share that a
    shuffled column gets (`chance`) is taken off the lower end. The upper end is divided by what remains of the 100 %
    without the chance shares of all components: noise took those from the components that matter.
    """
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    noise = min(float(chance.sum()) / 100, 0.9)
    return np.maximum(np.minimum(low, point) - chance, 0), np.minimum(np.maximum(high, point) / (1 - noise), 100)


def _gains(fitted: Fitted, names: Sequence[str], parts: ComponentMap | None, columns: Sequence[str]) -> pd.DataFrame:
    """Predicted gain in score from a component's lowest to its highest width, others as in the trials; and per MB.

    The widths of activations and caches store nothing, so they have no gain per MB; nor have parts of unknown size.
    """
    rows = []
    some = fitted.x[:: 1 + len(fitted.x) // 500]  # some hundred trials are enough for a mean
    for group in fitted.groups:
        low, high = (some.copy() for _ in range(2))
        for column in group:
            low[:, column], high[:, column] = fitted.x[:, column].min(), fitted.x[:, column].max()
        gain = float(np.mean(fitted.forest.predict(high) - fitted.forest.predict(low)))
        widths = {columns[c]: float(np.ptp(fitted.x[:, c])) for c in group}
        megabytes = math.nan
        if parts is not None and parts.sized:
            megabytes = sum(codes_in_mb(parts, name, bits) for name, bits in widths.items() if name in parts.names)
        rows.append({"gain": gain, "gain_per_mb": gain / megabytes if megabytes else math.nan})
    return pd.DataFrame(rows, index=pd.Index(names, name="component"))
