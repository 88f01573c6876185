"""What embedded:scenes-llava is made of: its words, its processor, its shape, and scenes packed into batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    """Specials, numbers and marks stand alone; a word carries the space before it, written as in SentencePiece."""
    numbers = [f"<{n}>" for n in range(101)] + [f"<{a}>" for a in S.ANGLES if a < 0]
    words = [*WORDS, *S.COLOURS, *S.BACKGROUNDS, *map(str, range(10)), "{"]
    return [*SPECIALS, *numbers, "|", "}", ",", ".", "?", *("▁" + word for word in words)]


@functools.cache
def tokenizer(more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The words, and more after them, so that those keep their numbers."""
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
        # The PIL processor, and not the one of torchvision, which the package does not need.
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
        # The default, -2, would leave the last block of the vision tower without a use.
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **ids,
    )


def build() -> LlavaForConditionalGeneration:
    """The untrained model; in the first two layers query and key start equal, so that a word looks for itself."""
    model = LlavaForConditionalGeneration._from_config(config(), attn_implementation="eager")
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0.0, 0.2)
        for layer in model.model.language_model.layers[:2]:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """The folder that anyone's `from_pretrained` loads: weights in fp16, greedy by default."""
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


# -- batches: one image, then its questions, which do not see each other

SLOTS = ("position", "colour", "digit", "exists", "exists", "count", "scene", "caption", "ground")
WEIGHTS = {"position": 1.0, "colour": 1.0, "digit": 1.0, "exists": 1.0, "count": 0.5, "scene": 0.5, "caption": 2.0}
WEIGHTS["ground"] = 2.0


@dataclass(frozen=True)
class Style:
    """How a model is asked: the tokens its image takes, its questions, what frames one, and words beyond the common."""

    image: int
    slots: tuple[str, ...]
    frame: Callable[[S.Question], str]
    more: tuple[str, ...] = ()

    def encode(self, text: str) -> tuple[int, ...]:
        return encode(text, self.more)


STYLE = Style(PATCHES, SLOTS, lambda question: f"{question.prompt}<answer>")


@functools.lru_cache(maxsize=100_000)
def encode(text: str, more: tuple[str, ...] = ()) -> tuple[int, ...]:
    return tuple(tokenizer(more).encode(text, add_special_tokens=False))


@functools.cache
def lengths(style: Style = STYLE) -> tuple[int, ...]:
    """How many tokens a question of each slot takes at most, its answer's end included."""
    most = dict.fromkeys(S.KINDS, 0)
    for index in itertools.count():
        scene = S.scene("train", 0, index, draw=False)
        for q in S.questions(scene):
            most[q.kind] = max(most[q.kind], len(style.encode(style.frame(q))) + len(encode(q.answer)) + 1)
        if len(scene.digits) == 4:
            return tuple(most[kind] for kind in style.slots)
    raise AssertionError


@functools.cache
def layout(style: Style = STYLE) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed row's mask (added to the scores) and its positions: each question starts right after the image."""
    total = style.image + sum(lengths(style))
    segment = torch.zeros(total, dtype=torch.long)
    positions = torch.arange(total)
    start = style.image
    for number, length in enumerate(lengths(style), 1):
        segment[start : start + length] = number
        positions[start : start + length] = torch.arange(style.image, style.image + length)
        start += length
    causal = torch.arange(total)[:, None] >= torch.arange(total)[None, :]
    seen = causal & ((segment[:, None] == segment[None, :]) | (segment[None, :] == 0))
    return torch.zeros(total, total).masked_fill(~seen, -1e9)[None, None], positions[None]


@dataclass
class Batch:
    scenes: list[S.Scene]
    pixels: torch.Tensor  # scenes x 3 x 48 x 48, from -1 to 1
    ids: torch.Tensor  # scenes x text
    labels: torch.Tensor  # scenes x text: the token that follows, or -100
    weights: torch.Tensor  # scenes x text: every question's tokens share its kind's weight
    background: torch.Tensor  # scenes: word id
    filled: torch.Tensor  # scenes x patches: does a digit lie here
    words: torch.Tensor  # scenes x patches x 2: digit's and colour's word ids
    corners: torch.Tensor  # scenes x patches x 4: in steps
    angle: torch.Tensor  # scenes x patches: class


def _pick(scene: S.Scene, rng: np.random.Generator, slots: tuple[str, ...]) -> list[S.Question]:
    kinds: dict[str, list[S.Question]] = {}
    for q in S.questions(scene, int(rng.integers(2**31))):
        kinds.setdefault(q.kind, []).append(q)
    picked = {kind: kinds[kind][int(rng.integers(len(kinds[kind])))] for kind in kinds}
    both = iter(kinds["exists"])
    return [next(both) if kind == "exists" else picked[kind] for kind in slots]


def _text(scene: S.Scene, rng: np.random.Generator, style: Style) -> tuple[list[int], list[int], list[float]]:
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for q, length in zip(_pick(scene, rng, style.slots), lengths(style), strict=True):
        prompt = style.encode(style.frame(q))
        answer = (*encode(q.answer), tokenizer().eos_token_id)
        rest = length - len(prompt) - len(answer)
        ids += [*prompt, *answer, *[0] * rest]
        labels += [*[-100] * (len(prompt) - 1), *answer, *[-100] * (rest + 1)]
        weights += [WEIGHTS[q.kind] / len(answer)] * length
    return ids, labels, weights


def _patches(scene: S.Scene) -> tuple[np.ndarray, ...]:
    """What each patch shows: a patch belongs to a digit when its centre lies in the digit's box, or almost."""
    filled = np.zeros((GRID, GRID), bool)
    words = np.zeros((GRID, GRID, 2), np.int64)
    corners = np.zeros((GRID, GRID, 4), np.int64)
    angle = np.zeros((GRID, GRID), np.int64)
    centres = (np.arange(GRID) + 0.5) * 100 / GRID
    for d in scene.digits:
        x1, y1, x2, y2 = d.box
        rows = (centres > y1 - S.STEP) & (centres < y2 + S.STEP)
        columns = (centres > x1 - S.STEP) & (centres < x2 + S.STEP)
        here = rows[:, None] & columns[None, :]
        filled |= here
        words[here] = encode(str(d.value))[0], encode(d.colour)[0]
        corners[here] = [v // S.STEP for v in d.box]
        angle[here] = S.ANGLES.index(d.angle)
    return filled, words, corners, angle


def batch(
    start: int,
    size: int,
    seed: int,
    most: int = 4,
    hard: float = 1.0,
    draw: bool = True,
    wobble: float = 0.0,
    style: Style = STYLE,
) -> Batch:
    """Scenes `start` to `start + size` of the training split."""
    made = [S.scene("train", seed, start + i, most, hard, draw, wobble) for i in range(size)]
    rng = np.random.default_rng([seed, start])
    ids, labels, weights = zip(*(_text(scene, rng, style) for scene in made), strict=True)
    filled, words, corners, angle = (np.stack(x) for x in zip(*map(_patches, made), strict=True))
    images = torch.from_numpy(np.stack([scene.image for scene in made]))
    return Batch(
        scenes=made,
        pixels=images.permute(0, 3, 1, 2).float() / 127.5 - 1,
        ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        weights=torch.tensor(weights),
        background=torch.tensor([encode(scene.background)[0] for scene in made]),
        filled=torch.from_numpy(filled).flatten(1),
        words=torch.from_numpy(words).flatten(1, 2),
        corners=torch.from_numpy(corners).flatten(1, 2),
        angle=torch.from_numpy(angle).flatten(1),
    )
