"""Runs calibration data through a model block by block, and replays block outputs that no longer change."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sensitivity.measure.calibrate.token_batches import TokenBatch, run
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import PARTS, ComponentMap, Weight
from sensitivity.spec.plan import Scheme

Done = Sequence[tuple[str, Scheme]]  # the quantized weights in the model, in the direction of data flow
# Of a block: index of its part, number in it. A weight outside blocks has infinity: after all of its part.
Place = tuple[int, float]


class _Enough(Exception):
    """Ends a forward pass early, once every layer that calibration watches has run."""


@dataclass
class _Block:
    """A transformer block's module, and how the model uses it."""

    place: Place
    module: nn.Module
    calls: int = 0  # in one forward pass
    read_later: bool = True  # whether anything except the next block reads its output


class BlockwisePass:
    """Forward passes that go on where the last one ended, so that calibrating all blocks costs about one full pass.

    A pass stops once the wanted blocks have run. The blocks before them are replayed: each returns at once the output
    that it gave when its weights and inputs were final. Values are needed of the last replayed block in each part, and
    of blocks whose output is also read elsewhere (a feature layer, a second stack). The outputs of all others become
    husks: tensors of the right shape that take no memory. `_look` finds out which block is which.
    """

    def __init__(
        self, vlm: VLM, parts: ComponentMap, data: Iterable[TokenBatch], exposed: bool, look: TokenBatch | None = None
    ) -> None:
        """`look` is a small batch for testing the model in `_look`; by default it is the smallest of the data."""
        self.vlm, self.exposed = vlm, exposed
        self.data = list(data)
        self.places = {weight.name: place_of(weight) for weight in parts.weights}
        self.loose = {w.reader: vlm.model.get_submodule(w.reader) for w in parts.weights if w.block is None}
        self.calls: Counter[str] = Counter()  # of layers outside blocks, in one forward pass
        self.blocks = _blocks(vlm.model, parts.weights)
        self.given: dict[Place, tuple[Any, list[list[Any]]]] = {}  # see _upstream; per batch the output of each call
        self._look(look or min(self.data, key=lambda batch: sum(t.numel() for t in batch.inputs.values())))

    @contextmanager
    def towards(self, weights: Sequence[Weight], done: Done | None) -> Iterator[Callable[[VLM, TokenBatch], None]]:
        """Inside the block, a function that runs one forward pass up to these weights, by the cheapest way.

        `done` lists the quantized weights that the model holds; None if unknown, and then recorded outputs are dropped.
        """
        if done is None:
            self.given.clear()
        done = done or ()
        asked = [place_of(weight) for weight in weights]
        # exposed: the asked blocks are quantized next, so only blocks before them are final; float: no block changes
        final = min(asked) if self.exposed else max(asked)
        ready = [b for b in self.blocks if b.place < final or (b.place == final and not self.exposed)]
        skipped = self._skippable([b for b in ready if b.place < min(asked)], done)
        # recorded in this pass, to be replayed in the next
        fresh = [block for block in ready if block.calls and block not in skipped]
        given = {block.place: self.given[block.place][1] for block in skipped}
        given |= {block.place: [[] for _ in self.data] for block in fresh}
        index = {id(batch): i for i, batch in enumerate(self.data)}

        def forward(vlm: VLM, batch: TokenBatch) -> None:
            i = index[id(batch)]
            with ExitStack() as patches, suppress(_Enough):
                for block in skipped:
                    patches.enter_context(_replaced(block.module, _giving(given[block.place][i])))
                for block in fresh:
                    patches.enter_context(_recorded(block.module, given[block.place][i]))
                self._stop_behind(weights, patches)
                run(vlm, batch)
            for before, after in pairwise(self.blocks):
                # `before` fed only `after`, whose output is recorded now: its values are never read again
                if after in fresh and not before.read_later:
                    given[before.place][i] = [_husk(output) for output in given[before.place][i]]

        yield forward
        for block in fresh:  # only after all batches: a pass that failed leaves nothing recorded
            self.given[block.place] = self._upstream(block.place, done), given[block.place]

    def _skippable(self, wanted: list[_Block], done: Done) -> list[_Block]:
        """In each part the blocks up to the last one with a valid output; outdated outputs are dropped."""
        found: list[_Block] = []
        for part in range(len(PARTS)):
            blocks = [block for block in wanted if block.place[0] == part and block.calls]
            known = 0
            for block in blocks:
                if self.given.get(block.place, (None,))[0] != self._upstream(block.place, done):
                    break
                known += 1
            # the next block computes from the output of the last replayed one, so that one must have its values
            while known and not self._whole(blocks[known - 1]):
                known -= 1
            found += blocks[:known]
            for block in blocks[known:]:
                self.given.pop(block.place, None)
        return found

    def _whole(self, block: _Block) -> bool:
        """Whether a block's recorded outputs hold their values in every batch; husks do not."""
        return not any(_is_husk(leaf) for outputs in self.given[block.place][1] for leaf in tree_leaves(outputs))

    def _upstream(self, place: Place, done: Done) -> tuple[tuple[str, Scheme], ...]:
        """The quantized weights that the output of a block may depend on."""
        return tuple((name, scheme) for name, scheme in done if _before(self.places[name], place))

    def _stop_behind(self, weights: Sequence[Weight], patches: ExitStack) -> None:
        """End the forward pass once every block, or layer outside blocks, that holds one of these weights has run."""
        at = {block.place: block for block in self.blocks}
        goals: dict[nn.Module, int] = {}
        for weight in weights:
            block = at.get(place_of(weight))
            goals[block.module if block else self.vlm.model.get_submodule(weight.reader)] = (
                block.calls if block else self.calls[weight.reader]
            )
        if not all(goals.values()):
            return  # a module that did not run in `_look` has no number of calls to stop at: run to the end

        # a module may be called several times in a pass (a shared block), and its last call must run, too
        def passed(module: nn.Module, *_: Any) -> None:
            goals[module] -= 1
            if not any(goals.values()):
                raise _Enough

        for module in goals:
            patches.callback(module.register_forward_hook(passed).remove)

    def _look(self, batch: TokenBatch) -> None:
        """Count each block's calls, and find out if anything except the next block reads its output.

        Runs one small batch, then replays it with the output of each block blanked in turn. If any module except the
        next block gets other inputs then, the output is read later.
        """
        outputs: dict[Place, list[Any]] = {block.place: [] for block in self.blocks}
        with torch.inference_mode():
            with ExitStack() as patches:
                for block in self.blocks:
                    patches.enter_context(_recorded(block.module, outputs[block.place]))
                for name, module in self.loose.items():
                    hook = module.register_forward_hook(lambda *_, name=name: self.calls.update([name]))
                    patches.callback(hook.remove)
                run(self.vlm, batch)
            for block in self.blocks:
                block.calls = len(outputs[block.place])
            expected = self._replayed(batch, outputs)
            for block, after in pairwise(self.blocks):
                # the last block of a part keeps read_later: the next part reads its output
                if block.place[0] == after.place[0] and block.calls:
                    blank = {**outputs, block.place: [_husk(output) for output in outputs[block.place]]}
                    # a replay that fails on blank values leaves read_later True, which is always safe
                    with suppress(RuntimeError, IndexError, ValueError):
                        block.read_later = not _same(self._replayed(batch, blank), expected, {after.module})

    def _replayed(self, batch: TokenBatch, outputs: dict[Place, list[Any]]) -> list[tuple[nn.Module, Any]]:
        """The inputs of every block and every layer outside blocks, when the blocks return the given outputs."""
        seen: list[tuple[nn.Module, Any]] = []
        with ExitStack() as patches:
            for block in self.blocks:
                if block.calls:
                    patches.enter_context(_replaced(block.module, _giving(outputs[block.place])))
            for module in (*(block.module for block in self.blocks), *self.loose.values()):
                hook = module.register_forward_pre_hook(
                    lambda *called: seen.append((called[0], called[1:])), with_kwargs=True
                )
                patches.callback(hook.remove)
            run(self.vlm, batch)
        return seen


