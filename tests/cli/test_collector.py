"""Python's collector in the process of a command: seldom while libraries are imported, as usual for a model."""

from __future__ import annotations

from forked import forked

CODE = """
import gc, sys
gc.set_threshold(700)
from sensitivity.cli import main as cli
from sensitivity.cli.arguments import model_and_tasks
from sensitivity.models import loading
cli.VERBS["methods"].run = lambda args: seen.append(gc.get_threshold()[0]) or {}
seen = []
for argv in (["methods", "--json"], None):
    sys.argv[1:] = ["methods", "--json"]
    cli.main(argv)
loading.load = lambda *args, **how: seen.append(gc.get_threshold()[0]) or [][0]
sys.argv[1:] = "sweep embedded:scenes-llava --n 4 --bits 8 --out new".split()
cli.main()
print(seen)
"""


def test_it_looks_seldom_in_a_command_and_as_usual_once_a_model_is_loaded() -> None:
    """A program that calls `main` with words of its own keeps its collector."""
    assert "[700, 40000, 700]" in forked(CODE)
