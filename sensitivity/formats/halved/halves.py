"""The two halves of a model as torch modules: image to features, and tokens to logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

VISION, LANGUAGE = "vision", "language"
Array = np.ndarray[Any, Any]
# values of config.model_type; tests compare the halves of these with the whole model
HALVED = ("llava", "blip-2")


def check_halves(vlm: VLM) -> None:
    """Raise an error for a model that cannot be split into an image half and a language half."""
    kind = vlm.model.config.model_type
    if kind not in HALVED or not hasattr(vlm.model, "get_image_features"):
        known = " and ".join(HALVED)
        raise UserError(f"only models of the types {known} can be run half by half, and {vlm.name} is of type {kind}")
    if vlm.encoder_decoder:
        raise UserError(
            f"only a decoder can be run half by half, and the language model of {vlm.name} also has an encoder"
        )


class Vision(nn.Module):
    """Pixels to image features, projector included: the rows that replace the placeholder tokens."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.model = vlm.model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        output = self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        features = output if isinstance(output, Tensor) else torch.cat(list(output))
        return {"image_features": features.reshape(-1, features.shape[-1])}


class Language(nn.Module):
    """Tokens, image features and the cache to logits and the new cache; holds the embedding and the output head."""

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
        )
        return {"logits": output.logits, "past_key_values": output.past_key_values}


HALVES: dict[str, type[nn.Module]] = {VISION: Vision, LANGUAGE: Language}
