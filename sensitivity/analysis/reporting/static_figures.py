"""The report's static figures in reading order, each with its title, its text alternative and its data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from sensitivity.analysis.importance.types import Ranking
from sensitivity.analysis.observations import Observations
from sensitivity.analysis.reporting import figures, sentences
from sensitivity.analysis.reporting.table_rows import quantized, single
from sensitivity.analysis.surrogate.fitting import fit_surrogate
from sensitivity.analysis.surrogate.space import Space
from sensitivity.spec.files import slug

Drawn = tuple[str, str, str, Figure, pd.DataFrame]  # name, title, text alternative, figure, data


@dataclass(frozen=True)
class DrawnFigure:
    """A static figure, drawn once for both the page and the files beside it."""

    name: str
    title: str
    alt: str
    svg: str
    png: bytes
    rows: pd.DataFrame

    def inline(self, prefix: str) -> Markup:
        """The SVG for the page, with ids that are unique there, the page's colors, and a text alternative."""
        svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-{self.name}-", self.svg)
        # without a ground of its own, the shadows show through that say there is more to scroll to
        svg = svg.replace(f"fill: {figures.PAPER}", "fill: none")
        for color, variable in ((figures.INK, "--ink"), (figures.FAINT, "--faint"), (figures.PAPER, "--paper")):
            svg = svg.replace(color, f"var({variable})")
        opening = Markup('<svg role="img" aria-label="{}"').format(self.alt)
        return Markup(svg.replace("<svg", opening, 1))


def figures_of_task(
    table: pd.DataFrame,
    observations: Observations,
    ranking: Ranking | None,
    full: float | None,
    chosen: Sequence[str] = (),
) -> list[DrawnFigure]:
    """Every figure for which the trials of one task hold data."""
    task = observations.task
    names = [name for name in observations.names if table[name].nunique() > 1]
    order = [name for name in (ranking.order if ranking else names) if name in names]
    drawn = [("pareto", "Score against size", sentences.PARETO_ALT, figures.pareto(table, task, full, chosen), table)]
    drawn += _of_ranking(ranking) if ranking else []
    drawn += _by_bits(table, task, names, full) if names else []
    drawn += _of_pairs(table, task, names, ranking) if ranking and len(ranking.pairs) else []
    if table["bpw"].notna().all():
        drawn += [
            (f"widths-{slug(name)}", f"Score against size by the width of {name}", sentences.WIDTHS_ALT,
             figures.colored(table, task, name), table[["bpw", name, task]])
            for name in order[:3]
        ]  # fmt: skip
    if (checked := unseen(observations)) is not None:
        figure = figures.predicted_against_measured(checked, task)
        title = "Predicted and measured scores of unseen plans"
        drawn.append(("calibration", title, sentences.calibration_alt(checked), figure, checked))
    return [
        DrawnFigure(name, title, alt, figures.svg(figure), figures.png(figure), rows)
        for name, title, alt, figure, rows in drawn
    ]


def _of_ranking(ranking: Ranking) -> list[Drawn]:
    """Figures of the ranking: importance, and how far it rests on single levels."""
    drawn = [("importance", "Importance of the parts", sentences.importance_alt(ranking),
              figures.importance_shares(ranking.table), ranking.table.reset_index())]  # fmt: skip
    if len(ranking.levels):
        drawn.append(("levels", "How much the ranking depends on single bit widths", sentences.levels_alt(ranking),
                      figures.effect_of_widths(ranking.levels), ranking.levels))  # fmt: skip
    return drawn


def _by_bits(table: pd.DataFrame, task: str, names: Sequence[str], full: float | None) -> list[Drawn]:
    """Figures of the score over each component's width: as a mean over the others, and with the others native."""
    means = _means(quantized(table), task, names)
    drawn: list[Drawn] = []
    # where each plan quantizes one part, or all alike, an average over the others says nothing about the part itself
    bits = table[list(names)]
    one_or_uniform = ((bits != 16).sum(axis=1).le(1) | bits.nunique(axis=1).eq(1)).all()
    if means.groupby("part").size().max() > 1 and not (one_or_uniform and len(names) > 1):
        drawn.append(("by-bits", "Sensitivity to the width of each part", sentences.by_bits_alt(means, task, full),
                      figures.by_bits(table, task, names), means))  # fmt: skip
    alone = pd.concat([single(table, names, name).assign(part=name) for name in names])
    if alone.groupby("part").size().max() > 2:
        each = pd.concat([_means(quantized(single(table, names, name)), task, [name]) for name in names])
        drawn.append(("alone", "One part at a time, the others native", sentences.by_bits_alt(each, task, full, True),
                      figures.by_bits(table, task, names, alone=True), alone))  # fmt: skip
    return drawn


def _means(table: pd.DataFrame, task: str, names: Sequence[str]) -> pd.DataFrame:
    """The mean score of each part at each of its widths, of how many plans, and the best of them."""
    rows = table.melt(id_vars=[task], value_vars=list(names), var_name="part", value_name="bits")
    return rows.groupby(["part", "bits"])[task].agg(mean="mean", count="count", best="max").reset_index()


def _of_pairs(table: pd.DataFrame, task: str, names: Sequence[str], ranking: Ranking) -> list[Drawn]:
    """Figures of interactions: all pairs, and the strongest pair's widths."""
    drawn = [("interactions", "Interactions of pairs of parts", sentences.interactions_alt(ranking),
              figures.interactions(ranking.pairs, list(ranking.order)), ranking.pairs)]  # fmt: skip
    first, second = ranking.pairs.iloc[0][["a", "b"]]
    if {first, second} <= set(names):
        drawn.append(("pair", f"Widths of {first} and {second} together", sentences.PAIR_ALT,
                      figures.pairwise(table, task, first, second), table[[first, second, task]]))  # fmt: skip
    return drawn


def unseen(observations: Observations, folds: int = 5) -> pd.DataFrame | None:
    """Cross-validation: each plan as predicted by a surrogate fitted to the other folds; None where plans are few."""
    keys = np.array(observations.keys)
    groups = np.unique(keys)
    if len(groups) < 4 * folds:
        return None
    space = Space.of(observations.plans)
    index = space.encode(observations.plans)
    # replicates of a plan are in the same fold, or the surrogate would have seen what it predicts
    lot = dict(zip(groups, np.random.default_rng(0).permutation(len(groups)) % folds, strict=True))
    fold = np.array([lot[key] for key in keys])
    predictions = pd.DataFrame({"key": keys, "measured": observations.score, "expected": 0.0, "low": 0.0, "high": 0.0})
    pairs = len(space.names) <= 6  # the search for pairs is slow with many components
    for out in range(folds):
        seen = fold != out
        noise = observations.where(seen).noises
        model = fit_surrogate(space, index[seen], observations.score[seen], noise=noise, pairs=pairs)
        draws = model.draws(index[fold == out])
        # a measured score scatters around the expected one: the interval must hold both uncertainties
        scatter = model.sigma * np.random.default_rng(out).standard_normal(draws.shape)
        low, high = np.quantile(draws + scatter, [0.025, 0.975], axis=0)
        expected = model.predict(index[fold == out])
        predictions.loc[fold == out, ["expected", "low", "high"]] = np.column_stack([expected, low, high])
    return predictions
