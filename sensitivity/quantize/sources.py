"""SOURCES: where each method comes from, how much of that was read, and what its published bits count."""

from __future__ import annotations

from dataclasses import dataclass

FULL, CODE, ABSTRACT = "text read in full", "code read, not the whole text", "known from an abstract and others' code"


@dataclass(frozen=True)
class Source:
    """The source of one row of METHODS or PRESETS."""

    where: str
    read: str  # FULL, CODE, ABSTRACT, or "" where there is nothing to read
    ours: str = ""  # what is inferred, or differs from the source; "there" means in the source
    claimed: str = "code bits alone"  # what the published bits per weight include


SOURCES: dict[str, Source] = {
    "uniform": Source("Gautam et al. 2025", CODE),
    "rtn": Source("common practice", ""),
    "clip": Source("Lin et al. 2023 (AWQ), the clipping alone", CODE),
    "gptq": Source("Frantar et al. 2023", CODE, "clip search weighed by the Cholesky factor"),
    "vlm-ptq": Source(
        "VLM-PTQ (CVPR 2026)",
        "known from reviews that print its equations",
        "the shift is exact, not a factor per column; the shares of image and text that are tried; a share per weight",
    ),
    "awq": Source("Lin et al. 2023", CODE, "errors from the Gram matrix, not from outputs"),
    "nf4": Source("Dettmers et al. 2023 (QLoRA), bitsandbytes", CODE),
    "fp4": Source("bitsandbytes", CODE),
    "llm-int8": Source("Dettmers et al. 2022", CODE),
    "binary": Source("residual binary approximation as in BiLLM's code", CODE),
    "squeezellm": Source(
        "Kim et al. 2023",
        CODE,
        "the Gram matrix's diagonal in place of gradients, which squeezellm-fisher has; partitions by dynamic "
        "programming; outliers are a fixed share",
    ),
    "leanquant": Source(
        "Zhang and Shrivastava 2024", CODE, "partitions by dynamic programming; the default exponent was not read"
    ),
    "leanquant-affine": Source(
        "Zhang and Shrivastava 2024", "only that it exists was read, not its search", "ranges by clip search under d^-p"
    ),
    "bpdq": Source("BPDQ", CODE, "each row keeps its own best iteration; columns are rounded in stored order"),
    "billm": Source(
        "Huang et al. 2024",
        CODE,
        "numbers of salient columns are tried in powers of two; 17 splits are tried, there 81",
        "1.08: one bit, and the second bit of salient columns",
    ),
    "bivlm": Source(
        "Bi-VLM",
        FULL,
        "the number of iterations for the tail's scale; bin indices at a fixed width",
        "1.01 to 1.1: without the index of each weight's bin",
    ),
    "spqr": Source(
        "Dettmers et al. 2023 (SpQR)",
        CODE,
        "outliers are a fixed share, chosen once",
        "all, with 32 bits per outlier",
    ),
    "gwq": Source(
        "GWQ", ABSTRACT, "a share of each weight; ranges without outliers; gradients of all calibration examples"
    ),
    "adpq": Source(
        "AdpQ, statistical pre-calibration",
        ABSTRACT,
        "outliers are a fixed share by magnitude, there found by a threshold",
    ),
    "wkv": Source(
        "WKVQuant",
        ABSTRACT,
        "only the token itself reads its key and value unrounded, also in a prompt; channels are divided by their "
        "largest value, there by learned factors",
        "code bits, of weights and cache",
    ),
    "qvla": Source(
        "QVLA",
        "the released proxy read, not the text",
        "channels of one weight share a budget of stored bits, and lose bits where that costs least per bit",
        "code bits, averaged over channels and not over weights",
    ),
    "qsvd": Source(
        "QSVD",
        CODE,
        "all layers keep the same share of the rank, there chosen by the gradient of the answer loss; inputs are "
        "weighed by the Gram matrix, there by magnitudes of channels; the latent is rotated, not the residual stream; "
        "other layers are rounded to nearest",
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
    "rsq": Source("Sung et al. 2025 (RSQ)", CODE, "each layer's input is rotated by itself, not the residual stream"),
    "norm-tweak": Source(
        "Li et al. 2023 (Norm Tweaking)",
        "known from an unofficial implementation",
        "the step with the least output error is kept; trained on images and questions, there on text that the model "
        "generated; a larger learning rate",
    ),
    "qig": Source(
        "QIG", CODE, "attribution and error of layers, there of modules; the error is that of 3 bits per row"
    ),
    "salq-vlm": Source(
        "SalQ-VLM, formerly VLMQ", ABSTRACT, "the block's error is that of rounding to nearest at 3 bits"
    ),
    "gptaq": Source(
        "Li et al. 2025 (GPTAQ)",
        CODE,
        "inputs are compared with the whole float model's; shifts start from the original weights",
    ),
    "smooth": Source(
        "Xiao et al. 2023 (SmoothQuant)",
        "known from code that follows it",
        "factors have a mean of 1; weights have a scale per row",
    ),
    "repq-vit": Source(
        "Li et al. 2023 (RepQ-ViT)",
        CODE,
        "ranges are minimum and maximum, there the best of three percentiles, and include zero; the last code of a "
        "softmax means zero, there zero is added to all codes",
    ),
    "ptq4sam": Source(
        "PTQ4SAM",
        CODE,
        "GPTQ in place of AdaRound and QDrop; keys alone change signs, around their rounding and before rotary "
        "positions, which equals folding the signs into weights; steps are fractions of the largest probability",
    ),
    "quantvggt": Source(
        "QuantVGGT",
        CODE,
        "trained per layer, on random normal tokens with its Gram matrix; only weights' ranges are trained; smoothing "
        "by root mean squares of rotated inputs and by rotated weights (its code: not rotated); each block leaves out "
        "its own outlying examples, and none are chosen by clusters",
    ),
    "quantvla": Source(
        "QuantVLA, after DuQuant",
        CODE,
        "all layers of a component, there only MLPs in the action head; a scale for each token, there the 99.9th "
        "percentile; statistics of logits and outputs are from the calibration data",
    ),
    "qvlm": Source(
        "Q-VLM (NeurIPS 2024)",
        FULL,
        "layers are transformer blocks; the threshold of dependency is its mean; each number has one level, there "
        "soft shares of several; a block ends with its component; the vision encoder is trained in an experiment",
    ),
    "qvlm-released": Source(
        "Q-VLM, its released code",
        CODE,
        "inputs of output and down projections, and of the tower, have a range for each token; there one for the whole "
        "prompt, which depends on how prompts are batched, and in the tower a table by position for one image size",
    ),
}
