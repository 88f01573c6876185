"""What `plan` says of a search whose scores may have misled it, and how to go on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sensitivity.analysis.allocate.knapsack import Knapsack
from sensitivity.analysis.recommending.request import PlanRequest
from sensitivity.api.planning import ENOUGH, kept_shares
from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.spec.errors import Notice
from sensitivity.spec.runtimes.table import files_of
from sensitivity.study.study import Study

MORE = 40  # trials that are advised where scores may mislead; beyond, a sweep is
EASIER = 0.3  # a calibration loss below this share of the evaluation loss gives a warning


def warn_if_scores_misjudge(study: Study, request: PlanRequest, trials: int) -> None:
    """Warn if all trials are used up, and the best measured plan of a budget still loses much."""
    ran = len(study.trials())  # more than `trials` where a sweep has added to the study
    if ran < trials:
        return
    knapsack = Knapsack.of(study, list(request.weights), files_of(request.runtime))
    kept = kept_shares(study, request, knapsack)
    lost = [(bpw, max(one.values())) for bpw, one in zip(request.bpw, kept, strict=True) if one]
    if lost := [(bpw, share) for bpw, share in lost if share < ENOUGH]:
        which = ", ".join(f"{100 * share:.0f} % at {bpw:g} bpw" for bpw, share in lost)
        further = f"--trials {MORE}"
        if ran >= MORE:
            further = f"`sensitivity sweep` with the same --out, --by and --n {study.meta['n']}"
        warnings.warn(
            f"the {ran} measured plans are believed to keep little of full precision (at most {which}): scores from "
            f"calibration say little about plans that lose so much, and measurements find better ones; {further} goes "
            "on from here",
            Notice,
            stacklevel=2,
        )


def warn_if_calibrated_elsewhere(data: Sequence[str], tasks: Sequence[str], trials: int) -> None:
    """Warn where scores are of other data than those of the tasks, and few trials had to make up for that."""
    missing = [name for name in tasks if name not in data]
    if missing and trials < MORE:
        warnings.warn(
            f"scores were calibrated on {' and '.join(data)}, not on {' and '.join(missing)}, and may misjudge which "
            f"parts matter there, most at small budgets; --trials {MORE} measures more plans, and goes on from here",
            Notice,
            stacklevel=2,
        )


def warn_if_calibration_is_easier(given: Calibrated, study: Study) -> None:
    """Warn if the loss on calibration data is far below the loss on evaluation data: scores then say little."""
    if (ours := given.loss) is None:
        return
    native = study.examples(study.native)
    theirs = float("nan") if native is None else float(native["nll"].mean())
    if ours < EASIER * theirs:
        warnings.warn(
            f"the loss on calibration data is {ours:.4f}, and {theirs:.4f} on evaluation data: either the model was "
            "trained on the former, or they hold few of the examples that it gets wrong; gradients there say little; "
            "calibrate on more (--calibration-n) or on other data (--calibration)",
            Notice,
            stacklevel=2,
        )
