"""AsModel: what is predicted of a new model if it behaves like one of the atlas's models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sensitivity.analysis.atlas.entry import Entry
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.analysis.surrogate.transfer import MIN_DAMAGE, transfer_damages
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan, Scheme


@dataclass(frozen=True)
class AsStudy:
    """The damages and relative errors of one entry, transferred to the components and schemes of a new model."""

    entry: Entry
    damages: Expected
    errors: Expected | None  # None where the entry has none

    def adjusted(self, errors: Expected | None, trust: float) -> Expected:
        """The damages, times the ratio of a model's relative errors to this entry's, to the power of `trust`."""
        if errors is None or self.errors is None or trust == 0:
            return self.damages
        return {
            name: {
                scheme: damage
                * (max(errors[name][scheme], MIN_DAMAGE) / max(self.errors[name][scheme], MIN_DAMAGE)) ** trust
                for scheme, damage in row.items()
            }
            for name, row in self.damages.items()
        }


@dataclass(frozen=True)
class AsModel:
    """What the studies of one model predict; `errors` and `trust` are those of the new model."""

    studies: tuple[AsStudy, ...]
    errors: Expected | None = None
    trust: float = 0.0

    @property
    def name(self) -> str:
        """The model's name, as its first study has it."""
        return self.studies[0].entry.about["model"]

    @cached_property
    def damages(self) -> tuple[Expected, ...]:
        """The damages that each study predicts."""
        return tuple(one.adjusted(self.errors, self.trust) for one in self.studies)

    @property
    def own_errors(self) -> Expected | None:
        """The relative errors of the atlas's own model, from the first study that has them."""
        return next((one.errors for one in self.studies if one.errors is not None), None)

    def loss(self, plan: Plan) -> float:
        """The loss of a plan, as `loss_of` counts it; the mean over studies."""
        totals = [
            sum(damages[name][scheme] for name, scheme in plan.schemes if scheme is not None)
            for damages in self.damages
        ]
        return float(np.mean([one.entry.loss(total) for one, total in zip(self.studies, totals, strict=True)]))


def predictions_by_model(entries: Sequence[Entry], parts: ComponentMap, schemes: Sequence[Scheme]) -> list[AsModel]:
    """For each model of an atlas, in its order, the predictions for a new model."""
    groups: dict[str, list[AsStudy]] = {}
    for entry in entries:
        known = entry.errors.keys() == entry.damages.keys()
        own = AsStudy(
            entry,
            transfer_damages(entry.damages, parts, schemes, entry.about["model"]),
            transfer_damages(entry.errors, parts, schemes, entry.about["model"]) if known else None,
        )
        groups.setdefault(entry.model, []).append(own)
    return [AsModel(tuple(studies)) for studies in groups.values()]


def with_errors(models: Sequence[AsModel], errors: Expected | None, trust: float) -> list[AsModel]:
    """The same models, with the relative errors of the new model."""
    return [replace(model, errors=errors, trust=trust) for model in models]


def mean_loss(models: Sequence[AsModel], plan: Plan) -> float:
    """The mean over models of a plan's loss."""
    return float(np.mean([model.loss(plan) for model in models]))
