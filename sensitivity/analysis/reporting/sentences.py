"""The sentences of the report: what to do, how sure that is, what would change it, and the figures' descriptions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sensitivity.analysis.importance import robustness
from sensitivity.analysis.importance.ranking import MIN_TRIALS, rank_correlations
from sensitivity.analysis.importance.types import TITLES, Ranking
from sensitivity.analysis.recommending.recommendation import Recommendation, what_is_lost
from sensitivity.analysis.reporting.table_rows import quantized
from sensitivity.spec.errors import shell_word
from sensitivity.spec.plan import few_names
from sensitivity.spec.sizes import bytes_in_words
from sensitivity.study.counting import count
from sensitivity.study.storage import expected
from sensitivity.study.study import Study


@dataclass(frozen=True)
class ReportSummary:
    """The report's summary: what to do, how sure that is, and what would change the answer."""

    do: tuple[str, ...]
    sure: tuple[str, ...]
    change: tuple[str, ...]


def summary(
    study: Study,
    table: pd.DataFrame,
    recommendations: Sequence[Recommendation],
    rankings: Sequence[Ranking | None],
    grown: Sequence[str] = (),
    budgets: bool = True,
) -> ReportSummary:
    """The report's summary of a study, its recommendations and its rankings; `budgets`: whether it has their table."""
    ranked = [ranking for ranking in rankings if ranking is not None]
    plans = [plan_to_use(one) for one in recommendations] or [_choose_a_budget(study, table, budgets)]
    return ReportSummary(
        (*plans, *(f"{_advice(ranking)}{_least_widths(ranking, table)}" for ranking in ranked)),
        (*_sure(study, recommendations, ranked), *grown),
        tuple(_change(study, recommendations, ranked)),
    )


def plan_to_use(one: Recommendation) -> str:
    """That a recommended plan is to be used; or, where it has lost what full precision can, that none is of use."""
    size = f"{one.size.bpw:.2f} bits per weight{f' in {one.size.format} files' if one.size.format else ''}"
    size += f" ({bytes_in_words(one.size.bytes)})" if one.size.sized else ""
    if lost := what_is_lost(one):
        return (
            f"No plan within a budget of {one.budget:.2f} is of use for {' and '.join(lost)}: the best, "
            f"{one.plan.describe()}, {size}, {' and '.join(lost.values())}."
        )
    return f"Use the plan {one.plan.describe()}: {size} within a budget of {one.budget:.2f}."


def _choose_a_budget(study: Study, table: pd.DataFrame, budgets: bool) -> str:
    """What to do in a study for which no plan was chosen yet."""
    full = table.loc[table["native"], list(study.tasks)].mean()
    if len(full) and (full <= 0).all():
        return f"No plan can be chosen: full precision scores nothing on {' and '.join(study.tasks)}."
    shown = " The table of budgets below shows what each would buy." if budgets else ""
    return f"Choose a budget and ask for its plan: `sensitivity recommend {shell_word(study.path)} --bpw 4.0`.{shown}"


def _advice(ranking: Ranking) -> str:
    """On which component to spend bits, and above which widths to stay where the score collapses."""
    if doubt := _doubt(ranking):
        return f"For {ranking.task}, it cannot be said yet on which part to spend bits: {doubt}."
    first, last = ranking.order[0], ranking.order[-1]
    cliffs = dict(robustness.cliffs(ranking.levels))
    kept = " and ".join(f"{name} above {bits} bits" for name, bits in cliffs.items())
    ends = ", ".join(_share(name, ranking.table.loc[name]) for name in dict.fromkeys((first, last)))
    ends = f"shares of the differences in score: {ends}"
    if first in cliffs:
        return (
            f"For {ranking.task}, keep {kept}: from there down the score collapses, which makes most of the ranking "
            f"({ends}). For wider plans see the importance where plans are used."
        )
    worst = robustness.decisive_level(ranking.levels)
    but = (
        f"; but without plans that have {worst['component']} at {robustness.width_in_words(worst['bits'])}, another "
        "part comes first"
        if worst is not None and worst["changes_first"]
        else ""
    )
    return f"For {ranking.task}, spend bits on {first} first ({ends}){but}."


def _least_widths(ranking: Ranking, table: pd.DataFrame) -> str:
    """The fewest bits of each part in the measured plans that are of use, where fewer were tried; or nothing."""
    rows, full = quantized(table), table.loc[table["native"], ranking.task].mean()
    names = [name for name in ranking.order if name in rows]
    if not full > 0:
        return ""
    kept = f"{100 * robustness.NEAR:.0f} % of full precision"
    keeping = rows[rows[ranking.task] >= robustness.NEAR * full]
    if not len(keeping):
        return f" No measured plan keeps {kept}."
    least, tried = keeping[names].min(), rows[names].min()
    at_least: dict[float, list[str]] = {}
    for name in names:
        if least[name] > tried[name]:
            at_least.setdefault(least[name], []).append(name)
    listed = "; ".join(
        f"{few_names(at_least[bits])} at {robustness.width_in_words(bits)}{' or more' if bits < 16 else ''}"
        for bits in sorted(at_least, reverse=True)
    )
    return f" The measured plans that keep {kept} ({len(keeping):,} of {len(rows):,}) have {listed}." if listed else ""


