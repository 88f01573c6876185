"""Component and ComponentMap: every weight is in exactly one component, or kept with a reason."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from sensitivity.spec.errors import UserError, unknown

PARTS = ("vision", "connector", "language")  # in data-flow order, which every listing follows
GROUPS = ("front", "middle", "end")
KINDS = ("attn", "cross", "ff")
EMBEDDING, HEAD = "embedding", "head"  # the token embedding and the output head: kept unless --include names them
VOCABULARY = (EMBEDDING, HEAD)  # the weights with a row per token of the vocabulary
KEY_VALUE = ("k_proj", "k", "key", "v_proj", "v", "value")  # layers whose outputs attention caches
MAX_NAMED = 8  # most components that a map's line names
LABELS = {"vision": "ViT", "connector": "Q-Former / projector", "language": "LLM"}  # papers' names, for figures


@dataclass(frozen=True)
class Weight:
    """One linear weight: its parameter name, its shape, and its place in the model."""

    name: str  # of the parameter, e.g. model.language_model.layers.3.mlp.up_proj.weight
    rows: int
    cols: int
    part: str
    block: int | None  # None: outside any block, such as a projection
    blocks: int  # how many transformer blocks the part has
    kind: str | None
    bias: str | None = None  # the name of the layer's bias
    shares_input: str | None = None  # equal for linears that read the same input (q, k, v; gate, up)
    tied: str | None = None  # the path of the output head, for an embedding whose weight the head shares

    @property
    def reader(self) -> str:
        """The module that multiplies its input by this weight.

        For a tied weight this is the output head, whichever module holds the parameter.
        """
        return self.tied or self.module

    @property
    def is_embedding(self) -> bool:
        """Whether this is the token embedding, whose rows are looked up: it has no inputs to calibrate on."""
        return self.kind == EMBEDDING

    @property
    def cached(self) -> bool:
        """Whether its outputs are keys or values of attention that a language model caches.

        The encoder of an encoder-decoder reads its whole input at once, and caches nothing.
        """
        path = self.module.split(".")
        keys_or_values = self.kind in ("attn", "cross") and path[-1] in KEY_VALUE
        return self.part == "language" and keys_or_values and "encoder" not in path

    @property
    def is_qkv(self) -> bool:
        """Whether it makes queries, keys or values of self-attention from an input that all three read."""
        fused = any(name in self.module.rpartition(".")[2] for name in ("qkv", "query_key_value"))
        return self.kind == "attn" and self.block is not None and (self.shares_input is not None or fused)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.rows * self.cols

    @property
    def module(self) -> str:
        """The path of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def group(self) -> str | None:
        """front, middle or end for a weight in a block.

        Outside the blocks: embedding, head, projection or other; None in a part without blocks.
        """
        if self.block is not None:
            # of L blocks, block i is in the front if i < L // 3, in the middle if i < 2L // 3, otherwise at the end
            middle, end = self.blocks // 3, 2 * self.blocks // 3
            return GROUPS[(self.block >= middle) + (self.block >= end)]
        if self.kind in VOCABULARY:
            return self.kind
        if not self.blocks:
            return None
        return "projection" if self.part == "connector" else "other"

    def component_name(self, by: str) -> str:
        """The name of the component that this weight belongs to at a granularity."""
        return GRANULARITIES[by](self)


@dataclass(frozen=True)
class Kept:
    """A weight that stays at native precision, and the reason."""

    name: str
    numel: int
    reason: str
    part: str | None = None


def _join(*words: str | None) -> str:
    return ".".join(word for word in words if word)


def _kind_in_block(w: Weight) -> str | None:
    return w.kind if w.block is not None else None


def _block(w: Weight) -> str:
    if w.block is None:
        return _join(w.part, w.group)
    # zero-padded to at least two digits, so that names sort like block numbers
    return f"{w.part}.{w.block:0{len(str(max(w.blocks - 1, 10)))}d}"


# granularity -> the name of a weight's component; weights with equal names form one component
GRANULARITIES: dict[str, Callable[[Weight], str]] = {
    # embedding and head stay components of their own
    "part": lambda w: _join(w.part, w.kind if w.kind in VOCABULARY else None),
    "group": lambda w: _join(w.part, w.group),
    "kind": lambda w: _join(w.part, _kind_in_block(w) or w.group),
    "group.kind": lambda w: _join(w.part, w.group, _kind_in_block(w)),
    "block": _block,
    "linear": lambda w: w.module,
}


def granularity(by: str) -> str:
    """The name of a granularity, or an error that lists them."""
    if by not in GRANULARITIES:
        raise unknown("granularity", by, GRANULARITIES)
    return by


@dataclass(frozen=True)
class Component:
    """The smallest set of weights that gets its own scheme.

    Examples:
        >>> connector = parts["connector"]
        >>> connector.part, connector.numel == sum(weight.numel for weight in connector.weights)
        ('connector', True)
    """

    name: str
    weights: tuple[Weight, ...]

    @property
    def part(self) -> str:
        """The part that all its weights belong to."""
        return self.weights[0].part

    @cached_property
    def numel(self) -> int:
        """The number of elements of its weights."""
        return sum(w.numel for w in self.weights)

    @cached_property
    def has_cache(self) -> bool:
        """Whether it has keys and values that a language model caches."""
        return any(w.cached for w in self.weights)


