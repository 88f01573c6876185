"""Runs calibration data through a model block by block, and replays block outputs that no longer change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sensitivity.measure.passes.block_modules import block_paths, recorded_forward, replaced_forward
from sensitivity.measure.passes.token_batches import TokenBatch, calibration_pass
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import PARTS, ComponentMap, Weight
from sensitivity.spec.plan import Scheme

Installed = Sequence[tuple[str, Scheme]]  # the quantized weights in the model, in the direction of data flow
# Of a block: index of its part, number in it. A weight outside blocks has infinity: after all of its part.
BlockPosition = tuple[int, float]
Upstream = tuple[tuple[str, Scheme], ...]  # the quantized weights that a block's output may depend on


class _AllRan(Exception):
    """Ends a forward pass early, once every layer that calibration watches has run."""


@dataclass
class _Block:
    """A transformer block's module, and how the model uses it."""

    position: BlockPosition
    module: nn.Module
    calls: int = 0  # in one forward pass
    read_later: bool = True  # whether anything except the next block reads its output


class BlockwisePass:
    """Forward passes that each continue where the last one ended, so that all blocks together cost about one full pass.

    A pass stops once the wanted blocks have run. The blocks before them are replayed: each returns at once the output
    that it gave when its weights and inputs were final. Values are needed of the last replayed block in each part, and
    of blocks whose output is also read elsewhere (a feature layer, a second stack). The outputs of all others become
    placeholders: tensors of the right shape that take no memory. `_probe` finds out whose outputs are read elsewhere.
    """

    def __init__(
        self,
        vlm: VLM,
        parts: ComponentMap,
        data: Iterable[TokenBatch],
        exposed: bool,
        probe_batch: TokenBatch | None = None,
    ) -> None:
        """`probe_batch` is a small batch, by which `_probe` tests the model; by default the smallest of the data."""
        self.vlm, self.exposed = vlm, exposed
        self.data = list(data)
        self.positions = {weight.name: position_of(weight) for weight in parts.weights}
        self.outside_blocks = {w.reader: vlm.model.get_submodule(w.reader) for w in parts.weights if w.block is None}
        self.calls: Counter[str] = Counter()  # of layers outside blocks, in one forward pass
        self.blocks = _blocks(vlm.model, parts.weights)
        # what each block's outputs depend on (see `_upstream`), and per batch the output of each call
        self.recorded: dict[BlockPosition, tuple[Upstream, list[list[object]]]] = {}
        self._probe(probe_batch or min(self.data, key=lambda batch: sum(t.numel() for t in batch.inputs.values())))

    @contextmanager
    def run_up_to(
        self, weights: Sequence[Weight], installed: Installed | None
    ) -> Iterator[Callable[[VLM, TokenBatch], None]]:
        """Inside the `with` block, a function that runs one forward pass up to these weights in the cheapest way.

        `installed` lists the quantized weights that the model holds; None if unknown, and then nothing is replayed or
        recorded.
        """
        skipped, recording = self._skipped_and_recording(weights, installed)
        recorded = {block.position: self.recorded[block.position][1] for block in skipped}
        recorded |= {block.position: [[] for _ in self.data] for block in recording}
        index = {id(batch): i for i, batch in enumerate(self.data)}

        def forward(vlm: VLM, batch: TokenBatch) -> None:
            i = index[id(batch)]
            with ExitStack() as patches, suppress(_AllRan):
                for block in skipped:
                    patches.enter_context(replaced_forward(block.module, _replaying(recorded[block.position][i])))
                for block in recording:
                    patches.enter_context(recorded_forward(block.module, recorded[block.position][i].append))
                self._stop_after(weights, patches)
                calibration_pass(vlm, batch)
            for before, after in pairwise(self.blocks):
                # only `after` read the output of `before`, and its own output is recorded now
                if after in recording and not before.read_later:
                    recorded[before.position][i] = [_without_values(output) for output in recorded[before.position][i]]

        yield forward
        for block in recording:  # only after all batches: a pass that failed leaves nothing recorded
            self.recorded[block.position] = (
                self._upstream(block.position, installed or ()),
                recorded[block.position],
            )

    def _skipped_and_recording(
        self, weights: Sequence[Weight], installed: Installed | None
    ) -> tuple[list[_Block], list[_Block]]:
        """The blocks that are replayed in a pass up to these weights, and those that it records for later passes."""
        if installed is None:  # without knowing what outputs depend on, none can be replayed now or later
            self.recorded.clear()
            return [], []
        targets = [position_of(weight) for weight in weights]
        # exposed: the blocks of these weights are quantized next, so only blocks before them are final; float: no block
        # changes
        final = min(targets) if self.exposed else max(targets)
        ready = [b for b in self.blocks if b.position < final or (b.position == final and not self.exposed)]
        skipped = self._skippable([b for b in ready if b.position < min(targets)], installed)
        return skipped, [block for block in ready if block.calls and block not in skipped]

    def _skippable(self, candidates: list[_Block], installed: Installed) -> list[_Block]:
        """In each part the blocks up to the last one with a valid output that has values; later outputs are dropped."""
        skippable: list[_Block] = []
        for part in range(len(PARTS)):
            blocks = [block for block in candidates if block.position[0] == part and block.calls]
            valid = 0
            for block in blocks:
                if self.recorded.get(block.position, (None,))[0] != self._upstream(block.position, installed):
                    break
                valid += 1
            # the next block computes from the output of the last replayed one, so that one must have its values
            while valid and not self._has_values(blocks[valid - 1]):
                valid -= 1
            skippable += blocks[:valid]
            for block in blocks[valid:]:
                self.recorded.pop(block.position, None)
        return skippable

    def _has_values(self, block: _Block) -> bool:
        """Whether a block's recorded outputs hold their values in every batch; placeholders do not."""
        return not any(
            _lacks_values(leaf) for outputs in self.recorded[block.position][1] for leaf in tree_leaves(outputs)
        )

    def _upstream(self, position: BlockPosition, installed: Installed) -> Upstream:
        """The quantized weights that the output of a block may depend on."""
        return tuple((name, scheme) for name, scheme in installed if _before(self.positions[name], position))

    def _stop_after(self, weights: Sequence[Weight], patches: ExitStack) -> None:
        """End the forward pass once every block, or layer outside blocks, that holds one of these weights has run."""
        by_position = {block.position: block for block in self.blocks}
        # a weight in a block needs the whole block, so that its output can be recorded
        calls_left: dict[nn.Module, int] = {}
        for weight in weights:
            block = by_position.get(position_of(weight))
            calls_left[block.module if block else self.vlm.model.get_submodule(weight.reader)] = (
                block.calls if block else self.calls[weight.reader]
            )
        if not all(calls_left.values()):
            return  # a module that did not run in `_probe` has no number of calls to stop at: run to the end

        # a module may be called several times in a pass (a shared block), and its last call must run, too
        def passed(module: nn.Module, *_: object) -> None:
            calls_left[module] -= 1
            if not any(calls_left.values()):
                raise _AllRan

        for module in calls_left:
            patches.callback(module.register_forward_hook(passed).remove)

    def _probe(self, batch: TokenBatch) -> None:
        """Count each block's calls, and find out if anything except the next block reads its output.

        Runs one small batch, then replays it with the output of each block blanked in turn. If any module except the
        next block gets other inputs then, the output is read later.
        """
        outputs: dict[BlockPosition, list[object]] = {block.position: [] for block in self.blocks}
        with torch.inference_mode():
            with ExitStack() as patches:
                for block in self.blocks:
                    patches.enter_context(recorded_forward(block.module, outputs[block.position].append))
                for name, module in self.outside_blocks.items():
                    hook = module.register_forward_hook(lambda *_, name=name: self.calls.update([name]))
                    patches.callback(hook.remove)
                calibration_pass(self.vlm, batch)
            for block in self.blocks:
                block.calls = len(outputs[block.position])
            expected = self._replayed(batch, outputs)
            for block, after in pairwise(self.blocks):
                # the last block of a part keeps read_later: the next part reads its output
                if block.position[0] == after.position[0] and block.calls:
                    blank = {**outputs, block.position: [_without_values(output) for output in outputs[block.position]]}
                    # a replay that fails on blank values leaves read_later True, which is always safe
                    with suppress(RuntimeError, IndexError, ValueError):
                        block.read_later = not _same(self._replayed(batch, blank), expected, {after.module})

    def _replayed(
        self, batch: TokenBatch, outputs: dict[BlockPosition, list[object]]
    ) -> list[tuple[nn.Module, object]]:
        """The inputs of every block and every layer outside blocks, when the blocks return the given outputs."""
        seen: list[tuple[nn.Module, object]] = []
        with ExitStack() as patches:
            for block in self.blocks:
                if block.calls:
                    patches.enter_context(replaced_forward(block.module, _replaying(outputs[block.position])))
            for module in (*(block.module for block in self.blocks), *self.outside_blocks.values()):
                hook = module.register_forward_pre_hook(
                    lambda *called: seen.append((called[0], called[1:])), with_kwargs=True
                )
                patches.callback(hook.remove)
            calibration_pass(self.vlm, batch)
        return seen


