"""Writes galleries of changed answers as a page of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sensitivity.analysis.failures.gallery import FailureGallery
from sensitivity.analysis.reporting.environment import check, rendered
from sensitivity.spec.files import write_atomically

__all__ = ["check", "write"]


def write(out: Path, model: str, galleries: Sequence[FailureGallery], title: str = "what breaks first") -> None:
    """Write the page, over an earlier one of ours only."""
    check(out)
    page = rendered(
        "failures.html",
        model=model,
        title=title,
        galleries=galleries,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