def place_of(weight: Weight) -> Place:
    """The position of a weight in the direction of data flow."""
    return PARTS.index(weight.part), float("inf") if weight.block is None else weight.block


def _before(weight: Place, block: Place) -> bool:
    """Whether the output of a block may depend on a weight; one outside blocks may be read anywhere in its part."""
    return weight[0] < block[0] or (weight[0] == block[0] and (weight[1] == float("inf") or weight[1] <= block[1]))


def _blocks(model: nn.Module, weights: Iterable[Weight]) -> list[_Block]:
    """The module around each block's weights, in the direction of data flow, except modules that hold another block."""
    paths: dict[Place, list[str]] = {}
    for weight in weights:
        if weight.block is not None:
            paths.setdefault(place_of(weight), []).append(weight.module.replace(".", "/"))
    around = {place: _called(model, os.path.commonpath(found)) for place, found in sorted(paths.items())}
    alone = {
        place: path
        for place, path in around.items()
        if path and not any(f"{other}.".startswith(f"{path}.") for of, other in around.items() if of != place)
    }
    return [_Block(place, model.get_submodule(path)) for place, path in alone.items()]


def _called(model: nn.Module, path: str) -> str:
    """The deepest module around a path that has a forward of its own; a ModuleList has none."""
    while isinstance(model.get_submodule(path.replace("/", ".")), nn.ModuleList | nn.ModuleDict):
        path = os.path.dirname(path)
    return path.replace("/", ".")


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward and keep the module, since transformers records hidden states by a module's class."""
    # accelerate sets a forward of its own on the instance; it must be back afterwards
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # makes the method of the class visible again
        if own is not None:
            module.forward = own


def _recorded(module: nn.Module, outputs: list[Any]) -> Any:
    """Inside the block, every output of the module is appended to `outputs`."""
    own = module.forward

    def recording(*args: Any, **kwargs: Any) -> Any:
        outputs.append(own(*args, **kwargs))
        return outputs[-1]

    return _replaced(module, recording)


def _giving(outputs: Sequence[Any]) -> Callable[..., Any]:
    """A forward that returns the given outputs, one per call, without computing."""
    left = iter(outputs)
    return lambda *_, **__: next(left)


def _husk(output: Any) -> Any:
    """Tensors of the same shapes and dtypes that take no memory: one zero, expanded."""
    return tree_map(lambda leaf: leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf, output)


def _is_husk(leaf: Any) -> bool:
    """Whether a tensor is a husk: all of its strides are 0, unlike those of any computed output."""
    return isinstance(leaf, Tensor) and leaf.numel() > 1 and not any(leaf.stride())


def _same(found: list[tuple[nn.Module, Any]], expected: list[tuple[nn.Module, Any]], but: set[nn.Module]) -> bool:
    """Whether the same modules were called with equal inputs; the inputs of those in `but` are not compared."""
    return len(found) == len(expected) and all(
        a is b and (a in but or _equal(tree_leaves(x), tree_leaves(y)))
        for (a, x), (b, y) in zip(found, expected, strict=True)
    )


def _equal(a: list[Any], b: list[Any]) -> bool:
    """Tensors compare by value; other objects, such as a cache, are new in each pass and compare by type."""
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y)
        for x, y in zip(a, b, strict=True)
    )
