"""Small random models of several families, saved as real folders: weights, configuration, processor, tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_vlms as small
import torch
import transformers as T
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from sensitivity.models import load

SIDE = 16


def words(**tokens: str) -> Any:
    """The embedded model's tokenizer, with the special words that a family wants."""
    tokenizer = load("embedded:scenes-llava").processor.tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<answer>", *tokens.values()]})
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def blip2(text: dict[str, Any]) -> tuple[Any, Any]:
    tokenizer = words()
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = T.Blip2Config(
        vision_config=small.VIT, qformer_config=small.QFORMER, text_config=text, num_query_tokens=4,
        image_token_index=image,
    )  # fmt: skip
    pictures = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return T.Blip2ForConditionalGeneration(config), T.Blip2Processor(pictures, tokenizer, num_query_tokens=4)


def blip2_opt() -> tuple[Any, Any]:
    return blip2(
        {"model_type": "opt", **small.OPT, "vocab_size": 256, "max_position_embeddings": 512, **small.SPECIALS}
    )


def blip2_t5() -> tuple[Any, Any]:
    return blip2(
        {"model_type": "t5", **small.T5, "num_decoder_layers": 3, "vocab_size": 256, "decoder_start_token_id": 0}
    )


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {"blip2_opt": blip2_opt, "blip2_t5": blip2_t5}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    for parameter in model.parameters():  # some families start at zero
        torch.nn.init.normal_(parameter, 0, 0.1)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
