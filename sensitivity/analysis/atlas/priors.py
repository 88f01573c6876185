"""Priors: damages that other studies measured, as what a study expects of its components before it has scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from sensitivity.analysis.allocate.by_scores import combined
from sensitivity.analysis.atlas.atlas_file import read
from sensitivity.analysis.atlas.entry import Entry, about_study, of_methods
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.analysis.surrogate.transfer import measured_damages, transfer_damages, without_counterpart
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Scheme
from sensitivity.study.storage import expected
from sensitivity.study.study import Study

NONE = Path("none")  # in place of priors: what a study expected is forgotten


def check_priors(priors: Sequence[Path], out: Path) -> None:
    """Raise an error where a prior is neither an atlas nor a study that has measured enough, or is the one at `out`."""
    study = Study.begun(out)
    for path in _named(priors):
        _damages(path, study)


def expect_from(
    study: Study, priors: Sequence[Path], schemes: Sequence[Scheme], scores: Mapping[str, Expected] | None = None
) -> None:
    """Write into a study the damages that studies, atlases and scores predict for its components, averaged.

    With NONE for a prior and without scores, it expects nothing from here on.
    """
    scores, priors = scores or {}, _named(priors)
    if not priors and not scores:
        expected.forget(study.path)
        return
    found = [*scores.values()]
    for path in priors:
        known = _damages(path, study, schemes)
        if path.is_file() and any(_is_of(entry, study) for entry in read(path)):
            told = f"{study.path} itself, whose measurements count already: that is left out as a prior"
            warnings.warn(f"{path} holds {told}", Notice, stacklevel=2)
        # an atlas may also have studies of models with other parts; if it has no other, the first one says so
        fitting = [one for one in known if not without_counterpart(one, study.parts)] or known[:1]
        found += [transfer_damages(one, study.parts, schemes, path) for one in fitting]
    expected.save(study.path, combined(found), ", ".join([*map(str, priors), *scores]))


def _named(priors: Sequence[Path]) -> Sequence[Path]:
    """The priors; nothing for NONE alone, where no folder or file has that name."""
    if NONE not in priors or NONE.exists():
        return priors
    if len(priors) > 1:
        raise UserError("--prior none stands alone: it forgets what the study expected; leave it out to name others")
    return []


def schemes_of(study: Study) -> list[Scheme]:
    """All schemes that a study measured."""
    return list(dict.fromkeys(one for trial in study.measured() for _, one in trial.plan.schemes if one is not None))


def _damages(path: Path, study: Study | None, schemes: Sequence[Scheme] = ()) -> list[Expected]:
    """The damages that a prior study measured, or those of an atlas's studies that say most about these schemes.

    Not those of `study`, which has its own.
    """
    if path.is_file():
        entries = read(path)
        others = [entry for entry in entries if study is None or not _is_of(entry, study)]
        if entries and not others:
            raise UserError(_itself(f"{path} holds nothing but this study"))
        return [entry.damages for entry in of_methods(others, schemes)]
    if study is not None and path.resolve() == study.path.resolve():
        raise UserError(_itself(f"{path} is this study"))
    return [measured_damages(Study(path))]


def _itself(what: str) -> str:
    """Why a study is no prior of its own: twice the weight of its measurements would make intervals too narrow."""
    return (
        f"{what} itself, whose measurements count already; name a --prior of another method, task, size or model, or "
        "leave it out"
    )


def _is_of(entry: Entry, study: Study) -> bool:
    """Whether an entry of an atlas is from this study, perhaps before it measured further methods."""
    about = about_study(study, entry.about["task"])
    measured = {scheme.method for scheme in schemes_of(study)}
    return (
        {**entry.about, "methods": []} == {**about, "methods": []}
        and entry.about["task"] in study.tasks
        and measured.issuperset(entry.about["methods"])
    )
