"""Prefix cache: neighboring plans reuse hidden states, which are recorded where a component begins."""

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
    """The blocks of one part, in order, and the depths at which hidden states are recorded."""

    blocks: list[nn.Module]
    boundaries: list[int]  # depth i: after the first i blocks


class PrefixCache:
    """The hidden states of the latest plan at component boundaries; memory does not grow with the number of plans.

    Plans that agree on everything before a boundary have the same hidden states there, so the blocks before it are
    skipped: each returns the recorded output of the last of them. Forwards are replaced and modules kept, since
    transformers records hidden states by a module's class. What else a model reads of skipped blocks (a feature layer
    that is not the last, features from several depths) is not known here: `prove` tries every boundary once and drops
    those that change a single bit.
    """

    def __init__(self, model: nn.Module, parts: ComponentMap, limit: int) -> None:
        """`limit` is in bytes; a batch whose hidden states exceed it is computed again for every plan."""
        self.parts, self.limit = parts, limit
        self.stages = {part: stage for part in PARTS if (stage := _stage(model, parts, part)).boundaries}
        self.only: tuple[str, int] | None = None  # in `prove`: the one boundary to use
        # per boundary, the schemes upstream of it in the current plan; a recorded state is valid if its key is equal
        self._keys: dict[tuple[str, int], Hashable] = {}
        # one state per batch and boundary: a plan with another prefix overwrites it, so memory holds one plan's path
        self._states: dict[tuple[Hashable, str, int], tuple[Hashable, Any]] = {}
        # per batch and layer: the key, then keys and values of attention after the image tokens
        self._caches: dict[Hashable, list[tuple[Hashable, Tensor, Tensor]]] = {}
        self.answers: dict[Hashable, Known] = {}  # in tokens, as drafts for later plans
        self._full: set[Hashable] = set()  # batches that exceeded the limit
        self._bytes = 0

    def under(self, plan: Plan) -> None:
        """Set the plan whose weights the model has from now on."""
        # every depth, not only boundaries: `caches` needs a key for the keys and values of each layer
        depths = [(part, i) for part, stage in self.stages.items() for i in range(len(stage.blocks) + 1)]
        self._keys = {(part, depth): self._upstream(plan, part, depth) for part, depth in depths}

    def _upstream(self, plan: Plan, part: str, depth: int) -> Hashable:
        """The schemes of everything that the hidden state after `depth` blocks of a part may depend on."""
        place = PARTS.index(part)
        return tuple(
            (component.name, plan[component.name])
            for component in self.parts.components
            if PARTS.index(component.part) < place
            or (component.part == part and any(_before(w, depth) for w in component.weights))
        )

    @contextmanager
    def over(self, batch: Hashable, *parts: str) -> Iterator[None]:
        """Inside the block, one forward pass over a batch skips blocks with known outputs and records at boundaries."""
        with ExitStack() as patches:
            for part in parts:
                if part in self.stages and batch not in self._full:
                    patches.enter_context(self._patched(batch, part, self.stages[part]))
            yield

    @contextmanager
    def _patched(self, batch: Hashable, part: str, stage: Stage) -> Iterator[None]:
        """Replace the forwards of one part: replay up to the deepest valid boundary, record at later ones."""
        usable = [depth for depth in stage.boundaries if self.only in (None, (part, depth))]
        known = [d for d in usable if self._states.get((batch, part, d), (None,))[0] == self._keys[part, d]]
        start = max(known, default=0)
        # accelerate, which spreads a model over devices, sets a forward on each instance
        before = {block: {k: v for k, v in vars(block).items() if k == "forward"} for block in stage.blocks}
        if start:
            # all skipped blocks return the same output: the next block reads only that of the last one
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
                vars(block).pop("forward", None)  # makes the method of the class visible again
                vars(block).update(before[block])

    def _recorded(self, forward: Callable[..., Any], slot: tuple[Hashable, str, int]) -> Callable[..., Any]:
        """A forward that also records its output at a boundary."""

        def recording(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._keep(slot, (self._keys[slot[1:]], output))
            return output

        return recording

    def caches(self, batch: Hashable, cache: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer after a pass over a batch's images, computed now or by an earlier plan."""
        before = self._caches.get(batch, [])
        found: list[tuple[Hashable, Tensor, Tensor]] = []
        for i, layer in enumerate(cache.layers):
            # a skipped layer wrote no keys and values; those of the last plan with this prefix are the same bits
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
        """Record a hidden state, unless its batch has exceeded the limit."""
        batch = slot[0]
        if batch not in self._full:
            self._bytes += _size(state[1]) - _size(self._states.get(slot))
            self._states[slot] = state
            self._check(batch)

    def _check(self, batch: Hashable) -> None:
        """Give up a batch when all entries together exceed the limit."""
        if self._bytes > self.limit:
            self.leave_out(batch)

    def leave_out(self, batch: Hashable) -> None:
        """Drop the entries of a batch and record no more of it; other batches keep theirs."""
        self._full.add(batch)
        for slot in [slot for slot in self._states if slot[0] == batch]:
            self._bytes -= _size(self._states.pop(slot))
        self._bytes -= sum(_size(entry) for entry in self._caches.pop(batch, []))

    def clear(self) -> None:
        """Drop everything, since other examples follow."""
        for kept in (self._states, self._caches, self._full, self.answers):
            kept.clear()
        self._bytes = 0

    def prove(self, run: Callable[[], Any]) -> None:
        """Run once and record, then once from every boundary; a boundary that changes the outcome is not used.

        The limit is lifted for these few examples: where nothing is recorded, nothing can be verified.
        """
        limit, self.limit = self.limit, sys.maxsize

        def once() -> Any:
            self.answers.clear()  # a pass over other drafts may round differently, and change an unsure answer
            return run()

        expected = once()
        for part, stage in self.stages.items():
            for depth in list(stage.boundaries):
                self.only = (part, depth)
                try:
                    same = bool(once() == expected)
                except (RuntimeError, IndexError, AttributeError, TypeError, AssertionError):
                    same = False  # the model reads more of a skipped block than its output
                if not same:
                    stage.boundaries.remove(depth)
                    self.clear()
                    once()  # later boundaries recorded wrong states on the way, and would fail because of them
        self.only, self.limit = None, limit
        self.clear()
        self.stages = {part: stage for part, stage in self.stages.items() if stage.boundaries}


def _before(weight: Weight, depth: int) -> bool:
    """Whether the hidden state after `depth` blocks of a weight's part may depend on the weight."""
    # an untied output head is after all blocks; other weights outside blocks may be read anywhere in their part
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
    # the end of a part, and before its last block, which has no effect in some models; not the end of language, since
    # plans that agree on all language blocks differ in the output head at most
    ends = set() if part == "language" else {last, last - 1} - {0}
    return Stage(blocks, sorted(begins | ends))


def _around(model: nn.Module, names: list[str]) -> nn.Module:
    """The deepest module around some modules that has a forward of its own; a ModuleList has none."""
    path = os.path.commonpath([name.replace(".", "/") for name in names])
    while isinstance(module := model.get_submodule(path.replace("/", ".")), nn.ModuleList | nn.ModuleDict):
        path = os.path.dirname(path)
    return module


def _size(output: Any) -> int:
    """The bytes of all tensors in a block's output."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    if isinstance(output, dict):
        return sum(_size(value) for value in output.values())
    if isinstance(output, tuple | list):
        return sum(_size(value) for value in output)
    return 0
