"""RUNTIMES: what each runtime can load, as data, and the rules that a plan breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sensitivity.spec.components import PARTS, WORDS, Component, ComponentMap, Weight
from sensitivity.spec.errors import UserError, unknown
from sensitivity.spec.plan import NOT_ROUNDED, ROUNDED, Plan, Scheme

Choice = Scheme | None
# methods with integer codes and an integer zero point
INTEGER_GRIDS = ("rtn", "clip", "gptq", "awq", "leanquant-affine", "vlm-ptq")
ANY = tuple(range(1, 17))


@dataclass(frozen=True)
class Runtime:
    """What one runtime can load; a bit width that no field names is one that it cannot load."""

    about: str
    symmetric: tuple[int, ...] = ()  # bit widths of symmetric grids
    asymmetric: tuple[int, ...] = ()  # bit widths of grids with a zero point
    methods: tuple[str, ...] | None = INTEGER_GRIDS  # None: any, since it receives only values or bit widths
    groups: tuple[int | str, ...] | None = None  # group sizes; None: "tensor", "row" and any number of columns
    zeros: tuple[int | str, ...] | None = None  # the groups that can have a zero point; None: all of them
    groups_of: Mapping[int, tuple[int | str, ...]] = field(default_factory=dict)  # bits -> groups, where fewer
    tensors: bool = True  # where `groups` is None: whether one scale for a whole tensor is possible
    ragged: bool = False  # whether the last group of a row may be shorter than the others
    rows: int = 1  # rows must be a multiple of this
    cols: int = 1  # columns must be a multiple of this
    cols_of: Mapping[int, int] = field(default_factory=dict)  # bits -> the same, where it is more
    fused: bool = False  # whether q, k, v (and gate, up) become one layer, with one scheme
    one_scheme: bool = False  # whether all quantized weights must have one scheme
    parts: tuple[str, ...] = PARTS  # the others stay in full precision
    words: tuple[str, ...] = ()  # which of "embedding", "head" and "tied" (one weight that is both) it can quantize
    biases: bool = False  # whether biases can be quantized too
    activations: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # bits of weights -> of activations beside
    cache: bool = False  # whether keys and values can be rounded
    packed: bool = False  # whether it loads our packed codes, which leave no place for AWQ's factor per input channel
    instead: str = "rtn"  # the method that a message suggests in place of one that it cannot load
    files: str | None = None  # the format that it reads if we write the weights: budgets count its bits


NAMED = Runtime("", ANY, ANY, methods=None, biases=True, ragged=True, words=(*WORDS, "tied"))
# The bit widths come from the source of the libraries in the comments; reports/export.md says which were also loaded.
RUNTIMES: dict[str, Runtime] = {
    "plan": replace(NAMED, activations=dict.fromkeys(ANY, tuple(ROUNDED)), cache=True),
    "fake": NAMED,
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
        words=("head",),
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
        "mlx-lm and mlx-vlm",
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
    """What a runtime can load, in the flags of a sweep."""
    able = runtime(name)
    zeros = "" if able.zeros is None else f" --group {' or '.join(map(str, able.zeros))}"
    grids = (("--symmetric", able.symmetric), (f"--no-symmetric{zeros}", able.asymmetric))
    words = [f"{flag} --bits {','.join(map(str, widths))}" for flag, widths in grids if widths]
    found = " or ".join(words)
    groups = able.groups_of or ({} if able.groups is None else {0: able.groups})
    for bits, sizes in groups.items():
        found += f", --group {' or '.join(map(str, sizes))}" + (f" at {bits} bits" if bits else "")
    return found if able.methods is None else f"--method {' or '.join(able.methods)} {found}"


def refusals(component: Component, scheme: Choice, name: str) -> Iterator[str]:
    """Why a runtime cannot load one component at one scheme: each rule that it breaks, as the end of a sentence."""
    # no rule names the component, so that `violations` and `restrict` can list all components under one sentence
    able = runtime(name)
    if scheme is None:
        return
    if component.part not in able.parts:
        yield f"{able.about} keeps {component.part} in full precision"
    if lost := [word for word in map(_word, component.weights) if word and word not in able.words]:
        yield (
            f"{able.about} keeps the {WORD[lost[0]]} in full precision; sweep without --include "
            f"{'embedding,head' if lost[0] == 'tied' else lost[0]}, or use --format fake"
        )
    if able.methods is not None and scheme.method not in able.methods:
        yield (
            f"{able.about} cannot hold what {scheme.method} stores; use --method {able.instead}, or --format fake, "
            "which writes the values themselves"
        )
    if able.packed and scheme.method == "awq" and scheme.get("scales") != "folded":
        yield (
            f"{able.about} has no place for the factor per input that awq stores; sweep with --set scales=folded, by "
            "which the layer before takes it over where that is exact (never across a GELU), or use --format fake"
        )
    if able.packed and scheme.get("transform"):
        yield (
            f"{able.about} does not rotate inputs; sweep with --set transform=none, or use --format fake, which writes "
            "the values themselves"
        )
    widths = able.symmetric if scheme.symmetric else able.asymmetric
    if scheme.bits not in widths:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        yield f"{able.about} loads {kind} widths {comma_list(widths) or 'of no kind'}, not {scheme.bits}"
    groups = able.groups_of.get(scheme.bits, able.groups)
    if groups is not None and scheme.group not in groups:
        yield f"{able.about} takes groups of {comma_list(groups)} at {scheme.bits} bits, not {scheme.group}"
    elif scheme.group == "tensor" and not able.tensors:
        yield f"{able.about} takes a scale per row or group, not one per tensor; use --group row"
    elif not scheme.symmetric and able.zeros is not None and scheme.group not in able.zeros:
        zeros = comma_list(able.zeros)
        yield f"{able.about} loads zero points of {zeros} groups, not of {scheme.group}; use --symmetric"
    yield from _not_rounded(scheme, able)
    if scheme.get("biases") and not able.biases:
        yield f"{able.about} keeps biases in full precision; leave out --biases"
    yield from _misfits(component.weights, scheme, able)


def _not_rounded(scheme: Scheme, able: Runtime) -> Iterator[str]:
    """Rules about what is rounded in each forward pass."""
    about = able.about or "a checkpoint of plain weights"
    if scheme.cache != NOT_ROUNDED and not able.cache:
        yield f"{about} has no place for a rounded cache; sweep without --cache-bits, or use --format plan"
    if scheme.activations == NOT_ROUNDED:
        return
    beside = able.activations.get(scheme.bits, ())
    if not able.activations:
        yield f"{about} cannot say that activations are rounded; sweep without --activation-bits, or use --format plan"
    elif scheme.activations not in beside:
        pairs = [f"{a} beside weights of {bits} bits" for bits, widths in able.activations.items() for a in widths]
        yield f"{about} takes activations of {' or '.join(pairs)}, not of {scheme.activations} beside {scheme.bits}"
    elif able.packed and (not scheme.symmetric or scheme.group != "row"):
        rows = "beside symmetric weights with a scale per row; use --symmetric --group row"
        yield f"{about} takes rounded activations {rows}"
    elif able.packed and scheme.get("activation_scale") == "tensor":
        yield f"{about} is written with a scale for each token; use --set activation_scale=token"


WORD = {"embedding": "embedding", "head": "output head", "tied": "embedding that is the output head too"}


def _word(weight: Weight) -> str | None:
    return "tied" if weight.tied else weight.kind if weight.kind in WORDS else None


def _misfits(weights: Sequence[Weight], scheme: Scheme, able: Runtime) -> Iterator[str]:
    """Rules about rows and columns that the group size or the packing does not divide."""
    rows, cols = sorted({w.rows for w in weights}), sorted({w.cols for w in weights})
    if isinstance(scheme.group, int) and not able.ragged and (odd := [n for n in cols if n % scheme.group]):
        yield f"groups of {scheme.group} do not divide rows of {comma_list(odd)} weights; use --group row"
    if odd := [n for n in rows if n % able.rows]:
        yield f"{able.about} needs rows in multiples of {able.rows}, not {comma_list(odd)}"
    step = able.cols_of.get(scheme.bits, able.cols)
    if odd := [n for n in cols if n % step]:
        yield f"{able.about} needs columns in multiples of {step} at {scheme.bits} bits, not {comma_list(odd)}"


def violations(parts: ComponentMap, plan: Plan, name: str) -> list[str]:
    """The rules that a plan breaks, one sentence per rule with its components; empty if the runtime can load it."""
    able = runtime(name)
    refused: dict[str, list[str]] = {}
    for component in parts.components:
        for refusal in refusals(component, plan[component.name], name):
            refused.setdefault(refusal, []).append(f"{component.name} ({_scheme(plan[component.name])})")
    found = [f"{', '.join(components)}: {refusal}" for refusal, components in refused.items()]
    for group in tied(parts, name):
        schemes = {plan[member] for member in group}
        if len(schemes) > 1:
            widths = ", ".join(f"{member} at {_scheme(plan[member])}" for member in group)
            found.append(f"{widths}: {able.about} makes one layer of them, so they must have one scheme")
    used = {scheme for _, scheme in plan.schemes if scheme is not None}
    if able.one_scheme and len(used) > 1:
        found.append(
            f"the plan has {len(used)} schemes ({', '.join(sorted(map(_scheme, used)))}), and {able.about} takes one "
            "for all that is quantized"
        )
    return found


def tied(parts: ComponentMap, name: str) -> list[tuple[str, ...]]:
    """Components that must share their scheme, because the runtime fuses their weights into one layer."""
    if not runtime(name).fused:
        return []
    home = {weight.name: component.name for component in parts.components for weight in component.weights}
    sharing: dict[str, set[str]] = {}
    for weight in parts.weights:
        if weight.shares_input is not None:
            sharing.setdefault(weight.shares_input, set()).add(home[weight.name])
    merged: list[set[str]] = []
    for names in sharing.values():
        # each input ties the components of its readers; sets that overlap are merged, as ties are transitive
        near = [group for group in merged if group & names]
        merged = [group for group in merged if not group & names] + [names.union(*near)]
    order = {component: place for place, component in enumerate(parts.names)}
    return sorted(tuple(sorted(group, key=order.__getitem__)) for group in merged if len(group) > 1)


def check(parts: ComponentMap, plan: Plan, name: str) -> None:
    """Raise an error that names the rules that a plan breaks."""
    if found := violations(parts, plan, name):
        shown = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise UserError(f"{name} cannot hold this plan: {shown}. `sensitivity legalize` finds the best plan that fits")


def _scheme(scheme: Choice) -> str:
    return "native" if scheme is None else str(scheme)


def comma_list(values: Sequence[object]) -> str:
    """Values with commas between them."""
    return ", ".join(map(str, values))
