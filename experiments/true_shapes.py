"""Random-weight models of published models' true shapes, saved as real folders: weights, config, tokenizer, processor.

python -m experiments.true_shapes smolvlm-256m FOLDER [--depth 1.0]

Weights are written one tensor at a time in bfloat16, as the published checkpoints are, so that 7 billion of them need
no more memory than the largest of them. Shapes are those of the models' own config.json on the hub:
HuggingFaceTB/SmolVLM-256M-Instruct and -500M-Instruct, Qwen/Qwen2-VL-2B-Instruct, llava-hf/llava-1.5-7b-hf. The small
LLaVA is of towers with the shapes of openai/clip-vit-base-patch16 and HuggingFaceTB/SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as T
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sensitivity.formats.writing.stream import Piece, Spec, write

DTYPE = torch.bfloat16
SHARD = 2_000_000_000  # bytes of a file
CHAT = (
    "{% for message in messages %}BEGIN{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}IMAGE{% else %}{{ item['text'] }}{% endif %}{% endfor %}END{% endfor %}AFTER"
)


def words(size: int, special: Sequence[str]) -> Any:
    """A tokenizer of so many words: all bytes, pairs of letters, places that nothing fills, and the special ones last.

    The numbers of the special words are those that its place in the list gives, counted from the end.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    small = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [(a, b) for a in ["Ġ", *small] for b in small]
    known = [*letters, *(a + b for a, b in merges)]
    known += [f"<unused{i}>" for i in range(size - len(known) - len(special))]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(known)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return inner


def fast(inner: Any, **tokens: str) -> Any:
    named = {name: tokens.pop(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token") if name in tokens}
    return T.PreTrainedTokenizerFast(tokenizer_object=inner, **named, extra_special_tokens=tokens)


Made = tuple[Any, Any, Any, dict[str, Any], str]  # model class and config, tokenizer, image processor, processor, chat


SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 512, "patch_size": 16}  # fmt: skip


def smolvlm(hidden: int, inner: int, layers: int, heads: int, shared: int, vision: dict[str, int] = SIGLIP) -> Made:
    """SmolVLM: a SigLIP of 12 x 768 at 512 pixels, sixteen patches to a token, and a SmolLM2 whose head is its own."""
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokens = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    special = ["<|im_start|>", "<|im_end|>", "<|unk|>", *tokens.values(), *tiles]
    tokenizer = fast(
        words(49280, special), bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>",
        unk_token="<|unk|>", **tokens,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<end_of_utterance>", "<|im_end|>"])
    named = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True))
    text = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": 64, "vocab_size": 49280,
        "max_position_embeddings": 8192, "rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        **named,
    }  # fmt: skip
    config = T.Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=4, tie_word_embeddings=False, **named,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    # the published processor cuts a picture into up to 17 of this size; here each is one
    edge = {"longest_edge": vision["image_size"]}
    pictures = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    chat = CHAT.replace("BEGIN", "<|im_start|>User:").replace("IMAGE", "<image>").replace("END", "<end_of_utterance>\n")
    how = {
        "processor_class": "Idefics3Processor",
        "image_seq_len": (vision["image_size"] // vision["patch_size"] // 4) ** 2,
    }
    return (T.Idefics3ForConditionalGeneration, config), tokenizer, pictures, how, chat.replace("AFTER", "Assistant:")


def qwen2_vl(language: dict[str, int] | None = None, vision: dict[str, int] | None = None) -> Made:
    """Qwen2-VL-2B: a ViT of 32 x 1280 at any size, four patches to a token, and a tied head of 151,936 words."""
    tokens = {
        "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    }  # fmt: skip
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens.values()]
    tokenizer = fast(
        words(151936, special), bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>", **tokens
    )
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    named = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
    text = {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "rope_parameters": rope, **named, **(language or {}),
    }  # fmt: skip
    tower = {
        "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, **(vision or {}),
    }  # fmt: skip
    config = T.Qwen2VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True, **ids, **named)
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    chat = CHAT.replace("BEGIN", "<|im_start|>user\n").replace("END", "<|im_end|>\n")
    chat = chat.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    chat = chat.replace("AFTER", "<|im_start|>assistant\n")
    return (
        (T.Qwen2VLForConditionalGeneration, config),
        tokenizer,
        pictures,
        {"processor_class": "Qwen2VLProcessor"},
        chat,
    )


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "image_size": 336, "patch_size": 14}  # fmt: skip
VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 32}  # fmt: skip
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16}  # fmt: skip
SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
          "num_key_value_heads": 3}  # fmt: skip


