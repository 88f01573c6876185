"""Counts the tokens that each vision or connector layer reads for one image, in a forward pass without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sensitivity.formats.halved.model import HalvedModel
from sensitivity.formats.halved.traceable import shapes_of_weights, without_values
from sensitivity.models.halves.vision_half import vision_half_of
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError, reason


def rows_by_weight(vlm: VLM, parts: ComponentMap, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Weight -> rows of its layer's input for the first image of a processor's output.

    The values of the weights and of the image are not read.
    """
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
        half, read = vision_half_of(vlm), HalvedModel.image_inputs(inputs)
        first = half.images(vlm.model.config, read["pixel_values"], read.get("image_grid_thw"))[0]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # tensors that have no values
            image = {name: torch.empty_like(value) for name, value in first.items()}
            torch.func.functional_call(half(empty), shapes_of_weights(empty), kwargs=image, tie_weights=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the tokens of an image cannot be counted for {vlm.name} ({reason(error)})") from error
    return found
