"""predict_frontier(): the plans that an atlas chooses for a new model, and the share of its score that they keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from sklearn.covariance import LedoitWolf

from sensitivity.analysis.allocate.budget import budgets_in_bits
from sensitivity.analysis.allocate.by_scores import combined, optimum
from sensitivity.analysis.atlas.as_each_model import AsModel, mean_loss, predictions_by_model, with_errors
from sensitivity.analysis.atlas.atlas_file import DEFAULT, read
from sensitivity.analysis.atlas.entry import ERROR, Entry, of_methods, share_of
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.analysis.surrogate.transfer import transfer_damages, without_counterpart
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError, check_is, each_is, shell_word, unknown
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.sizes import Size, size
from sensitivity.study.scores import CONFIDENCE
from sensitivity.study.storage import paths
from sensitivity.study.storage.attributions import read as read_attributions

Floats = np.ndarray
FACTS = ("studies", "measured", "other_methods", "trust", "halved_by", "examples")  # that are JSON values as they are
BUDGETS = 6  # between the smallest and the largest uniform plan, where none are given
TRUSTS = (0.5, 1.0)  # powers of the ratio of relative errors, by which damages may be corrected
MIN_MODELS = 3  # models with relative errors, from which the power is learned
MAX_ERROR_SHARE = 0.8  # damages are corrected if that lowers the leave-one-out error to at most this share
MAX_PLANS = 200  # plans to measure; beyond, no number is given


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
    """What an atlas says of a model, most often one of which nothing was measured."""

    points: tuple[FrontierPoint, ...]
    models: tuple[str, ...]  # of the studies that were used
    measured: bool  # whether the model itself is among them, by its name
    studies: int
    tasks: tuple[str, ...]
    other_methods: dict[str, list[str]]  # by model: the methods of its studies, where none used one that was asked for
    trust: float  # how far relative errors of the new model counted; 0 means not at all
    halved_by: int | None  # plans to measure until intervals are half as wide; None where that is not known
    examples: int | None  # examples that each of these plans runs on

    def to_json(self) -> dict[str, object]:
        """The prediction as JSON values."""
        own = {name: getattr(self, name) for name in FACTS}
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

    The prediction is the mean of what the new model would score if it were like each model of the atlas. The width of
    its interval comes from the errors of predicting each of the atlas's models from the others.

    Examples:
        >>> from sensitivity import predict_frontier
        >>> found = predict_frontier(parts, [scheme("rtn", 4), scheme("rtn", 8)], "runs/atlas.parquet", bpw=14)
        >>> point = found.points[0]
        >>> point.low <= point.share <= point.high, point.size.bpw <= 14
        (True, True)
    """
    check_is("parts", parts, ComponentMap)
    schemes = each_is("schemes", schemes, Scheme)
    entries = of_methods(_fitting(read(Path(atlas)), Path(atlas), parts, task), schemes)
    limits = _budgets(parts, schemes, bpw)
    models = predictions_by_model(entries, parts, schemes)
    errors = _errors(attributions, parts, schemes)
    trust = 0.0 if errors is None else _trust(models, parts, limits)
    informed = with_errors(models, errors, trust)
    plans = _plans(informed, parts, limits)
    losses = [mean_loss(informed, plan) for plan in plans]
    left_out = _left_out(models, parts, limits, trust)
    spread = _spread(left_out, len(limits))
    half_widths = stats.t.ppf((1 + CONFIDENCE) / 2, len(models) - 1) * spread if len(models) > 1 else spread
    points = tuple(
        FrontierPoint(one, plan, size(parts, plan), share_of(y), share_of(y + half), share_of(y - half))
        for one, plan, y, half in zip(limits, plans, losses, half_widths, strict=True)
    )
    names, asked = tuple(model.name for model in models), {scheme.method for scheme in schemes}
    examples = [entry.about["n"] for entry in entries if entry.about["n"]]
    return PredictedFrontier(
        points,
        names,
        Path(parts.model).name in names,
        len(entries),
        tuple(dict.fromkeys(entry.about["task"] for entry in entries)),
        {one.about["model"]: one.about["methods"] for one in entries if not asked.intersection(one.about["methods"])},
        trust,
        _halved_by(left_out, losses, [entry.noise for entry in entries if entry.noise is not None]),
        int(np.median(examples)) if examples else None,
    )


def _fitting(entries: Sequence[Entry], atlas: Path, parts: ComponentMap, task: str | None) -> list[Entry]:
    """The entries of a task that have all parts of a model; an error where there are none."""
    tasks = list(dict.fromkeys(entry.about["task"] for entry in entries))
    if task is not None and task not in tasks:
        raise unknown(f"task of {atlas}", task, tasks)
    asked = [entry for entry in entries if task in (None, entry.about["task"])]
    fitting = [entry for entry in asked if not without_counterpart(entry.damages, parts)]
    if not fitting:
        missing = without_counterpart(asked[0].damages, parts)[0]
        remedy = "add one of a model with the same parts"
        if parts.by not in (theirs := sorted({entry.about["by"] for entry in asked})):
            remedy = f"choose --by {' or '.join(theirs)}, as these studies are, or {remedy}"
        raise UserError(f"no study of {atlas} says anything about {missing}; {remedy}")
    return fitting


