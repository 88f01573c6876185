"""Counts the tokens that each vision or connector layer reads for one image, in a forward pass without weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sensitivity.formats.halved.halves import Vision
from sensitivity.formats.openvino.trace import image_input, shapes_of_weights, without_values
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError, reason


def rows_at_once(vlm: VLM, parts: ComponentMap) -> dict[str, int]:
    """Weight -> rows of its layer's input for one image; the values of the weights are not read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    empty = replace(vlm, model=without_values(vlm.model))
    modules = dict(empty.model.named_modules())
    found = {weight.name: 0 for weight in parts.weights if weight.part != "language"}

    def count(weight: Weight) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[weight.name] += inputs[0].numel() // weight.cols

        modules[weight.reader].register_forward_pre_hook(hook)

    for weight in parts.weights:
        if weight.name in found:
            count(weight)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # tensors that have no values
            inputs = {"pixel_values": image_input(vlm)}
            torch.func.functional_call(Vision(empty), shapes_of_weights(empty), kwargs=inputs, tie_weights=True)
    except Exception as error:
        raise UserError(f"the tokens of an image cannot be counted for {vlm.name} ({reason(error)})") from error
    return found
