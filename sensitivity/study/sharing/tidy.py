"""A study as tidy tables: one row per plan and task, or one per plan and example."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import split_ending
from sensitivity.study.examples.questions import read_questions
from sensitivity.study.study import Study

# the columns of a task T in a study's table, without their prefix `T.`
SCORES = (
    "se", "low", "high", "n", "n_images", "repetitions", "nll", "delta", "delta.se", "delta.low", "delta.high",
    "to_wrong", "to_right", "empty", "cut", "malformed",
)  # fmt: skip
PLAN_COLUMNS = ("key", "plan", "uniform", "native", "complete")
SIZE_COLUMNS = ("bytes", "bpw", "bpw_codes")
MEANINGS = {
    "model": "the model",
    "trial": "number of the trial in the study",
    "key": "hash of the plan: the same plan has the same key in every study",
    "plan": "the plan in words",
    "scheme": "the plan as JSON: component to scheme, or null for native precision",
    "methods": "the quantization methods of the plan, separated by commas, or native",
    "uniform": "whether all components have one scheme",
    "native": "whether nothing is quantized",
    "complete": "whether the plan has seen all examples",
    "bits.NAME": "bits of a component, or of its NAME.activations or NAME.cache; 16 is native precision",
    "bytes": "bytes of all that is stored; empty where the sizes of the components are not known",
    "bpw": "bits per weight, counting all that is stored",
    "bpw_codes": "bits per weight of codes alone, the convention of papers",
    "cache_bits": "bits of all keys and values of one token, where the plan rounds some",
    "seconds": "how long the plan ran",
    "task": "the task",
    "score": "the score: its mean over examples, or of one example",
    "se": "standard error of the score, clustered by image",
    "low": "lower end of the 95 % interval",
    "high": "upper end of the 95 % interval",
    "n": "number of examples",
    "n_images": "number of images that they are on, by which the standard error is clustered",
    "repetitions": "of how many rows of an imported table the score is the mean, where the plan has several",
    "nll": "negative log-likelihood per token of the right answer",
    "delta": "difference to full precision, paired on the same examples",
    "delta.se": "its standard error",
    "delta.low": "lower end of its 95 % interval",
    "delta.high": "upper end of its 95 % interval",
    "to_wrong": "examples that score lower than under full precision (right to wrong, where scores are 0 or 1)",
    "to_right": "examples that score higher than under full precision",
    "empty": "empty answers",
    "cut": "answers that reached the largest number of tokens",
    "malformed": "answers without what the score reads, such as a box",
    "metric.NAME": "a further metric of the task",
    "example": "id of the example",
    "cluster": "examples of one cluster share an image",
    "kind": "kind of the question",
    "answer": "the answer that was given; it ends with … where it could no longer be right",
    "question": "what was asked",
    "right": "the right answers, one a line",
}


def trials(study: Study) -> pd.DataFrame:
    """One row per measured plan and task."""
    table = study.table()
    if not len(table):
        raise UserError(f"no trial of {study.path} is finished yet: there is nothing to write")
    plans = {trial.number: trial.plan for trial in study.measured()}
    shared = pd.DataFrame({"model": study.parts.model, "trial": table["number"]})
    for name in PLAN_COLUMNS:
        shared[name] = table[name]
    schemes = [plans[number] for number in table["number"]]
    shared.insert(4, "scheme", [plan.dumps() for plan in schemes])
    shared.insert(
        5, "methods", [",".join(sorted({s.method for _, s in plan.schemes if s})) or "native" for plan in schemes]
    )
    for name in (*study.parts.names, *(column for column in table if split_ending(column)[1])):
        shared[f"bits.{name}"] = table[name]
    for name in (*SIZE_COLUMNS, *(["cache_bits"] if "cache_bits" in table else []), "seconds"):
        shared[name] = table.get(name)
    frames = [_of_task(shared, table, task) for task in study.tasks if task in table]
    return pd.concat(frames, ignore_index=True).sort_values(["trial", "task"], kind="stable", ignore_index=True)


def _of_task(shared: pd.DataFrame, table: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows of one task, without its name in the columns."""
    scores = {name: table[f"{task}.{name}"] for name in SCORES if f"{task}.{name}" in table}
    metrics = {
        f"metric.{column.removeprefix(f'{task}.')}": table[column]
        for column in table
        if column.startswith(f"{task}.") and column.removeprefix(f"{task}.") not in SCORES
    }
    rows = shared.assign(task=task, score=table[task]).assign(**scores, **metrics)
    return rows[rows["score"].notna()]


def rows_of_examples(study: Study) -> Iterator[pd.DataFrame]:
    """One row per plan and example: a frame for each plan, since all of them together may not fit in memory."""
    asked, has_answers = read_questions(study.path, study.meta), False
    for trial in study.measured():
        rows = study.examples(trial.plan)
        if rows is None:
            continue
        has_answers = True
        about = [asked.get((task, example)) for task, example in zip(rows["task"], rows["example"], strict=True)]
        rows = rows.assign(
            question=[one and one.prompt for one in about], right=[one and "\n".join(one.answers) for one in about]
        )
        facts = {"model": study.parts.model, "trial": trial.number, "key": trial.key, "plan": trial.plan.describe()}
        yield pd.DataFrame({**facts, "bpw": trial.bpw}, index=rows.index).join(rows)
    if not has_answers:
        raise UserError(f"{study.path} has no answers to single examples; an imported table has means alone")
