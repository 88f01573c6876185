"""The report in words: what to do, how sure that is, and what would change the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sensitivity.importance import Ranking
from sensitivity.readings import count
from sensitivity.trials import Study
from sensitivity.verdict import Recommendation


@dataclass(frozen=True)
class Summary:
    """Sentences under three headings."""

    do: tuple[str, ...]
    sure: tuple[str, ...]
    change: tuple[str, ...]


def summary(
    study: Study, table: pd.DataFrame, recommendation: Recommendation | None, rankings: Sequence[Ranking | None]
) -> Summary:
    ranked = [ranking for ranking in rankings if ranking is not None]
    return Summary(
        tuple(_do(study, recommendation, ranked)),
        tuple(_sure(table, recommendation, ranked)),
        tuple(_change(study, recommendation, ranked)),
    )


def _do(study: Study, recommendation: Recommendation | None, ranked: Sequence[Ranking]) -> list[str]:
    told = []
    if recommendation is not None:
        size = recommendation.size
        told.append(
            f"Use the plan {recommendation.plan.describe()}: {size.bpw:.2f} bits per weight "
            f"({size.bytes / 1e6:,.1f} MB) within a budget of {recommendation.budget:.2f}."
        )
    else:
        told.append(
            f"Choose a budget and ask for its plan: sensitivity recommend {study.path} --bpw 4.0. "
            "The table of budgets below shows what each would buy."
        )
    for ranking in ranked:
        first, last = ranking.order[0], ranking.order[-1]
        told.append(
            f"For {ranking.task}, spend bits on {first} first ({ranking.table['consensus'].iloc[0]:.0f} % of the "
            f"differences in score); {last} matters least ({ranking.table['consensus'].iloc[-1]:.0f} %)."
        )
    return told


def _sure(table: pd.DataFrame, recommendation: Recommendation | None, ranked: Sequence[Ranking]) -> list[str]:
    told = []
    if recommendation is not None and recommendation.measured is not None:
        measured, full = recommendation.measured, recommendation.full
        kept = f", where full precision scores {full}" if full else ""
        fresh = "fresh examples" if recommendation.fresh else "the examples it was chosen on, which flatters it"
        told.append(f"It was run on {fresh} and scored {measured}{kept}.")
    if recommendation is not None:
        told.append(recommendation.words)
    for ranking in ranked:
        told.append(
            f"The ranking for {ranking.task} rests on {count(ranking.trials, 'trial')}; the forest explains "
            f"{max(ranking.r2, 0):.0%} of the variance of plans it has not seen, a straight line "
            f"{max(ranking.linear_r2, 0):.0%} of those it has."
        )
    return told


def _change(study: Study, recommendation: Recommendation | None, ranked: Sequence[Ranking]) -> list[str]:
    told = [f"{ranking.task}: {warning}." for ranking in ranked for warning in ranking.warnings]
    if recommendation is not None and recommendation.uniform and recommendation.uniform.more:
        told.append(f"About {recommendation.uniform.more:,} more examples would show whether the difference is real.")
    counts = study.counts()
    if counts["waiting"]:
        told.append(f"{count(counts['waiting'], 'plan')} of this sweep are still waiting to be measured.")
    told.append("Another model, task, method or set of widths: all figures hold for what was measured here.")
    return told


def importance_alt(ranking: Ranking) -> str:
    """The importance figure for those who cannot see it."""
    shares = ", ".join(
        f"{name} {row['consensus']:.0f} %"
        + (f" (between {row['consensus.low']:.0f} and {row['consensus.high']:.0f})" if "consensus.low" in row else "")
        for name, row in ranking.table.iterrows()
    )
    return f"Bars of each component's share of the differences in {ranking.task}; consensus: {shares}."