def _doubt(ranking: Ranking) -> str:
    """Why a ranking should not be trusted, or an empty string."""
    if ranking.r2 < robustness.TRUSTED_R2:
        return (
            f"the forest behind the ranking, of {count(ranking.trials, 'trial')}, explains only "
            f"{100 * max(ranking.r2, 0):.0f} % of the variance of plans it has not seen"
        )
    first = ranking.table.iloc[0]
    if first.get("consensus.low", 1) <= 0:
        return f"the share of the first, {_share(first.name, first)}, cannot be told from nothing"
    return ""


def _share(name: object, row: pd.Series) -> str:
    """A component with its share of the differences in score, and the interval where it is known."""
    return f"{name} {row['consensus']:.0f} %{_interval(row)}"


def _interval(row: Mapping[str, float] | pd.Series) -> str:
    """The interval of a share, where it is known."""
    low, high = row.get("consensus.low"), row.get("consensus.high")
    # NaN: see Ranking.no_intervals
    return f" [{low:.0f}, {high:.0f}]" if low is not None and high is not None and low == low else ""


def _sure(study: Study, recommendations: Sequence[Recommendation], ranked: Sequence[Ranking]) -> list[str]:
    """How sure that is: measurements, verdicts, and how well the forest predicts."""
    lines = []
    if all(one.measured is None for one in recommendations) and len({one.words for one in recommendations}) == 1:
        lines.append(recommendations[0].words)
    for one in recommendations if not lines else ():
        at = f"At {one.budget:g} bpw: " if len(recommendations) > 1 else ""
        if one.measured is not None:
            several = len(one.weights) > 1  # then the score is a share of full precision
            kept = f", where full precision scores {one.full}" if one.full and not several else ""
            scored = f"kept a share of {one.measured} of full precision" if several else f"scored {one.measured}"
            seen = "" if one.fresh else " So the score is optimistic."
            examples = "fresh examples" if one.fresh else "examples that had a part in the choice"
            lines.append(f"{at}{'it' if at else 'It'} was run on {examples} and {scored}{kept}.{seen}")
        lines.append(f"{at}{one.words}")
    if note := expected.note_on(study.path):
        lines.append(_sentences([note]))
    if not recommendations and not ranked:
        lines.append("Not at all yet: no part could be ranked, for the reason given below, and no plan was run.")
    if study.meta.get("left_out"):
        used, rows = study.meta.get("used", 0), study.meta.get("rows", 0)
        lines.append(f"{used:,} of {rows:,} rows of the imported table were used. {_sentences(study.meta['left_out'])}")
    for ranking in ranked:
        lines.append(
            f"The ranking for {ranking.task} rests on {count(ranking.trials, 'trial')}; the forest explains "
            f"{100 * max(ranking.r2, 0):.0f} % of the variance of plans it has not seen, a straight line "
            f"{100 * max(ranking.linear_r2, 0):.0f} % of those it has."
        )
        if ranking.no_intervals:
            lines.append(f"{ranking.no_intervals}.")
        if ranking.choice:
            lines.append(
                f"The choice of method decides {ranking.choice['consensus']:.0f} % of the differences in "
                f"{ranking.task}{_interval(ranking.choice)}; the shares of the parts are of their widths."
            )
    if len(ranked) > 1:
        tau = rank_correlations({ranking.task: ranking for ranking in ranked}).to_numpy()
        least = float(np.nanmin(tau))
        alike = f"agrees with a Kendall's tau of at least {least:.2f} (1: the same)" if least < 0.999 else "is the same"
        lines.append(f"Between tasks the order of the parts {alike}.")
    return lines


def _sentences(notes: Sequence[str]) -> str:
    """Notes as sentences."""
    return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes)


def _change(study: Study, recommendations: Sequence[Recommendation], ranked: Sequence[Ranking]) -> list[str]:
    """What could change the answer: warnings, undecided comparisons, plans that are still queued."""
    lines = [
        f"{ranking.task}: {warning}{'' if warning.endswith('?') else '.'}"
        for ranking in ranked
        for warning in ranking.warnings
    ]
    lines += [
        f"About {one.uniform.more:,} more examples would show whether the lead over the uniform plan at "
        f"{one.budget:g} bpw is real."
        for one in recommendations
        if one.uniform and one.uniform.more
    ]
    # those of a process that was killed wait, too: a sweep queues them again
    counts, stopped = study.counts(), study.stopped()
    waiting, running = counts["waiting"] + stopped, counts["running"] - stopped
    lines += [
        f"{count(number, 'plan')} of this sweep {'is' if number == 1 else 'are'} {state}."
        for state, number in (("still waiting to be measured", waiting), ("being measured", running))
        if number
    ]
    lines.append("Another model, task, method or set of widths: all figures hold for what was measured here.")
    return lines