def position_of(weight: Weight) -> BlockPosition:
    """The position of a weight in the direction of data flow."""
    return PARTS.index(weight.part), float("inf") if weight.block is None else weight.block


def _before(weight: BlockPosition, block: BlockPosition) -> bool:
    """Whether the output of a block may depend on a weight; one outside blocks may be read anywhere in its part."""
    return weight[0] < block[0] or (weight[0] == block[0] and (weight[1] == float("inf") or weight[1] <= block[1]))


def _blocks(model: nn.Module, weights: Iterable[Weight]) -> list[_Block]:
    """The blocks of some weights, in the direction of data flow."""
    paths = {(PARTS.index(part), block): path for (part, block), path in block_paths(model, weights).items()}
    return [_Block(position, model.get_submodule(path)) for position, path in sorted(paths.items())]


def _replaying(outputs: Sequence[object]) -> Callable[..., object]:
    """A forward that returns the given outputs, one per call, without computing."""
    left = iter(outputs)
    return lambda *_, **__: next(left)


def _without_values(output: object) -> object:
    """Tensors of the same shapes and dtypes that take no memory: one zero, expanded."""
    return tree_map(lambda leaf: leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf, output)


def _lacks_values(leaf: object) -> bool:
    """Whether a tensor is a placeholder: all of its strides are 0, unlike those of any computed output."""
    return isinstance(leaf, Tensor) and leaf.numel() > 1 and not any(leaf.stride())


def _same(
    calls: list[tuple[nn.Module, object]], expected: list[tuple[nn.Module, object]], ignored: set[nn.Module]
) -> bool:
    """Whether the same modules were called with equal inputs; the inputs of `ignored` modules are not compared."""
    return len(calls) == len(expected) and all(
        a is b and (a in ignored or _equal(tree_leaves(x), tree_leaves(y)))
        for (a, x), (b, y) in zip(calls, expected, strict=True)
    )


def _equal(a: list[object], b: list[object]) -> bool:
    """Tensors compare by value; other objects, such as a cache, are new in each pass and compare by type."""
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y)
        for x, y in zip(a, b, strict=True)
    )
