"""Checks that a study's plans share one calibration: those of two cannot be verified, or told apart, together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sensitivity.analysis.atlas.priors import schemes_of
from sensitivity.api.sweeping import path_for
from sensitivity.measure.calibrate.calibration import calibration_examples, calibration_facts
from sensitivity.quantize.methods import needs_data
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme
from sensitivity.study.identity import another_study
from sensitivity.study.storage import attributions, paths
from sensitivity.study.study import Study

# what schemes record of their calibration -> the flag that sets it; the seed is compared as that of the whole study
FLAGS = {"calibration": "calibration", "examples": "calibration-n", "path": "path"}


def check_calibration(
    out: Path,
    schemes: Sequence[Scheme],
    tasks: Sequence[str],
    n: int,
    seed: int,
    path: str | None = None,
    verifies: bool = False,
) -> None:
    """Raise an error where what a folder holds was calibrated otherwise than these schemes will be.

    A study made before this was checked may hold several calibrations; each of them is taken. Scores that `explain`
    stored count where no plan was measured yet. With `verifies`, schemes count that need no calibration themselves:
    what is calibrated also serves to verify plans that the study holds.
    """
    needing = [one for one in schemes if needs_data(one)]
    if not needing and not verifies:
        return
    studies = [Study.begun(folder) for folder in (out, paths.verification_folder(out))]
    measured = _calibrations([one for study in studies if study for one in schemes_of(study)])
    known = measured or _calibrations(attributions.schemes(out))
    if not known:
        return
    facts = calibration_facts(tasks, calibration_examples(tasks, n, seed), seed, path_for(needing, path))
    ours = tuple(facts[name] for name in FLAGS)
    if ours in known:
        return
    there, here, flag = next(
        (tuple(dict.fromkeys(one[i] for one in known)), ours[i], flag)
        for i, flag in enumerate(FLAGS.values())
        if ours[i] != known[0][i]
    )
    why = f"{flag}: there {' and '.join(map(str, there))}, here {here}"
    if measured:
        raise another_study(out, why)
    raise UserError(f"{paths.attributions_file(out)} has scores of another calibration ({why}); choose another --out")


def _calibrations(schemes: Sequence[Scheme]) -> list[tuple[object, ...]]:
    """The distinct calibrations that schemes record."""
    recorded = [tuple(one.get(name) for name in FLAGS) for one in schemes if one.get("examples") is not None]
    return list(dict.fromkeys(recorded))
