"""onnx: the image half and the language half as ONNX graphs that hold our codes, written as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sensitivity.formats.halved.halves import LANGUAGE, VISION, check_halves
from sensitivity.formats.halved.pieces import pieces_of
from sensitivity.formats.onnx import graph, layout, trace
from sensitivity.formats.onnx.layout import Blocks, Constant
from sensitivity.formats.openvino.trace import skeleton
from sensitivity.formats.writing import stream
from sensitivity.formats.writing.checkpoint import save
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from onnx_ir import Model

FILES = {VISION: "vision.onnx", LANGUAGE: "language.onnx"}
DATA = ".data"  # the file of a graph's constants has the graph's name with this suffix
STORED = "onnx_weights.json"  # graph -> constant -> the SHA-256 of its bytes
LOAD = """\
from transformers import AutoProcessor
from sensitivity.formats.onnx.run import ONNXModel

model, processor = ONNXModel(FOLDER), AutoProcessor.from_pretrained(FOLDER)
inputs = processor(images=[image], text=[prompt], return_tensors="pt")
features = model.image_features(**model.image_inputs(inputs))
ends = {processor.tokenizer.eos_token_id}
tokens = model.generate(inputs["input_ids"][0].tolist(), features, ends, max_new_tokens=20)
"""
NOTES = ("Run it with one image per prompt. Sums are in float32, so that its answers are those that were measured.",)


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
    tensors = {tensor.parameter: tensor for tensor in job.source.tensors}
    names = [*job.weights, *(name for name in tensors if name not in job.weights)]  # codes in data-flow order
    bytes: dict[str, int] = {}  # of each parameter
    file_bytes = 0
    hashes: dict[str, str] = {}
    stored: dict[str, dict[str, str]] = {}
    unread = dict.fromkeys(names)
    programs = trace.traced(skeleton(job.model))
    for half, file in FILES.items():
        program = programs[half]
        constants = {name: _constants(job, tensors[name]) for name in graph.weights_of(program, names)}
        data = folder / f"{file}{DATA}"
        hashes[data.name], stored[file] = _write_half(job, tensors, constants, program, data)
        for name, parts in constants.items():
            bytes[name] = sum(constant.bytes for constant in parts)
            del unread[name]
        file_bytes += (folder / file).stat().st_size + data.stat().st_size
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
    data: Path,
) -> tuple[str, dict[str, str]]:
    """Write one graph and the file of its constants; returns the hash of that file and of each constant."""
    import onnx_ir

    blocks = {name: Blocks.of(job.weights[name], job.schemes[name]) for name in constants if name in job.weights}
    offsets = graph.offsets_of([one for parts in constants.values() for one in parts])
    graph.put_constants(program, constants, blocks, data.name, offsets)
    onnx_ir.save(program, data.with_suffix(""))
    parts = pieces_of(job, tensors, constants, layout.contents)
    return stream.write_at(data, b"", parts, offsets, job.at_once)
