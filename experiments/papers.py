"""What holds for all experiments of one paper: where its figures come from, the widths it tried, its known defects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from published import Experiment

MMQ = (
    "Gautam et al., Towards Understanding Best Practices for Quantization of Vision-Language Models "
    "(arXiv 2601.15287), and the tables in its repository, gautomdas/mmq"
)
BLIP2 = "Salesforce/blip2-opt-2.7b"
BLIP2_ITM = "Salesforce/blip2-itm-vit-g-coco"
LLAVA = "llava-hf/llava-1.5-7b-hf"
WIDTHS = (2, 3, 4, 5, 6, 8, 16)  # 16 is native precision

CALIBRATION = "theirs was calibrated on the evaluation split; ours never is"
GRID = (
    "importance is a property of the widths tried as much as of the model: a part with one catastrophic width "
    "decides the ranking"
)
UNIFORM_TRAPS = (
    "the published code never quantised the attention of the language model, nor the Q-Former's feed-forwards and "
    "cross-attention; plans are named here by what it did quantise, and biases are rounded with the weights, as there",
    "the published sizes count the language model's attention as compressed, so their bits per weight are too low",
)
GPTQ_TRAPS = (
    CALIBRATION,
    "inputs passed the layers that were quantised before, in chunks of 32 linears; ours are those of the float model "
    "(`sensitivity sweep --path exposed` has the other kind)",
    "the head of the language model was quantised too, and with it the embedding that is tied to it; bits per weight "
    "did not count it. Ours keeps it",
    GRID,
)
AWQ_TRAPS = (
    CALIBRATION,
    "the published search tried the exponents 0, 1, ..., 19 instead of 0 to 0.95, did not normalise scales, and "
    "clipped scaled weights by unscaled inputs; ours is the search that was meant, so that differences at 2 and 3 bits "
    "are to be expected",
    "scales were folded into a linear without its bias, and through a GELU: the published model changes its function "
    "even at 16 bits. 16 stands for fake quantisation at 16 bits there, and for native precision here",
    "projections between the parts were left out there; ours count as connector",
    GRID,
)
FIGURES_ONLY = "scores are published in figures only, so that the importance of the parts is what can be compared"
VQAV2_TRAPS = ("theirs are the first tenth of val2014's questions (21,435); ours as many, drawn with the seed",)
BEAMS = "five beams and a length penalty for BLIP-2 there; greedy here"
LLAVA_TRAPS = (
    "the published GPTQ class ignores its configuration and always uses 4 bits; only an older script ran the widths",
    "answers kept the prompt in the main scripts (one committed file has accuracy 0.0); ours are stripped",
    "the projector is never quantised, there and here",
)
RETRIEVAL_TRAPS = (
    "the branch that calibrates the retrieval model cannot be reached in the published GPTQ code, and would leave the "
    "text feed-forwards without data",
    "calibration images were resized and normalised twice, and caption i paired with image i although there are five "
    "captions to an image",
    "the importance published for texts was not found again from the committed table (62 to 63, 37 to 38 on R@1)",
)

GEOCHAT = "a report on quantising GeoChat and its slides; GeoChat is Kuckreja et al. 2024 (arXiv 2311.15826)"
GEOCHAT_7B = "MBZUAI/geochat-7B"
Q_VLM = (
    "the 4-bit column: it is Q-VLM's released code, NF4 weights and activations rounded to 4 bits per channel or token "
    "position, which is not part of this package; NF4 weights alone would be another experiment"
)
INT8 = (
    "the report calls LLM.int8 asymmetric; its weights are symmetric per row, and the activations that reach 6 are "
    "multiplied in 16 bits, as here (the simulation in this package, threshold 6)"
)

TRAPS = {"uniform": UNIFORM_TRAPS, "GPTQ": GPTQ_TRAPS, "AWQ": AWQ_TRAPS}
QUESTIONS = {"VQAv2": 21_435, "GQA": 12_578}  # evaluated on: a tenth of val2014, and all of test-dev


def mmq(title: str, method: str, traps: tuple[str, ...] = (), **more: Any) -> Experiment:
    """One of the paper's experiments: a model's parts on a grid of widths."""
    return Experiment(title=title, source=MMQ, method=f"paper-{method.lower()}", traps=(*TRAPS[method], *traps), **more)


def captions(method: str, traps: tuple[str, ...] = (), **more: Any) -> Experiment:
    how = {"model": BLIP2, "small": "blip2", "tasks": ("coco-captions:{data}",), "unit": "CIDEr"}
    return mmq(f"BLIP-2, {method}, COCO captions", method, traps, **how, **more)


def retrieval(method: str, **more: Any) -> Experiment:
    how = {"model": BLIP2_ITM, "small": "blip2-retrieval", "tasks": ("flickr30k:{data}",), "unit": "R@1", "scale": 100}
    traps = {"GPTQ": RETRIEVAL_TRAPS, "AWQ": RETRIEVAL_TRAPS[1:]}.get(method, ())
    return mmq(f"BLIP-2, {method}, Flickr30k retrieval", method, traps, **how, **more)


def questions(label: str, method: str, data: str, shares: Mapping[str, float]) -> Experiment:
    """Of BLIP-2 or LLaVA, whose published importance is that of the parts named in `shares`."""
    blip2 = label == "BLIP-2"
    how = {"model": BLIP2 if blip2 else LLAVA, "small": "blip2" if blip2 else "llava", "unit": "accuracy"}
    how |= {"tasks": (f"{data.lower()}:{{data}}",), "n": QUESTIONS[data], "shares": {"": shares}}
    traps = (
        FIGURES_ONLY,
        *(VQAV2_TRAPS if data == "VQAv2" else ()),
        *((BEAMS,) if blip2 else LLAVA_TRAPS[method != "GPTQ" :]),
    )
    return mmq(f"{label}, {method}, {data}", method, traps, grid=dict.fromkeys(shares, WIDTHS), **how)


def geochat(title: str, traps: tuple[str, ...], missing: tuple[str, ...] = (), **more: Any) -> Experiment:
    """Full precision and LLM.int8, on all examples."""
    how = {"model": GEOCHAT_7B, "small": "geochat", "dtype": "bfloat16", "method": "llm-int8", "grid": {"*": (8, 16)}}
    how |= {"scale": 100, "n": 100_000, "traps": (INT8, *traps), "missing": (Q_VLM, *missing)}
    return Experiment(title=f"GeoChat, {title}", source=GEOCHAT, **how, **more)
