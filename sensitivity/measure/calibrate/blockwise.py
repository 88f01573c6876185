"""Walk: calibration data on its way through a model, block by block; what is final is not computed a second time."""

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

Done = Sequence[tuple[str, Scheme]]  # the weights that the model holds quantized, in the direction of data flow
Place = tuple[int, float]  # of a block: part, number; a weight outside of blocks stands behind all of its part


class _Enough(Exception):
    """All that was to be seen in a forward pass has been seen."""


@dataclass
class _Block:
    place: Place
    module: nn.Module
    calls: int = 0  # in a forward pass
    read_later: bool = True  # whether anything but the next block looks at what it gives back


class BlockwisePass:
    """Batches that stand where the last forward pass left them, so that studying all blocks costs about one pass.

    A forward pass stops when its blocks have run. The blocks before them give back at once what they gave when they
    were final: the last of each part, and those whose output something else reads too (a feature layer, a second
    stack); for the others an empty tensor of the right shape is enough. Which is which, `_look` finds out.
    """

    def __init__(
        self, vlm: VLM, parts: ComponentMap, data: Iterable[TokenBatch], exposed: bool, look: TokenBatch | None = None
    ) -> None:
        """`look` is a small batch to find out about the model with; without, the smallest of the data is taken."""
        self.vlm, self.exposed = vlm, exposed
        self.data = list(data)
        self.places = {weight.name: place_of(weight) for weight in parts.weights}
        self.loose = {w.reader: vlm.model.get_submodule(w.reader) for w in parts.weights if w.block is None}
        self.calls: Counter[str] = Counter()  # of loose modules in a forward pass
        self.blocks = _blocks(vlm.model, parts.weights)
        self.given: dict[Place, tuple[Any, list[list[Any]]]] = {}  # upstream, and per batch what each call gave back
        self._look(look or min(self.data, key=lambda batch: sum(t.numel() for t in batch.inputs.values())))

    @contextmanager
    def towards(self, weights: Sequence[Weight], done: Done | None) -> Iterator[Callable[[VLM, TokenBatch], None]]:
        """Inside the block, a forward pass that reaches some weights, with the cheapest way there.

        `done` says which quantized weights the model holds; None, that nobody knows.
        """
        if done is None:
            self.given.clear()
        done = done or ()
        asked = [place_of(weight) for weight in weights]
        final = min(asked) if self.exposed else max(asked)
        ready = [b for b in self.blocks if b.place < final or (b.place == final and not self.exposed)]
        skipped = self._skippable([b for b in ready if b.place < min(asked)], done)
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
                if after in fresh and not before.read_later:
                    given[before.place][i] = [_husk(output) for output in given[before.place][i]]

        yield forward
        for block in fresh:  # only now: a pass that failed leaves nothing behind
            self.given[block.place] = self._upstream(block.place, done), given[block.place]

    def _skippable(self, wanted: list[_Block], done: Done) -> list[_Block]:
        """In each part the blocks up to the last one whose output is at hand; what is out of date is let go."""
        found: list[_Block] = []
        for part in range(len(PARTS)):
            blocks = [block for block in wanted if block.place[0] == part and block.calls]
            known = 0
            for block in blocks:
                if self.given.get(block.place, (None,))[0] != self._upstream(block.place, done):
                    break
                known += 1
            while known and not self._whole(blocks[known - 1]):
                known -= 1
            found += blocks[:known]
            for block in blocks[known:]:
                self.given.pop(block.place, None)
        return found

    def _whole(self, block: _Block) -> bool:
        return not any(_is_husk(leaf) for outputs in self.given[block.place][1] for leaf in tree_leaves(outputs))

    def _upstream(self, place: Place, done: Done) -> tuple[tuple[str, Scheme], ...]:
        """The quantized weights that what comes out of a block may depend on."""
        return tuple((name, scheme) for name, scheme in done if _before(self.places[name], place))

    def _stop_behind(self, weights: Sequence[Weight], patches: ExitStack) -> None:
        """End the forward pass when all blocks, and layers outside of blocks, that hold these weights have run."""
        at = {block.place: block for block in self.blocks}
        goals: dict[nn.Module, int] = {}
        for weight in weights:
            block = at.get(place_of(weight))
            goals[block.module if block else self.vlm.model.get_submodule(weight.reader)] = (
                block.calls if block else self.calls[weight.reader]
            )
        if not all(goals.values()):
            return  # one that did not run when `_look` looked: to the end then

        def passed(module: nn.Module, *_: Any) -> None:
            goals[module] -= 1
            if not any(goals.values()):
                raise _Enough

        for module in goals:
            patches.callback(module.register_forward_hook(passed).remove)

    def _look(self, batch: TokenBatch) -> None:
        """Run one batch, then replay it with each block's output blanked out in turn, and see who notices."""
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
                if block.place[0] == after.place[0] and block.calls:
                    blank = {**outputs, block.place: [_husk(output) for output in outputs[block.place]]}
                    with suppress(RuntimeError, IndexError, ValueError):
                        block.read_later = not _same(self._replayed(batch, blank), expected, {after.module})

    def _replayed(self, batch: TokenBatch, outputs: dict[Place, list[Any]]) -> list[tuple[nn.Module, Any]]:
        """What blocks and loose layers are called with where every block gives back what is given here."""
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
    return PARTS.index(weight.part), float("inf") if weight.block is None else weight.block


def _before(weight: Place, block: Place) -> bool:
    """Whether a weight may stand before the end of a block; of what is outside of blocks nobody knows."""
    return weight[0] < block[0] or (weight[0] == block[0] and (weight[1] == float("inf") or weight[1] <= block[1]))


def _blocks(model: nn.Module, weights: Iterable[Weight]) -> list[_Block]:
    """The modules around each block's weights, in the direction of data flow; none that holds another one."""
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
    """The deepest module around a path that has a forward of its own; a list of modules has none."""
    while isinstance(model.get_submodule(path.replace("/", ".")), nn.ModuleList | nn.ModuleDict):
        path = os.path.dirname(path)
    return path.replace("/", ".")


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """It is the forward that is replaced and not the module, since transformers records hidden states by class."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # uncovers the method of the class
        if own is not None:
            module.forward = own


def _recorded(module: nn.Module, outputs: list[Any]) -> Any:
    own = module.forward

    def recording(*args: Any, **kwargs: Any) -> Any:
        outputs.append(own(*args, **kwargs))
        return outputs[-1]

    return _replaced(module, recording)


def _giving(outputs: Sequence[Any]) -> Callable[..., Any]:
    left = iter(outputs)
    return lambda *_, **__: next(left)


def _husk(output: Any) -> Any:
    """The same shapes and types, and no memory."""
    return tree_map(lambda leaf: leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf, output)


def _is_husk(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 1 and not any(leaf.stride())


def _same(found: list[tuple[nn.Module, Any]], expected: list[tuple[nn.Module, Any]], but: set[nn.Module]) -> bool:
    """Whether modules were called alike, whatever those of `but` were called with."""
    return len(found) == len(expected) and all(
        a is b and (a in but or _equal(tree_leaves(x), tree_leaves(y)))
        for (a, x), (b, y) in zip(found, expected, strict=True)
    )


def _equal(a: list[Any], b: list[Any]) -> bool:
    """Tensors by their numbers; other objects, such as a cache, are made anew for each pass and equal by type."""
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y)
        for x, y in zip(a, b, strict=True)
    )
