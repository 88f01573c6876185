"""Priors from other studies: what those measured is what a study expects of its components before it has scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sensitivity.analysis.allocate.by_scores import combined
from sensitivity.analysis.surrogate.transfer import measured_damages, transferred
from sensitivity.spec.plan import Scheme
from sensitivity.study.storage import expected
from sensitivity.study.study import Study


def check_priors(priors: Sequence[Path]) -> None:
    """Raise an error where a prior is no study, or one that has measured too little."""
    for path in priors:
        measured_damages(Study(path))


def expect_from(study: Study, priors: Sequence[Path], schemes: Sequence[Scheme]) -> Path:
    """Write into a study the damages that other studies predict for its components; several are averaged."""
    found = [transferred(Study(path), study.parts, schemes) for path in priors]
    return expected.save(study.path, combined(found), ", ".join(map(str, priors)))


def schemes_of(study: Study) -> list[Scheme]:
    """All schemes that a study measured."""
    return list(dict.fromkeys(one for trial in study.measured() for _, one in trial.plan.schemes if one is not None))
