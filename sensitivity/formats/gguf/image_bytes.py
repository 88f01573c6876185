"""Turns a processor's pixels back into bytes: llama.cpp takes an image's bytes and scales them as the processor did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sensitivity.formats.halved.halves import Array
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

NEAR = 0.02  # pixels in float16 are at most this far from whole bytes


def as_bytes(vlm: VLM, pixel_values: Tensor, grids: Tensor | None) -> list[Array]:
    """Each image, or each of its tiles, as rows x columns x 3 bytes."""
    images = _of_patches(vlm, pixel_values, grids) if grids is not None else pixel_values.flatten(0, -4)
    return [_bytes(vlm, image.float()) for image in images]


def _bytes(vlm: VLM, image: Tensor) -> Array:
    """The bytes that the processor scaled to one image (3 x rows x columns)."""
    processor = vlm.processor.image_processor
    mean, std = (torch.tensor(list(one))[:, None, None] for one in (processor.image_mean, processor.image_std))
    values = (image * std + mean) * 255
    if float((values - values.round()).abs().max()) > NEAR:
        raise UserError(
            f"the processor of {vlm.name} makes pixels that are not whole bytes, which llama.cpp does not take"
        )
    whole: Array = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(whole)


def _of_patches(vlm: VLM, patches: Tensor, grids: Tensor) -> Sequence[Tensor]:
    """Images from Qwen2-VL's patches, in which those that are merged are neighbors, and each has two equal frames."""
    vision, images, begin = vlm.model.config.vision_config, [], 0
    merge, side = int(vision.spatial_merge_size), int(vision.patch_size)
    for time, rows, cols in grids.tolist():
        if time != 1:
            raise UserError("llama.cpp is given images here, not videos")
        some = patches[begin : begin + rows * cols].reshape(
            rows // merge, cols // merge, merge, merge, 3, vision.temporal_patch_size, side, side
        )
        begin += rows * cols
        images.append(some[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * side, cols * side))
    return images
