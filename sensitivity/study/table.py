"""One row of a study's table: a trial's plan, size and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from optuna.trial import TrialState

from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.examples.answer_counts import AnswerCounts
from sensitivity.study.scores import Score
from sensitivity.study.trial import NATIVE, Trial

# columns that no task may be called
RESERVED = {"number", "key", "plan", "uniform", "native", "complete", "bytes", "bpw", "bpw_codes", "format", "seconds"}
RESERVED |= {"not_finite", "cache_bits"}


def check_task_names(tasks: Sequence[str], parts: ComponentMap) -> None:
    """Raise an error for a task whose column would be that of something else."""
    for name in tasks:
        if name in RESERVED or name in parts.names or any(name.startswith(f"{other}.") for other in tasks):
            raise UserError(
                f"a task cannot be called {name}: the study's table has another column of that name; rename the file"
            )


def row(
    trial: Trial,
    parts: ComponentMap,
    tasks: Sequence[str],
    difference: Callable[[Plan, str, int | None], Score | None],
    counts: Callable[[Plan, str, int | None], AnswerCounts | None],
) -> dict[str, object]:
    """The row of a trial, by column.

    number, key, plan (in words), uniform, native, complete (whether it has seen all examples); bits of each component;
    COMPONENT.activations and COMPONENT.cache where they are rounded; bytes, bpw, bpw_codes, cache_bits, and the format
    in whose files they are counted, if not as plans count them; seconds; for each task T: T, T.se, T.low, T.high, T.n,
    T.n_images (by which T.se is clustered), T.nll; T.repetitions, of how many rows of an imported table T is the mean,
    where it has several; the paired difference to full precision as T.delta, T.delta.se,
    T.delta.low, T.delta.high; counts of answers as T.to_wrong, T.to_right, T.empty, T.cut, T.malformed (see
    AnswerCounts); further metrics by name, such as T.BLEU-4; not_finite: how many examples scored 0 because their
    logits were NaN.
    """
    columns: dict[str, object] = {
        "number": trial.number,
        "key": trial.key,
        "plan": trial.plan.describe(),
        "uniform": trial.plan.is_uniform_in(parts),
        "native": trial.plan.is_native,
        "complete": trial.state == TrialState.COMPLETE,
        **trial.plan.bits(NATIVE),
        **trial.plan.rounded_bits(),
        **(trial.size or {}),
        **({} if parts.sized else {"bytes": np.nan}),  # of components whose sizes are not known, only widths are
        "seconds": np.nan if trial.seconds is None else trial.seconds,
        **({"not_finite": trial.not_finite} if trial.not_finite else {}),
    }
    for task in tasks:
        score = trial.scores.get(task)
        if score is None:
            continue
        columns |= {task: score["mean"], f"{task}.nll": score.get("nll")}
        columns |= {f"{task}.{name}": score.get(name) for name in ("se", "low", "high", "n")}
        columns |= {f"{task}.n_images": score.get("clusters")}
        if "repetitions" in score:
            columns[f"{task}.repetitions"] = score["repetitions"]
        columns |= {f"{task}.{name}": value for name, value in trial.metrics.get(task, {}).items()}
        if delta := difference(trial.plan, task, score.get("n")):
            columns |= {f"{task}.delta": delta.mean, f"{task}.delta.se": delta.se}
            columns |= {f"{task}.delta.low": delta.low, f"{task}.delta.high": delta.high}
        if counted := counts(trial.plan, task, score.get("n")):
            known = {name: value for name, value in counted.to_json().items() if value is not None}
            columns |= {f"{task}.{name}": value for name, value in known.items()}
    return columns
