"""The two halves of a model as torch modules: image to features, and tokens to logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensitivity.models.halves.vision_half import VISIONS, vision_half_of
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.spec.runtimes.rules import comma_list

VISION, LANGUAGE = "vision", "language"
Array = np.ndarray[Any, Any]


def check_halves(vlm: VLM) -> None:
    """Raise an error for a model that cannot be split into an image half and a language half."""
    kind = vlm.model.config.model_type
    if kind not in VISIONS or not hasattr(vlm.model, "get_image_features"):
        known = comma_list(list(VISIONS))
        raise UserError(f"only models of the types {known} can be run half by half, and {vlm.name} is of type {kind}")
    if vlm.encoder_decoder:
        raise UserError(
            f"only a decoder can be run half by half, and the language model of {vlm.name} also has an encoder"
        )


class Language(nn.Module):
    """The language half: it reads tokens, image features and the cache, and returns logits and the new cache.

    It holds the embedding and the output head.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.model = vlm.model
        self.text = (vlm.text_generator,)  # in a tuple, so that torch does not register it twice
        self.image_token = int(vlm.model.config.image_token_id)

    def forward(
        self,
        input_ids: Tensor,
        image_features: Tensor,
        attention_mask: Tensor,
        past_key_values: Any,
        logits_to_keep: Tensor,
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        embedded = self.model.get_input_embeddings()(input_ids)
        width = embedded.shape[-1]
        is_image = (input_ids == self.image_token).reshape(-1)
        # the n-th placeholder takes the n-th row; row 0 is a dummy for all other tokens
        number = torch.cumsum(is_image.to(torch.int64), 0) * is_image.to(torch.int64)
        rows = torch.cat([torch.zeros(1, width, dtype=embedded.dtype), image_features])
        picked = nn.functional.embedding(number, rows)
        merged = torch.where(is_image[:, None], picked, embedded.reshape(-1, width)).reshape(embedded.shape)
        output = self.text[0](
            inputs_embeds=merged,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **({} if position_ids is None else {"position_ids": position_ids}),
        )
        return {"logits": output.logits, "past_key_values": output.past_key_values}


def half_of(vlm: VLM, half: str) -> nn.Module:
    """One half of a model as a module."""
    return vision_half_of(vlm)(vlm) if half == VISION else Language(vlm)
