"""A plan's score read with the likelihood of right answers, which is less noisy than a count of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sensitivity.study.counting import Floats

MIN_PLANS = 6  # fewer plans do not show how scores follow from likelihoods
CURVED = 10  # with so many plans the relation may bend
KEPT = 0.6  # plans that keep less of full precision are read as they are: the relation may be another one there


@dataclass(frozen=True)
class Link:
    """How scores follow from likelihoods in a study: a polynomial, and how far true scores lie from it."""

    coefficients: Floats  # of the mean negative log-likelihood, highest power first
    scatter: float  # variance of true scores around the polynomial
    lowest: float  # scores below this are read as they are

    def steadied(self, scores: Floats, nll: Floats, noise: Floats, centered: bool = False) -> Floats:
        """Scores moved towards the polynomial, the more so the noisier they are and the less true scores scatter.

        `noise`: the error of differences between plans.
        `centered`: the scores are of other examples than those of the study, so that they all may lie higher or lower.
        """
        off = scores - np.polyval(self.coefficients, nll)
        used = np.isfinite(off) & (scores >= self.lowest)
        if not used.any():
            return scores
        if centered:
            off = off - off[used].mean()
        variance = np.square(np.where(np.isfinite(noise), noise, 0.0))
        total = self.scatter + variance
        share = np.divide(variance, total, out=np.zeros_like(total), where=total > 0)  # of what is off, that is noise
        return np.where(used, scores - share * off, scores)


def link(scores: Floats, nll: Floats, noise: Floats, full: float) -> Link | None:
    """The relation between plans' scores and their mean negative log-likelihoods; None where there is none to see.

    `noise` is the error of differences between plans. Likelihoods that rise while scores fall measure something else.
    """
    used = np.isfinite(nll) & np.isfinite(noise) & (scores >= KEPT * full)
    x, y = nll[used], scores[used]
    if len(np.unique(x)) < MIN_PLANS:
        return None
    for degree in (2, 1) if len(np.unique(x)) >= CURVED else (1,):
        found = np.polyfit(x, y, degree)
        if (np.polyval(np.polyder(found), x) < 0).all():
            spread = float(np.square(y - np.polyval(found, x)).sum()) / (len(x) - degree - 1)
            return Link(found, max(spread - float(np.mean(noise[used] ** 2)), 0.0), KEPT * full)
    return None
