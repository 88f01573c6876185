"""Finds causes of failures: runs a plan with one part at a time at full precision, on the failed examples only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd

from sensitivity.analysis.failures.causes import measured_answers, next_part, put_back
from sensitivity.analysis.failures.changes import Change
from sensitivity.api.sweeping import with_calibration
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.loop import MEMORY_GB, Step
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import GB
from sensitivity.study import answers
from sensitivity.study.examples.questions import tasks_of
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Task


def begin_causes(vlm: VLM, study: Study, plan: Plan, failed: Sequence[Change]) -> Iterator[Step]:
    """An iterator that measures which part mends each of these examples: each step runs one part at full precision.

    The plan with the cheapest part put back runs on all of them, and each further one on those that are not mended
    yet. The answers are stored in the study, and none is computed twice; `causes.cause` reads them.
    """
    study.check_model(vlm.name, vlm.fingerprint)
    tasks = _tasks(study, failed)
    _, statistics = with_calibration(vlm, study.parts, plan.distinct_schemes, study.meta["tasks"])
    # a weight is quantized once, for all parts that are put back
    codes = WeightCodes(int(MEMORY_GB * GB / 2), vlm.model)
    done, number_of_parts = 0, len(put_back(study, plan))
    for number in range(number_of_parts):
        restored = put_back(study, plan)  # again, since it reads what the last step measured
        chosen = {(one.task, one.example) for one in failed if next_part(one, restored) is restored[number]}
        if chosen:
            began = time.perf_counter()
            with quantized(vlm.model, study.parts, restored[number].plan, codes, statistics):
                frames = [pd.DataFrame(evaluate(vlm, some, plain=plan.prunes)) for some in _with_only(chosen, tasks)]
            _store(study, restored[number].plan, frames)
            done, left = done + len(chosen), len(chosen) * (number_of_parts - number - 1)
            seconds = time.perf_counter() - began
            yield Step(restored[number].plan, {}, seconds, True, done, left, len(failed), len(chosen))


def _tasks(study: Study, failed: Sequence[Change]) -> list[Task]:
    """The tasks whose examples failed, if their data are still those that were measured."""
    known = {task.name: task for task in tasks_of(study.meta)}
    for name in dict.fromkeys(change.task for change in failed):
        if name not in known:
            raise UserError(f"the data of {name} are not where they were, or were changed: nothing can be run on them")
        if known[name].gallery:
            raise UserError(f"{name} ranks each image among all others: no single one can be run")
    return list(known.values())


def _with_only(chosen: set[tuple[str, str]], tasks: Sequence[Task]) -> Iterator[Task]:
    """The tasks, with only the chosen examples."""
    for task in tasks:
        if examples := tuple(example for example in task.examples if (task.name, example.id) in chosen):
            yield replace(task, examples=examples)


def _store(study: Study, plan: Plan, frames: Sequence[pd.DataFrame]) -> None:
    """Store the answers, together with stored answers to other examples."""
    before = measured_answers(study, plan)
    every = pd.concat([*([] if before is None else [before]), *frames], ignore_index=True)
    answers.write(paths.put_back_file(study.path, plan.key), every.drop_duplicates(["task", "example"], keep="last"))
