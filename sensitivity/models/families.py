"""FAMILIES: the few facts about each family of VLMs that the model itself does not tell."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from sensitivity.spec.components import PARTS


@dataclass(frozen=True)
class Family:
    """Module paths and prompts of a family; where a path is empty, the model's getters find the module.

    A path matches at any depth of the module tree, and the longest match wins.
    """

    label: str = ""  # as papers write it
    vision: tuple[str, ...] = ()
    connector: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()  # linears that are kept, since they turn features into scores or logits
    kinds: dict[str, str] = field(default_factory=dict)  # word of a module path inside a block -> attn, cross or ff
    prompt: str = "{}"  # format of a question, where the processor has no chat template
    brief: bool = False  # whether the prompt asks for a short answer; then the task's request for one is left out
    caption: str | None = None  # replaces the prompt that asks for a caption
    shares_prefix: bool = False  # the image comes first, and its keys and values serve every question about it
    patches: tuple[str, ...] = ()  # parts whose image tokens are the patches of one square image, row by row


# The key is config.model_type, or a class name where that class differs from its family.
FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA", prompt="USER: <image>\n{} ASSISTANT:", shares_prefix=True, patches=PARTS),
    "llava_next": Family("LLaVA-NeXT"),
    "llava_onevision": Family("LLaVA-OneVision"),
    "blip-2": Family(
        "BLIP-2", prompt="Question: {} Short answer:", brief=True, caption="", shares_prefix=True, patches=("vision",)
    ),
    "Blip2ForImageTextRetrieval": Family("BLIP-2 retrieval", language=("embeddings",), heads=("itm_head",)),
    "instructblip": Family("InstructBLIP", patches=("vision",)),
    "qwen2_vl": Family("Qwen2-VL", connector=("visual.merger",), shares_prefix=True),
    "qwen2_5_vl": Family("Qwen2.5-VL", connector=("visual.merger",), shares_prefix=True),
    "qwen3_vl": Family("Qwen3-VL", connector=("visual.merger", "visual.deepstack_merger_list")),
    "internvl": Family("InternVL", shares_prefix=True),
    "idefics3": Family("Idefics3", shares_prefix=True),
    "smolvlm": Family("SmolVLM", shares_prefix=True),
    "paligemma": Family(
        "PaliGemma", prompt="<image>answer en {}", brief=True, caption="<image>caption en", patches=PARTS
    ),
    "gemma3": Family("Gemma 3", shares_prefix=True, patches=PARTS),
    "mllama": Family("Llama 3.2 Vision"),
    "kosmos-2": Family("Kosmos-2"),
    "florence2": Family("Florence-2"),
    "clip": Family("CLIP"),
    # the text tower ends in its projection into the shared space; the pooling head of the vision tower is vision
    "siglip": Family("SigLIP", connector=("text_model.head",)),
}

# retrieval models that an error message suggests
RETRIEVAL_MODELS = "Salesforce/blip2-itm-vit-g-coco or embedded:scenes-blip2-itm"


def family_of(model: nn.Module) -> Family:
    """The known facts about a model's family; empty for an unknown one, whose parts only getters can find."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return FAMILIES.get(type(model).__name__) or FAMILIES.get(model_type) or Family()
