"""gguf: writes the language model, and the vision tower with its projector, as GGUF files that hold our codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sensitivity.formats.gguf.blocks import packed
from sensitivity.formats.gguf.metadata import language_writer, vision_writer
from sensitivity.formats.gguf.names import CLIP, QWEN, Placed, check_named, placed
from sensitivity.formats.gguf.vocabulary import add_vocabulary, check_vocabulary
from sensitivity.formats.halved.halves import LANGUAGE, VISION
from sensitivity.formats.writing import stream
from sensitivity.formats.writing.checkpoint import on_integer_grid, save, unquantized
from sensitivity.formats.writing.job import Job, Written
from sensitivity.formats.writing.source import CheckpointTensor
from sensitivity.formats.writing.stream import Piece, Spec
from sensitivity.models.config_only import without_weights
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.spec.stored_bits import GGUF_BLOCK, GGUF_BLOCK_BYTES, GGUF_MATRICES, gguf_type

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILES = {VISION: "mmproj.gguf", LANGUAGE: "language.gguf"}
STORED = "gguf_weights.json"  # file -> tensor -> the SHA-256 of its bytes
FLOATS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
LOAD = """\
from transformers import AutoProcessor
from sensitivity.formats.gguf.run import opened

model, processor = opened(FOLDER), AutoProcessor.from_pretrained(FOLDER)
inputs = processor(images=[image], text=[prompt], return_tensors="pt")
features = model.image_features(**model.image_inputs(inputs))
ends = {processor.tokenizer.eos_token_id}
tokens = model.generate(inputs["input_ids"][0].tolist(), features, ends, max_new_tokens=20)
"""
ROUNDS_INPUTS = (
    "The weights are exactly those that were measured, but llama.cpp rounds what a quantized layer reads to 8 bits in "
    "groups of 32, so that a few answers can differ; `sensitivity verify` says how many."
)
# https://github.com/ggml-org/llama.cpp/issues/25814: closed there as stale
DEFECT = (
    "llama.cpp up to at least 2026.10 computes CLIP towers wrongly: it puts the class token after the patches, but "
    "positions and the choice of features expect it before them (ggml-org/llama.cpp#25814). mmproj.gguf needs a build "
    "with the one-line fix of pull request 25844"
)
NO_EPSILON = (
    "llama.cpp 2026.10 leaves out the epsilon of the norms in the language models of Qwen2-VL and Qwen2.5-VL, which "
    "changes logits a little where hidden states are small."
)


@dataclass(frozen=True)
class _FileTensor:
    """A tensor of a GGUF file: where its values come from, its type, and its number of bytes."""

    placed: Placed
    type: str
    bytes: int


def check(model: VLM | str) -> None:
    """Raise an error if the package gguf is not installed or llama.cpp cannot run the model."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"gguf needs the package gguf ({error}); type `pip install 'vlm-sensitivity[gguf]'`") from error
    vlm = with_processor(model)
    check_named(vlm)
    check_vocabulary(vlm.processor.tokenizer)


def with_processor(model: VLM | str) -> VLM:
    """A model with its processor: loaded by name without weights, or as it is if it is loaded and has one."""
    if isinstance(model, VLM) and model.processor is not None:
        return model
    return without_weights(model if isinstance(model, str) else model.name)


def write(job: Job, folder: Path) -> Written:
    """Write both files tensor by tensor, so that memory never holds all weights."""
    check(job.model)
    vlm = with_processor(job.model)
    tensors = {tensor.parameter: tensor for tensor in job.source.tensors}
    names = [*job.weights, *(name for name in tensors if name not in job.weights)]  # codes in data-flow order
    matrices = _matrices(job)
    bytes: dict[str, int] = {}  # of each parameter
    hashes: dict[str, str] = {}
    stored: dict[str, dict[str, str]] = {}
    halves: dict[str, dict[str, list[_FileTensor]]] = {half: {} for half in FILES}
    unread: list[str] = []
    for name in names:
        half, places = placed(vlm.model.config, name, tensors[name].shape)
        if not places:
            unread.append(name)
            continue
        halves[half][name] = [_tensor(job, tensors[name], one, name in matrices) for one in places]
        bytes[name] = sum(one.bytes for one in halves[half][name])
    for half, file in FILES.items():
        hashes[file], stored[file] = _write_half(job, vlm, half, tensors, halves[half], folder / file)
    save(folder, STORED, stored)
    save(folder, "config.json", dict(job.source.config))
    job.source.copy_small_files(folder)
    by_component = job.by_component(bytes)
    headers = sum((folder / file).stat().st_size for file in FILES.values()) - sum(by_component.values())
    return Written(LOAD, by_component, hashes, _notes(vlm.model.config), True, headers, unread=unread)


