"""openvino: writes the image half and the language half as OpenVINO graphs that hold our codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.formats.halved.halves import LANGUAGE, VISION, check_halves
from sensitivity.formats.halved.pieces import pieces_of
from sensitivity.formats.openvino import graph, layout, trace
from sensitivity.formats.openvino.layout import Constant
from sensitivity.formats.writing import stream
from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from openvino import Model

FILES = {VISION: "openvino_vision.xml", LANGUAGE: "openvino_language.xml"}
STORED = "openvino_weights.json"  # graph -> constant -> the SHA-256 of its bytes
LOAD = """\
from transformers import AutoProcessor
from sensitivity.formats.openvino.run import OpenVINOModel

model, processor = OpenVINOModel(FOLDER), AutoProcessor.from_pretrained(FOLDER)
inputs = processor(images=[image], text=[prompt], return_tensors="pt")
features = model.image_features(**model.image_inputs(inputs))
ends = {processor.tokenizer.eos_token_id}
tokens = model.generate(inputs["input_ids"][0].tolist(), features, ends, max_new_tokens=20)
"""
NOTES = ("Run it with one image per prompt. Sums are in float32, so that its answers are those that were measured.",)


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
    check_halves(trace.skeleton(model))


def write(job: Job, folder: Path) -> Written:
    """Write both graphs layer by layer, so that memory never holds all weights."""
    check(job.model)
    tensors = {tensor.parameter: tensor for tensor in job.source.tensors}
    names = [*job.weights, *(name for name in tensors if name not in job.weights)]  # codes in data-flow order
    bytes: dict[str, int] = {}  # of each parameter
    file_bytes = 0
    hashes: dict[str, str] = {}
    stored: dict[str, dict[str, str]] = {}
    unread = dict.fromkeys(names)
    for half, file in FILES.items():
        program = trace.traced(trace.skeleton(job.model), half)
        constants = {name: _constants(job, tensors[name]) for name in graph.weights_of(program, names)}
        graph.put_constants(program, constants)
        binary = folder / file.replace(".xml", ".bin")
        hashes[binary.name], stored[file] = _write_half(job, tensors, constants, program, folder / file)
        for name, parts in constants.items():
            bytes[name] = sum(constant.bytes for constant in parts)
            del unread[name]
        file_bytes += (folder / file).stat().st_size + binary.stat().st_size
    save(folder, STORED, stored)
    save(folder, "config.json", dict(job.source.config))
    job.source.copy_small_files(folder)
    by_component = job.by_component(bytes)
    headers = file_bytes - sum(by_component.values())
    return Written(LOAD, by_component, hashes, NOTES, True, headers, unread=tuple(unread))


def _constants(job: Job, tensor: CheckpointTensor) -> tuple[Constant, ...]:
    """The constants that a parameter becomes in a graph."""
    name = tensor.parameter
    if name in job.weights:
        return layout.constants(job.weights[name], job.schemes[name], job.half)
    return (layout.kept(name, tensor.dtype, tensor.shape),)


def _write_half(
    job: Job,
    tensors: Mapping[str, CheckpointTensor],
    constants: Mapping[str, Sequence[Constant]],
    program: Model,
    xml: Path,
) -> tuple[str, dict[str, str]]:
    """Write one graph and its binary file; returns the hash of the binary file and of each constant."""
    begin, offsets = graph.write_xml(program, [one for parts in constants.values() for one in parts], xml)
    parts = pieces_of(job, tensors, constants, layout.contents)
    return stream.write_at(xml.with_suffix(".bin"), begin, parts, offsets, job.at_once)
