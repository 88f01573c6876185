"""Python's collector of garbage: it seldom looks while libraries are imported, since nothing of them is garbage."""

from __future__ import annotations

import gc

# new objects after which it looks: with the usual 700, it takes a quarter of the CPU time of importing transformers
SELDOM = 40_000
_usual = gc.get_threshold()[0]


def look_seldom() -> None:
    """For the process of a command, from its beginning."""
    gc.set_threshold(SELDOM)


def look_as_usual() -> None:
    """Before a model is loaded: memory that passes leave behind must be free soon. What is imported by now stays."""
    if gc.get_threshold()[0] == SELDOM:
        gc.freeze()
        gc.set_threshold(_usual)
