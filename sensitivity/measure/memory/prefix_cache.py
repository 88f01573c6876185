"""What neighboring plans share is computed once: hidden states are kept where a component begins."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sensitivity.measure.generate.drafts import Known
from sensitivity.spec.components import HEAD, PARTS, ComponentMap, Weight
from sensitivity.spec.plan import Plan


@dataclass
class Stage:
    """The blocks of one part, in order, and the depths at which hidden states are worth keeping."""

    blocks: list[nn.Module]
    boundaries: list[int]  # i: after the first i blocks


class PrefixCache:
    """The hidden states along one path through the tree of plans; memory does not grow with the number of plans.

    Plans that agree on everything before a boundary have the same hidden states there, so the blocks before it are
    skipped: each gives back what the last of them gave. It is the forward that is replaced and not the module, since
    transformers records hidden states by class. What a model does with the outputs of skipped blocks (a feature layer
    that is not the last, features from several depths) is not known here: `prove` tries every boundary once and drops
    those that change a single bit.
    """

    def __init__(self, model: nn.Module, parts: ComponentMap, limit: int) -> None:
        """`limit` is in bytes; a batch whose hidden states do not fit is computed again for every plan."""
        self.parts, self.limit = parts, limit
        self.stages = {part: stage for part in PARTS if (stage := _stage(model, parts, part)).boundaries}
        self.only: tuple[str, int] | None = None  # while proving: the one boundary to use
        self._keys: dict[tuple[str, int], Hashable] = {}
        self._states: dict[tuple[Hashable, str, int], tuple[Hashable, Any]] = {}
        self._caches: dict[Hashable, list[tuple[Hashable, Tensor, Tensor]]] = {}
        self.answers: dict[Hashable, Known] = {}  # in tokens
        self._full: set[Hashable] = set()  # batches that did not fit
        self._bytes = 0

    def under(self, plan: Plan) -> None:
        """From now on the model has this plan's weights."""
        depths = [(part, i) for part, stage in self.stages.items() for i in range(len(stage.blocks) + 1)]
        self._keys = {(part, depth): self._upstream(plan, part, depth) for part, depth in depths}

    def _upstream(self, plan: Plan, part: str, depth: int) -> Hashable:
        """The schemes of all that the hidden state after so many blocks of a part may depend on."""
        place = PARTS.index(part)
        return tuple(
            (component.name, plan[component.name])
            for component in self.parts.components
            if PARTS.index(component.part) < place
            or (component.part == part and any(_before(w, depth) for w in component.weights))
        )

    @contextmanager
    def over(self, batch: Hashable, *parts: str) -> Iterator[None]:
        """Inside the block, one forward pass over a batch skips what is known and keeps what it learns."""
        with ExitStack() as patches:
            for part in parts:
                if part in self.stages and batch not in self._full:
                    patches.enter_context(self._patched(batch, part, self.stages[part]))
            yield

    @contextmanager
    def _patched(self, batch: Hashable, part: str, stage: Stage) -> Iterator[None]:
        usable = [depth for depth in stage.boundaries if self.only in (None, (part, depth))]
        known = [d for d in usable if self._states.get((batch, part, d), (None,))[0] == self._keys[part, d]]
        start = max(known, default=0)
        # accelerate, which spreads a model over devices, has forwards of its own there
        before = {block: {k: v for k, v in vars(block).items() if k == "forward"} for block in stage.blocks}
        if start:
            given = self._states[batch, part, start][1]
            for block in stage.blocks[:start]:
                block.forward = lambda *_, **__: given
        for depth in stage.boundaries:
            if depth > start:
                block = stage.blocks[depth - 1]
                block.forward = self._recorded(block.forward, (batch, part, depth))
        try:
            yield
        finally:
            for block in stage.blocks:
                vars(block).pop("forward", None)  # uncovers the method of the class
                vars(block).update(before[block])

    def _recorded(self, forward: Callable[..., Any], slot: tuple[Hashable, str, int]) -> Callable[..., Any]:
        def recording(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._keep(slot, (self._keys[slot[1:]], output))
            return output

        return recording

    def caches(self, batch: Hashable, cache: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer after a pass over a batch's images: just computed, or from the path."""
        before = self._caches.get(batch, [])
        found: list[tuple[Hashable, Tensor, Tensor]] = []
        for i, layer in enumerate(cache.layers):
            if layer.get_seq_length():
                found.append((self._keys.get(("language", i + 1)), layer.keys, layer.values))
            else:
                assert before[i][0] == self._keys["language", i + 1], "a skipped layer's cache is of another path"
                found.append(before[i])
        if "language" in self.stages and batch not in self._full:
            self._bytes += sum(_size(entry) for entry in found) - sum(_size(entry) for entry in before)
            self._caches[batch] = found
            self._check(batch)
        return [(keys, values) for _, keys, values in found]

    def _keep(self, slot: tuple[Hashable, str, int], state: tuple[Hashable, Any]) -> None:
        batch = slot[0]
        if batch not in self._full:
            self._bytes += _size(state[1]) - _size(self._states.get(slot))
            self._states[slot] = state
            self._check(batch)

    def _check(self, batch: Hashable) -> None:
        if self._bytes > self.limit:
            self.leave_out(batch)

    def leave_out(self, batch: Hashable) -> None:
        """A batch does not fit and is not kept; the others keep their place."""
        self._full.add(batch)
        for slot in [slot for slot in self._states if slot[0] == batch]:
            self._bytes -= _size(self._states.pop(slot))
        self._bytes -= sum(_size(entry) for entry in self._caches.pop(batch, []))

    def clear(self) -> None:
        """Drop everything that is kept: other examples come."""
        for kept in (self._states, self._caches, self._full, self.answers):
            kept.clear()
        self._bytes = 0

    def prove(self, run: Callable[[], Any]) -> None:
        """Run once and keep, then once from every boundary: one that changes the outcome is not used.

        Of a few examples, whatever the limit: where nothing is kept, nothing is proved.
        """
        limit, self.limit = self.limit, sys.maxsize

        def once() -> Any:
            self.answers.clear()  # a draft may round otherwise, which an unsure model's answers show
            return run()

        expected = once()
        for part, stage in self.stages.items():
            for depth in list(stage.boundaries):
                self.only = (part, depth)
                try:
                    same = bool(once() == expected)
                except (RuntimeError, IndexError, AttributeError, TypeError, AssertionError):
                    same = False  # a family that wants more of its blocks than one output
                if not same:
                    stage.boundaries.remove(depth)
                    self.clear()
                    once()  # wrong states were kept along the way, and would speak against every boundary behind them
        self.only, self.limit = None, limit
        self.clear()
        self.stages = {part: stage for part, stage in self.stages.items() if stage.boundaries}


def _before(weight: Weight, depth: int) -> bool:
    """Whether the hidden state after so many blocks of a weight's part may depend on it."""
    if weight.kind == HEAD and not weight.tied:
        return False
    return weight.block is None or weight.block < depth


def _stage(model: nn.Module, parts: ComponentMap, part: str) -> Stage:
    """A part's blocks as modules, and the depths where a component begins or the part ends."""
    names: dict[int, list[str]] = {}
    owners: dict[int, set[str]] = {}
    for component in parts.components:
        for weight in component.weights:
            if weight.part == part and weight.block is not None:
                names.setdefault(weight.block, []).append(weight.module)
                owners.setdefault(weight.block, set()).add(component.name)
    if not names:
        return Stage([], [])
    blocks = [_around(model, names[i]) for i in sorted(names)]
    last = len(blocks)
    begins = {i for i in range(1, last) if owners[i] != owners[i - 1]}
    # the whole of a part, and all but its last block, which some models leave without effect
    ends = set() if part == "language" else {last, last - 1} - {0}
    return Stage(blocks, sorted(begins | ends))


def _around(model: nn.Module, names: list[str]) -> nn.Module:
    """The deepest module around all of them that has a forward of its own; a list of modules has none."""
    path = os.path.commonpath([name.replace(".", "/") for name in names])
    while isinstance(module := model.get_submodule(path.replace("/", ".")), nn.ModuleList | nn.ModuleDict):
        path = os.path.dirname(path)
    return module


def _size(output: Any) -> int:
    """Bytes of all tensors in whatever a block gives back."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    if isinstance(output, dict):
        return sum(_size(value) for value in output.values())
    if isinstance(output, tuple | list):
        return sum(_size(value) for value in output)
    return 0
