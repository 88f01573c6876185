"""Parameters of a test of which `make test` takes a few, and `make slow` the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All values; those that are not kept are marked slow."""
    values = list(values)
    assert set(kept) < set(values), f"{set(kept) - set(values)} are no parameters"
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]