@dataclass(frozen=True)
class ComponentMap:
    """All weights of a model: those in components, and those kept.

    Examples:
        >>> finer = inspect(vlm, by="kind")
        >>> [component.name for component in finer.match("vision")]
        ['vision.attn', 'vision.ff']
        >>> finer.regroup("part").names == parts.names
        True
        >>> next(kept.reason for kept in parts.kept if "embed_tokens" in kept.name)
        'embedding, tied to the output head'
    """

    model: str
    by: str
    weights: tuple[Weight, ...]
    kept: tuple[Kept, ...]
    native_bits: int = 16  # bits of most weights in the checkpoint, for everything that is not quantized
    sized: bool = True  # False where no sizes are known, as in a table without them: all components then count alike
    shaped: bool = True  # False where weights stand for components of a table, which says nothing of their shapes
    unread: tuple[str, ...] = ()  # parameters of vision blocks behind the layer whose output the model takes
    # bits per weight of the parameters that the checkpoint stores in others than `native_bits`
    other_bits: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The names of its components: all weights would fill pages."""
        names = self.names
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return f"<ComponentMap of {self.model} by {self.by}: {', '.join(names[:MAX_NAMED])}{more}>"

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The components in the order of data flow."""
        members: dict[str, list[Weight]] = {}
        for weight in sorted(self.weights, key=lambda weight: _flow_order(weight, self.by)):
            members.setdefault(weight.component_name(self.by), []).append(weight)
        return tuple(Component(name, tuple(weights)) for name, weights in members.items())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the components in the order of data flow."""
        return tuple(component.name for component in self.components)

    def native_bits_of(self, name: str) -> int:
        """Bits per weight in which the checkpoint stores a parameter."""
        return self.other_bits.get(name, self.native_bits)

    @cached_property
    def never_read(self) -> frozenset[str]:
        """The names in `unread`, to look them up."""
        return frozenset(self.unread)

    @cached_property
    def numel(self) -> int:
        """The number of elements of the whole model, kept weights included."""
        return sum(w.numel for w in self.weights) + sum(k.numel for k in self.kept)

    @cached_property
    def _by_name(self) -> dict[str, Component]:
        return {component.name: component for component in self.components}

    def __getitem__(self, name: str) -> Component:
        if name not in self._by_name:
            raise unknown("component", name, self.names)
        return self._by_name[name]

    def regroup(self, by: str) -> ComponentMap:
        """The same weights at another granularity."""
        return replace(self, by=granularity(by))

    def match(self, pattern: str) -> tuple[Component, ...]:
        """The components that a pattern names: by name, by its first words (vision.front), or with * and ?.

        A word ends at a dot: vision.front names vision.front.attn and vision.front.ff.
        """
        matching = tuple(c for c in self.components if matches(c.name, pattern))
        if not matching:
            raise UserError(f"no component matches '{pattern}'; there are {', '.join(self.names)}")
        return matching

    def to_json(self) -> dict[str, object]:
        """All fields as JSON values; the last ones only where they are not as usual."""
        usual = {"sized": True, "shaped": True, "unread": (), "other_bits": {}}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ComponentMap:
        """The map from what `to_json` returned."""
        return cls(
            model=data["model"],
            by=data["by"],
            weights=tuple(Weight(**w) for w in data["weights"]),
            kept=tuple(Kept(**k) for k in data["kept"]),
            native_bits=data["native_bits"],
            sized=data.get("sized", True),
            shaped=data.get("shaped", True),
            unread=tuple(data.get("unread", ())),
            other_bits=data.get("other_bits", {}),
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a component's name matches a pattern (see `ComponentMap.match`)."""
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def _flow_order(weight: Weight, by: str) -> tuple[int, float, int]:
    """The sort key of data flow: part, then depth, then kind.

    Depth is the block or the group where the granularity tells them apart. The embedding comes first in its part, and
    other weights outside the blocks come last.
    """
    kind = KINDS.index(weight.kind) if weight.kind in KINDS else len(KINDS) + (weight.kind == HEAD)
    if weight.is_embedding:
        return PARTS.index(weight.part), -1, kind
    if weight.block is None:
        return PARTS.index(weight.part), float("inf"), kind
    depth = weight.block if by in ("block", "linear") else GROUPS.index(weight.group or "") if "group" in by else 0
    return PARTS.index(weight.part), depth, kind


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which layers.10 comes after layers.9."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def check(weights: Iterable[Weight], kept: Iterable[Kept], parameters: Mapping[str, int]) -> None:
    """Raise an error unless every parameter is exactly once in a component or among the kept weights."""
    placed = [w.name for w in weights] + [k.name for k in kept]
    twice = sorted(name for name, times in Counter(placed).items() if times > 1)
    lost = sorted(set(parameters) - set(placed), key=natural_order)
    invented = sorted(set(placed) - set(parameters), key=natural_order)
    findings = {"in no component and not kept": lost, "placed twice": twice, "not in the model": invented}
    for what, names in findings.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UserError(f"weights {what}: {', '.join(names[:8])}{more}")
