"""Stored bits of one weight: what each method stores beside its codes, and what each file format stores."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEEP, NOT_ROUNDED, QSVD, Scheme, Setting


def groups(scheme: Scheme, rows: int, cols: int) -> int:
    """How many scales a weight has; the last group of a row may be shorter and counts as one."""
    if scheme.group == "tensor":
        return 1
    return rows if scheme.group == "row" else rows * math.ceil(cols / int(scheme.group))


def _affine(scheme: Scheme, rows: int, cols: int) -> int:
    """A 16-bit scale per group and, on asymmetric grids, a zero point as wide as a code."""
    return groups(scheme, rows, cols) * (16 + (0 if scheme.symmetric else scheme.bits))


def _scaled(scheme: Scheme, rows: int, cols: int) -> int:
    """What `_affine` counts, and a 16-bit scale per input channel unless the layer before absorbs it."""
    return _affine(scheme, rows, cols) + (0 if scheme.get("scales") in ("folded", "norms") else 16 * cols)


def _blocks(scheme: Scheme, rows: int, cols: int) -> int:
    """bitsandbytes' storage: a table of 16 float32 numbers, and a float32 scale per block of the flattened weight.

    With `double`, block scales take 8 bits each; beside them are their float32 mean, a float32 scale per 256 of them,
    and a table of 256 float32 numbers.
    """
    if isinstance(scheme.group, str):
        raise UserError(f"the group of {scheme.method} is a number of weights, not '{scheme.group}'")
    blocks = math.ceil(rows * cols / scheme.group)
    # the tables are counted per weight, since bitsandbytes stores them with each one
    table = 16 * 32
    if scheme.get("double"):
        return table + 8 * blocks + 32 * (math.ceil(blocks / 256) + 1 + 256)
    return table + 32 * blocks


def outlier_count(share: Setting, rows: int, cols: int) -> int:
    """The number of outliers of a weight, from their share alone: a plan's size is needed before it is quantized."""
    return round(float(share or 0) * rows * cols)


POSITION_SPAN = 256  # columns within which the position of an outlier takes 8 bits


def _positions(count: int, rows: int, cols: int) -> int:
    """The positions of outliers: 8 bits for each, and a 16-bit count for every 256 columns of a row."""
    return 8 * count + 16 * rows * math.ceil(cols / POSITION_SPAN) if count else 0


def _sparse(count: int, rows: int, cols: int) -> int:
    """Outliers with 16-bit values."""
    return 16 * count + _positions(count, rows, cols)


def _codebook(scheme: Scheme, rows: int, cols: int) -> int:
    """A 16-bit codebook per row."""
    return 16 * rows * (1 << scheme.bits)


def _squeezellm(scheme: Scheme, rows: int, cols: int) -> int:
    """What `_codebook` counts, and outliers."""
    count = outlier_count(scheme.get("sensitive"), rows, cols) + outlier_count(scheme.get("outliers"), rows, cols)
    return _codebook(scheme, rows, cols) + _sparse(count, rows, cols)


def _planes(scheme: Scheme, rows: int, cols: int) -> int:
    """For each group, a 16-bit coefficient per bit plane and a 16-bit offset."""
    return groups(scheme, rows, cols) * 16 * (scheme.bits + 1)


def _billm(scheme: Scheme, rows: int, cols: int) -> int:
    """What BiLLM stores beside one bit per weight.

    A second bit for each weight: the half by magnitude that it is in or, in a salient column, its second sign. For each
    group, the mean and magnitude of each half, and the mean and two magnitudes of salient columns. A bit for each
    column: whether it is salient.
    """
    salient, split = bool(scheme.get("salient")), bool(scheme.get("split"))
    numbers = (4 if split else 2) + (3 if salient else 0)
    second = rows * cols if salient or split else 0
    return second + 16 * numbers * groups(scheme, rows, cols) + (cols if salient else 0)


def _bivlm(scheme: Scheme, rows: int, cols: int) -> int:
    """What Bi-VLM stores beside signs: the index of each weight's bin, which the paper leaves out, and bin levels.

    Salient weights are two more bins; they add a 16-bit scale per row, and a mean and a deviation per matrix.
    """
    bins, salient = int(scheme.get("bins") or 1), bool(scheme.get("salient"))
    index = math.ceil(math.log2(bins + (2 if salient else 0)))
    return index * rows * cols + 16 * bins + (16 * (rows + 2) if salient else 0)


