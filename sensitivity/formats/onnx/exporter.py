"""onnx: the image half and the language half as ONNX graphs that hold our codes, written as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from sensitivity.formats.halved.graph_files import LOAD, WrittenHalf, constants_by_name, write_halves
from sensitivity.formats.halved.halves import LANGUAGE, VISION, check_halves
from sensitivity.formats.halved.pieces import pieces_of
from sensitivity.formats.halved.traceable import skeleton
from sensitivity.formats.halved.tracing import traced
from sensitivity.formats.onnx import graph, layout, trace
from sensitivity.formats.onnx.layout import Blocks
from sensitivity.formats.writing import stream
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

FILES = {VISION: "vision.onnx", LANGUAGE: "language.onnx"}
DATA = ".data"  # the file of a graph's constants has the graph's name with this suffix
STORED = "onnx_weights.json"  # graph -> constant -> the SHA-256 of its bytes


def check(model: VLM | str) -> None:
    """Raise an error if ONNX Runtime is not installed or the model cannot be split; called before any slow work."""
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import transformers.exporters  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"onnx needs ONNX Runtime, and transformers 5.23 or newer ({error}); type "
            "`pip install 'vlm-sensitivity[onnx]'`"
        ) from error
    check_halves(skeleton(model))


def write(job: Job, folder: Path) -> Written:
    """Write both graphs layer by layer, so that memory never holds all weights."""
    check(job.model)
    load = LOAD.format(module="sensitivity.formats.onnx.run", model="ONNXModel")
    with traced(job.name, "onnx", trace.write_graphs, folder) as graphs:
        return write_halves(job, folder, FILES, STORED, load, partial(_write_half, job, graphs))


def _write_half(
    job: Job,
    graphs: Mapping[str, Path],
    half: str,
    file: Path,
    names: Sequence[str],
    tensors: Mapping[str, CheckpointTensor],
) -> WrittenHalf:
    """Write one graph and the file of its constants."""
    import onnx_ir

    program, data = trace.read(graphs[half]), file.with_name(f"{file.name}{DATA}")
    read = list(graph.weights_of(program, names))
    constants = constants_by_name(job, tensors, read, layout.constants, layout.kept)
    blocks = {name: Blocks.of(job.weights[name], job.schemes[name]) for name in constants if name in job.weights}
    offsets = graph.offsets_of([one for parts in constants.values() for one in parts])
    graph.put_constants(program, constants, blocks, data.name, offsets)
    onnx_ir.save(program, file)
    parts = pieces_of(job, tensors, constants, layout.contents)
    return WrittenHalf(constants, data, *stream.write_at(data, b"", parts, offsets, job.at_once))
