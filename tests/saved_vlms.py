"""Small random models of several families, saved as real folders: weights, configuration, processor, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import small_vlms as small
import torch
import transformers as T
from safetensors.torch import load_file
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from sensitivity.models.loading import load

SIDE = 16
SQUARE = {"height": SIDE, "width": SIDE}
TEXT: dict[str, Any] = {**small.LLAMA, "vocab_size": 256, "max_position_embeddings": 512}
VIT: dict[str, Any] = {"model_type": "siglip_vision_model", **small.VIT, "vision_use_head": False}


@dataclass
class Made:
    """A model and what lies beside its weights; the processor is named and not built, as some want torchvision."""

    model: Any
    tokenizer: Any
    pictures: Any
    processor: str
    settings: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


def words(**tokens: str) -> Any:
    """The embedded model's words, with the special ones that a family's processor asks its tokenizer for."""
    inner = load("embedded:scenes-llava").processor.tokenizer.backend_tokenizer
    common = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return T.PreTrainedTokenizerFast(tokenizer_object=inner, **common, extra_special_tokens={**tokens})


def chat(image: str, before: str = "", after: str = "") -> str:
    """A chat template: the image and the text of each turn, framed."""
    return (
        "{% for message in messages %}" + before + "{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}" + image + "{% else %}{{ item['text'] }}{% endif %}"
        "{% endfor %}" + after + "{% endfor %}"
    )


def blip2(text: dict[str, Any]) -> Made:
    tokenizer = words()  # a word of its own for images, but no name for it: Blip2Processor gives it one
    config = T.Blip2Config(
        vision_config=small.VIT, qformer_config=small.QFORMER, text_config=text, num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = T.Blip2ForConditionalGeneration(config)
    return Made(model, tokenizer, BlipImageProcessorPil(size=SQUARE), "Blip2Processor", {"num_query_tokens": 4})


def blip2_opt() -> Made:
    return blip2(
        {"model_type": "opt", **small.OPT, "vocab_size": 256, "max_position_embeddings": 512, **small.SPECIALS}
    )


def blip2_t5() -> Made:
    return blip2(
        {"model_type": "t5", **small.T5, "num_decoder_layers": 3, "vocab_size": 256, "decoder_start_token_id": 0}
    )


def blip2_itm() -> Made:
    tokenizer = words()
    qformer = {**small.QFORMER, "vocab_size": 256, "use_qformer_text_input": True, "hidden_dropout_prob": 0.0}
    config = T.Blip2Config(
        vision_config=small.VIT, qformer_config=qformer, text_config={"model_type": "opt", **small.OPT},
        num_query_tokens=4, image_text_hidden_size=8, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = T.Blip2ForImageTextRetrieval(config)
    return Made(model, tokenizer, BlipImageProcessorPil(size=SQUARE), "Blip2Processor", {"num_query_tokens": 4})


def llava() -> Made:
    tokenizer = words(image_token="<image>")
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**small.VIT), text_config=T.LlamaConfig(**TEXT),
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return Made(T.LlavaForConditionalGeneration(config), tokenizer, pictures, "LlavaProcessor", settings)


def qwen2_5_vl() -> Made:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = words(**names)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    vision = {"depth": small.BLOCKS, "hidden_size": 16, "out_hidden_size": 24, "num_heads": 2, "intermediate_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [4]}
    config = T.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": small.ROPE}, vision_config=vision, **ids)
    pictures = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 256, "longest_edge": 1024})
    template = chat("<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>", "<|im_end|>")
    model = T.Qwen2_5_VLForConditionalGeneration(config)
    return Made(model, tokenizer, pictures, "Qwen2_5_VLProcessor", template=template)


def qwen2_vl() -> Made:
    made = qwen2_5_vl()
    vision = {"depth": small.BLOCKS, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 4}
    ids = {name: getattr(made.model.config, name) for name in ("image_token_id", "video_token_id")}
    ids |= {name: getattr(made.model.config, name) for name in ("vision_start_token_id", "vision_end_token_id")}
    config = T.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": small.ROPE}, vision_config=vision, **ids)
    return replace(made, model=T.Qwen2VLForConditionalGeneration(config), processor="Qwen2VLProcessor")


def internvl() -> Made:
    names = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer = words(**names, video_token="<video>")
    config = T.InternVLConfig(
        vision_config={**small.VIT, "image_size": [SIDE, SIDE], "patch_size": [4, 4]},
        text_config={"model_type": "qwen2", **TEXT}, image_token_id=tokenizer.context_image_token_id,
    )  # fmt: skip
    model = T.InternVLForConditionalGeneration(config)
    pictures = GotOcr2ImageProcessorPil(size=SQUARE)
    return Made(model, tokenizer, pictures, "InternVLProcessor", {"image_seq_length": 4}, chat("<IMG_CONTEXT>"))


def smolvlm() -> Made:
    names = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
    tokenizer = words(
        **names, image_token="<image>", end_of_utterance_token="<end_of_utterance>", video_token="<video>"
    )
    config = T.SmolVLMConfig(
        vision_config={**small.VIT, "patch_size": 4}, text_config={"model_type": "llama", **TEXT}, scale_factor=2,
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    edges = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    pictures = SmolVLMImageProcessorPil(**edges)
    template = chat("<image>", "User:", "<end_of_utterance>")
    return Made(
        T.SmolVLMForConditionalGeneration(config), tokenizer, pictures, "SmolVLMProcessor", {"image_seq_len": 4},
        template,
    )  # fmt: skip


def idefics3() -> Made:
    made = smolvlm()
    config = T.Idefics3Config(
        vision_config={**small.VIT, "patch_size": 4}, text_config={"model_type": "llama", **TEXT}, scale_factor=2,
        image_token_id=made.tokenizer.image_token_id,
    )  # fmt: skip
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    model = T.Idefics3ForConditionalGeneration(config)
    return replace(made, model=model, pictures=pictures, processor="Idefics3Processor")


def paligemma() -> Made:
    tokenizer = words(image_token="<image>")
    config = T.PaliGemmaConfig(
        vision_config={**VIT, "projection_dim": 24}, text_config={"model_type": "gemma", **TEXT}, projection_dim=24,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    pictures = SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 4
    return Made(T.PaliGemmaForConditionalGeneration(config), tokenizer, pictures, "PaliGemmaProcessor")


def gemma3() -> Made:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = words(**names)
    ids = {"boi_token_index": tokenizer.boi_token_id, "eoi_token_index": tokenizer.eoi_token_id}
    config = T.Gemma3Config(
        vision_config=VIT, text_config={**TEXT, "sliding_window": 64}, mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id, **ids,
    )  # fmt: skip
    pictures = Gemma3ImageProcessorPil(size=SQUARE)
    template = chat("<start_of_image>", "{{ bos_token }}<start_of_turn>user\n", "<end_of_turn>\n")
    model = T.Gemma3ForConditionalGeneration(config)
    return Made(model, tokenizer, pictures, "Gemma3Processor", {"image_seq_length": 4}, template)


SIZES = (TEXT, VIT, small.LLAMA, small.VIT, small.QFORMER, small.OPT, small.T5, small.ROPE)  # what builders read
_FOLDER = TemporaryDirectory()  # of models that were saved once, until this process ends
BUILDERS: dict[str, Callable[[], Made]] = {
    f.__name__: f
    for f in (
        blip2_opt,
        blip2_t5,
        blip2_itm,
        llava,
        qwen2_vl,
        qwen2_5_vl,
        internvl,
        idefics3,
        smolvlm,
        paligemma,
        gemma3,
    )
}


def save(name: str, folder: Path) -> Path:
    """A folder with the model of that name, for the test alone: what it changes in it, no other sees."""
    shutil.copytree(_saved_once(BUILDERS[name], repr(SIZES)), folder, dirs_exist_ok=True)
    torch.manual_seed(0)  # what is drawn next is the same, whether the model was made now or before
    return folder


@cache
def _saved_once(build: Callable[[], Made], sizes: str) -> Path:
    """The folder of a model, made once for each way to build it; `sizes` are those of now, which some tests change."""
    folder = Path(mkdtemp(dir=_FOLDER.name))
    torch.manual_seed(0)
    made = build()
    for parameter in made.model.parameters():  # some families start at zero
        torch.nn.init.normal_(parameter, 0, 0.1)
    if made.model.can_generate():
        made.model.generation_config.eos_token_id = made.tokenizer.eos_token_id
        made.model.generation_config.pad_token_id = made.tokenizer.pad_token_id
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    made.pictures.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "processor_class": made.processor}))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": made.processor, **made.settings}))
    if made.template:
        (folder / "chat_template.jinja").write_text(made.template)
    return folder


def adapter(base: Path, folder: Path) -> Path:
    """A LoRA of rank 2 on queries and values of the language model, as PEFT saves it, that changes them by much."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    adapted = peft.get_peft_model(load(str(base)).model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def in_pickles(folder: Path, without: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint as GeoChat is published, in two pickles and an index; gives back the tensors that are left out."""
    tensors = load_file(folder / "model.safetensors")
    left_out = {name: tensors.pop(name) for name in list(tensors) if without and without in name}
    names = sorted(tensors)
    shards = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        torch.save({name: tensors[name] for name in names if shards[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model.safetensors").unlink()
    return left_out
