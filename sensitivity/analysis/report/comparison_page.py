"""Writes a comparison of two plans or two studies as a page: the rows, and for two plans the answers that differ."""

from __future__ import annotations

from pathlib import Path

from sensitivity.analysis.comparing.sides import Pairing, Side
from sensitivity.analysis.comparing.versus import Row, Versus
from sensitivity.analysis.failures.changes import changes
from sensitivity.analysis.failures.gallery import Card, Gallery, notes_on
from sensitivity.analysis.failures.pictures import Pictures
from sensitivity.analysis.report.environment import check, rendered
from sensitivity.spec.files import write_atomically
from sensitivity.study.examples.answer_counts import counts_by_kind
from sensitivity.study.examples.questions import questions

__all__ = ["check", "write"]

MOST = 60  # examples that are shown


def write(out: Path, a: Side, b: Side, comparison: Versus) -> None:
    """Write the page, over an earlier one of ours only."""
    check(out)
    single = comparison.rows[0] if a.plan or b.plan else None
    page = rendered(
        "comparison.html",
        versus=comparison,
        galleries=[_gallery(a, b, single)] if single else [],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def _gallery(a: Side, b: Side, row: Row) -> Gallery:
    """The examples that both plans have seen and that they answer differently."""
    before, after = a.study.examples(row.a), b.study.examples(row.b)
    assert before is not None, "the comparison has a row of it"
    assert after is not None, "and of the other"
    pairing = Pairing(a.study, b.study)
    names = zip(after["task"], after["example"], strict=True)
    after = after[[pairing.is_same(str(task), str(example)) for task, example in names]]
    every = changes(after, before, questions(b.study.path, b.study.meta))
    pictures = Pictures(b.study.meta)
    cards = tuple(Card(one, tuple(pictures.of(one))) for one in every[:MOST])
    counts = tuple(counts_by_kind(after, before))
    return Gallery("Answers that differ", row.b, "A", counts, len(every), cards, tuple(notes_on(cards)), "B")
