"""discover() and inspect() sort every parameter of a VLM into a part, block and kind, or keep it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike

from torch import nn

from sensitivity.models.families import Family, family_of
from sensitivity.models.loading import load
from sensitivity.models.towers import Towers, inside
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import EMBEDDING, HEAD, KEY_VALUE, PARTS, VOCABULARY, ComponentMap, Kept, Weight, check
from sensitivity.spec.errors import UserError, check_is, each_is, unknown

# Patterns of module paths, tried in this order: paths of cross-attention also contain attention, and those of attention
# also contain output.
KINDS = {
    "cross": re.compile(r"cross|encdec|encoder_attn|x_attn"),
    "attn": re.compile(r"attn|attention"),
    "ff": re.compile(
        r"mlp|ffn|feed_?forward|densereludense|intermediate|output|expert|moe"
        r"|\b(c_)?fc|\b(up|gate|down|c)_proj|\bw[i123o]\b|\bwi_|\blinear_?\d"
    ),
}
# Reasons to keep a weight -> the words of --include that override them.
OVERRIDDEN_BY = {
    "embedding": {EMBEDDING},
    "output head": {HEAD},
    "embedding, tied to the output head": {EMBEDDING, HEAD},
}
# names of layers that read one input: queries beside keys and values, and gates beside what they multiply
QUERY = {"q_proj", "q", "query"}
GATED = {"gate_proj": "up_proj", "wi_0": "wi_1", "w1": "w3"}


def discover(
    model: nn.Module,
    family: Family | None = None,
    name: str = "",
    by: str = "group.kind",
    native_bits: int = 16,
    include: Collection[str] = (),
    other_bits: Mapping[str, int] | None = None,
) -> ComponentMap:
    """Sort every parameter of a model into a component, or keep it for a reason; the model may be on the meta device.

    `include` names the language model's embedding or output head, which become components instead of being kept.
    """
    for word in include:
        if word not in VOCABULARY:
            raise unknown("weight to include", word, VOCABULARY)
    family = family_of(model) if family is None else family
    towers = Towers(model, family)
    aliases: dict[int, list[nn.Module]] = {}  # a tied parameter is sorted once, by all modules that hold it
    for path, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(model.get_submodule(path.rpartition(".")[0]))
    heads = {id(model.get_submodule(path)) for path in towers.heads}
    # torch's MultiheadAttention keeps q, k and v in one bare parameter, and its layers never run as linear layers
    packed_attention = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    linears, included, kept = _sorted_parameters(model, towers, aliases, heads, packed_attention, include)
    if unplaced := [path for path in linears if towers.part(path) is None]:
        raise towers.unplaced_error(path.rpartition(".")[0] for path in unplaced)

    weights, tower = _weights(model, family, towers, linears, packed_attention)
    blocks = max((weight.blocks for weight in weights if weight.part == "language"), default=0)
    weights += [
        _embedding_or_head(model, path, included[path], aliases[id(included[path])], heads, towers, blocks)
        for path in included
    ]
    includable = {word for weight in weights for word in ((weight.kind, EMBEDDING) if weight.tied else (weight.kind,))}
    if missing := [word for word in include if word not in includable]:
        raise UserError(f"{name or type(model).__name__} has no {missing[0]} to include; leave it out")
    check(weights, kept, {path: parameter.numel() for path, parameter in model.named_parameters()})
    unread = tuple(path for path, _ in model.named_parameters() if any(inside(path, b) for b in _behind(model, tower)))
    named = name or type(model).__name__
    return ComponentMap(
        named, "group.kind", tuple(weights), tuple(kept), native_bits, unread=unread, other_bits=other_bits or {}
    ).regroup(by)


def _behind(model: nn.Module, blocks: Sequence[str]) -> Sequence[str]:
    """The blocks of the vision tower behind the one whose output the model takes, as LLaVA does."""
    layer = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if not isinstance(layer, int):
        return ()
    return blocks[layer if layer >= 0 else len(blocks) + 1 + layer :]  # 0 is what the first block reads


def _sorted_parameters(
    model: nn.Module,
    towers: Towers,
    aliases: Mapping[int, list[nn.Module]],
    heads: set[int],
    packed_attention: list[str],
    include: Collection[str],
) -> tuple[list[str], dict[str, nn.Parameter], list[Kept]]:
    """The paths of weights of linear layers, the embedding and head to include, and what is kept and why."""
    linears: list[str] = []
    included: dict[str, nn.Parameter] = {}
    kept: list[Kept] = []
    for path, parameter in model.named_parameters():
        owners = aliases[id(parameter)]
        reason = _reason(path, owners, heads, packed_attention, _is_router(model, path.rpartition(".")[0]))
        is_head = any(id(owner) in heads for owner in owners)
        if reason is None:
            linears.append(path)
        elif _is_included(reason, owners, is_head, towers, include):
            included[path] = parameter
        else:
            part = towers.part(path) or ("language" if is_head else None)
            kept.append(Kept(path, parameter.numel(), reason, part))
    return linears, included, kept


def _is_included(reason: str, owners: list[nn.Module], is_head: bool, towers: Towers, include: Collection[str]) -> bool:
    """Whether `include` overrides the reason to keep a parameter, which must be the language model's."""
    if OVERRIDDEN_BY.get(reason, set()).isdisjoint(include):
        return False
    return is_head or "language" in {towers.part(towers.paths[id(owner)]) for owner in owners}


