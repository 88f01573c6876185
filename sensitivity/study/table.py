"""One row of a study's table: a trial's plan, size and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from sensitivity.spec.plan import Plan
from sensitivity.study.scores import Score

NATIVE = 16  # the 'bits' of a component at native precision, as an Optuna parameter and in tables


def row(
    trial: FrozenTrial, tasks: Sequence[str], delta: Callable[[Plan, str, int | None], Score | None]
) -> dict[str, Any]:
    """The row of a trial, by column.

    number, key, plan (in words), uniform, native, complete (whether it has seen all examples); bits of each component;
    bytes, bpw, bpw_codes, seconds; for each task T: T, T.se, T.low, T.high, T.n, T.nll; the paired difference to full
    precision as T.delta, T.delta.se, T.delta.low, T.delta.high; further metrics by name, such as T.BLEU-4;
    not_finite: how many examples scored 0 because their logits were NaN.
    """
    attrs = trial.user_attrs
    plan = Plan.from_json(attrs["plan"])
    found: dict[str, Any] = {
        "number": trial.number,
        "key": attrs["key"],
        "plan": plan.describe(),
        "uniform": plan.is_uniform,
        "native": plan.is_native,
        "complete": trial.state == TrialState.COMPLETE,
        **plan.bits(NATIVE),
        **attrs["size"],
        "seconds": attrs.get("seconds", np.nan),
        **({"not_finite": lost} if (lost := attrs.get("not_finite")) else {}),
    }
    for task in tasks:
        score = attrs["scores"].get(task)
        if score is None:
            continue
        found |= {task: score["mean"], f"{task}.nll": score.get("nll")}
        found |= {f"{task}.{name}": score.get(name) for name in ("se", "low", "high", "n")}
        found |= {f"{task}.{name}": value for name, value in attrs.get("metrics", {}).get(task, {}).items()}
        if apart := delta(plan, task, score.get("n")):
            found |= {f"{task}.delta": apart.mean, f"{task}.delta.se": apart.se}
            found |= {f"{task}.delta.low": apart.low, f"{task}.delta.high": apart.high}
    return found
