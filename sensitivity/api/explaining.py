"""Explains the damage of a plan: how much comes from each component, modality, image region and token."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from sensitivity.analysis.comparing.sides import plan_of
from sensitivity.analysis.failures.damage_places import id_in_task
from sensitivity.analysis.failures.gallery import changed
from sensitivity.api.sweeping import CACHE_GB, with_calibration
from sensitivity.measure.attribution.blame import Blame, blame_of
from sensitivity.measure.attribution.boxes import NUMBERS, mean_shifts, tokens_of, writes_boxes
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.gradients.backward import Counted, in_rows_that_fit
from sensitivity.measure.gradients.path_integral import MAX_PASSES, TOLERANCE, PathIntegral, integrate_path
from sensitivity.measure.passes.token_batches import answer_batches
from sensitivity.models.processors import square_seen
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.files import finite, write_atomically
from sensitivity.spec.plan import Plan
from sensitivity.study.examples.questions import tasks_of
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.table import missing
from sensitivity.tasks.table import task as find_task

# of each number of a box: a plan makes some tokens likelier and others less so, and what is left of that is small
NUMBER_TOLERANCE, NUMBER_PASSES = 0.05, 18


class DrawnExamples(TypedDict):
    """Where a task's examples were drawn from, so that they can be drawn again."""

    task: str
    name: str  # of the task, in the study
    split: str
    n: int
    seed: int


@dataclass(frozen=True)
class MovedNumber:
    """What a plan does to one number of a task's boxes: how far it moves, and where the loss of its tokens rises."""

    moved: float  # mean distance from full precision's number over the study's examples; NaN where no answer is a box
    integral: PathIntegral  # of the loss of the tokens that write this number
    blame: Blame


@dataclass(frozen=True)
class Explanation:
    """Where a plan's damage comes from: the change of the loss on some examples, divided among its causes."""

    plan: Plan
    integral: PathIntegral
    blame: Blame
    data: tuple[DrawnExamples, ...]
    examples: tuple[str, ...]  # the name of each example (see `names_of`), by its number in `blame`
    questions: Mapping[str, tuple[str, ...]]  # name -> the text of each token of the question
    square_seen: tuple[str, float] | None  # of each image, as `models.processors.square_seen` says
    boxes: Mapping[str, MovedNumber] = field(default_factory=dict)  # by number of a box, where answers are boxes

    @property
    def of_failures(self) -> bool:
        """Whether the examples are those that the plan answered worse, instead of calibration data."""
        return any(source["split"] == "evaluation" for source in self.data)

    def to_json(self) -> dict[str, object]:
        """The explanation as JSON values; regions are rows of patches, for each example."""
        mean = 1 / len(self.examples)
        return {
            "plan": self.plan.to_json(),
            "key": self.plan.key,
            "describe": self.plan.describe(),
            "examples": len(self.examples),
            "loss": {"before": self.integral.before * mean, "after": self.integral.after * mean},
            "change": self.integral.change * mean,
            "missing": self.integral.missing,
            "backward_passes": self.integral.passes,
            "components": {name: value * mean for name, value in self.blame.components.items()},
            "modalities": {name: value * mean for name, value in self.blame.modalities.items()},
            "boxes": {
                name: {
                    "moved": one.moved,
                    "change": one.integral.change * mean,
                    "missing": one.integral.missing,
                    "components": {part: value * mean for part, value in one.blame.components.items()},
                    "modalities": {part: value * mean for part, value in one.blame.modalities.items()},
                }
                for name, one in self.boxes.items()
            },
            "regions": {self.examples[i]: grid.tolist() for i, grid in self.blame.regions.items()},
            "questions": {
                self.examples[i]: [
                    [*pair] for pair in zip(self.questions[self.examples[i]], values.tolist(), strict=True)
                ]
                for i, values in self.blame.prompts.items()
            },
            "square_seen": self.square_seen,
            "data": list(self.data),
        }


def plan_to_explain(study: Study, wanted: str) -> Plan:
    """The measured plan that a number or the beginning of a key names; it may be one of the verification."""
    plan = plan_of(study, wanted)[1]
    if plan.is_native:
        raise UserError("full precision has no damage to explain; choose a plan that quantizes something")
    return plan


