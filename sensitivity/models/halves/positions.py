"""Positions of tokens in time, height and width, for models whose image tokens lie in a plane, as in Qwen2-VL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensitivity.models.vlm import VLM


def in_plane(vlm: VLM) -> bool:
    """Whether the positions of a model's tokens depend on the sizes of the images before them."""
    return hasattr(getattr(vlm.model, "model", None), "get_rope_index")


class Positions:
    """The positions of one prompt, and of the tokens that follow it."""

    def __init__(self, vlm: VLM) -> None:
        self.model, self.image_token = vlm.model.model, int(vlm.model.config.image_token_id)
        self.grids: Tensor | None = None  # of the images that were read last
        # added to the index of a later token to get its position: an image takes fewer positions than it has tokens
        self.shift = 0

    def next(self, ids: Sequence[int], read: int) -> Tensor:
        """Three positions for each of these tokens: a whole prompt, or tokens that follow `read` earlier ones."""
        if read:
            return (torch.arange(read, read + len(ids)) + self.shift).expand(3, 1, -1)
        tokens = torch.tensor([list(ids)])
        found: Tensor = self.model.get_rope_index(tokens, (tokens == self.image_token).int(), self.grids)[0]
        self.shift = int(found.max()) + 1 - len(ids)
        return found


def positions_of(vlm: VLM) -> Positions | None:
    """The positions of a model's prompts; None where a token's position is its index."""
    return Positions(vlm) if in_plane(vlm) else None
