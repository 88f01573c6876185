"""The image half of a LLaVA export in transformers, from mmproj.gguf: llama.cpp computes CLIP towers wrongly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sensitivity.formats.gguf.exporter import FILES
from sensitivity.formats.gguf.model import GGUFModel
from sensitivity.formats.gguf.names import placed
from sensitivity.formats.halved.halves import VISION, Array
from sensitivity.formats.halved.traceable import without_values
from sensitivity.models.halves.vision_half import Vision
from sensitivity.models.vlm import VLM


class GGUFModelWithCLIP(GGUFModel):
    """An export whose language half runs in llama.cpp, and whose image half runs in transformers."""

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        super().__init__(folder, threads)
        empty = replace(self.vlm, model=without_values(self.vlm.model))  # its buffers, such as positions, have values
        self.tower = Vision(with_tower(empty, self.folder / FILES[VISION]))

    @torch.inference_mode()
    def image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Array:
        """The rows that the language model reads in place of an image's placeholder tokens."""
        found: Array = self.tower(pixel_values.float())["image_features"].numpy()
        return found


def with_tower(vlm: VLM, file: Path) -> VLM:
    """Give a model without weights those of its vision tower and projector, as the package gguf reads them."""
    from gguf import GGUFReader, dequantize

    stored = {one.name: one for one in GGUFReader(file).tensors}
    for name, parameter in list(vlm.model.named_parameters()):
        half, places = placed(vlm.model.config, name, tuple(parameter.shape))
        if half != VISION:
            continue
        values = torch.ones(parameter.shape)  # for parameters that are never read
        if places:
            one = stored[places[0].name]
            values = torch.from_numpy(np.array(dequantize(one.data, one.tensor_type))).reshape(parameter.shape)
        module, _, leaf = name.rpartition(".")
        setattr(vlm.model.get_submodule(module), leaf, nn.Parameter(values.float(), requires_grad=False))
    return vlm
