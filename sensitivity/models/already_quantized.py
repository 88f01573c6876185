"""Weights that were quantized before they were stored: a `fake` export, which looks like any model."""

from __future__ import annotations

from pathlib import Path

from sensitivity.spec.errors import UserError
from sensitivity.spec.plan_file import EXPORTED, read


def quantized_before(folder: Path) -> str | None:
    """A sentence on the plan by which an export's weights were quantized; None for any other folder."""
    file = folder / EXPORTED
    if not file.is_file():
        return None
    try:
        _, plan, facts = read(file)
    except UserError:  # a file of another program, or a damaged one
        return None
    if plan.is_native:
        return None
    return f'these weights were quantized already: {plan.describe()} of {facts["model"]}; "full precision" here is that'
