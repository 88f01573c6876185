"""Runs an export in ONNX Runtime on its packed codes: greedy answers, and the likelihood of the right answers."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sensitivity.formats.halved.halves import LANGUAGE, VISION, Array
from sensitivity.formats.halved.model import HalvedModel, Running
from sensitivity.formats.onnx.exporter import FILES, STORED, check
from sensitivity.formats.onnx.trace import PAST, PRESENT
from sensitivity.models.halves.positions import positions_of
from sensitivity.models.halves.vision_half import vision_half_of
from sensitivity.models.loading import load
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession, OrtValue


class ONNXModel(HalvedModel):
    """Both graphs of an export in sessions; one prompt with its images at a time."""

    def __init__(self, folder: Path | str, threads: int = 0, accuracy_level: int | None = None) -> None:
        """Open both graphs; `threads` is how many threads ONNX Runtime uses, and 0 leaves that to ONNX Runtime.

        `accuracy_level` is that of MatMulNBits; with 4, activations are rounded to 8 bits, which is faster.
        """
        self.vision, self.language = (
            _session(Path(folder) / FILES[half], threads, accuracy_level) for half in (VISION, LANGUAGE)
        )
        inputs = {one.name: one for one in self.language.get_inputs()}
        self.width = int(inputs["image_features"].shape[1])
        self.empty = {name: _empty(one.shape) for name, one in inputs.items() if name.startswith(PAST)}
        self.past: dict[str, OrtValue] = dict(self.empty)
        self.read = 0  # tokens in the cache
        vlm = load(str(folder), config_only=True)
        self.vision_half, self.config, self.positions = vision_half_of(vlm), vlm.model.config, positions_of(vlm)

    def image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Array:
        """The rows that the language model reads in place of an image's placeholder tokens."""
        if self.positions:
            self.positions.grids = image_grid_thw
        images = self.vision_half.images(self.config, pixel_values.float(), image_grid_thw)
        each = ({name: value.numpy() for name, value in one.items()} for one in images)
        return np.concatenate([self.vision.run(["image_features"], inputs)[0] for inputs in each])

    def logits(self, ids: Sequence[int], keep: int, features: Array | None = None) -> Array:
        """Read the next tokens of the prompt that `forget` began; returns logits at the last `keep` of them."""
        from onnxruntime import OrtValue

        seen = self.read + len(ids)
        inputs: dict[str, Array] = {
            "input_ids": np.array([ids], np.int64),
            "image_features": np.zeros((1, self.width), np.float32) if features is None else features,
            "attention_mask": np.ones((1, seen), np.int64),
            "logits_to_keep": np.arange(len(ids) - keep, len(ids), dtype=np.int64),
        }
        if self.positions:
            inputs["position_ids"] = self.positions.next(ids, self.read).numpy()
        given = {name: OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
        cached = [name.replace(PAST, PRESENT) for name in self.past]
        found, *past = self.language.run_with_ort_values(["logits", *cached], {**given, **self.past})
        self.past = dict(zip(self.past, past, strict=True))
        self.read = seen
        logits: Array = found.numpy()[0]
        return logits

    def forget(self) -> None:
        """Begin a new prompt."""
        self.past, self.read = dict(self.empty), 0


def running(folder: Path, threads: int, accuracy_level: int | None = None) -> Running:
    """An export in ONNX Runtime, which evaluates tasks."""
    check(str(folder))
    check_arrived(folder)
    return Running.of(folder, ONNXModel(folder, threads, accuracy_level), "onnx")


def check_arrived(folder: Path) -> None:
    """Raise an error unless ONNX Runtime reads every weight, under its own name, with the bytes that were written."""
    import onnx

    stored: Mapping[str, Mapping[str, str]] = json.loads((folder / STORED).read_bytes())
    for file, expected in stored.items():
        model = onnx.load(folder / file, load_external_data=False)
        read = {name for node in model.graph.node for name in node.input}
        external = [one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
        # only the constants stay in the graph, and each becomes an output, so that ONNX Runtime returns it
        del model.graph.node[:], model.graph.input[:], model.graph.output[:], model.graph.initializer[:]
        model.graph.initializer.extend(external)
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in external
        )
        session = _opened(model, folder, 1)
        found = {one.name: _hash(session, one.name) for one in external if one.name in read}
        if wrong := [name for name, sha in expected.items() if found.get(name) != sha]:
            named = ", ".join(wrong[:4])
            raise UserError(f"ONNX Runtime does not read {named} of {folder / file} as written; export again")


def _hash(session: InferenceSession, name: str) -> str:
    """The SHA-256 of a constant's bytes in memory; numpy does not know all types."""
    (value,) = session.run_with_ort_values([name], {})
    return hashlib.sha256(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())).hexdigest()


def _session(file: Path, threads: int, accuracy_level: int | None) -> InferenceSession:
    """One graph, ready to run."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    if accuracy_level is not None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = accuracy_level
    return _opened(model, file.parent, threads)


def _opened(model: onnx.ModelProto, folder: Path, threads: int) -> InferenceSession:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    return InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _empty(shape: Sequence[int | str]) -> OrtValue:
    """The keys or the values of one layer before the first token, for a batch of one prompt."""
    from onnxruntime import OrtValue

    _, heads, _, width = shape
    # the tracer writes sizes of the cache as texts, also those that do not vary
    return OrtValue.ortvalue_from_numpy(np.zeros((1, int(heads), 0, int(width)), np.float32))