def _weights(
    model: nn.Module, family: Family, towers: Towers, linears: list[str], packed_attention: list[str]
) -> tuple[list[Weight], list[str]]:
    """The linear layers as weights, each with its part, block, kind and shared input; and the vision tower's blocks."""
    modules = [path.rpartition(".")[0] for path in linears]
    paths_of: dict[str, list[str]] = {part: [] for part in PARTS}
    for path in _blocks(model, "", False, [*modules, *packed_attention], family):
        paths_of[towers.part(path) or "connector"].append(path)
    block_of = {path: (part, i) for part, paths in paths_of.items() for i, path in enumerate(paths)}
    weights: list[Weight] = []
    unknown_kind: list[str] = []
    for path, module in zip(linears, modules, strict=True):
        linear = model.get_submodule(module)
        part = towers.part(module)
        assert part is not None
        assert isinstance(linear, nn.Linear)
        # blocks of another part do not count: a connector may lie inside a tower
        block = next((b for b in _enclosing_paths(module) if b in block_of and block_of[b][0] == part), None)
        kind = _kind(module[len(block) + 1 :], family) if block else None
        if block and kind is None:
            unknown_kind.append(module)
        weights.append(
            Weight(
                name=path,
                rows=linear.weight.shape[0],
                cols=linear.weight.shape[1],
                part=part,
                block=block_of[block][1] if block else None,
                blocks=len(paths_of[part]),
                kind=kind,
                bias=f"{module}.bias" if linear.bias is not None else None,
                shares_input=_shares_input(model, module, family),
            )
        )
    if unknown_kind:
        raise UserError(
            f"cannot tell whether these layers are attention or feed-forward: {', '.join(unknown_kind[:8])}; give a "
            "word of their names a kind in FAMILIES (sensitivity/models/families.py)"
        )
    return weights, paths_of["vision"]


def _embedding_or_head(
    model: nn.Module,
    path: str,
    parameter: nn.Parameter,
    owners: list[nn.Module],
    heads: set[int],
    towers: Towers,
    blocks: int,
) -> Weight:
    """The embedding or the output head as a weight of the language model; a weight that both share is the head."""
    module = path.rpartition(".")[0]
    reader = next((towers.paths[id(owner)] for owner in owners if id(owner) in heads), None)
    return Weight(
        name=path,
        rows=parameter.shape[0],
        cols=parameter.shape[1],
        part="language",
        block=None,
        blocks=blocks,
        kind=EMBEDDING if reader is None else HEAD,
        bias=f"{module}.bias" if reader == module and getattr(owners[0], "bias", None) is not None else None,
        tied=reader if reader != module else None,
    )


def _is_router(model: nn.Module, path: str) -> bool:
    """Whether a linear layer is the router of the experts beside it."""
    parent, _, leaf = path.rpartition(".")
    return leaf in ("gate", "router") and hasattr(model.get_submodule(parent), "experts")


