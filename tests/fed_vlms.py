"""Small models of every family with weights, and a batch of tokens that each of them takes."""

from __future__ import annotations

import small_vlms
import torch
from torch import Tensor

from sensitivity.measure.passes.token_batches import ANSWER, PROMPT, VISION, TokenBatch, _qformer_sequences
from sensitivity.models.families import family_of
from sensitivity.models.vlm import VLM

FAMILIES = tuple(small_vlms.BUILDERS)


def fed(name: str, vlm: VLM) -> TokenBatch:
    """Two rows for a small model: image tokens where the family has them, then words."""
    model, config, rows, token = vlm.model, vlm.model.config, 2, 90
    pixels, more, asks_count = pictures(name, vlm, rows)
    words = torch.randint(5, 80, (rows, 6))
    count = asks_count
    if count is None:
        with torch.no_grad():
            features = model.get_image_features(pixels, **more).pooler_output
        count = sum(one.reshape(-1, one.shape[-1]).shape[0] for one in features) // rows
    config.image_token_id = token
    if hasattr(config, "image_token_index"):
        config.image_token_index = token
    ids = torch.cat([torch.full((rows, count), token), words], dim=1)
    if name.startswith("qwen"):
        more["mm_token_type_ids"] = (ids == token).int()
    if name == "kosmos2":
        more["image_embeds_position_mask"] = (ids == token).int()
    if name == "mllama":
        more["cross_attention_mask"] = torch.ones(*ids.shape, 1, 4)
    text = torch.full_like(ids, PROMPT)
    text[ids == token] = VISION
    known = [("language", text)]
    if vlm.encoder_decoder:
        more["decoder_input_ids"] = torch.randint(5, 80, (rows, 4))
        known.append(("language", torch.full((rows, 4), ANSWER)))
    if name == "instructblip":
        asked = torch.randint(5, 80, (rows, 3))
        more |= {"qformer_input_ids": asked, "qformer_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    assert next(model.parameters()).dtype == torch.float32
    return TokenBatch(inputs, [*known, *_qformer_sequences(vlm, inputs)])


def pictures(name: str, vlm: VLM, rows: int) -> tuple[Tensor, dict[str, Tensor], int | None]:
    """Pixels as a family wants them, what it must know about them, and how many tokens a row has for its image."""
    config = vlm.model.config
    if name.startswith("qwen"):
        vision = config.vision_config
        pixels = torch.randn(rows * 16, 3 * vision.temporal_patch_size * vision.patch_size**2)
        return pixels, {"image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}, 4
    if name in ("llava_next", "llava_onevision"):  # the whole picture, and two tiles of it
        config.image_grid_pinpoints = [[16, 32], [32, 16]]
        return torch.randn(rows, 3, 3, 16, 16), {"image_sizes": torch.tensor([[16, 28]] * rows)}, None
    if name in ("idefics3", "smolvlm"):
        return torch.randn(rows, 1, 3, 16, 16), {}, None
    if name == "mllama":  # four tiles of one picture
        ratio = {"aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long), "aspect_ratio_mask": torch.ones(rows, 1, 4)}
        return torch.randn(rows, 1, 4, 3, 16, 16), ratio, 0
    if name == "florence2":
        return torch.randn(rows, 3, 64, 64), {}, None
    if name.startswith(("blip2", "instructblip")):
        return torch.randn(rows, 3, 16, 16), {}, config.num_query_tokens
    return torch.randn(rows, 3, 16, 16), {}, {"clip": 0, "siglip": 0, "kosmos2": 4, "internvl": None}.get(name, 4)


def built(name: str) -> VLM:
    torch.manual_seed(0)
    model = small_vlms.BUILDERS[name]().eval().requires_grad_(False)
    return VLM(name, model, None, family_of(model), "small", 32)
