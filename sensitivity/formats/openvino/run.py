"""Runs an export in OpenVINO on its packed codes: greedy answers, and the likelihood of the right answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sensitivity.formats.halved.halves import LANGUAGE, VISION, Array
from sensitivity.formats.halved.model import HalvedModel, Running, unlike
from sensitivity.formats.openvino.exporter import FILES, STORED, check
from sensitivity.formats.openvino.graph import OPTIONS
from sensitivity.formats.openvino.layer_counters import LayerCounters, name_layers
from sensitivity.models.halves.positions import positions_of
from sensitivity.models.halves.vision_half import vision_half_of
from sensitivity.models.loading import load
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from openvino import InferRequest


class OpenVINOModel(HalvedModel):
    """Both graphs of an export, compiled; one prompt with its images at a time."""

    def __init__(self, folder: Path | str, threads: int = 0, counted: bool = False) -> None:
        """Open an export; `threads` is how many threads OpenVINO uses, and 0 leaves that to OpenVINO.

        With `counted`, the seconds of each layer are counted.
        """
        self.folder, self.counted = Path(folder), counted
        self.options = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        self.counters: dict[str, LayerCounters] = {}
        vlm = load(str(self.folder), config_only=True)
        self.vision_half, self.config, self.positions = vision_half_of(vlm), vlm.model.config, positions_of(vlm)
        self.read = 0  # tokens in the cache

    @cached_property
    def vision(self) -> InferRequest:
        """The image half, compiled when it is first run, so that the memory of each half can be measured."""
        return self._compiled(VISION)

    @cached_property
    def language(self) -> InferRequest:
        """The language half, compiled when it is first run."""
        return self._compiled(LANGUAGE)

    def _compiled(self, half: str) -> InferRequest:
        import openvino

        core = openvino.Core()
        graph = core.read_model(self.folder / FILES[half])
        weights = name_layers(graph) if self.counted else []
        compiled = core.compile_model(graph, "CPU", {**OPTIONS, **self.options, "PERF_COUNT": self.counted})
        request = compiled.create_infer_request()
        if self.counted:
            self.counters[half] = LayerCounters(compiled, request, weights)
        return request

    def _infer(self, half: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run one graph."""
        output: Mapping[str, Array] = (self.vision if half == VISION else self.language).infer(inputs)
        if half in self.counters:
            self.counters[half].passes += 1
        return output

    def layer_seconds(self) -> dict[str, float]:
        """Weight -> the seconds that its layer has taken since the model was opened."""
        return {name: took for counters in self.counters.values() for name, took in counters.seconds().items()}

    def image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Array:
        """The rows that the language model reads in place of an image's placeholder tokens."""
        if self.positions:
            self.positions.grids = image_grid_thw
        images = self.vision_half.images(self.config, pixel_values.float(), image_grid_thw)
        each = (self._infer(VISION, {name: value.numpy() for name, value in one.items()}) for one in images)
        return np.concatenate([np.array(output["image_features"]) for output in each])

    def logits(self, ids: Sequence[int], keep: int, features: Array | None = None) -> Array:
        """Read the next tokens of the prompt that `forget` began; returns logits at the last `keep` of them."""
        width = self.language.get_compiled_model().input("image_features").get_partial_shape()[1].get_length()
        seen = self.read + len(ids)
        given: dict[str, Array] = {
            "input_ids": np.array([ids], np.int64),
            "image_features": np.zeros((1, width), np.float32) if features is None else features,
            "attention_mask": np.ones((1, seen), np.int64),
            "logits_to_keep": np.arange(len(ids) - keep, len(ids), dtype=np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        if self.positions:
            given["position_ids"] = self.positions.next(ids, self.read).numpy()
        output = self._infer(LANGUAGE, given)
        self.read = seen
        return np.array(output["logits"][0])

    def forget(self) -> None:
        """Begin a new prompt."""
        self.language.reset_state()
        self.read = 0


def running(folder: Path, threads: int) -> Running:
    """An export opened in OpenVINO, which evaluates tasks."""
    check(str(folder))
    check_arrived(folder)
    return Running.of(folder, OpenVINOModel(folder, threads), "openvino")


def check_arrived(folder: Path) -> None:
    """Raise an error unless OpenVINO reads every weight, under its own name, with the bytes that were written."""
    import openvino

    stored: Mapping[str, Mapping[str, str]] = json.loads((folder / STORED).read_bytes())
    for file, expected in stored.items():
        graph = openvino.Core().read_model(folder / file)
        constants = {op.get_friendly_name(): op for op in graph.get_ops() if op.get_type_name() == "Constant"}
        found = {name: constants[name].data for name in expected if name in constants}
        if wrong := unlike(found, expected):
            named = ", ".join(wrong[:4])
            raise UserError(f"OpenVINO does not read {named} of {folder / file} as written; export again")
