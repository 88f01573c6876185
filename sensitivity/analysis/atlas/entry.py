"""Entry: what an atlas has of one study, the damage of each component and the score at each total damage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sensitivity.analysis.observations import check_task, observations_of
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.analysis.surrogate.transfer import additive_surrogate, damages_of
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Scheme
from sensitivity.study.storage import attributions
from sensitivity.study.study import Study

ERROR = "gram"  # the score that is kept: a relative error, so that those of two models can be compared
# shares of full precision are kept within these limits, so that their loss is finite
MIN_SHARE, MAX_SHARE = 1e-3, 1 - 1e-5


class About(TypedDict):
    """What was measured on what; a study that is added again replaces the one about the same."""

    model: str
    weights: str | None  # the model's fingerprint
    task: str
    by: str
    methods: list[str]
    n: int | None
    seed: int | None


@dataclass(frozen=True)
class Entry:
    """One task of one study; scores are shares of full precision's."""

    about: About
    parameters: int
    plans: int
    full: float  # the score of full precision, as it was measured
    floor: float  # the score of a ruined model
    power: float
    noise: float | None  # standard deviation of one score
    sizes: Mapping[str, int]  # component -> elements
    damages: Expected
    errors: Expected  # relative errors of the outputs of each component's layers; may be empty

    @property
    def model(self) -> str:
        """What identifies the model: its fingerprint, or its name."""
        return self.about["weights"] or self.about["model"]

    def loss(self, damage: float) -> float:
        """The loss at a total damage, as `loss_of` counts it."""
        return loss_of(self.floor + (1 - self.floor) * math.exp(-min(damage**self.power, 700.0)))


def of_methods(entries: Sequence[Entry], schemes: Iterable[Scheme]) -> list[Entry]:
    """Of each model the entries that measured most of the methods of these schemes: others say less about them."""
    asked = {scheme.method for scheme in schemes}
    known = [len(asked & set(entry.about["methods"])) for entry in entries]
    most = {entry.model: 0 for entry in entries}
    for entry, count in zip(entries, known, strict=True):
        most[entry.model] = max(most[entry.model], count)
    return [entry for entry, count in zip(entries, known, strict=True) if count == most[entry.model]]


def loss_of(share: float) -> float:
    """The loss of a share of full precision, as log(-log(share)): on this scale models differ by about a constant."""
    return math.log(-math.log(min(max(share, MIN_SHARE), MAX_SHARE)))


def share_of(loss: float) -> float:
    """The inverse of `loss_of`."""
    return math.exp(-math.exp(min(loss, 700.0)))


def entries_of(study: Study) -> list[Entry]:
    """An entry for each task of a study; those at which full precision scores nothing are left out with a warning."""
    found = {task: _entry(study, task) for task in study.tasks}
    if lost := [task for task, entry in found.items() if entry is None]:
        said = f"full precision scored nothing on {', '.join(lost)}, so no share of it can be kept in an atlas"
        if len(lost) == len(found):
            raise UserError(said)
        warnings.warn(f"{said}: left out", Notice, stacklevel=2)
    return [entry for entry in found.values() if entry is not None]


def _entry(study: Study, task: str) -> Entry | None:
    """The entry for a task, from the surrogate of the study; its shares are of what the surrogate has at no damage.

    None if that is nothing.
    """
    observations = observations_of(study, check_task(study, task))
    model = additive_surrogate(study, task)
    full, floor = float(model.theta[0]), float(model.theta[1])
    if not full > 0:
        return None
    damages = damages_of(model)
    schemes = {name: set(row) for name, row in damages.items()}
    errors = attributions.read(study.path, ERROR, study.meta.get("fingerprint"))
    return Entry(
        about_study(study, task, {scheme.method for row in damages.values() for scheme in row}),
        study.parts.numel,
        len(set(observations.keys)),
        observations.full,
        min(floor / full, 0.99),
        model.power,
        None if observations.noise is None else observations.noise / full,
        {name: study.parts[name].numel for name in damages},
        damages,
        {name: own for name, row in errors.items() if (own := _measured(row, schemes.get(name, set())))},
    )


def about_study(study: Study, task: str, methods: Iterable[str] = ()) -> About:
    """What a study has measured of a task, by these methods."""
    return About(
        model=Path(study.parts.model).name,  # not the whole path, since an atlas is for others, too
        weights=study.meta.get("fingerprint"),
        task=task,
        by=study.parts.by,
        methods=sorted(methods),
        n=study.meta.get("n"),
        seed=study.meta.get("seed"),
    )


def _measured(scores: Mapping[Scheme, float], schemes: set[Scheme]) -> dict[Scheme, float]:
    """The scores of the schemes that a study measured."""
    return {scheme: score for scheme, score in scores.items() if scheme in schemes}
