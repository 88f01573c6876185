"""Priors: damages that other studies measured, as what a study expects of its components before it has scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sensitivity.analysis.allocate.by_scores import combined
from sensitivity.analysis.atlas.atlas_file import read
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.analysis.surrogate.transfer import measured_damages, transfer_damages, without_counterpart
from sensitivity.spec.plan import Scheme
from sensitivity.study.storage import expected
from sensitivity.study.study import Study


def check_priors(priors: Sequence[Path]) -> None:
    """Raise an error where a prior is neither a study that has measured enough nor an atlas."""
    for path in priors:
        _damages(path)


def expect_from(
    study: Study, priors: Sequence[Path], schemes: Sequence[Scheme], scores: Mapping[str, Expected] | None = None
) -> Path:
    """Write into a study the damages that studies, atlases and scores predict for its components, averaged."""
    scores = scores or {}
    found = [*scores.values()]
    for path in priors:
        known = _damages(path)
        # an atlas may also have studies of models with other parts; if it has no other, the first one says so
        fitting = [one for one in known if not without_counterpart(one, study.parts)] or known[:1]
        found += [transfer_damages(one, study.parts, schemes, path) for one in fitting]
    return expected.save(study.path, combined(found), ", ".join([*map(str, priors), *scores]))


def schemes_of(study: Study) -> list[Scheme]:
    """All schemes that a study measured."""
    return list(dict.fromkeys(one for trial in study.measured() for _, one in trial.plan.schemes if one is not None))


def _damages(path: Path) -> list[Expected]:
    """The damages that a study measured, or those of each study of an atlas."""
    if path.is_file():
        return [entry.damages for entry in read(path)]
    return [measured_damages(Study(path))]
