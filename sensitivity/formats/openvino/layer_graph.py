"""Copies of one layer as an OpenVINO graph with random codes, to time the layer without its model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from sensitivity.formats.openvino.graph import OPTIONS, numbers
from sensitivity.formats.openvino.layout import FLOATS, Constant, constants
from sensitivity.spec.components import Weight
from sensitivity.spec.plan import Scheme

MOST = 128 * 2**20  # bytes of float32 weights in one graph at most: more than a processor's cache holds


class LayerGraph:
    """As many copies of a layer as the model has, all with the same input, so that weights are read from memory."""

    def __init__(self, weight: Weight, scheme: Scheme | None, copies: int, threads: int) -> None:
        import openvino
        from openvino import Type, op, opset14

        self.copies = max(min(copies, MOST // (4 * weight.numel)), 1)
        draw = np.random.default_rng(0)
        # kept, since OpenVINO does not copy the bytes of its constants, and packs weights only in the first pass
        self.kept: list[openvino.Tensor] = []

        def filled(constant: Constant) -> op.Constant:
            if constant.type in FLOATS.values():
                array = draw.random(constant.shape, np.float32) * 1e-3
                content = torch.from_numpy(array).to({v: k for k, v in FLOATS.items()}[constant.type])
                raw = content.view(torch.uint8).numpy().reshape(-1)
            else:
                raw = draw.integers(0, 256, constant.bytes, np.uint8)
            self.kept.append(openvino.Tensor(raw, list(constant.shape), getattr(Type, constant.type)))
            return op.Constant(self.kept[-1])

        x = op.Parameter(Type.f32, openvino.PartialShape([-1, weight.cols]))
        results = []
        for _ in range(self.copies):
            stored = _stored(weight, scheme)
            value = numbers(stored, [filled(one) for one in stored])
            results.append(opset14.result(opset14.matmul(x, value, False, True)))
        model = openvino.Model(results, [x], "layer")
        how = {**OPTIONS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.request = openvino.Core().compile_model(model, "CPU", how).create_infer_request()
        self.cols = weight.cols

    def seconds(self, tokens: int) -> tuple[float, float]:
        """Wall-clock and CPU seconds that one copy takes for this many tokens at once."""
        inputs = np.ones((tokens, self.cols), np.float32)
        began = time.perf_counter(), time.process_time()
        self.request.infer([inputs], share_inputs=True, share_outputs=True)
        ended = time.perf_counter(), time.process_time()
        wall, cpu = ((b - a) / self.copies for a, b in zip(began, ended, strict=True))
        return wall, cpu


def _stored(weight: Weight, scheme: Scheme | None) -> Sequence[Constant]:
    """The constants of the layer: codes and scales, or float32 values without a scheme."""
    if scheme is None:
        return (Constant(weight.name, "f32", (weight.rows, weight.cols)),)
    return constants(weight, scheme, torch.float16)