def _spqr(scheme: Scheme, rows: int, cols: int) -> int:
    """Outliers, and grids whose scales and zero points are quantized themselves.

    The scales of 16 rows share one 16-bit scale and zero point of their own, and so do their zero points.
    """
    per_group = int(scheme.get("scale_bits") or 16)
    shared = math.ceil(rows / 16) * groups(scheme, 1, cols)
    # at 16 bits there is no second level, and a zero point is as wide as a code
    grids = groups(scheme, rows, cols) * 2 * per_group + 64 * shared if per_group < 16 else _affine(scheme, rows, cols)
    return grids + _sparse(outlier_count(scheme.get("outliers"), rows, cols), rows, cols)


def _gwq(scheme: Scheme, rows: int, cols: int) -> int:
    """What `_affine` counts, and outliers."""
    return _affine(scheme, rows, cols) + _sparse(outlier_count(scheme.get("outliers"), rows, cols), rows, cols)


def _adpq(scheme: Scheme, rows: int, cols: int) -> int:
    """A second grid per group for outliers, which are codes like all other weights, and their positions."""
    count = outlier_count(scheme.get("outliers"), rows, cols)
    return (2 if count else 1) * _affine(scheme, rows, cols) + _positions(count, rows, cols)


CHANNEL_WIDTHS = (0, 2, 4, 8, 16)  # bits that QVLA may give an output channel


def channel_budget(scheme: Scheme, rows: int, cols: int) -> int:
    """The bits that a weight whose rows have different widths may take: codes, and a 16-bit scale per row."""
    return scheme.bits * rows * cols + 16 * rows


def _qvla(scheme: Scheme, rows: int, cols: int) -> int:
    """A 16-bit scale for each row, and 3 bits that say which width it has.

    Codes of the chosen widths never exceed `channel_budget`: the size is an upper bound.
    """
    return 16 * rows + 3 * rows


def latent_rank(scheme: Scheme, cols: int) -> int:
    """The length of the latent vector between the factors of a low-rank weight: a multiple of 16, at most `cols`."""
    return min(cols, 16 * math.ceil(float(scheme.get("rank") or 1) * cols / 16))


def _own_factor(scheme: Scheme, rows: int, cols: int) -> int:
    """A weight's own low-rank factor with a 16-bit scale per row, minus the codes of the full weight."""
    return scheme.bits * rows * (latent_rank(scheme, cols) - cols) + 16 * rows


def _shared_factors(scheme: Scheme, weights: Iterable[Weight]) -> int:
    """The low-rank factor that weights with a common input share, with a 16-bit scale per row; one for each input."""
    inputs = {weight.shares_input or weight.module: weight.cols for weight in weights if weight.is_qkv}
    return sum(latent_rank(scheme, cols) * (scheme.bits * cols + 16) for cols in inputs.values())


# method -> bits that the weights of a component store together
SHARED: dict[str, Callable[[Scheme, Iterable[Weight]], int]] = {QSVD: _shared_factors}
# method -> bits stored beside the codes of a weight with `rows` and `cols`
OVERHEAD: dict[str, Callable[[Scheme, int, int], int]] = {
    "uniform": lambda scheme, rows, cols: 64 * groups(scheme, rows, cols),  # minimum and range, float32
    "rtn": _affine,
    "clip": _affine,
    "gptq": _affine,
    "vlm-ptq": _affine,
    "awq": _scaled,
    "smooth": _scaled,
    "nf4": _blocks,
    "fp4": _blocks,
    "llm-int8": lambda scheme, rows, cols: 32 * rows,
    "binary": _planes,
    "squeezellm": _squeezellm,
    "leanquant": _codebook,
    "leanquant-affine": _affine,
    "bpdq": _planes,
    "billm": _billm,
    "bivlm": _bivlm,
    "spqr": _spqr,
    "gwq": _gwq,
    "adpq": _adpq,
    "qvla": _qvla,
    QSVD: _own_factor,
    KEEP: lambda scheme, rows, cols: 0,
    "codes": lambda scheme, rows, cols: 0,  # an imported table, of which only bit widths are known
}


def _whole_words(bits: int) -> int:
    """Bits rounded up to whole 32-bit words."""
    return 32 * math.ceil(bits / 32)


def _compressed_tensors(scheme: Scheme, rows: int, cols: int) -> int:
    """Bits in the pack-quantized format, or in int-quantized where activations are rounded.

    Codes fill whole words row by row; a 16-bit scale per group; two int64 for the shape; zero points are packed along
    the rows, except the int8 of a whole tensor. In int-quantized each code takes a byte, whatever its width.
    """
    if scheme.activations != NOT_ROUNDED:
        return 8 * rows * cols + 16 * groups(scheme, rows, cols)
    stored = rows * _whole_words(cols * scheme.bits) + 16 * groups(scheme, rows, cols) + 2 * 64
    if scheme.symmetric:
        return stored
    return stored + (8 if scheme.group == "tensor" else groups(scheme, 1, cols) * _whole_words(rows * scheme.bits))


