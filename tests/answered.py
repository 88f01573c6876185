"""Studies with answers to real questions and no model: whoever calls says what each plan answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import planted

from sensitivity.spec.plan import Plan
from sensitivity.study.examples import questions
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example, Task

NATIVE = Plan.uniform(planted.parts(), None)
HOSTILE = "</p><img src=x onerror=alert(1)>"
FOUR, TWO = (planted.plan(planted.PARTS, [bits] * 3) for bits in (4, 2))


def study(
    path: Path,
    tasks: Sequence[Task],
    answer: Callable[[Plan, Example], str],
    sources: Sequence[str] = (),
    n: int = 100,
    seed: int = 0,
    plans: Sequence[Plan] = (NATIVE, FOUR, TWO),
    runtime: str | None = None,
    names: Sequence[str] = planted.PARTS,
) -> Study:
    """A study as a sweep leaves it; `sources` are the names by which its tasks are found again."""
    data = {task.name: f"{len(task.examples)} examples {task.fingerprint}" for task in tasks}
    meta = {"model": "planted", "fingerprint": "f", "tasks": list(sources), "n": n, "seed": seed, "data": data}
    made = Study.create(path, planted.parts(names), [task.name for task in tasks], meta, runtime=runtime)
    questions.store(path, tasks)
    made.enqueue(plans)
    last = None
    while (last := made.ask(last)) is not None:
        rows: dict[str, list[object]] = {}
        for task in tasks:
            for example in task.examples:
                text = answer(last.plan, example)
                score = task.score(text, example)
                row = {"task": task.name, "example": example.id, "cluster": example.cluster, "kind": example.kind,
                       "score": score, "nll": 0.1 if last.plan.is_native else 1.0, "answer": text,
                       "cut": len(text) > 20, "malformed": task.is_malformed(text, score)}  # fmt: skip
                for name, value in row.items():
                    rows.setdefault(name, []).append(value)
        made.tell(last, rows, {"seconds": 1.0, "path": "fast", "versions": {"sensitivity": "0"}})
    return made


def explain(study: Study, plan: Plan, failures: bool, examples: Sequence[str]) -> dict[str, Any]:
    """Store an explanation of a plan's damage as `explain` writes it, and return it."""
    split = "evaluation" if failures else "calibration"
    data = {
        "components": {"vision": 0.3, "connector": 0.0, "language": 0.1},
        "modalities": {"vision": 0.3, "prompt": 0.1, "answer": 0.0},
        "change": 0.4, "examples": len(examples), "square_seen": None,
        "regions": {name: [[0.0, 2.0], [-1.0, 1.0]] for name in examples},
        "questions": {name: [["what", 0.5], [HOSTILE, 1.0], [" is", -1.0]] for name in examples},
        "data": [{"task": "vqa", "split": split, "n": len(examples), "seed": 0}],
    }  # fmt: skip
    file = paths.explanation_file(study.path, plan.key, failures)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data))
    return data
