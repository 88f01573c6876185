"""Prefix cache: neighboring plans reuse hidden states, which are recorded where a component begins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from sensitivity.measure.generate.drafts import EarlierAnswers
from sensitivity.measure.generate.shared_images import KeysAndValues
from sensitivity.measure.passes.block_modules import block_path, recorded_forward, replaced_forward
from sensitivity.spec.components import HEAD, PARTS, ComponentMap, Weight
from sensitivity.spec.errors import is_defect
from sensitivity.spec.plan import Plan


@dataclass
class PartBlocks:
    """The blocks of one part, in order, and the depths at which hidden states are recorded."""

    blocks: list[nn.Module]
    boundaries: list[int]  # depth i: after the first i blocks


class PrefixCache:
    """The hidden states of the latest plan at component boundaries; memory does not grow with the number of plans.

    Plans that agree on everything before a boundary have the same hidden states there, so the blocks before it are
    skipped: each returns the recorded output of the last of them. Forwards are replaced and modules kept, since
    transformers records hidden states by a module's class. What else a model reads of skipped blocks (a feature layer
    that is not the last, features from several depths) is not known here: `verify_boundaries` tries every boundary once
    and drops those that change a single bit.
    """

    def __init__(
        self, model: nn.Module, parts: ComponentMap, limit: int, also: Callable[[], bool] = lambda: False
    ) -> None:
        """`limit` is in bytes; a batch whose hidden states exceed it is computed again for every plan.

        `also` frees what else plans share on the device, when `release` is called; it returns whether there was any.
        """
        self.parts, self.limit, self.also = parts, limit, also
        self.stages = {part: stage for part in PARTS if (stage := _part_blocks(model, parts, part)).boundaries}
        self.only_boundary: tuple[str, int] | None = None  # in `verify_boundaries`: the one boundary to use
        # per boundary, the schemes upstream of it in the current plan; a recorded state is valid if its key is equal
        self._current_keys: dict[tuple[str, int], Hashable] = {}
        # one state per batch and boundary: a plan with another prefix overwrites it, so memory holds one plan's path
        self._states: dict[tuple[Hashable, str, int], tuple[Hashable, object]] = {}
        # per batch and layer: the upstream schemes, then attention's keys and values up to the image's last token
        self._caches: dict[Hashable, list[tuple[Hashable, Tensor, Tensor]]] = {}
        self.answers: dict[Hashable, EarlierAnswers] = {}  # in tokens, as drafts for later plans
        self._excluded: set[Hashable] = set()  # batches that exceeded the limit, or that were halved
        self._bytes = 0

    def set_plan(self, plan: Plan) -> None:
        """Set the plan whose weights the model has from now on."""
        # every depth, not only boundaries: `image_keys_and_values` needs a key for the keys and values of each layer
        depths = [(part, i) for part, stage in self.stages.items() for i in range(len(stage.blocks) + 1)]
        self._current_keys = {(part, depth): self._upstream(plan, part, depth) for part, depth in depths}

    def _upstream(self, plan: Plan, part: str, depth: int) -> Hashable:
        """The schemes of everything that the hidden state after `depth` blocks of a part may depend on."""
        part_index = PARTS.index(part)
        return tuple(
            (component.name, plan[component.name])
            for component in self.parts.components
            if PARTS.index(component.part) < part_index
            or (component.part == part and any(_may_depend_on(w, depth) for w in component.weights))
        )

    @contextmanager
    def reuse(self, batch: Hashable, *parts: str) -> Iterator[None]:
        """Inside the `with` block, a forward pass skips blocks with known outputs and records others at boundaries."""
        with ExitStack() as patches:
            for part in parts:
                if part in self.stages and batch not in self._excluded:
                    patches.enter_context(self._patched(batch, part, self.stages[part]))
            yield

    @contextmanager
    def _patched(self, batch: Hashable, part: str, stage: PartBlocks) -> Iterator[None]:
        """Replace the forwards of one part: replay up to the deepest valid boundary, record at later ones."""
        boundaries = [depth for depth in stage.boundaries if self.only_boundary in (None, (part, depth))]
        valid = [d for d in boundaries if self._states.get((batch, part, d), (None,))[0] == self._current_keys[part, d]]
        start = max(valid, default=0)
        with ExitStack() as patches:
            if start:
                # all skipped blocks return the same output: the next block reads only that of the last one
                output = self._states[batch, part, start][1]
                for block in stage.blocks[:start]:
                    patches.enter_context(replaced_forward(block, lambda *_, **__: output))
            for depth in stage.boundaries:
                if depth > start:
                    record = partial(self._record, (batch, part, depth), self._current_keys[part, depth])
                    patches.enter_context(recorded_forward(stage.blocks[depth - 1], record))
            yield

    def image_keys_and_values(
        self, batch: Hashable, layers: Sequence[KeysAndValues | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer after a pass over a batch's images, computed now or by an earlier plan."""
        before = self._caches.get(batch, [])
        entries: list[tuple[Hashable, Tensor, Tensor]] = []
        for i, layer in enumerate(layers):
            # a skipped layer wrote no keys and values; those of the last plan with this prefix are the same bits
            if layer is not None:
                entries.append((self._current_keys.get(("language", i + 1)), *layer))
            else:
                assert before[i][0] == self._current_keys["language", i + 1], (
                    "a skipped layer's cache is of another path"
                )
                entries.append(before[i])
        if "language" in self.stages and batch not in self._excluded:
            self._bytes += sum(_size(entry) for entry in entries) - sum(_size(entry) for entry in before)
            self._caches[batch] = entries
            self._enforce_limit(batch)
        return [(keys, values) for _, keys, values in entries]

    def _record(self, slot: tuple[Hashable, str, int], key: Hashable, output: object) -> None:
        """Record a hidden state, unless its batch is excluded."""
        batch = slot[0]
        if batch not in self._excluded:
            self._bytes += _size(output) - _size(self._states.get(slot))
            self._states[slot] = key, output
            self._enforce_limit(batch)

    def _enforce_limit(self, batch: Hashable) -> None:
        """Drop a batch, until `clear` is called, when all entries together exceed the limit."""
        if self._bytes > self.limit:
            self.exclude(batch)

    def exclude(self, batch: Hashable) -> None:
        """Drop the entries of a batch and record no more of it; other batches keep theirs."""
        self._excluded.add(batch)
        for slot in [slot for slot in self._states if slot[0] == batch]:
            self._bytes -= _size(self._states.pop(slot))
        self._bytes -= sum(_size(entry) for entry in self._caches.pop(batch, []))

    def clear(self) -> None:
        """Drop everything, before other examples are run."""
        for kept in (self._states, self._caches, self._excluded, self.answers):
            kept.clear()
        self._bytes = 0

    def release(self) -> bool:
        """Free what plans share on the device for good, because the memory is needed; false if there was nothing."""
        freed, self.limit = self._bytes > 0, 0
        for batch in {slot[0] for slot in self._states} | set(self._caches):
            self.exclude(batch)
        return self.also() or freed

    def verify_boundaries(self, run: Callable[[], object]) -> None:
        """Run once and record, then once more from each boundary; a boundary that changes the outcome is dropped.

        The limit is lifted for these few examples: where nothing is recorded, nothing can be verified.
        """
        limit, self.limit = self.limit, sys.maxsize

        def once() -> object:
            self.answers.clear()  # a pass over other drafts may round differently, and change an unsure answer
            return run()

        expected = once()
        for part, stage in self.stages.items():
            for depth in list(stage.boundaries):
                self.only_boundary = (part, depth)
                try:
                    same = bool(once() == expected)
                except (RuntimeError, IndexError, AttributeError, TypeError, AssertionError) as error:
                    if is_defect(error):
                        raise
                    same = False  # the model reads more of a skipped block than its output
                if not same:
                    stage.boundaries.remove(depth)
                    self.clear()
                    once()  # later boundaries recorded wrong states on the way, and would fail because of them
        self.only_boundary, self.limit = None, limit
        self.clear()
        self.stages = {part: stage for part, stage in self.stages.items() if stage.boundaries}


