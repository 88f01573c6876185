"""RUNTIMES: what each runtime can load, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sensitivity.spec.components import PARTS, VOCABULARY
from sensitivity.spec.errors import unknown
from sensitivity.spec.plan import ROUNDED, Scheme

Choice = Scheme | None
# methods with integer codes and an integer zero point
INTEGER_GRIDS = ("rtn", "clip", "gptq", "awq", "leanquant-affine", "vlm-ptq")
ANY_WIDTH = tuple(range(1, 17))


@dataclass(frozen=True)
class Runtime:
    """What one runtime can load; it refuses bit widths that neither `symmetric` nor `asymmetric` lists."""

    title: str  # what messages call it
    symmetric: tuple[int, ...] = ()  # bit widths of symmetric grids
    asymmetric: tuple[int, ...] = ()  # bit widths of grids with a zero point
    methods: tuple[str, ...] | None = INTEGER_GRIDS  # None: any, since it receives only values or bit widths
    groups: tuple[int | str, ...] | None = None  # group sizes; None: "tensor", "row" and any number of columns
    zeros: tuple[int | str, ...] | None = None  # the groups that can have a zero point; None: all of them
    groups_of: Mapping[int, tuple[int | str, ...]] = field(default_factory=dict)  # bits -> fewer group sizes
    tensors: bool = True  # where `groups` is None: whether one scale for a whole tensor is possible
    ragged: bool = False  # whether the last group of a row may be shorter than the others
    rows: int = 1  # rows must be a multiple of this
    cols: int = 1  # columns must be a multiple of this
    cols_of: Mapping[int, int] = field(default_factory=dict)  # bits -> a larger multiple of columns
    fused: bool = False  # whether q, k, v (and gate, up) become one layer, with one scheme
    one_scheme: bool = False  # whether all quantized weights must have one scheme
    parts: tuple[str, ...] = PARTS  # the others stay in full precision
    vocabulary: tuple[str, ...] = ()  # what it can quantize of "embedding", "head" and "tied" (one weight for both)
    biases: bool = False  # whether biases can be quantized too
    activations: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # bits of weights -> bits of activations
    cache: bool = False  # whether keys and values can be rounded
    packed: bool = False  # whether it loads our packed codes, which leave no place for AWQ's factor per input channel
    instead: str = "rtn"  # the method that a message suggests in place of one that it cannot load
    # the format of ours that it reads, whose bits budgets count; None: the runtime's own tool makes the weights
    files: str | None = None


# a checkpoint of plain values: any width and method, but no rounded activations and no rounded cache
PLAIN_VALUES = Runtime(
    "", ANY_WIDTH, ANY_WIDTH, methods=None, biases=True, ragged=True, vocabulary=(*VOCABULARY, "tied")
)
ONNX = Runtime(
    "ONNX Runtime",
    symmetric=tuple(range(2, 9)),
    asymmetric=tuple(range(2, 9)),
    groups=("tensor", "row", 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024),
    packed=True,
    vocabulary=(*VOCABULARY, "tied"),
    files="onnx",
)
# The bit widths are from the source code of the libraries in the comments; reports/export.md says which were loaded.
RUNTIMES: dict[str, Runtime] = {
    "plan": replace(PLAIN_VALUES, activations=dict.fromkeys(ANY_WIDTH, tuple(ROUNDED)), cache=True),
    "fake": PLAIN_VALUES,
    # compressed-tensors 0.20: one symmetric bit means -1 or 0 there, not plus or minus one step. Packed zero points are
    # written and unpacked, but transformers builds the model on the meta device, where their shape comes out unpacked,
    # and refuses the checkpoint (vllm-project/llm-compressor#1618); one zero point per tensor is not packed
    "compressed-tensors": Runtime(
        "transformers with compressed-tensors",
        symmetric=tuple(range(2, 9)),
        asymmetric=tuple(range(1, 9)),
        zeros=("tensor",),
        packed=True,
        # int-quantized, one scale per token; codes of 4 bits take a byte there
        activations={4: (8,), 8: (8,)},
        vocabulary=("head",),
        files="compressed-tensors",
    ),
    # vllm compressed_tensors_wNa16 and its fused qkv_proj, gate_up_proj; groups as its kernels are built
    "vllm": Runtime(
        "vLLM reading compressed-tensors",
        symmetric=tuple(range(2, 9)),
        asymmetric=(4, 8),
        groups=("row", 32, 64, 128),
        fused=True,
        packed=True,
        activations={8: (8,)},
        files="compressed-tensors",
    ),
    # GPTQModel 7.6: codes are packed along the columns, zeros along the rows, 32 at a time
    "gptq": Runtime(
        "GPTQModel",
        symmetric=tuple(range(2, 9)),
        asymmetric=tuple(range(2, 9)),
        groups=("row", 16, 32, 64, 128, 256, 512, 1024),
        rows=32,
        cols=32,
        packed=True,
        files="gptq",
    ),
    "awq": Runtime(
        "AutoAWQ's layout",
        symmetric=(4,),
        asymmetric=(4,),
        groups=("row", 16, 32, 64, 128),
        rows=8,
        one_scheme=True,
        packed=True,
        files="awq",
    ),
    # auto-round 0.16, packing_format auto_round:auto_gptq, which cannot hold an asymmetric zero of 0
    "auto-round": Runtime(
        "AutoRound",
        symmetric=(2, 3, 4, 8),
        groups=("row", 32, 64, 128, 256),
        rows=32,
        cols=32,
        packed=True,
        files="auto-round",
    ),
    # OpenVINO 2026.4 keeps u2, u4, i4, u8 and i8 packed while it runs, and expands u3 and u6 to floats: codes of 3 bits
    # are stored in 4, and those of 5 to 7 in 8
    "openvino": Runtime(
        "OpenVINO",
        symmetric=tuple(range(2, 9)),
        asymmetric=tuple(range(2, 9)),
        packed=True,
        files="openvino",
    ),
    # ONNX Runtime 1.32 has MatMulNBits for 2, 4 and 8 bits, in blocks of a power of two from 16 up, and refuses other
    # widths: codes of 3 bits are stored in 4, and those of 5 to 7 in 8
    "onnx": ONNX,
    # the same files with accuracy level 4: what a quantized layer reads is rounded to 8 bits, block by block
    "onnx-int8": replace(ONNX, title="ONNX Runtime, rounding what layers read to 8 bits,"),
    # llama.cpp 2026.10 has kernels for Q4_0, Q5_0 and Q8_0. Codes of 2 and 3 bits are stored in 4, those of 6 and 7 in
    # 8, and asymmetric codes in one bit more, since a minimum of 16 bits (Q4_1, Q5_1) does not hold them exactly
    "gguf": Runtime(
        "llama.cpp reading our codes",
        symmetric=tuple(range(2, 9)),
        asymmetric=tuple(range(2, 8)),
        groups=("tensor", "row", 32, 64, 96, 128, 256, 512, 1024),
        cols=32,
        packed=True,
        vocabulary=(*VOCABULARY, "tied"),
        files="gguf",
    ),
    # compressed-tensors' pydantic scheme; llm-compressor computes the grids itself, so only methods that it has
    "llm-compressor": Runtime(
        "llm-compressor",
        symmetric=tuple(range(2, 9)),
        asymmetric=tuple(range(1, 9)),
    ),
    # bitsandbytes 0.50: 4 bits in blocks of the flattened weight, 8 bits per row with separate outlier columns
    "bnb": Runtime(
        "bitsandbytes",
        symmetric=(4, 8),
        methods=("nf4", "fp4", "llm-int8"),
        groups=("row", 64),
        ragged=True,
        one_scheme=True,
        instead="nf4 at 4 bits or llm-int8 at 8",
    ),
    # torchao 0.18 IntxWeightOnlyConfig
    "torchao": Runtime(
        "torchao", symmetric=tuple(range(2, 9)), asymmetric=tuple(range(1, 9)), methods=("rtn",), tensors=False
    ),
    # nvidia-modelopt 0.47 quantized_layers: W4A16_AWQ in groups and W8A16 per row are its integer formats
    "modelopt": Runtime(
        "ModelOpt",
        symmetric=(4, 8),
        groups_of={4: (32, 64, 128), 8: ("row",)},
    ),
    # llama.cpp: q4_0, q5_0 and q8_0 are blocks of 32 columns; k-quants are super-blocks of 256 with scales of their own
    "llama.cpp": Runtime(
        "llama.cpp",
        symmetric=(2, 3, 4, 5, 6, 8),
        asymmetric=(2, 3, 4, 5, 6, 8),
        methods=None,
        ragged=True,
        cols=32,
        cols_of={2: 256, 3: 256, 6: 256},
    ),
    # mlx.core.quantize: affine, groups of 32, 64 or 128
    "mlx": Runtime(
        "MLX (mlx-lm, mlx-vlm)",
        asymmetric=(2, 3, 4, 5, 6, 8),
        groups=(32, 64, 128),
        methods=("rtn", "clip", "gptq"),
    ),
}


def runtime(name: str) -> Runtime:
    """The row of RUNTIMES for a name, or an error that lists the names."""
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    return RUNTIMES[name]


def files_of(name: str | None) -> str | None:
    """The format whose stored bits count against a runtime's budget; None: the bits that the plan itself counts."""
    return None if name is None else runtime(name).files