def _awq(scheme: Scheme, rows: int, cols: int) -> int:
    """Codes and, per group, a 16-bit scale and a zero point, which symmetric grids store too."""
    return scheme.bits * rows * cols + groups(scheme, rows, cols) * (16 + scheme.bits)


def _gptq(scheme: Scheme, rows: int, cols: int) -> int:
    """What `_awq` counts, and for each column the 32-bit index of its group."""
    return _awq(scheme, rows, cols) + 32 * cols


def openvino_width(bits: int) -> int:
    """The width in which OpenVINO stores codes: 2, 4 or 8 bits, since it expands codes of other widths to floats.

    For more than 8 bits it is 16: such codes are never stored, but the search counts the size of any choice.
    """
    return next((width for width in (2, 4, 8) if bits <= width), 16)


def _whole_bytes(bits: int) -> int:
    """Bits rounded up to whole bytes."""
    return 8 * math.ceil(bits / 8)


def _openvino(scheme: Scheme, rows: int, cols: int) -> int:
    """Codes in 2, 4 or 8 bits, a 16-bit scale per group, and zero points as wide as codes.

    Symmetric codes of 4 and 8 bits are signed and have no zero point; those of 2 bits share one, in a byte.
    """
    width, count = openvino_width(scheme.bits), groups(scheme, rows, cols)
    zeros = (8 if width == 2 else 0) if scheme.symmetric else _whole_bytes(width * count)
    return _whole_bytes(width * rows * cols) + 16 * count + zeros


def onnx_block(scheme: Scheme, cols: int) -> int:
    """How many codes a block has in ONNX Runtime: a power of two that divides the group, so blocks share its scale.

    If the group is a row or the tensor, a block has at least 32 codes, and the last block of a row may be padded. The
    fastest kernels want 32 to 128 codes.
    """
    whole = cols if isinstance(scheme.group, str) else scheme.group
    fitting = min(whole & -whole, 128)
    return max(fitting, 32) if isinstance(scheme.group, str) else fitting


def _onnx(scheme: Scheme, rows: int, cols: int) -> int:
    """Codes in 2, 4 or 8 bits in whole blocks, a 16-bit scale per group, and zero points of asymmetric codes.

    Where a row or the tensor has one zero point, it is stored once, in a byte; else for each block, as wide as a code.
    """
    width, block = openvino_width(scheme.bits), onnx_block(scheme, cols)
    blocks = math.ceil(cols / block)
    zeros = {"tensor": 8, "row": 8 * rows}.get(str(scheme.group), rows * _whole_bytes(width * blocks))
    return width * rows * blocks * block + 16 * groups(scheme, rows, cols) + (0 if scheme.symmetric else zeros)


GGUF_BLOCK = 32  # weights that share a scale in GGUF
GGUF_BLOCK_BYTES = {"q4_0": 18, "q5_0": 22, "q8_0": 34}  # type -> a 16-bit scale and 32 codes of 4, 5 or 8 bits
# reasons to keep a weight that GGUF stores in the checkpoint's own type; norms and biases become float32
# kept weights that GGUF leaves out, by their names: LLaVA never reads what its tower has for pooling
LEAVE_OUT = {"gguf", "openvino", "onnx"}  # formats without what the model never reads
GGUF_UNREAD = re.compile(r"model\.vision_tower\.(vision_model\.)?(post_layernorm|head)\.")
GGUF_MATRICES = ("embedding", "embedding, tied to the output head", "output head")


def gguf_type(scheme: Scheme) -> str:
    """The type in which GGUF stores codes exactly: a code minus its zero point takes a bit more than the code."""
    width = scheme.bits if scheme.symmetric else scheme.bits + 1
    return "q4_0" if width <= 4 else "q5_0" if width == 5 else "q8_0"


def _gguf(scheme: Scheme, rows: int, cols: int) -> int:
    """Whole blocks of 32 columns, whatever the group: its scale is repeated in each of them."""
    return 8 * GGUF_BLOCK_BYTES[gguf_type(scheme)] * rows * math.ceil(cols / GGUF_BLOCK)


# formats whose files are configurations, from which the runtime's own tool makes the weights
CONFIGURED = ("plan", "fake", "llm-compressor", "bnb", "torchao", "llama.cpp", "modelopt", "mlx")
# other formats -> all bits that their files hold for one weight
FILES: dict[str, Callable[[Scheme, int, int], int]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "auto-round": _gptq,
    "awq": _awq,
    "openvino": _openvino,
    "onnx": _onnx,
    "gguf": _gguf,
    "float32": lambda scheme, rows, cols: 32 * rows * cols,  # the values themselves
    "float16": lambda scheme, rows, cols: 16 * rows * cols,
    "bfloat16": lambda scheme, rows, cols: 16 * rows * cols,
}
