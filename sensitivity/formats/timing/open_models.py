"""Opens the image half and the language half of a model in a runtime, to time them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from sensitivity.formats.gguf.exporter import check as check_gguf
from sensitivity.formats.halved.halves import Array, Language, check_halves
from sensitivity.formats.halved.model import HalvedModel
from sensitivity.formats.onnx.exporter import check as check_onnx
from sensitivity.formats.openvino.exporter import check as check_openvino
from sensitivity.models.halves.positions import positions_of
from sensitivity.models.halves.vision_half import vision_half_of
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM


class TorchHalves(HalvedModel):
    """The halves as torch computes them."""

    def __init__(self, vlm: VLM) -> None:
        self.vision, self.language = vision_half_of(vlm)(vlm), Language(vlm)
        self.config, self.positions = vlm.model.config, positions_of(vlm)
        self.dtype = vlm.model.dtype
        self.no_features = torch.empty(0, vlm.model.config.get_text_config().hidden_size, dtype=self.dtype)
        self.forget()

    @torch.inference_mode()
    def image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Array:
        """The rows that the language model reads in place of an image's placeholder tokens."""
        if self.positions:
            self.positions.grids = image_grid_thw
        images = self.vision.images(self.config, pixel_values.to(self.dtype), image_grid_thw)
        found: Tensor = torch.cat([self.vision(**one)["image_features"] for one in images])
        return found.float().numpy()

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], keep: int, features: Array | None = None) -> Array:
        """Read the next tokens of the prompt that `forget` began; returns logits at the last `keep` of them."""
        position_ids = self.positions.next(ids, self.read) if self.positions else None
        self.read += len(ids)
        found = self.language(
            input_ids=torch.tensor([ids]),
            image_features=self.no_features if features is None else torch.from_numpy(features).to(self.dtype),
            attention_mask=torch.ones(1, self.read, dtype=torch.int64),
            past_key_values=self.cache,
            logits_to_keep=torch.arange(len(ids) - keep, len(ids)),
            position_ids=position_ids,
        )
        logits: Tensor = found["logits"]
        return logits[0].float().numpy()

    def forget(self) -> None:
        """Begin a new prompt."""
        self.cache, self.read = DynamicCache(), 0


def _in_torch(model: str, dtype: str, threads: int) -> HalvedModel:
    return TorchHalves(load(model, dtype=dtype, quantized=True))


def _in_openvino(model: str, dtype: str, threads: int) -> HalvedModel:
    from sensitivity.formats.openvino.run import OpenVINOModel

    return OpenVINOModel(model, threads)


def _counted_in_openvino(model: str, threads: int) -> HalvedModel:
    from sensitivity.formats.openvino.run import OpenVINOModel

    return OpenVINOModel(model, threads, counted=True)


def _in_onnx_runtime(model: str, dtype: str, threads: int, accuracy_level: int | None = None) -> HalvedModel:
    from sensitivity.formats.onnx.run import ONNXModel

    return ONNXModel(model, threads, accuracy_level)


def _in_llama_cpp(model: str, dtype: str, threads: int) -> HalvedModel:
    from sensitivity.formats.gguf.model import GGUFModel

    # a CLIP tower is timed there, too: only its positions are wrong, which takes as long as right ones
    return GGUFModel(model, threads)


def _check_llama_cpp(model: str) -> None:
    """Raise an error for a model that llama.cpp cannot run, or if it is not installed."""
    from sensitivity.formats.gguf.library import check_installed

    check_gguf(model)
    check_installed()


def check_in_torch(model: str) -> None:
    """Raise an error for a model that cannot be timed half by half."""
    check_halves(load(model, config_only=True))


def _warm_torch() -> None:
    torch.ones(8, 8) @ torch.ones(8, 8)


def _warm_llama_cpp() -> None:
    from sensitivity.formats.gguf.library import xllamacpp_library

    xllamacpp_library()
    _warm_torch()  # since torch makes the images that llama.cpp reads


def _warm_openvino() -> None:
    import openvino
    from openvino import Type, op, opset14

    x = op.Parameter(Type.f32, openvino.PartialShape([-1, 8]))
    graph = openvino.Model([opset14.result(opset14.matmul(x, torch.ones(8, 8).numpy(), False, True))], [x], "one")
    openvino.Core().compile_model(graph, "CPU")(torch.ones(2, 8).numpy())


def _warm_onnx_runtime() -> None:
    import onnx
    import onnxruntime

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "one", [x], [y])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": torch.ones(2).numpy()})


# runtime -> the function that opens a model there
OPEN: dict[str, Callable[[str, str, int], HalvedModel]] = {
    "openvino": _in_openvino,
    "onnx": _in_onnx_runtime,
    "onnx-int8": partial(_in_onnx_runtime, accuracy_level=4),
    "gguf": _in_llama_cpp,
    "transformers": _in_torch,
}
# runtime -> the function that opens a model there, with counters of the time of each layer
COUNT: dict[str, Callable[[str, int], HalvedModel]] = {"openvino": _counted_in_openvino}
# runtime -> the function that raises an error if the runtime is not installed, or cannot open the model
CHECK: dict[str, Callable[[str], None]] = {
    "openvino": check_openvino,
    "onnx": check_onnx,
    "onnx-int8": check_onnx,
    "gguf": _check_llama_cpp,
    "transformers": check_in_torch,
}
# runtime -> the function that loads its libraries
WARM_UP: dict[str, Callable[[], None]] = {
    "openvino": _warm_openvino,
    "onnx": _warm_onnx_runtime,
    "onnx-int8": _warm_onnx_runtime,
    "gguf": _warm_llama_cpp,
    "transformers": _warm_torch,
}


def open_model(model: str, runtime: str, dtype: str, threads: int, counted: bool = False) -> HalvedModel:
    """Open a model in a runtime; with `counted`, the runtime counts the time of each layer."""
    if counted:
        return COUNT[runtime](model, threads)
    return OPEN[runtime](model, dtype, threads)


def warm_up(runtime: str) -> None:
    """Load the runtime's libraries, so that their memory is not taken for the model's."""
    WARM_UP[runtime]()
