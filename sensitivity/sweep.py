"""The loop: ask for a plan, quantise, evaluate, tell; begin again where a killed process left off."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from sensitivity.components import ComponentMap
from sensitivity.errors import UserError
from sensitivity.evaluate import Batch, Rows, answer, batches, rows_of
from sensitivity.models import VLM
from sensitivity.plan import Plan
from sensitivity.quantize import Memory, Statistics, prepare, quantized
from sensitivity.replay import Replay
from sensitivity.tasks import Task
from sensitivity.trials import Study

WEIGHTS = 4 << 30  # bytes of quantised weights to remember, beyond those of the plan that is running
LIBRARIES = ("torch", "transformers", "optuna", "numpy")


@dataclass(frozen=True)
class Step:
    """A trial that was just finished, and how far the sweep is."""

    plan: Plan
    scores: Mapping[str, float]
    seconds: float
    done: int
    left: int


def run(
    vlm: VLM,
    study: Study,
    tasks: Sequence[Task],
    plans: Iterable[Plan],
    plain: bool = False,
    statistics: Statistics | None = None,
) -> Iterator[Step]:
    """Run every plan that the study does not hold yet; full precision first, since all else is compared to it.

    A list of plans is queued at once, before the first step is asked for, so that any number of processes can take
    from it; other iterables are asked for one plan at a time, after the last one was told.
    """
    trial = _Trial(vlm, study.parts, tasks, plain, statistics)
    if isinstance(plans, Sequence):
        trial.prepare(plans)
    study.release_lost()
    study.enqueue([Plan.uniform(study.parts, None), *(plans if isinstance(plans, Sequence) else ())])
    return _walk(study, trial, () if isinstance(plans, Sequence) else plans)


def _walk(study: Study, trial: _Trial, more: Iterable[Plan]) -> Iterator[Step]:
    yield from _drain(study, trial)
    for plan in more:
        study.enqueue([plan])
        yield from _drain(study, trial)


def _drain(study: Study, trial: _Trial) -> Iterator[Step]:
    while (asked := study.ask()) is not None:
        began = time.perf_counter()
        try:
            rows = trial.run(asked.plan)
        except UserError as error:
            study.give_up(asked, str(error))
            raise
        seconds = time.perf_counter() - began
        facts = {"seconds": seconds, "path": "plain" if trial.plain else "fast", "versions": versions()}
        scores = study.tell(asked, rows, facts)
        counts = study.counts()
        yield Step(asked.plan, scores, seconds, counts["done"], counts["waiting"] + counts["running"])


class _Trial:
    """What plans share: the tasks as tensors, quantised weights, and hidden states along the path of the last plan."""

    def __init__(
        self,
        vlm: VLM,
        parts: ComponentMap,
        tasks: Sequence[Task],
        plain: bool = False,
        statistics: Statistics | None = None,
    ) -> None:
        self.vlm, self.parts, self.tasks, self.plain, self.statistics = vlm, parts, tasks, plain, statistics
        self.batches: dict[str, list[Batch]] = {task.name: list(batches(vlm, task, plain)) for task in tasks}
        self.weights: Memory | None = None if plain else {}
        self.replay = None if plain else self._proven()

    def _proven(self) -> Replay:
        """Hidden states may be kept where doing so changes no answer and no likelihood, on a first few examples."""
        replay = Replay(self.vlm.model, self.parts)
        replay.under(Plan.uniform(self.parts, None))
        task = self.tasks[0]
        few = next(batches(self.vlm, replace(task, examples=task.examples[:4])))
        replay.prove(lambda: answer(self.vlm, task, few, replay, "proof"))
        return replay

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Quantise every layer at all the widths it will be asked for, each layer studied once, if there is room."""
        widths = {scheme for plan in plans for _, scheme in plan.schemes if scheme}
        room = sum(w.numel for w in self.parts.weights) * self.vlm.model.dtype.itemsize * len(widths)
        if self.weights is not None and room < WEIGHTS:
            prepare(self.vlm.model, self.parts, plans, self.weights, self.statistics)

    def run(self, plan: Plan) -> Rows:
        """Per-example rows of all tasks under a plan."""
        rows: Rows = {}
        if self.replay:
            self.replay.under(plan)
        with quantized(self.vlm.model, self.parts, plan, self.weights, self.statistics):
            for task in self.tasks:
                for number, batch in enumerate(self.batches[task.name]):
                    found = rows_of(task, batch, *answer(self.vlm, task, batch, self.replay, (task.name, number)))
                    for name, values in found.items():
                        rows.setdefault(name, []).extend(values)
        if self.weights and sum(t.numel() * t.element_size() for t in self.weights.values()) > WEIGHTS:
            self.weights.clear()
        return rows


def identity(vlm: VLM, tasks: Sequence[Task], sources: Sequence[str], n: int, seed: int) -> dict[str, Any]:
    """What must be the same for trials to be comparable: model, type of numbers, data and seed."""
    return {
        "model": vlm.name,
        "fingerprint": vlm.fingerprint,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "note": vlm.note,
        "tasks": list(sources),
        "n": n,
        "seed": seed,
        "data": {task.name: f"{len(task.examples)} examples {task.fingerprint}" for task in tasks},
        "chance": {task.name: task.chance for task in tasks},
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("sensitivity", *LIBRARIES)} | {"threads": str(torch.get_num_threads())}