def agreement(ranking: Ranking) -> str:
    """A sentence on the two estimators that agree least on the order of the components."""
    if not len(ranking.tau):
        return ""
    pairs = [
        (float(ranking.tau.loc[a, b]), a, b) for a, b in itertools.combinations(ranking.tau.index, 2)
        if pd.notna(ranking.tau.loc[a, b])
    ]  # fmt: skip
    if not pairs:
        return ""
    tau, *two = min(pairs)
    if tau > 0.999:
        # as they are shown: a tie is no order
        tied = [TITLES.get(name, name) for name in ranking.tau.index if ranking.table[name].round(1).duplicated().any()]
        but = f", except that {' and '.join(tied)} {'give' if len(tied) > 1 else 'gives'} some the same share"
        return f"All estimators put the parts in the same order{but if tied else ''}."
    a, b = (TITLES.get(name, name) for name in two)
    return f"The estimators differ most between {a} and {b}: Kendall's tau of their orders is {tau:.2f} (1: the same)."


def importance_alt(ranking: Ranking) -> str:
    """The text alternative of the importance figure."""
    shares = ", ".join(_share(name, row) for name, row in ranking.table.iterrows())
    return f"Bars of each component's share of the differences in {ranking.task}; consensus: {shares}."


PARETO_ALT = "Scatter plot of the score of every plan against its bits per weight, with the frontier of the best."
PAIR_ALT = "Table in colors of the mean score by the widths of the two parts that interact most over all plans."
WIDTHS_ALT = "Scatter plot of score against bits per weight; color and shape of a point say the width of this part."


def by_bits_alt(means: pd.DataFrame, task: str, full: float | None, alone: bool = False) -> str:
    """The text alternative of the curves: down to which widths of each component 90 % of full precision is kept.

    `alone`: the others stayed native, and the mean itself must keep it. Else it is an average over what the others had,
    bad widths included, which says nothing of the part: then the best plan with each width must.
    """
    others = "while all others stay at native precision" if alone else "averaged over the others"
    drawn = f"Lines of the mean {task} over the bits of each part, {others}"
    if full is None or full <= 0 or (not alone and means.groupby("part")["count"].sum().max() < MIN_TRIALS):
        return f"{drawn}."
    parts = []
    for part, rows in means.groupby("part", sort=False):
        curve = rows.set_index("bits")["mean" if alone else "best"].sort_index(ascending=False)
        high = curve >= 0.9 * full
        unbroken = curve.index[high.cummin()]
        if len(unbroken) == high.sum() > 0:
            parts.append(f"{part} down to {unbroken.min():g} bits")
        elif high.any():
            widths = [f"{bits:g}" for bits in sorted(curve.index[high])]
            listed = " and ".join(filter(None, [", ".join(widths[:-1]), widths[-1]]))
            parts.append(f"{part} only at {listed} bits")
        else:
            parts.append(f"{part} at no width ({curve.max():.3g} at best)")
    where = "Where they keep" if alone else "Widths at which the best plan keeps"
    return f"{drawn}. {where} 90 % of full precision's {full:.3g}: {'; '.join(parts)}."


def levels_alt(ranking: Ranking) -> str:
    """The text alternative of the figure of left-out levels."""
    worst = ranking.levels.loc[ranking.levels["shift"].abs().idxmax()]
    return (
        "A row is the part whose trials with one width, the column, are left out. A cell says by how many points that "
        "moves the share of forest importance that it moves most, which may be another part's; largest: "
        f"{worst['moves']} by {worst['shift']:+.0f} without {worst['component']} at "
        f"{robustness.width_in_words(worst['bits'])}."
    )


def interactions_alt(ranking: Ranking) -> str:
    """The text alternative of the interactions figure: of the largest cell, and of the strongest pair over all plans.

    These may differ, since a cell knows only of plans in which both widths are low.
    """
    drawn = ranking.pairs.dropna(subset="both_low")
    strongest = ranking.pairs.iloc[0]
    over_all = f"over all plans ({strongest['strength']:.2g} on average, with either sign)"
    told = (
        "A cell is what two parts do to the score beyond the sum of their effects, where both are in the lower half of "
        "their widths (SHAP); negative means that they hurt each other."
    )
    if not len(drawn):
        return f"{told} No plan has both so low. Largest {over_all}: {strongest['a']} with {strongest['b']}."
    cell = drawn.loc[drawn["both_low"].abs().idxmax()]
    told += f" Largest there: {cell['a']} with {cell['b']} ({cell['both_low']:+.2g})"
    if (cell["a"], cell["b"]) == (strongest["a"], strongest["b"]):
        return f"{told}, and also {over_all}."
    return f"{told}. Largest {over_all}, which no cell shows: {strongest['a']} with {strongest['b']}."


def calibration_alt(checked: pd.DataFrame) -> str:
    """The text alternative of the figure of predicted against measured scores."""
    inside = ((checked["low"] <= checked["measured"]) & (checked["measured"] <= checked["high"])).mean()
    error = (checked["measured"] - checked["expected"]).abs().median()
    return (
        f"Predicted against measured scores of plans that the surrogate had not seen (five folds): median error "
        f"{error:.3f}; {100 * inside:.0f} % of the measured scores lie within the predicted 95 % interval."
    )