def tasks_to_explain(study: Study, asked: Sequence[str] = ()) -> list[str]:
    """The names of tasks that a study measured: those asked for, or all; an error for others or without answers.

    Tasks on which full precision scores 0 are left out, since no plan can damage that; an error if none is left.
    """
    measured = list(study.meta["tasks"])
    # a task goes by the name in the study's tables, or by what was typed for the sweep
    typed = dict(zip(study.tasks, measured, strict=True)) if len(study.tasks) == len(measured) else {}
    names = [typed.get(name, name) for name in asked] or measured
    tasks = [_task_of(study, name) for name in names]
    if other := [name for name, task in zip(names, tasks, strict=True) if task.name not in study.tasks]:
        raise UserError(f"{study.path} has not measured {other[0]}; choose from {', '.join(study.meta['tasks'])}")
    ranked = {name: task.gallery is not None for name, task in zip(names, tasks, strict=True)}
    if any(ranked.values()):
        answered = [name for name in names if not ranked[name]]
        remedy = f"; leave it out: --task {','.join(answered)}" if answered else ""
        why = "ranks images and captions, and has no answers in words whose loss could be divided among parts"
        raise UserError(f"{next(name for name in names if ranked[name])} {why}{remedy}")
    native = next((trial.scores for trial in study.measured() if trial.plan.is_native), {})
    without = [one.name for one in tasks if native.get(one.name, {"mean": math.nan})["mean"] == 0]
    said = f"full precision scores 0 on {' and '.join(without)}, so that no plan damages it"
    if len(without) == len(tasks):
        raise UserError(f"{said}: there is nothing to explain")
    if without:
        warnings.warn(f"{said}: left out", Notice, stacklevel=2)
    return [name for name, task in zip(names, tasks, strict=True) if task.name not in without]


def _task_of(study: Study, name: str) -> Task:
    """A task with a single example; an error where the data that a study was measured on are no longer there."""
    try:
        return find_task(name, n=1)
    except UserError as error:
        if name not in study.meta["tasks"]:
            raise
        gone = f"{place} is not there" if (place := missing([name])) else str(error)
        raise UserError(
            f"no plan can be explained on {name}, on which {study.path} was measured: {gone}; put its data back"
        ) from error


def explain_plan(
    vlm: VLM,
    study: Study,
    plan: Plan,
    n: int,
    tasks: Sequence[str] = (),
    cache_gb: float = CACHE_GB,
    failures: bool = False,
) -> Explanation:
    """Divide what a plan does to the loss among components, modalities, regions of images and tokens of questions.

    The loss is that of the right answers to n calibration examples or, with `failures`, to the n evaluation examples
    whose scores the plan lowers most.
    """
    study.check_model(vlm.name, vlm.fingerprint)
    names = tasks_to_explain(study, tasks)
    _, statistics = with_calibration(vlm, study.parts, plan.distinct_schemes, study.meta["tasks"], cache_gb=cache_gb)
    changes = plan_changes(vlm.model, study.parts, plan, statistics)
    data = _failing_tasks(study, plan, names, n) if failures else calibration_examples(names, n, study.meta["seed"])

    def integrated(name: str, tolerance: float, passes: int, counted: Counted | None = None) -> PathIntegral:
        return in_rows_that_fit(
            vlm,
            lambda rows: answer_batches(vlm, data, rows),
            lambda again: integrate_path(vlm, study.parts, changes, again, tolerance, passes, counted, name),
        )

    integral = integrated("loss of answers", TOLERANCE, MAX_PASSES)
    _check_precision(integral, vlm)
    ids = names_of([(task.name, example.id) for task in data for example in task.examples])
    boxes: dict[str, MovedNumber] = {}
    if writes_boxes(data):
        distances = distances_in(study, plan, [task.name for task in data])
        for number, name in enumerate(NUMBERS):
            counted = partial(tokens_of, vlm, number)
            of_number = integrated(f"loss of '{name}' in boxes", NUMBER_TOLERANCE, NUMBER_PASSES, counted)
            divided = blame_of(study.parts, vlm.family, of_number)
            boxes[name] = MovedNumber(distances.get(name, math.nan), of_number, divided)
    split, seed = "evaluation" if failures else "calibration", study.meta["seed"]
    counts = [study.meta["n"] if failures else len(task.examples) for task in data]
    drawn = tuple(
        DrawnExamples(task=name, name=task.name, split=split, n=count, seed=seed)
        for task, name, count in zip(data, _requested_names(data, names), counts, strict=True)
    )
    questions = {ids[number]: _pieces(vlm, tokens) for number, tokens in integral.prompts.items()}
    divided = blame_of(study.parts, vlm.family, integral)
    return Explanation(plan, integral, divided, drawn, ids, questions, square_seen(vlm.processor), boxes)