def _may_depend_on(weight: Weight, depth: int) -> bool:
    """Whether the hidden state after `depth` blocks of a weight's part may depend on the weight."""
    # an untied output head is after all blocks; other weights outside blocks may be read anywhere in their part
    if weight.kind == HEAD and not weight.tied:
        return False
    return weight.block is None or weight.block < depth


def _part_blocks(model: nn.Module, parts: ComponentMap, part: str) -> PartBlocks:
    """A part's blocks as modules, and the depths where a component begins or the part ends."""
    names: dict[int, list[str]] = {}
    owners: dict[int, set[str]] = {}
    for component in parts.components:
        for weight in component.weights:
            if weight.part == part and weight.block is not None:
                names.setdefault(weight.block, []).append(weight.module)
                owners.setdefault(weight.block, set()).add(component.name)
    if not names:
        return PartBlocks([], [])
    blocks = [model.get_submodule(block_path(model, names[i])) for i in sorted(names)]
    last = len(blocks)
    begins = {i for i in range(1, last) if owners[i] != owners[i - 1]}
    # also the end of a part, and before its last block, whose output some models do not read; not the end of language,
    # since plans that agree on all language blocks differ in the output head at most
    ends = set() if part == "language" else {last, last - 1} - {0}
    return PartBlocks(blocks, sorted(begins | ends))


def _size(output: object) -> int:
    """The bytes of all tensors in a block's output."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    if isinstance(output, dict):
        return sum(_size(value) for value in output.values())
    if isinstance(output, tuple | list):
        return sum(_size(value) for value in output)
    return 0
