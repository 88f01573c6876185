"""Scores answers by an lmms-eval task's metrics: one value for each example, and aggregates over all examples."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from inspect import Parameter, signature
from numbers import Real
from types import SimpleNamespace

import numpy as np

from sensitivity.spec.errors import UserError, reason
from sensitivity.tasks.datasets.source import Record
from sensitivity.tasks.examples.types import Example, Metric
from sensitivity.tasks.harness.loading import Docs, LibraryTask, quiet

PROBED = 32  # examples on which it is tested whether a metric is the mean of a value per example
CLOSE = 1e-4  # a tolerance, since some aggregates are rounded to four or five digits
RESULTS = 16_384  # answers whose results are cached, since neighboring plans give many equal answers

Aggregate = Callable[[Sequence[object]], object]


class Scorer:
    """The metrics of a task for the documents of one split; `main` is the metric that scores an example."""

    def __init__(self, name: str, task: LibraryTask, docs: Mapping[str, Docs], examples: Sequence[Example]) -> None:
        self.name, self.task, self.docs = name, task, docs
        self.aggregates = _aggregates(task)
        self._results = lru_cache(RESULTS)(self._results_of)
        self.main = self._main(examples[:PROBED])

    def score(self, answer: str, example: Example) -> float:
        """The value of the main metric for one answer."""
        value = self._results(answer, example.id).get(self.main)
        if value is None:
            raise UserError(f"{self.main} of lmms-eval:{self.name} has no value for example {example.id}")
        return self._single(self.main, value)

    def metrics(self) -> dict[str, Metric]:
        """The aggregates of all metrics, as the library computes them."""
        return {metric: partial(self._aggregate, metric) for metric in self.aggregates}

    def _aggregate(self, metric: str, answers: Sequence[str], examples: Sequence[Example]) -> float:
        every = (
            self._results(answer, example.id).get(metric) for answer, example in zip(answers, examples, strict=True)
        )
        if not (values := [value for value in every if value is not None]):
            return math.nan  # a metric of a kind of question that is not among these examples
        with quiet():
            return _number(self.aggregates[metric](values))

    def _single(self, metric: str, value: object) -> float:
        """One example's value of a metric: its number, or the aggregate over this example alone."""
        if isinstance(value, Real | np.bool_):
            return float(value)
        with quiet():
            return _number(self.aggregates[metric]([value]))

    def _results_of(self, answer: str, example_id: str) -> Mapping[str, object]:
        """The task's results for one answer: a value for each metric."""
        split, _, number = example_id.rpartition("-")
        with quiet(), _same_guess(example_id):
            doc = self.docs[split][int(number)]  # read again each time, since some tasks change their document
            try:
                results: Mapping[str, object] = _process(self.task, doc, answer)
            except Exception as error:
                raise UserError(
                    f"lmms-eval:{self.name} cannot score the answer '{answer[:40]}' to {example_id} ({reason(error)})"
                ) from error
        return {metric: value for metric, value in results.items() if metric in self.aggregates}

    def _main(self, examples: Sequence[Example]) -> str:
        """The first metric that is the mean of a value per example, tried with right and with wrong answers."""
        tried = [("" if place % 2 else example.answers[0], example) for place, example in enumerate(examples)]
        results = [self._results(answer, example.id) for answer, example in tried]
        for metric in self.aggregates:
            if all(metric in one for one in results) and self._is_mean(metric, [one[metric] for one in results]):
                return metric
        raise UserError(
            f"lmms-eval:{self.name} has no metric with a value for each example ({', '.join(self.aggregates)}), so "
            "that plans could not be compared on the same examples; choose another task"
        )

    def _is_mean(self, metric: str, values: Sequence[object]) -> bool:
        try:
            singles = [self._single(metric, value) for value in values]
            with quiet():
                whole = _number(self.aggregates[metric](list(values)))
        except Exception:  # an aggregate that cannot take a single example has errors of its own
            return False
        return math.isclose(sum(singles) / len(singles), whole, rel_tol=CLOSE, abs_tol=CLOSE)


@contextlib.contextmanager
def _same_guess(example_id: str) -> Iterator[None]:
    """Until the block ends, random numbers depend only on the example.

    Some rules guess if an answer names no option (mmmu_val). The same guess for every plan cancels in differences.
    """
    before = random.getstate()
    random.seed(example_id)
    try:
        yield
    finally:
        random.setstate(before)


def _process(task: LibraryTask, doc: Record, answer: str) -> Mapping[str, object]:
    """The metrics of one answer as the library computes them: the task's first filter, then its rule."""
    request = SimpleNamespace(resps=[answer], filtered_resps={})
    task._filters[0].apply([request], [doc])
    filtered = list(request.filtered_resps.values())
    # the rule without the library's wrapper, which on an error tries five times, seconds apart
    rule = getattr(type(task).process_results, "__wrapped__", type(task).process_results)
    results: Mapping[str, object] = rule(task, doc, filtered)
    return results


def _number(value: object) -> float:
    """An aggregate as a number; NaN where it is something else, such as the name of a file that was written."""
    return float(value) if isinstance(value, Real | np.bool_) else math.nan


def _aggregates(task: LibraryTask) -> dict[str, Aggregate]:
    """The aggregates of the task's metrics for which higher is better, and which need only the metric's values."""
    better = task.higher_is_better()
    return {
        metric: aggregate
        for metric, aggregate in task.aggregation().items()
        if better.get(metric) and _takes_values_alone(aggregate)
    }


def _takes_values_alone(aggregate: Aggregate) -> bool:
    """Whether an aggregate needs only the values; one that takes arguments of the command line writes files."""
    needed = [one for one in signature(aggregate).parameters.values() if one.default is Parameter.empty]
    return len([one for one in needed if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]) == 1
