"""Writes a comparison as a page: its rows, and the frontiers of two studies or the differing answers of two plans."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from markupsafe import Markup

from sensitivity.analysis.comparing.sides import Pairing, Side
from sensitivity.analysis.comparing.versus import BEST, Row, Versus
from sensitivity.analysis.failures.changes import changed_answers
from sensitivity.analysis.failures.gallery import Card, FailureGallery, notes_on
from sensitivity.analysis.failures.pictures import Pictures
from sensitivity.analysis.reporting import figures
from sensitivity.analysis.reporting.environment import check, rendered
from sensitivity.analysis.reporting.static_figures import DrawnFigure
from sensitivity.analysis.reporting.table_rows import frontier_rows
from sensitivity.spec.files import slug, write_atomically
from sensitivity.study.examples.answer_counts import counts_by_kind
from sensitivity.study.examples.questions import read_questions

__all__ = ["check", "write"]

MAX_EXAMPLES = 60  # that are shown


def write(out: Path, a: Side, b: Side, comparison: Versus) -> None:
    """Write the page, over an earlier one of ours only."""
    check(out)
    single = comparison.rows[0] if a.plan or b.plan else None
    page = rendered(
        "comparison.html",
        versus=comparison,
        pictures=[] if single else [_frontiers(a, b, comparison, task) for task in comparison.tasks],
        galleries=[_gallery(a, b, single)] if single else [],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def _frontiers(a: Side, b: Side, comparison: Versus, task: str) -> tuple[str, Markup]:
    """Both frontiers of a task in one figure, with its title."""
    rows = {name: frontier_rows(side.study.table(), task) for name, side in (("A", a), ("B", b))}
    picture = DrawnFigure(
        f"frontiers-{slug(task)}", f"{task}: the frontiers of A and B", _frontiers_alt(comparison, task),
        figures.svg(figures.frontiers(rows, task)), b"", pd.concat(rows),
    )  # fmt: skip
    return picture.title, picture.inline("compared")


def _frontiers_alt(comparison: Versus, task: str) -> str:
    """The text alternative: what both reach within each budget."""
    best = [row for row in comparison.rows if row.what.startswith(BEST) and row.paired.task == task]
    reached = (
        f"{row.what.removeprefix('best ')} A {row.paired.a.mean:.3f} and B {row.paired.b.mean:.3f}" for row in best
    )
    return "; ".join([f"Lines of the best {task} that each size reaches", *reached]) + "."


def _gallery(a: Side, b: Side, row: Row) -> FailureGallery:
    """The examples that both plans have seen and that they answer differently."""
    before, after = a.study.examples(row.a), b.study.examples(row.b)
    assert before is not None, "the comparison has a row for it"
    assert after is not None, "the comparison has a row for it"
    pairing = Pairing(a.study, b.study)
    names = zip(after["task"], after["example"], strict=True)
    after = after[[pairing.is_same(str(task), str(example)) for task, example in names]]
    every = changed_answers(after, before, read_questions(b.study.path, b.study.meta), both_ways=True)
    pictures = Pictures(b.study.meta)
    cards = tuple(Card(one, tuple(pictures.of(one))) for one in every[:MAX_EXAMPLES])
    counts = tuple(counts_by_kind(after, before))
    return FailureGallery(
        "Answers that differ", row.b, "A", counts, len(every), cards, tuple(notes_on(cards)), "B",
        order="those whose scores differ most first, losses and gains in turn",
    )  # fmt: skip