def _check_precision(integral: PathIntegral, vlm: VLM) -> None:
    """Raise an error if the change of the loss is not finite; warn if the terms do not add up to it."""
    if not math.isfinite(integral.change):
        raise UserError("the loss of this plan is NaN or infinite; run the model in float32 (--dtype fp32)")
    if integral.missing > TOLERANCE:
        warnings.warn(
            f"after {integral.passes} backward passes the terms miss {100 * integral.missing:.1f} % of the change of "
            "the loss"
            f"{'' if vlm.model.dtype == torch.float32 else '; --dtype fp32 is more precise'}",
            Notice,
            stacklevel=3,
        )


def _failing_tasks(study: Study, plan: Plan, names: Sequence[str], n: int) -> list[Task]:
    """The tasks, with only the n examples whose scores a plan lowers most."""
    asked = {find_task(name, n=1).name for name in names}
    worse = [one for one in changed(study, plan) if one.cost > 0 and one.task in asked]
    if not worse:
        raise UserError(f"no answer of the plan {plan.describe()} is worse than full precision's: nothing failed")
    chosen = {(one.task, one.example) for one in worse[:n]}
    failing = []
    for task in tasks_of(study.meta):
        if examples := tuple(example for example in task.examples if (task.name, example.id) in chosen):
            failing.append(replace(task, examples=examples))
    if not failing:
        raise UserError(f"the data of {', '.join(names)} are not where they were, or were changed: nothing can be run")
    return failing


def _requested_names(data: Sequence[Task], names: Sequence[str]) -> list[str]:
    """The name by which each task was requested."""
    return [next(name for name in names if find_task(name, n=1).name == task.name) for task in data]


def _pieces(vlm: VLM, tokens: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds to those before it."""
    so_far = [vlm.processor.tokenizer.decode(tokens[:end]) for end in range(len(tokens) + 1)]
    return tuple(after[len(before) :] for before, after in itertools.pairwise(so_far))


def names_of(examples: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A name for each example of a task: its id, with the task where another task has the same, as with lines."""
    repeated = Counter(example for _, example in examples)
    return tuple(id_in_task(example, task) if repeated[example] > 1 else example for task, example in examples)


def distances_in(study: Study, plan: Plan, tasks: Sequence[str]) -> dict[str, float]:
    """How far a plan moves each number of the boxes in the answers to the study's examples."""
    before, after = (study.examples(one) for one in (study.native, plan))
    if before is None or after is None:
        return {}
    answers = []
    for frame in (before, after):
        rows = frame[frame["task"].isin(tasks)]
        answers.append(dict(zip(zip(rows["task"], rows["example"], strict=True), rows["answer"], strict=True)))
    return mean_shifts(*answers)


def save_explanation(study: Study, explanation: Explanation, tasks: Sequence[str] = ()) -> Path:
    """Write an explanation into the study's folder; `tasks` are those that were asked for, by default all."""
    asked = [name for name in study.tasks if name in {find_task(one, n=1).name for one in tasks}]
    of = () if len(asked) == len(study.tasks) else asked
    file = paths.explanation_file(study.path, explanation.plan.key, explanation.of_failures, of)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(finite(explanation.to_json()), indent=1).encode())
    return file