def is_clip(config: PreTrainedConfig) -> bool:
    """Whether the vision tower is one that llama.cpp computes wrongly."""
    return bool(config.vision_config.model_type == CLIP)


def remark(folder: Path, same: bool) -> str:
    """What a verification adds to its words: why answers differ, and where the image half was computed."""
    words = "" if same else "; llama.cpp rounds what quantized layers read to 8 bits"
    if is_clip(load(str(folder), config_only=True).model.config):
        words += "; the image half was computed in transformers, since llama.cpp computes CLIP towers wrongly"
    return words


def _tensor(job: Job, tensor: CheckpointTensor, place: Placed, matrix: bool) -> _FileTensor:
    """The type and the number of bytes of a tensor."""
    count = torch.Size(place.shape).numel()
    if tensor.parameter in job.weights:
        type = gguf_type(job.schemes[tensor.parameter])
        return _FileTensor(place, type, count // GGUF_BLOCK * GGUF_BLOCK_BYTES[type])
    if tensor.dtype not in FLOATS:
        raise UserError(f"{tensor.parameter} is stored as {tensor.dtype}, which GGUF does not hold; use --format fake")
    dtype = tensor.dtype if matrix else torch.float32
    return _FileTensor(place, FLOATS[dtype], count * dtype.itemsize)


def _matrices(job: Job) -> set[str]:
    """The parameters that may keep their own dtype; llama.cpp takes all others in float32."""
    kept = {kept.name for kept in job.parts.kept if kept.reason in GGUF_MATRICES}
    return kept | {weight.name for weight in job.parts.weights}


def _write_half(
    job: Job,
    vlm: VLM,
    half: str,
    tensors: Mapping[str, CheckpointTensor],
    parts: Mapping[str, Sequence[_FileTensor]],
    file: Path,
) -> tuple[str, dict[str, str]]:
    """Write one file; returns its hash and that of each tensor."""
    writer = _writer(vlm, half)
    every = [one for several in parts.values() for one in several]
    for one in every:
        _add(writer, one)
    begin = header_of(writer, file)
    offsets, end = {}, len(begin)
    for one in every:
        offsets[one.placed.name] = end
        end += one.bytes + -one.bytes % writer.data_alignment
    pieces = [_piece(job, tensors[name], several) for name, several in parts.items()]
    return stream.write_at(file, begin, pieces, offsets, job.at_once)


def _writer(vlm: VLM, half: str) -> GGUFWriter:
    if half == VISION:
        return vision_writer(vlm)
    config = vlm.model.config
    writer = language_writer(config)
    tokenizer = vlm.processor.tokenizer
    template = getattr(vlm.processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    add_vocabulary(writer, tokenizer, config.get_text_config().vocab_size, template)
    return writer


def _add(writer: GGUFWriter, one: _FileTensor) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    # float32 is not the type of the values, which the last argument says; it says that the shape counts no bytes
    writer.add_tensor_info(
        one.placed.name, one.placed.shape, np.dtype(np.float32), one.bytes, GGMLQuantizationType[one.type.upper()]
    )


def header_of(writer: GGUFWriter, file: Path) -> bytes:
    """The bytes of a file before its first tensor."""
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = file.read_bytes()
    return begin + bytes(-len(begin) % writer.data_alignment)


def _piece(job: Job, tensor: CheckpointTensor, parts: Sequence[_FileTensor]) -> Piece:
    """The bytes of a parameter's tensors, computed when they are written."""
    name = tensor.parameter

    def make() -> Sequence[Tensor]:
        if name in job.weights:
            codes = on_integer_grid(job, tensor, job.schemes[name])
            return [packed(name, codes, one.type, one.placed.rows) for one in parts]
        values = unquantized(job, tensor)
        types = {code: dtype for dtype, code in FLOATS.items()}
        made = (one.placed.of(values).to(types[one.type]).contiguous() for one in parts)
        return [one.reshape(-1).view(torch.uint8) for one in made]

    return Piece(tuple(Spec(one.placed.name, torch.uint8, (one.bytes,)) for one in parts), make)


def _notes(config: PreTrainedConfig) -> Sequence[str]:
    """Notes for the model card about what llama.cpp computes in another way."""
    notes = [
        ROUNDS_INPUTS,
        "llama.cpp resizes images by its own rules; the lines above use those of the processor.",
    ]
    if is_clip(config):
        notes.append(f"{DEFECT}. The lines above compute the image half in transformers, from mmproj.gguf.")
    if config.model_type in QWEN:
        notes.append(NO_EPSILON)
    return notes
