"""predict_frontier(): the plans that an atlas chooses for a new model, and the share of its score that they keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from sklearn.covariance import LedoitWolf

from sensitivity.analysis.allocate.budget import budgets
from sensitivity.analysis.allocate.by_scores import combined, optimum
from sensitivity.analysis.atlas.as_each_model import AsModel, as_each_model, mean_loss, with_errors
from sensitivity.analysis.atlas.atlas_file import DEFAULT, read
from sensitivity.analysis.atlas.entry import ERROR, Entry, share_of
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.analysis.surrogate.transfer import moved, unknown_to
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import Size, size
from sensitivity.study.scores import CONFIDENCE
from sensitivity.study.storage import paths
from sensitivity.study.storage.attributions import read as read_attributions

Floats = np.ndarray
BUDGETS = 6  # between the smallest and the largest uniform plan, where none are given
TRUSTS = (0.5, 1.0)  # how far relative errors may correct damages: the power of their ratio
MIN_MODELS = 3  # models with relative errors from which that is learned
WORTH = 0.8  # they count if models that are left out are then missed by at most this share of what they were
MAX_PLANS = 200  # measured plans; beyond, nothing is promised


@dataclass(frozen=True)
class FrontierPoint:
    """The plan for a budget, and the share of full precision that it will keep, with its 95 % interval."""

    bpw: float
    plan: Plan
    size: Size
    share: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        """The point as JSON values."""
        return {
            "budget_bpw": self.bpw,
            "plan": self.plan.to_json(),
            "describe": self.plan.describe(),
            "size": self.size.to_json(),
            "share": self.share,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True)
class PredictedFrontier:
    """What an atlas says of a model of which nothing was measured."""

    points: tuple[FrontierPoint, ...]
    models: tuple[str, ...]  # those that it learned from
    studies: int
    tasks: tuple[str, ...]
    trust: float  # how far relative errors of the new model counted: 0 not at all
    halved_by: int | None  # plans to measure until intervals are half as wide; None where that is not known
    examples: int | None  # examples that each of these plans runs on

    def to_json(self) -> dict[str, object]:
        """The prediction as JSON values."""
        own = {name: getattr(self, name) for name in ("studies", "trust", "halved_by", "examples")}
        lists = {"models": list(self.models), "tasks": list(self.tasks)}
        return {**lists, **own, "frontier": [one.to_json() for one in self.points]}


def predict_frontier(
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    atlas: Path | str = DEFAULT,
    bpw: float | Iterable[float] | None = None,
    task: str | None = None,
    attributions: Path | str | None = None,
) -> PredictedFrontier:
    """Predict the frontier of a model of which nothing was measured, from an atlas of studies of others.

    bpw: budgets; by default six, between the smallest and the largest uniform plan. task: learn from studies of this
    task alone. attributions: a folder with what `sensitivity explain` says of the new model.

    The new model is taken to be like each model of the atlas in turn; the mean is the prediction. Its interval holds
    the share of another such model: it is as wide as the atlas's own models are missed when each is left out.

    Examples:
        >>> from sensitivity import predict_frontier
        >>> found = predict_frontier(parts, [scheme("rtn", 4), scheme("rtn", 8)], "runs/atlas.parquet", bpw=14)
        >>> point = found.points[0]
        >>> point.low <= point.share <= point.high, point.size.bpw <= 14
        (True, True)
    """
    entries = _fitting(read(Path(atlas)), Path(atlas), parts, task)
    limits = _budgets(parts, schemes, bpw)
    models = as_each_model(entries, parts, schemes)
    errors = _errors(attributions, parts, schemes)
    trust = 0.0 if errors is None else _trust(models, parts, limits)
    informed = with_errors(models, errors, trust)
    plans = _plans(informed, parts, limits)
    losses = [mean_loss(informed, plan) for plan in plans]
    missed = _left_out(models, parts, limits, trust)
    spread = _spread(missed, len(limits))
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(models) - 1) * spread if len(models) > 1 else spread
    points = tuple(
        FrontierPoint(one, plan, size(parts, plan), share_of(y), share_of(y + far), share_of(y - far))
        for one, plan, y, far in zip(limits, plans, losses, reach, strict=True)
    )
    examples = [entry.about["n"] for entry in entries if entry.about["n"]]
    return PredictedFrontier(
        points,
        tuple(model.name for model in models),
        len(entries),
        tuple(dict.fromkeys(entry.about["task"] for entry in entries)),
        trust,
        _halved_by(missed, losses, [entry.noise for entry in entries if entry.noise is not None]),
        int(np.median(examples)) if examples else None,
    )


def _fitting(entries: Sequence[Entry], atlas: Path, parts: ComponentMap, task: str | None) -> list[Entry]:
    """The entries of a task that have all parts of a model; an error where there are none."""
    tasks = list(dict.fromkeys(entry.about["task"] for entry in entries))
    if task is not None and task not in tasks:
        raise unknown(f"task of {atlas}", task, tasks)
    asked = [entry for entry in entries if task in (None, entry.about["task"])]
    fitting = [entry for entry in asked if not unknown_to(entry.damages, parts)]
    if not fitting:
        missing = unknown_to(asked[0].damages, parts)[0]
        raise UserError(f"no study of {atlas} says anything about {missing}; add one of a model with the same parts")
    return fitting


def _budgets(parts: ComponentMap, schemes: Sequence[Scheme], bpw: float | Iterable[float] | None) -> list[float]:
    """The budgets in rising order."""
    if not schemes:
        raise UserError("no scheme to choose from; name some, such as scheme('gptq', 4)")
    if bpw is not None:
        return sorted({asked for _, asked in budgets(parts, bpw, None)})
    sizes = [size(parts, Plan.uniform(parts, scheme)).bpw for scheme in schemes]
    # rounded up, so that the smallest plan fits the smallest budget
    return sorted({math.ceil(100 * one) / 100 for one in np.linspace(min(sizes), max(sizes), BUDGETS)})


def _errors(folder: Path | str | None, parts: ComponentMap, schemes: Sequence[Scheme]) -> Expected | None:
    """The relative errors of the new model's components, where they are given."""
    if folder is None:
        return None
    found = read_attributions(Path(folder), ERROR)
    if not found:
        raise UserError(
            f"{paths.attributions(Path(folder))} has no score called {ERROR}; "
            f"`sensitivity explain MODEL --scores {ERROR} --check 0 --out {folder}` writes it"
        )
    return moved(found, parts, schemes, folder)


