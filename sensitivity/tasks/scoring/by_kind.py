"""Accuracy for each kind of question, beside the score of all questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sensitivity.tasks.examples.types import Example, Metric
from sensitivity.tasks.scoring.answer_text import equals_squeezed


def accuracies_by_kind(examples: Sequence[Example]) -> dict[str, Metric]:
    """The accuracy of each kind of question that was drawn, and their unweighted mean.

    The score of the task, in contrast, is the mean over all questions.
    """
    kinds = sorted({example.kind for example in examples})

    def of(kinds: Sequence[str]) -> Metric:
        def metric(answers: Sequence[str], examples: Sequence[Example]) -> float:
            pairs = list(zip(answers, examples, strict=True))
            of_kinds = [[equals_squeezed(a, e) for a, e in pairs if e.kind == kind] for kind in kinds]
            return float(np.mean([np.mean(matches) for matches in of_kinds])) if all(of_kinds) else math.nan

        return metric

    return {kind: of([kind]) for kind in kinds} | {"mean of the kinds": of(kinds)}
