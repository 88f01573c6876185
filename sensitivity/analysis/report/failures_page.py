"""Writes galleries of changed answers as a page of their own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sensitivity.analysis.failures.gallery import Gallery
from sensitivity.analysis.report.environment import GENERATOR, check, environment
from sensitivity.spec.files import write_atomically
from sensitivity.spec.version import __version__

__all__ = ["check", "write"]


def write(out: Path, model: str, galleries: Sequence[Gallery], title: str = "what breaks first") -> None:
    """Write the page, over an earlier one of ours only."""
    check(out)
    page = (
        environment()
        .get_template("failures.html")
        .render(
            model=model,
            title=title,
            galleries=galleries,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            generator=GENERATOR,
            version=__version__,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode("utf-8", "replace"))
