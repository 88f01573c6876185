"""Scores of components as a file: which scores a task allows, how well they agree with a study, and writing them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sensitivity.analysis.surrogate.score_agreement import ScoreAgreement, agreement_of_scores
from sensitivity.measure.attribution.checks import Checks
from sensitivity.measure.attribution.scores import SCORES, WITH_ANSWERS, Attribution
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.files import finite, new_folder, write_atomically
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Task

VERSION = 1
TITLE = "attributions"  # the title by which a file is known to be ours


def check_scores_apply(tasks: Sequence[Task], names: Sequence[str] = WITH_ANSWERS) -> None:
    """Raise an error where a score needs the loss of right answers, and a task has none."""
    for name in names:
        if name not in SCORES:
            raise unknown("score", name, SCORES)
    searched = [task.name for task in tasks if task.gallery]
    if searched and (needing := [name for name in names if name in WITH_ANSWERS]):
        raise UserError(
            f"{searched[0]} has no answers in words to take a loss of, which {', '.join(needing)} would need; "
            "choose a task with answers, or --scores weight,gram"
        )


def study_beside(out: Path, vlm: VLM, names: Sequence[str]) -> Study | None:
    """The study in the folder of the scores, if it holds one; an error if that is about another model or components."""
    if not paths.is_study(out):
        return None
    study = Study(out)
    if "imported" not in study.meta:  # whose table says of its model no more than a name
        study.check_model(vlm.name, vlm.fingerprint)
    if study.parts.names != tuple(names):
        raise UserError(f"the study in {out} has other components than --by gives; choose another --out")
    return study


def agreements(study: Study | None, scores: Sequence[Attribution]) -> dict[str, ScoreAgreement | str]:
    """How well each score predicts a study's measured plans, or a sentence that says why that is not known."""
    return {} if study is None else {one.name: agreement_of_scores(study, one.scores) for one in scores}


def check_writable(out: Path) -> None:
    """Raise an error if the attributions would replace a file that we did not write."""
    file = paths.attributions_file(out)
    try:
        ours = not file.exists() or json.loads(file.read_text(encoding="utf-8"))["title"] == TITLE
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{file} was not written by `sensitivity explain`, and is not replaced; choose another --out")


def attributions_json(
    vlm: VLM,
    scores: Sequence[Attribution],
    measured: Mapping[str, ScoreAgreement | str],
    checks: Checks | None = None,
) -> dict[str, object]:
    """Attributions as JSON values: for each score its cost, its agreement with measured plans, and its values."""
    return {
        "title": TITLE,
        "version": VERSION,
        "model": vlm.name,
        "fingerprint": vlm.fingerprint,
        "scores": {
            one.name: {
                "cpu_seconds": one.seconds,
                "passes": one.seconds / checks.pass_seconds if checks else None,
                "check": checks.by_score[one.name].to_json() if checks and checks.by_score else None,
                "measured": found.to_json() if isinstance(found := measured.get(one.name), ScoreAgreement) else None,
                "values": [
                    {"component": name, "scheme": scheme.to_json(), "score": value}
                    for name, row in one.scores.items()
                    for scheme, value in row.items()
                ],
            }
            for one in scores
        },
    }


def save_attributions(out: Path, content: Mapping[str, object]) -> Path:
    """Write attributions into a folder, which is made if it is missing."""
    check_writable(out)
    with new_folder(out):
        write_atomically(paths.attributions_file(out), json.dumps(finite(dict(content)), indent=1).encode())
    return paths.attributions_file(out)
