"""FORMATS: a plan becomes the files that a runtime loads; one file per format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sensitivity.components import ComponentMap
from sensitivity.errors import UserError, unknown
from sensitivity.export import plan_json
from sensitivity.plan import Plan

# name -> writes the plan for a model into a folder or file, and returns what was written
FORMATS: dict[str, Callable[[ComponentMap, Plan, dict[str, Any], Path], Path]] = {
    "plan": plan_json.write,
}


def write(parts: ComponentMap, plan: Plan, facts: dict[str, Any], out: Path, format: str, force: bool = False) -> Path:
    """Write a plan in a runtime's format; what is already there stays unless `force`."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if out.exists() and not force:
        raise UserError(f"{out} is already there; choose another --out or add --force")
    return FORMATS[format](parts, plan, facts, out)
