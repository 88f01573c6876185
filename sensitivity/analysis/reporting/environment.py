"""The environment of the pages' templates: filters for figures and texts, and the mark by which a page is known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from sensitivity.analysis.failures.gallery import shortened
from sensitivity.spec.errors import UserError
from sensitivity.spec.sizes import bytes_in_words
from sensitivity.spec.version import __version__

GENERATOR = '<meta name="generator" content="sensitivity">'  # marks a page that we wrote and may replace


def jinja_environment() -> jinja2.Environment:
    """Jinja with our templates and filters, and what the frame of a page says; an undefined name is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("sensitivity.analysis.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "score": _score, "percent": _percent, "in_words": bytes_in_words, "shortened": shortened, "coded": _coded,
    }  # fmt: skip
    made.filters |= filters
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    made.globals |= {"made": now, "version": __version__, "generator": GENERATOR}  # for the frame of every page
    return made


def rendered(template: str, **values: object) -> bytes:
    """A page made from a template; a lone surrogate code point, which an answer may hold, becomes a question mark."""
    return jinja_environment().get_template(template).render(**values).encode("utf-8", "replace")


def _coded(text: str) -> Markup:
    """A sentence whose commands stand between backticks, as HTML."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _percent(value: float | None) -> str:
    """A share in percent, a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f} %"


def _score(value: float | None) -> str:
    """A score with three decimals, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}"


def check(out: Path) -> None:
    """Raise an error where a page may not be written: its name does not end with .html, or the file is not ours."""
    if out.suffix != ".html":
        raise UserError(f"--out takes a file whose name ends with .html, not {out}")
    if out.exists() and not (out.is_file() and GENERATOR.encode() in out.read_bytes()[:4096]):
        raise UserError(f"{out} is not replaced: it is not a page that sensitivity wrote; choose another --out")