def abilities(name: str) -> str:
    """What a runtime can load, as flags of `sensitivity sweep`."""
    able = runtime(name)
    zeros = "" if able.zeros is None else f" --group {' or '.join(map(str, able.zeros))}"
    grids = (("--symmetric", able.symmetric), (f"--no-symmetric{zeros}", able.asymmetric))
    grid_flags = [f"{flag} --bits {','.join(map(str, widths))}" for flag, widths in grids if widths]
    flags = " or ".join(grid_flags)
    groups = able.groups_of or ({} if able.groups is None else {0: able.groups})
    for bits, sizes in groups.items():
        flags += f", --group {' or '.join(map(str, sizes))}" + (f" at {bits} bits" if bits else "")
    return flags if able.methods is None else f"--method {' or '.join(able.methods)} {flags}"


def sweep_flags(name: str) -> str:
    """The flags with which `sensitivity sweep`, otherwise at its defaults, finds plans that a runtime can load."""
    able = runtime(name)
    flags = [f"--runtime {name}"]
    if able.methods is not None and "rtn" not in able.methods:
        flags += [f"--method {able.methods[0]}", f"--bits {able.symmetric[0]}"]
    if not able.symmetric:
        flags.append("--no-symmetric")
    if able.groups_of:  # one sweep has one size of groups: that of the fewest bits
        bits = min(able.groups_of)
        flags.append(f"--bits {bits} --group {able.groups_of[bits][0]}")
    elif able.groups is not None and "row" not in able.groups:
        flags.append(f"--group {able.groups[0]}")
    return " ".join(flags)
