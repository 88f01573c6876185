"""SOURCES: where each method comes from, how much of that was read, and what its published bits count."""

from __future__ import annotations

from dataclasses import dataclass

FULL, CODE, ABSTRACT = "text read in full", "code read, not the whole text", "known from an abstract and others' code"


@dataclass(frozen=True)
class Source:
    """The source of one row of METHODS or PRESETS."""

    where: str
    read: str  # FULL, CODE, ABSTRACT, or "" where there is nothing to read
    ours: str = ""  # what is inferred, or differs from the source
    claimed: str = "code bits alone"  # what the published bits per weight include


SOURCES: dict[str, Source] = {
    "uniform": Source("Gautam et al. 2025", CODE),
    "rtn": Source("common practice", ""),
    "clip": Source("Lin et al. 2023 (AWQ), the clipping alone", CODE),
    "gptq": Source("Frantar et al. 2023", CODE, "clip search weighed by the Cholesky factor"),
    "vlm-ptq": Source(
        "VLM-PTQ (CVPR 2026)",
        "known from reviews that print its equations",
        "the exact shift of each row, shares of the image, and a share per weight",
    ),
    "awq": Source("Lin et al. 2023", CODE, "errors from the Gram matrix, not from outputs"),
    "nf4": Source("Dettmers et al. 2023 (QLoRA), bitsandbytes", CODE),
    "fp4": Source("bitsandbytes", CODE),
    "llm-int8": Source("Dettmers et al. 2022", CODE),
    "binary": Source("residual binary approximation as in BiLLM's code", CODE),
    "squeezellm": Source(
        "Kim et al. 2023",
        CODE,
        "the Gram matrix's diagonal for gradients, which squeezellm-fisher has; partitions by dynamic programming; "
        "outliers are exact shares",
    ),
    "leanquant": Source(
        "Zhang and Shrivastava 2024", CODE, "partitions by dynamic programming; the default exponent was not read"
    ),
    "leanquant-affine": Source(
        "Zhang and Shrivastava 2024", "that it exists was read, not its search", "ranges by clip search under d^-p"
    ),
    "bpdq": Source("BPDQ", CODE, "each row keeps its own best turn; columns as they are stored"),
    "billm": Source(
        "Huang et al. 2024",
        CODE,
        "numbers of salient columns in powers of two, 17 splits for 81",
        "1.08: one bit, and the second bit of salient columns",
    ),
    "bivlm": Source(
        "Bi-VLM",
        FULL,
        "the number of turns of the tail's scale; bin indices at a fixed width",
        "1.01 to 1.1: without the index of each weight's bin",
    ),
    "spqr": Source(
        "Dettmers et al. 2023 (SpQR)",
        CODE,
        "outliers are a fixed share, chosen once",
        "all, with 32 bits per outlier",
    ),
    "gwq": Source(
        "GWQ", ABSTRACT, "a share of each weight; ranges without outliers; as many examples as are calibrated on"
    ),
    "adpq": Source("AdpQ, statistical pre-calibration", ABSTRACT, "its threshold is the largest share by magnitude"),
    "wkv": Source(
        "WKVQuant",
        ABSTRACT,
        "a token alone reads its own key and value as they are, also in a prompt; channels are divided by their "
        "largest value, where published factors are learned",
        "code bits, of weights and cache",
    ),
    "qvla": Source(
        "QVLA",
        "released proxy read, not the text",
        "channels compete within each weight, for stored bits, by added cost per saved bit",
        "code bits, averaged over channels and not over weights",
    ),
    "qsvd": Source(
        "QSVD",
        CODE,
        "one share of the rank in all layers, there chosen by the gradient of the answer loss; the Gram matrix, there "
        "magnitudes of channels; the latent rotated, not the residual stream; other layers rounded to nearest",
        "code bits, at the rank",
    ),
    "paper-uniform": Source("Gautam et al. 2025", CODE),
    "paper-gptq": Source("Gautam et al. 2025", CODE),
    "paper-awq": Source("Gautam et al. 2025", CODE),
    "mbq": Source("Li et al. 2025 (MBQ)", CODE, "squared error of layers, there the L1 error of modules"),
    "tlq": Source("TLQ", ABSTRACT, "the weight of a token is the norm of its gradient"),
    "tlq-gptq": Source("TLQ", ABSTRACT, "as tlq, with GPTQ's solver"),
    "oac": Source("OAC", ABSTRACT, "without the terms between tokens"),
    "squeezellm-fisher": Source(
        "Kim et al. 2023", CODE, "as squeezellm, and squared gradients from the calibration data, not from text"
    ),
    "rsq": Source("Sung et al. 2025 (RSQ)", CODE, "each layer's input rotated by itself, not the residual stream"),
    "norm-tweak": Source(
        "Li et al. 2023 (Norm Tweaking)",
        "known from an unofficial implementation",
        "the step with the least output error is kept; images and questions, there text that the model generated; a "
        "larger rate",
    ),
    "qig": Source("QIG", CODE, "attribution and error of layers, there of modules; three bits per row as the error"),
    "salq-vlm": Source(
        "SalQ-VLM, formerly VLMQ", ABSTRACT, "the block's error is that of rounding to nearest at 3 bits"
    ),
    "gptaq": Source(
        "Li et al. 2025 (GPTAQ)", CODE, "inputs differ from the whole float model's; shifts are of the original weights"
    ),
    "smooth": Source(
        "Xiao et al. 2023 (SmoothQuant)", "known from code that follows it", "factors with a mean of 1; weights per row"
    ),
    "repq-vit": Source(
        "Li et al. 2023 (RepQ-ViT)",
        CODE,
        "ranges are minimum and maximum, there the best of three percentiles, and include zero; the last code of a "
        "softmax is zero, there zero stands beside all codes",
    ),
    "ptq4sam": Source(
        "PTQ4SAM",
        CODE,
        "GPTQ for AdaRound and QDrop; signs of keys around their rounding, before rotary positions, which is what "
        "folding them into weights comes to; keys alone; steps of the largest probability",
    ),
    "quantvggt": Source(
        "QuantVGGT",
        CODE,
        "training per layer on normal tokens with its Gram matrix; ranges of weights alone; smoothing by root mean "
        "squares of rotated inputs and by rotated weights (its code: not rotated); each block leaves out its own "
        "outlying examples, and none are chosen by clusters",
    ),
    "quantvla": Source(
        "QuantVLA, after DuQuant",
        CODE,
        "all layers of a component, there MLPs alone in the action head; a scale for each token, there the 99.9th "
        "percentile; statistics of logits and outputs from the calibration data",
    ),
    "qvlm": Source(
        "Q-VLM (NeurIPS 2024)",
        FULL,
        "layers are transformer blocks; the threshold of dependency is its mean; levels are not assigned softly; a "
        "block ends with its component; its training of the vision encoder is left out",
    ),
    "qvlm-released": Source(
        "Q-VLM, its released code",
        CODE,
        "inputs of output and down projections, and of the tower, have a range for each token: there one of the whole "
        "prompt, which would depend on how prompts are batched, and a table by position for one image size",
    ),
}