def _reason(
    path: str, owners: list[nn.Module], heads: set[int], packed_attention: list[str], router: bool
) -> str | None:
    """Why a parameter is kept at native precision; None for the weight of a linear layer, which is quantized."""
    module, _, leaf = path.rpartition(".")
    # The order matters: a tied head is an embedding first, a norm inside a head is a norm, and a head is a linear layer
    # that is kept all the same.
    owner, class_name = owners[0], type(owners[0]).__name__
    is_head = any(id(o) in heads for o in owners)
    if any(isinstance(o, nn.Embedding) for o in owners):
        if re.search(r"pos|relative|row_emb|column_emb|tile", path.lower()):
            return "position embedding"
        return "embedding, tied to the output head" if is_head else "embedding"
    if "norm" in class_name.lower():
        return "norm"
    if is_head:
        return "bias" if leaf == "bias" else "output head"
    if any(inside(module, attention) for attention in packed_attention):
        return "bias" if leaf.endswith("bias") else "packed attention, which is not read through linear layers"
    if leaf == "bias":
        return "bias"
    if isinstance(owner, nn.Linear) and leaf == "weight":
        return "router" if router else None
    if class_name.startswith("Conv") and isinstance(owner, nn.modules.conv._ConvNd):
        return "patch convolution" if "patch" in path else "convolution"
    return _reason_by_name(path.lower(), class_name)


def _reason_by_name(path: str, class_name: str) -> str:
    """The reason to keep a parameter of no known kind of layer, by the words of its path."""
    if "expert" in path:
        return "expert weights, which are not linear layers"
    if "router" in path or "router" in class_name.lower():
        return "router"
    if re.search(r"pos(ition)?_?emb|positional", path):
        return "position embedding"
    if re.search(r"class_embedding|cls_token|query|probe|newline|latent|token", path):
        return "learned token"
    if re.search(r"scale|gate|lambda|logit|temperature|gamma", path):
        return "scale or gate"
    return f"bare parameter of {class_name}, not a linear layer"


def _enclosing_paths(path: str) -> Iterator[str]:
    """A module path and the paths around it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _blocks(module: nn.Module, path: str, listed: bool, layers: list[str], family: Family) -> list[str]:
    """The paths of transformer blocks: elements of module lists that hold attention.

    A stage that consists of whole blocks is not a block, and neither is a layer inside a block (T5). `listed` says
    whether the module is an element of a module list.
    """
    within = [layer for layer in layers if not path or inside(layer, path)]
    if not within:
        return []
    blocks = [
        block
        for key, child in module.named_children()
        for block in _blocks(child, f"{path}.{key}" if path else key, isinstance(module, nn.ModuleList), within, family)
    ]
    if not listed or _kinds(path, within, family).isdisjoint({"attn", "cross"}):
        return blocks
    # Elements inside this one that have a feed-forward are whole blocks, so this one is a stage. Without one they are
    # layers of a block (T5 lists its attention and its feed-forward), and this one is the block.
    whole = any("ff" in _kinds(block, [layer for layer in within if inside(layer, block)], family) for block in blocks)
    return blocks if whole else [path]


def _kinds(path: str, layers: list[str], family: Family) -> set[str | None]:
    """The kinds of all layers under a path."""
    return {_kind(layer[len(path) + 1 :], family) for layer in layers}


def _kind(path: str, family: Family) -> str | None:
    """The kind of a layer, by the words of its path inside its block."""
    for word, kind in family.kinds.items():
        if word in path:
            return kind
    return next((kind for kind, words in KINDS.items() if words.search(path.lower())), None)


def _shares_input(model: nn.Module, path: str, family: Family) -> str | None:
    """The module around linears that read one input: q, k, v of self-attention; k, v of cross-attention; gate, up."""
    parent, _, leaf = path.rpartition(".")
    # in cross-attention, k and v read the other sequence, and q does not
    cross = _kind(path, family) == "cross"
    for group in ({*KEY_VALUE} if cross else QUERY | {*KEY_VALUE}, *({gate, up} for gate, up in GATED.items())):
        there = group & {key for key, child in model.get_submodule(parent).named_children()}
        if leaf in group and len(there) > 1:
            return parent
    return None


def inspect(
    vlm: VLM | str | PathLike[str], by: str = "group.kind", include: str | Collection[str] = ()
) -> ComponentMap:
    """Every weight of a model in exactly one named component, or kept with a reason.

    Given the name of a model, it loads no weights. `include` may name embedding and head, which are kept otherwise.

    Examples:
        >>> from sensitivity import inspect
        >>> parts = inspect(vlm, by="part")
        >>> parts.names
        ('vision', 'connector', 'language')
    """
    if isinstance(vlm, str | PathLike):
        vlm = load(vlm, config_only=True)
    check_is("vlm", vlm, VLM)
    included = each_is("include", include, str)
    return discover(vlm.model, vlm.family, vlm.name, by, vlm.native_bits, included, vlm.other_bits)
