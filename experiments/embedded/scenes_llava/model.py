"""embedded:scenes-llava before training: tokenizer, processor, configuration, initial weights; and how it is saved."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sensitivity.tasks import scenes as S

PATCH, GRID = 8, 6
PATCHES = GRID * GRID
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<answer>")
WORDS = (
    *("where", "is", "the", "what", "colour", "which", "digit", "there", "any", "how", "many", "digits", "are"),
    *("describe", "image", "background", "locate", "on", "top", "bottom", "left", "right", "yes", "no", *S.COUNTS),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<answer>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<image>{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, numbers and punctuation; then words, which carry the space before them, as in SentencePiece."""
    numbers = [f"<{n}>" for n in range(101)] + [f"<{a}>" for a in S.ANGLES if a < 0]
    words = [*WORDS, *S.COLORS, *S.BACKGROUNDS, *map(str, range(10)), "{"]
    return [*SPECIALS, *numbers, "|", "}", ",", ".", "?", *("▁" + word for word in words)]


@functools.cache
def tokenizer(more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; words in `more` come last, so that all others keep their ids."""
    vocab = {token: i for i, token in enumerate((*vocabulary(), *("▁" + word for word in more)))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    marks = pre_tokenizers.Split(Regex(r"▁?\{|<-?\d+>|[|}?.,]"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), marks])
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<answer>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def processor() -> LlavaProcessor:
    side = {"height": S.SIDE, "width": S.SIDE}
    return LlavaProcessor(
        # the PIL processor: the other one needs torchvision, which this package does not require
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": S.SIDE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def config() -> LlavaConfig:
    words = tokenizer()
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=S.SIDE,
            patch_size=PATCH,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=256,
            initializer_range=0.05,
            tie_word_embeddings=True,
            **ids,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        # the default, -2, would never use the last block of the vision tower
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **ids,
    )


def build() -> LlavaForConditionalGeneration:
    """The untrained model.

    In the first two layers query and key projections start equal, so that a token attends to its own earlier
    occurrences from the start; finding a word of the question in the image or prompt is what answering needs.
    """
    model = LlavaForConditionalGeneration._from_config(config(), attn_implementation="eager")
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0.0, 0.2)
        for layer in model.model.language_model.layers[:2]:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a folder that `from_pretrained` loads: weights in fp16, greedy decoding by default."""
    words = tokenizer()
    half = LlavaForConditionalGeneration(config()).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    half.save_pretrained(folder)
    processor().save_pretrained(folder)