def _plans(models: Sequence[AsModel], parts: ComponentMap, limits: Sequence[float]) -> list[Plan]:
    """The best plan for each budget, by the damages of all models; a larger budget never has a worse plan."""
    damages = combined([combined(model.damages) for model in models])
    plans: list[Plan] = []
    for bpw in limits:
        plan = optimum(parts, damages, bpw)
        worse = plans and mean_loss(models, plans[-1]) <= mean_loss(models, plan)
        plans.append(plans[-1] if worse else plan)
    return plans


def _left_out(models: Sequence[AsModel], parts: ComponentMap, limits: Sequence[float], trust: float) -> Floats:
    """How far each model's loss is from what the others predict, for the plans that they choose; models x budgets."""
    missed = []
    for own in models if len(models) > 1 else ():
        others = with_errors([model for model in models if model is not own], own.own_errors, trust)
        plans = _plans(others, parts, limits)
        missed.append([own.loss(plan) - mean_loss(others, plan) for plan in plans])
    return np.array(missed).reshape(-1, len(limits))


def _trust(models: Sequence[AsModel], parts: ComponentMap, limits: Sequence[float]) -> float:
    """How far relative errors correct damages: what misses least when each model that has them is left out."""
    having = [model for model in models if model.own_errors is not None]
    if len(having) < MIN_MODELS:
        return 0.0
    missed = {trust: float(np.linalg.norm(_left_out(having, parts, limits, trust))) for trust in (0.0, *TRUSTS)}
    best = min(TRUSTS, key=missed.__getitem__)
    return best if missed[best] <= WORTH * missed[0.0] else 0.0


def _unbiased(models: int) -> float:
    """From the mean square by which models are missed that are left out, to the variance of predicting another.

    A model of variance v is missed by v (1 + 1/(J - 1)) if the mean of the others predicts it, and by v (1 + 1/J) if
    the mean of all J does.
    """
    return (models**2 - 1) / models**2


def _spread(missed: Floats, limits: int) -> Floats:
    """The standard deviation of the loss around the prediction, for each budget; infinite where it is not known."""
    if not len(missed):
        return np.full(limits, np.inf)
    return np.asarray(np.sqrt(np.mean(missed**2, axis=0) * _unbiased(len(missed))))


def _halved_by(missed: Floats, losses: Sequence[float], noises: Sequence[float]) -> int | None:
    """How many plans on the frontier must be measured until intervals are half as wide on average.

    Models that are missed at one budget are missed alike at others: their covariance says what a measurement at one
    tells about all (kriging). Each time the plan is measured that narrows the intervals most.
    """
    if not len(missed):
        return None
    steep = np.array([math.exp(y - math.exp(min(y, 700.0))) for y in losses])  # of the share, by the loss
    covariance = LedoitWolf(assume_centered=True).fit(missed).covariance_ * _unbiased(len(missed))
    covariance = covariance * np.outer(steep, steep)
    noise = float(np.median(noises)) ** 2 if noises else 0.0
    before = _mean_spread(covariance)
    for count in range(MAX_PLANS):
        if _mean_spread(covariance) <= before / 2:
            return count
        after = [covariance - np.outer(row, row) / max(row[i] + noise, 1e-300) for i, row in enumerate(covariance)]
        covariance = min(after, key=_mean_spread)
    return None


def _mean_spread(covariance: Floats) -> float:
    """The mean standard deviation; rounding errors can make a variance of nothing negative."""
    return float(np.sqrt(np.maximum(np.diag(covariance), 0.0)).mean())
