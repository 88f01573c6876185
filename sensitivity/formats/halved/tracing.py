"""Traces the two halves of a model in a process of its own, which is started again if it crashes."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sensitivity.formats.halved.halves import LANGUAGE, VISION
from sensitivity.formats.halved.traceable import Half, Inputs, prepared, skeleton
from sensitivity.formats.writing import own_process
from sensitivity.spec.errors import UserError, reason

TRIES = 3  # how many processes may crash before an error is raised
# a format's tracer: (module, example inputs, their dynamic sizes, the folder that gets the graph) -> what it has made
Tracer = Callable[[Half, Inputs, Inputs, Path], object]

_kept: Path | None = None  # inside `kept`: the folder of graphs that are traced already


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Inside the block, each half of a model is traced only once: tracing takes longer than writing a small model.

    The graphs are kept in a new folder, as files: cloning a traced Qwen2-VL-2B in memory ended the process.
    """
    global _kept
    folder.mkdir()
    _kept = folder
    try:
        yield
    finally:
        _kept = None


@contextmanager
def traced(model: str, format: str, write_graphs: Callable[..., None], space: Path) -> Iterator[dict[str, Path]]:
    """Each half of a model as the folder that holds its graph; the input of parameter P is `parameter_input(P)`.

    `write_graphs` is the function of a format that calls `write_traced` in the process that traces. Graphs lie in a
    temporary folder in `space`. That of an unfinished export is best, since the next export removes what a kill leaves.

    With torch 2.13, a process that has traced often finds its memory damaged later, when it collects garbage or frees
    what it made. So tracing has a process of its own, which does neither.
    """
    with _place(model, format, space) as place:
        graphs = {half: place / half for half in (VISION, LANGUAGE)}
        for _ in range(TRIES):
            if missing := {half: str(graph) for half, graph in graphs.items() if not graph.exists()}:
                ended = own_process.call(write_graphs, model=model, graphs=missing)
                if ended.status and not ended.crashed:
                    raise UserError(f"{model} cannot be traced for {format} ({ended.last_line})")
        for half, graph in graphs.items():
            if not graph.exists():
                raise UserError(f"tracing the {half} half of {model} for {format} crashed {TRIES} times; try again")
        yield graphs


@contextmanager
def _place(model: str, format: str, space: Path) -> Iterator[Path]:
    """The folder for a model's graphs in one format: a temporary one, or inside `kept` one that stays."""
    if _kept is None:
        with tempfile.TemporaryDirectory(prefix="tracing-", dir=space) as temporary:
            yield Path(temporary)
    else:
        place = _kept / hashlib.sha256(f"{format} {model}".encode()).hexdigest()
        place.mkdir(exist_ok=True)
        yield place


def write_traced(model: str, graphs: Mapping[str, str], trace: Tracer) -> None:
    """Trace some halves of a model, and write the graph of each into its folder; runs in the process that traces."""
    gc.disable()
    vlm, alive = skeleton(model), []
    for half, graph in graphs.items():
        module, inputs, shapes = prepared(vlm, half)
        unfinished = Path(tempfile.mkdtemp(dir=Path(graph).parent))
        try:
            made = trace(module, inputs, shapes, unfinished)
        except Exception as error:
            raise UserError(f"the {half} half: {reason(error)}") from error
        alive.append((module, inputs, made))  # so that nothing is freed
        unfinished.rename(graph)  # a graph that is there is whole