def _budgets(parts: ComponentMap, schemes: Sequence[Scheme], bpw: float | Iterable[float] | None) -> list[float]:
    """The budgets in rising order."""
    if not schemes:
        raise UserError("no scheme to choose from; name some, such as scheme('gptq', 4)")
    if bpw is not None:
        return sorted({asked for _, asked in budgets_in_bits(parts, bpw, None)})
    sizes = [size(parts, Plan.uniform(parts, scheme)).bpw for scheme in schemes]
    # rounded up, so that the smallest plan fits the smallest budget
    return sorted({math.ceil(100 * one) / 100 for one in np.linspace(min(sizes), max(sizes), BUDGETS)})


def _errors(folder: Path | str | None, parts: ComponentMap, schemes: Sequence[Scheme]) -> Expected | None:
    """The relative errors of the new model's components, where they are given."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise UserError(
            f"there is no folder {folder}; `sensitivity explain MODEL --out {shell_word(folder)}` makes one"
        )
    found = read_attributions(Path(folder), ERROR)
    if not found:
        raise UserError(
            f"{paths.attributions_file(Path(folder))} has no score called {ERROR}; "
            f"`sensitivity explain {shell_word(parts.model)} --by {parts.by} --scores {ERROR} --check 0 "
            f"--out {shell_word(folder)}` writes it"
        )
    return transfer_damages(found, parts, schemes, folder)


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
    """Leave-one-out errors, models x budgets: each model's loss for the plans of the others, minus their prediction."""
    errors = []
    for own in models if len(models) > 1 else ():
        others = with_errors([model for model in models if model is not own], own.own_errors, trust)
        plans = _plans(others, parts, limits)
        errors.append([own.loss(plan) - mean_loss(others, plan) for plan in plans])
    return np.array(errors).reshape(-1, len(limits))


def _trust(models: Sequence[AsModel], parts: ComponentMap, limits: Sequence[float]) -> float:
    """The power by which relative errors correct damages: that of the least leave-one-out error, or 0."""
    having = [model for model in models if model.own_errors is not None]
    if len(having) < MIN_MODELS:
        return 0.0
    errors = {trust: float(np.linalg.norm(_left_out(having, parts, limits, trust))) for trust in (0.0, *TRUSTS)}
    best = min(TRUSTS, key=errors.__getitem__)
    return best if errors[best] <= MAX_ERROR_SHARE * errors[0.0] else 0.0


def _unbiased(models: int) -> float:
    """The factor from the mean squared leave-one-out error to the expected squared error for a new model.

    With a variance of v between J models, the first is v (1 + 1/(J - 1)), since the mean of the others predicts each;
    the second is v (1 + 1/J), since the mean of all J predicts the new one.
    """
    return (models**2 - 1) / models**2


def _spread(errors: Floats, limits: int) -> Floats:
    """The standard deviation of the loss around the prediction, for each budget; infinite where it is not known."""
    if not len(errors):
        return np.full(limits, np.inf)
    return np.asarray(np.sqrt(np.mean(errors**2, axis=0) * _unbiased(len(errors))))


def _halved_by(errors: Floats, losses: Sequence[float], noises: Sequence[float]) -> int | None:
    """How many plans on the frontier must be measured until intervals are half as wide on average.

    Prediction errors at different budgets are correlated: their covariance says what a measurement at one budget tells
    about all (kriging). The plan to measure next is always the one that narrows intervals most.
    """
    if not len(errors):
        return None
    # how steeply the share falls with the loss
    slopes = np.array([math.exp(y - math.exp(min(y, 700.0))) for y in losses])
    covariance = LedoitWolf(assume_centered=True).fit(errors).covariance_ * _unbiased(len(errors))
    covariance = covariance * np.outer(slopes, slopes)
    noise = float(np.median(noises)) ** 2 if noises else 0.0
    before = _mean_spread(covariance)
    for count in range(MAX_PLANS):
        if _mean_spread(covariance) <= before / 2:
            return count
        after = [covariance - np.outer(row, row) / max(row[i] + noise, 1e-300) for i, row in enumerate(covariance)]
        covariance = min(after, key=_mean_spread)
    return None


def _mean_spread(covariance: Floats) -> float:
    """The mean standard deviation; rounding errors can make a variance near zero negative."""
    return float(np.sqrt(np.maximum(np.diag(covariance), 0.0)).mean())