def llava(vision: dict[str, int], language: dict[str, int]) -> Made:
    """LLaVA: a CLIP tower, a projector of two layers, and a language model of the Llama type."""
    special = ["<s>", "</s>", "<unk>", "<pad>", "<image>"]
    tokenizer = fast(
        words(32064, special), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        image_token="<image>",
    )  # fmt: skip
    text = {
        **language, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False,
    }  # fmt: skip
    side, patch = vision["image_size"], vision["patch_size"]
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**vision, projection_dim=768), text_config=T.LlamaConfig(**text),
        tie_word_embeddings=False, image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    how = {
        "processor_class": "LlavaProcessor", "patch_size": patch, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }  # fmt: skip
    chat = CHAT.replace("BEGIN", "USER: ").replace("IMAGE", "<image>\n").replace("END", " ")
    return (T.LlavaForConditionalGeneration, config), tokenizer, pictures, how, chat.replace("AFTER", "ASSISTANT:")


SHAPES: dict[str, Callable[[], Made]] = {
    "smolvlm-256m": partial(smolvlm, 576, 1536, 30, 9, 3),
    "smolvlm-500m": partial(smolvlm, 960, 2560, 32, 15, 5),
    "qwen2-vl-2b": qwen2_vl,
    "llava-1.5-7b": partial(llava, LARGE, VICUNA),
    "llava-vit-b-smollm2-135m": partial(llava, BASE, SMOLLM),
}


def save(name: str, folder: Path, depth: float = 1.0) -> Path:
    """Write a model of this shape; `depth` is the share of its blocks, so that a test of the builder is quick."""
    (architecture, config), tokenizer, pictures, how, chat = SHAPES[name]()
    for half in (config.vision_config, config.text_config):
        for count in {"num_hidden_layers", "depth"} & set(vars(half)):
            setattr(half, count, max(round(getattr(half, count) * depth), 1))
    layers = getattr(config.text_config, "layer_types", None)
    if layers:
        config.text_config.layer_types = layers[: config.text_config.num_hidden_layers]
    config.dtype = config.text_config.dtype = config.vision_config.dtype = DTYPE
    config.architectures = [architecture.__name__]
    with torch.device("meta"):
        model = architecture(config)
    folder.mkdir(parents=True)
    head = model.get_output_embeddings().weight
    ends = {id(head): tokenizer.eos_token_id}
    write(folder, [_piece(k, model, p, ends.get(id(p))) for k, p in model.named_parameters()], SHARD)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "processor_class": how["processor_class"]}))
    (folder / "processor_config.json").write_text(json.dumps(how))
    (folder / "chat_template.jinja").write_text(chat)
    said = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    T.GenerationConfig(**said).save_pretrained(folder)
    return folder


def _piece(key: str, model: nn.Module, parameter: nn.Parameter, end: int | None) -> Piece:
    """A tensor that is drawn when its turn has come: from its own name, so that order and files do not matter.

    `end` is the row of the word that ends an answer, which is made likely: random models ramble, trained ones do not.
    """
    norm = "norm" in type(model.get_submodule(key.rpartition(".")[0])).__name__.lower()
    shape = tuple(parameter.shape)

    def make() -> tuple[Tensor]:
        if len(shape) < 2:
            return (torch.full(shape, float(norm and key.endswith("weight")), dtype=DTYPE),)
        draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        spread = parameter[0].numel() ** -0.5  # what is read with a variance of 1 goes on with a variance of 1
        drawn = torch.randn(shape, generator=draw).mul_(spread)
        if end is not None:
            drawn[end] *= 5
        return (drawn.to(DTYPE),)

    return Piece((Spec(key, DTYPE, shape),), make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=float, default=1.0, help="the share of its blocks that is built")
    args = parser.parse_args()
    print(save(args.shape, args.folder, args.depth))


if __name__ == "__main__":
    main()
