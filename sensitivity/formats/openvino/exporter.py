"""openvino: writes the image half and the language half as OpenVINO graphs that hold our codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from sensitivity.formats.halved.graph_files import LOAD, WrittenHalf, constants_by_name, write_halves
from sensitivity.formats.halved.halves import LANGUAGE, VISION, check_halves
from sensitivity.formats.halved.pieces import pieces_of
from sensitivity.formats.halved.traceable import skeleton
from sensitivity.formats.halved.tracing import traced
from sensitivity.formats.openvino import graph, layout, trace
from sensitivity.formats.writing import stream
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

FILES = {VISION: "openvino_vision.xml", LANGUAGE: "openvino_language.xml"}
STORED = "openvino_weights.json"  # graph -> constant -> the SHA-256 of its bytes


def check(model: VLM | str) -> None:
    """Raise an error if OpenVINO is not installed or the model cannot be split; called before any slow work."""
    try:
        import openvino  # noqa: F401
        import transformers.exporters  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"openvino needs OpenVINO, and transformers 5.23 or newer ({error}); type "
            "`pip install 'vlm-sensitivity[openvino]'`"
        ) from error
    check_halves(skeleton(model))


def write(job: Job, folder: Path) -> Written:
    """Write both graphs layer by layer, so that memory never holds all weights."""
    check(job.model)
    load = LOAD.format(module="sensitivity.formats.openvino.run", model="OpenVINOModel")
    with traced(job.name, "openvino", trace.write_graphs, folder) as graphs:
        return write_halves(job, folder, FILES, STORED, load, partial(_write_half, job, graphs))


def _write_half(
    job: Job,
    graphs: Mapping[str, Path],
    half: str,
    xml: Path,
    names: Sequence[str],
    tensors: Mapping[str, CheckpointTensor],
) -> WrittenHalf:
    """Write one graph and its binary file."""
    program = trace.read(graphs[half])
    read = list(graph.weights_of(program, names))
    constants = constants_by_name(job, tensors, read, layout.constants, layout.kept)
    graph.put_constants(program, constants)
    begin, offsets = graph.write_xml(program, [one for parts in constants.values() for one in parts], xml)
    binary, parts = xml.with_suffix(".bin"), pieces_of(job, tensors, constants, layout.contents)
    return WrittenHalf(constants, binary, *stream.write_at(binary, begin, parts, offsets, job.at_once))
