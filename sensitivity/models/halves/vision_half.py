"""The image half of each type of model, projector included: what it reads of an image, and what it computes."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

# Merged patches of a traced image whose size may vary. Torch treats equal sizes as the same dimension, so it is a prime
# that no model uses.
MERGED = 29


class Vision(nn.Module):
    """LLaVA and BLIP-2: turns an image of fixed size into features, the rows that replace the placeholder tokens."""

    varies: ClassVar[tuple[str, ...]] = ()  # inputs whose number of rows depends on the size of the image

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.model = vlm.model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        output = self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        features = output if isinstance(output, Tensor) else torch.cat(list(output))
        return {"image_features": features.reshape(-1, features.shape[-1])}

    @staticmethod
    def images(config: PreTrainedConfig, pixel_values: Tensor, grids: Tensor | None) -> list[dict[str, Tensor]]:
        """What the half reads of each image that a processor made."""
        return [{"pixel_values": image[None]} for image in pixel_values]

    @staticmethod
    def example(config: PreTrainedConfig) -> dict[str, Tensor]:
        """One image, of which only the shape matters.

        Not several: some families make a list of their features, and tracing would fix its length.
        """
        vision = config.vision_config
        return {
            "pixel_values": torch.empty(1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        }


class TiledVision(Vision):
    """Idefics3 and SmolVLM: a picture is cut into tiles of one size, and each of them is an image."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.model.model.connector(self.model.model.vision_model(pixel_values).last_hidden_state)
        return {"image_features": features.reshape(-1, features.shape[-1])}

    @staticmethod
    def images(config: PreTrainedConfig, pixel_values: Tensor, grids: Tensor | None) -> list[dict[str, Tensor]]:
        """What the half reads of each image that a processor made."""
        tiles, side = pixel_values.flatten(0, -4), config.vision_config.image_size
        height, width = tiles.shape[-2:]
        if (height, width) != (side, side):
            raise UserError(
                f"the image half reads images of {side} x {side} pixels, and the processor makes {width} x {height}; "
                "in preprocessor_config.json, set max_image_size to that of the vision tower and do_image_splitting to "
                "true"
            )
        return [{"pixel_values": tile[None]} for tile in tiles]


class PackedVision(Vision):
    """Qwen2-VL: patches of an image of any size as rows, with the place of each."""

    varies: ClassVar[tuple[str, ...]] = ("pixel_values", "position_ids")

    def forward(self, pixel_values: Tensor, position_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        ends = torch.arange(2, dtype=torch.int32) * pixel_values.shape[0]  # one image: all patches see each other
        found = self.model.model.visual(pixel_values, grid_thw=None, position_ids=position_ids, cu_seqlens=ends)
        return {"image_features": found.pooler_output}

    @staticmethod
    def images(config: PreTrainedConfig, pixel_values: Tensor, grids: Tensor | None) -> list[dict[str, Tensor]]:
        """What the half reads of each image that a processor made."""
        return [
            {"pixel_values": rows, "position_ids": get_vision_position_ids(grid[None], _merge(config))}
            for rows, grid in _each(pixel_values, grids)
        ]

    @staticmethod
    def example(config: PreTrainedConfig) -> dict[str, Tensor]:
        """One image; only its shape matters."""
        vision, patches = config.vision_config, MERGED * _merge(config) ** 2
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        places = torch.empty(patches, 2, dtype=torch.int64)
        return {"pixel_values": torch.empty(patches, values), "position_ids": places}


class WindowedVision(PackedVision):
    """Qwen2.5-VL: patches in the order of windows, within which most blocks attend.

    Windows at the edges are smaller. Transformers cuts the patches into windows, which cannot be traced for images of
    any size; here a mask hides the patches of other windows.
    """

    varies: ClassVar[tuple[str, ...]] = ("pixel_values", "position_ids", "windows", "order")

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, position_ids: Tensor, windows: Tensor, order: Tensor
    ) -> dict[str, Tensor]:
        tower = self.model.model.visual
        hidden = tower.patch_embed(pixel_values)
        rotary = tower.rotary_pos_emb(hidden, position_ids)
        in_same = windows[:, None] == windows
        for number, block in enumerate(tower.blocks):
            mask = None if number in tower.fullatt_block_indexes else in_same
            hidden = hidden + masked_attention(block.attn, block.norm1(hidden), mask, rotary)
            hidden = hidden + block.mlp(block.norm2(hidden))
        return {"image_features": tower.merger(hidden)[order]}

    @staticmethod
    def images(config: PreTrainedConfig, pixel_values: Tensor, grids: Tensor | None) -> list[dict[str, Tensor]]:
        """What the half reads of each image that a processor made."""
        vision, unit, found = config.vision_config, _merge(config) ** 2, []
        for rows, grid in _each(pixel_values, grids):
            order, ends = get_vision_window_index(grid[None], _merge(config), vision.window_size, vision.patch_size)
            patches = (order[:, None] * unit + torch.arange(unit)).flatten()
            found.append(
                {
                    "pixel_values": rows[patches],
                    "position_ids": get_vision_position_ids(grid[None], _merge(config))[patches],
                    "windows": torch.bucketize(torch.arange(len(patches)), ends[1:].long(), right=True),
                    "order": torch.argsort(order),
                }
            )
        return found

    @staticmethod
    def example(config: PreTrainedConfig) -> dict[str, Tensor]:
        """One image; only its shape matters."""
        patches = MERGED * _merge(config) ** 2
        return {
            **PackedVision.example(config),
            "windows": torch.empty(patches, dtype=torch.int64),
            "order": torch.empty(MERGED, dtype=torch.int64),
        }


def masked_attention(layer: Any, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The attention of a block of Qwen2.5-VL's tower, with a mask that says which patches see each other."""
    rotate = sys.modules[type(layer).__module__].apply_rotary_pos_emb_vision
    queries, keys, values = layer.qkv(hidden).unflatten(-1, (3, layer.num_heads, -1)).unbind(1)
    queries, keys = rotate(queries, keys, *rotary)
    queries, keys, values = (states.transpose(0, 1)[None] for states in (queries, keys, values))
    seen = nn.functional.scaled_dot_product_attention(queries, keys, values, mask, scale=layer.scaling)
    output: Tensor = layer.proj(seen[0].transpose(0, 1).flatten(1))
    return output


def _merge(config: PreTrainedConfig) -> int:
    return int(config.vision_config.spatial_merge_size)


def _each(pixel_values: Tensor, grids: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """The patches of each image, and how many it has in time, height and width."""
    assert grids is not None, "the processor makes image_grid_thw"
    if (grids[:, 0] != 1).any():
        raise UserError("the image half reads images, not videos; name a task with images")
    return list(zip(torch.split(pixel_values, grids.prod(-1).tolist()), grids, strict=True))


# config.model_type -> its image half; for these, tests compare the halves with the whole model
VISIONS: dict[str, type[Vision]] = {
    "llava": Vision,
    "blip-2": Vision,
    "idefics3": TiledVision,
    "smolvlm": TiledVision,
    "qwen2_vl": PackedVision,
    "qwen2_5_vl": WindowedVision,
}


def vision_half_of(vlm: VLM) -> type[Vision]:
    """The image half of a model's type."""
    return VISIONS[vlm.model.config.model_type]
