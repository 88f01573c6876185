"""ScoreAgreement: how well additive scores of components predict the plans that a study has measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression

from sensitivity.analysis.observations import observations_of
from sensitivity.analysis.surrogate.space import Expected
from sensitivity.study.counting import count
from sensitivity.study.study import Study

MIN_PLANS = 4  # with fewer plans, agreement is not computed


@dataclass(frozen=True)
class ScoreAgreement:
    """The agreement of scores with measurements, over all quantized plans whose components have a score."""

    plans: int
    rank_correlation: float  # between the sum of scores and the loss of task score; 1 if the order of plans is the same
    error: float  # root mean square error of each plan's task score, predicted by a falling curve through all others

    def to_json(self) -> dict[str, float]:
        """The agreement as JSON values."""
        return {"plans": self.plans, "rank_correlation": self.rank_correlation, "error": self.error}


def agreement_of_scores(study: Study, scores: Expected, task: str | None = None) -> ScoreAgreement | str:
    """How well the sums of scores order and predict the measured plans; a sentence that says why none is known."""
    observations = observations_of(study, task)
    observations = observations.where([not plan.is_native for plan in observations.plans])
    unscored = [
        {str(choice) for name, choice in plan.schemes if choice is not None and choice not in scores.get(name, {})}
        for plan in observations.plans
    ]
    quantized, others = len(observations), sorted(set().union(*unscored))
    observations = observations.where([not found for found in unscored])
    sums = np.array([
        sum(scores[name][choice] for name, choice in plan.schemes if choice is not None) for plan in observations.plans
    ])  # fmt: skip
    if len(sums) < MIN_PLANS:
        why = f", since others hold {', '.join(others)}" if others else ""
        return (
            f"{len(sums)} of {count(quantized, 'quantized plan')} in {study.path} hold only what is scored here{why}; "
            f"agreement needs {MIN_PLANS}"
        )
    if len(set(sums)) < 2 or len(set(observations.score)) < 2:
        return f"the plans of {study.path} have all the same score, or the same sum of scores"
    errors = [
        IsotonicRegression(increasing=False, out_of_bounds="clip")
        .fit(np.delete(sums, i), np.delete(observations.score, i))
        .predict(sums[i : i + 1])[0]
        - observations.score[i]
        for i in range(len(sums))
    ]
    agreement = float(spearmanr(sums, -observations.score).statistic)
    return ScoreAgreement(len(sums), agreement, float(np.sqrt(np.mean(np.square(errors)))))
