"""embedded:scenes-blip2 and scenes-blip2-itm before training, and the vision tower of scenes-llava in their layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from experiments.embedded.batches import KINDS, PromptStyle
from experiments.embedded.scenes_llava import model as llava
from sensitivity.tasks import scenes as S

QUERIES, CELLS = 16, 4  # queries 0, 4, 8 and 12 describe the first quarter of the scene, 1, 5, 9 and 13 the second ...
WIDTH, WORDS = 128, 192  # of vision tower and Q-Former; of the language model
ITC = 64  # width of the embeddings of images and captions
MORE = ("Question:", "Short", "answer:")


def prompt(question: S.SceneQuestion) -> str:
    """The prompt format of the published BLIP-2: `<s>`, then a question, or nothing for a caption."""
    return "<s>" if question.kind == "caption" else f"<s>Question: {question.prompt} Short answer:"


STYLE = PromptStyle(QUERIES, KINDS[:-1], prompt, MORE)


@functools.cache
def tokenizer(retrieval: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of scenes-llava with three more words; in retrieval the hidden state of <s> represents the text."""
    words = llava.tokenizer.__wrapped__(MORE)
    ends = [(token, words.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    text = "<s> $A </s>" if retrieval else "<s> $A"
    words.backend_tokenizer.post_processor = TemplateProcessing(single=text, special_tokens=ends)
    words.padding_side = "right" if retrieval else "left"
    return words


def processor(retrieval: bool = False) -> Blip2Processor:
    side = {"height": S.SIDE, "width": S.SIDE}
    # the PIL processor: the other one needs torchvision, which this package does not require
    pictures = BlipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Blip2Processor(pictures, tokenizer(retrieval), num_query_tokens=QUERIES)


def config(retrieval: bool = False) -> Blip2Config:
    words = tokenizer(retrieval)
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    shape = {"hidden_size": WIDTH, "num_attention_heads": 4}
    small = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
    }  # not built by the retrieval class
    large = {"hidden_size": WORDS, "word_embed_proj_dim": WORDS, "ffn_dim": 384, "num_hidden_layers": 4}
    return Blip2Config(
        vision_config={
            **shape,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "image_size": S.SIDE,
            "patch_size": llava.PATCH,
            "hidden_act": "quick_gelu",  # as CLIP's, whose weights these are
            "layer_norm_eps": 1e-5,
            "initializer_range": 0.02,
        },
        qformer_config={
            **shape,
            "vocab_size": len(words),
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "use_qformer_text_input": retrieval,
        },
        text_config={
            "model_type": "opt",
            **(small if retrieval else large),
            "vocab_size": len(words),
            "num_attention_heads": 1 if retrieval else 6,
            "max_position_embeddings": 128,
            "dropout": 0.0,
            "init_std": 0.05,
            "tie_word_embeddings": True,
            **ids,
        },
        num_query_tokens=QUERIES,
        image_text_hidden_size=ITC,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )


def build(retrieval: bool = False) -> Any:
    """The untrained model; OPT's first two layers start as those of scenes-llava's language model do."""
    architecture = Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration
    model = architecture._from_config(config(retrieval), attn_implementation="eager")
    with torch.no_grad():
        model.query_tokens.normal_(0.0, 0.2)  # transformers starts them at zero, where all queries would stay equal
        if not retrieval:
            model.get_input_embeddings().weight.normal_(0.0, 0.2)
            for layer in model.language_model.model.decoder.layers[:2]:
                layer.self_attn.k_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
    return model


def save(model: Any, folder: Path) -> None:
    """Write a folder that `from_pretrained` loads: weights in fp16, greedy decoding by default."""
    retrieval = isinstance(model, Blip2ForImageTextRetrieval)
    words = tokenizer(retrieval)
    half = type(model)(config(retrieval)).half()
    half.load_state_dict(model.state_dict())
    if not retrieval:
        ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id}
        half.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=40, eos_token_id=words.eos_token_id, **ids
        )
    folder.mkdir(parents=True, exist_ok=True)
    half.save_pretrained(folder)
    processor(retrieval).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


# -- the vision tower of scenes-llava, in BLIP-2's layout


def copy_vision_tower(clip: nn.Module, blip: nn.Module, pixels: Tensor) -> None:
    """Copy CLIP's vision weights into BLIP-2's tower.

    Everything fits except the LayerNorm before the first block, which BLIP-2 does not have. Its centering is folded
    into the embeddings exactly (by removing the mean over the width from their weights). Its division by the standard
    deviation depends on the input, so the average over `pixels` is folded in,
    and stage `eye` trains the difference away.
    """
    old, new, norm = clip.embeddings, blip.embeddings, clip.pre_layrnorm
    with torch.no_grad():
        raw = old(pixels)
        gain = norm.weight / (raw - raw.mean(-1, keepdim=True)).std(-1).mean()
        kernel, position = old.patch_embedding.weight, old.position_embedding.weight
        new.patch_embedding.weight.copy_(gain[:, None, None, None] * (kernel - kernel.mean(0)))
        new.patch_embedding.bias.zero_()
        new.position_embedding.copy_(gain * (position - position.mean(-1, keepdim=True)) + norm.bias)
        new.class_embedding.copy_(gain * (old.class_embedding - old.class_embedding.mean()))
        for one, other in zip(clip.encoder.layers, blip.encoder.layers, strict=True):
            attention = one.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            other.self_attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            other.self_attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            other.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
            for name in ("layer_norm1", "layer_norm2", "mlp"):
                getattr(other, name).load_state_dict(getattr(one, name).state_dict())
