"""Functions that tests call in a process of its own; they load little, so that it begins soon."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sensitivity.spec.errors import Failed, UserError


def write(file: str, text: str) -> None:
    print("standard output is nobody's")
    Path(file).write_text(text, encoding="utf-8")


def refuse(noise: int) -> None:
    os.write(2, b"a" * noise + b"\n")
    raise Failed("no space is left; free some")


def crash(number: int) -> None:
    os.kill(os.getpid(), number)


def stay(file: str) -> None:
    Path(file).write_text(f"{os.getpid()}\n")
    time.sleep(60)


def write_graphs(model: str, graphs: dict[str, str]) -> None:
    """A tracer without a runtime."""
    for half, graph in graphs.items():
        made = Path(f"{graph}.made")
        made.mkdir()
        (made / "half").write_text(f"{half} of {model}")
        made.rename(graph)


def refuse_graphs(model: str, graphs: dict[str, str]) -> None:
    raise UserError(f"the {next(iter(graphs))} half: no such operation")


def export(model: str, out: str, format: str) -> None:
    """Write a model with 4 bits everywhere."""
    import torch

    from sensitivity.formats.table import write
    from sensitivity.formats.writing.job import Job
    from sensitivity.models.discovery import inspect
    from sensitivity.spec.plan import Plan, Scheme

    parts = inspect(model, by="part")
    write(Job(model, parts, Plan.uniform(parts, Scheme("rtn", 4)), dtype=torch.float32), Path(out), format)
