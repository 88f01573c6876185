"""Noise planted in one component: which component has the most blame, and whose replacement mends most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from experiments.benchmarks.put_back import ROUGHLY
from sensitivity import Plan, inspect, load, scheme
from sensitivity.measure.attribution.blame import Blame, blame_of
from sensitivity.measure.attribution.weight_errors import plan_changes
from sensitivity.measure.calibrate.calibration import calibration_examples
from sensitivity.measure.gradients.backward import answer_loss
from sensitivity.measure.gradients.path_integral import PathIntegral, integrate_path, moved
from sensitivity.measure.passes.token_batches import TokenBatch, answer_batches
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap, Weight

Changes = Mapping[str, Tensor]  # parameter -> by how much it differs from the float model's
BESIDE = (8, 4)  # bits of everything else
LEVELS = (2.0, 4.0)  # norm of the noise, as a multiple of the component's rounding error at 2 bits
DRAWN, EXAMPLES, PASSES = 40, 8, 16


@dataclass(frozen=True)
class Case:
    """One defect: the seed chooses where it is planted, its noise, and the examples."""

    beside: int
    level: float
    seed: int


@dataclass
class Subject:
    """A model in which defects are planted, with the rounding errors of its weights."""

    name: str
    by: str
    errors: dict[int, Changes] = field(default_factory=dict)

    @cached_property
    def vlm(self) -> VLM:
        return load(f"embedded:{self.name}", dtype="float32")

    @cached_property
    def parts(self) -> ComponentMap:
        return inspect(self.vlm, by=self.by)

    def rounded(self, bits: int) -> Changes:
        """The changes of all weights rounded to nearest at a width."""
        if bits not in self.errors:
            plan = Plan.uniform(self.parts, scheme("rtn", bits))
            self.errors[bits] = plan_changes(self.vlm.model, self.parts, plan)
        return self.errors[bits]

    def examples(self, seed: int) -> list[TokenBatch]:
        """Examples of equal length, which share a batch."""
        drawn = answer_batches(self.vlm, calibration_examples(["vqa"], DRAWN, seed), EXAMPLES)
        return [max(drawn, key=lambda batch: len(batch.examples))]

    def blame(self, changes: Changes, data: list[TokenBatch]) -> tuple[Blame, PathIntegral]:
        integral = integrate_path(self.vlm, self.parts, changes, lambda: data, ROUGHLY, PASSES)
        return blame_of(self.parts, self.vlm.family, integral), integral

    def loss(self, changes: Changes, data: Iterable[TokenBatch]) -> float:
        with moved(self.vlm.model, changes, 1.0), torch.inference_mode():
            return sum(float(answer_loss(self.vlm, batch)) for batch in data)


def cases(places: int, levels: Sequence[float] = LEVELS) -> Iterator[Case]:
    """Each place once, at each width of the others and each level; no two cases share noise or examples."""
    for i, (level, beside) in enumerate(product(levels, BESIDE)):
        yield from (Case(beside, level, i * places + place) for place in range(places))


def component(subject: Subject, case: Case) -> dict[str, object]:
    """One case: the component with the most blame, and the one whose replacement by float weights mends most."""
    planted = subject.parts.components[case.seed % len(subject.parts.components)]
    changes = {**subject.rounded(case.beside), **noise(subject, planted.weights, case)}
    data = subject.examples(case.seed)
    found, integral = subject.blame(changes, data)
    mended = {
        one.name: integral.after - subject.loss(without(changes, one.weights), data) for one in subject.parts.components
    }
    return compared(planted.name, found.components, mended, integral, data)


def noise(subject: Subject, weights: Sequence[Weight], case: Case) -> dict[str, Tensor]:
    """The rounding errors of some weights with noise added, of the case's level."""
    draw = torch.Generator().manual_seed(case.seed)
    found = {}
    for weight in weights:
        own, coarse = subject.rounded(case.beside)[weight.name], subject.rounded(2)[weight.name]
        drawn = torch.randn(own.shape, generator=draw)
        found[weight.name] = own + drawn * (case.level * coarse.norm() / drawn.norm())
    return found


def without(changes: Changes, weights: Sequence[Weight]) -> dict[str, Tensor]:
    own = {weight.name for weight in weights}
    return {name: change for name, change in changes.items() if name not in own}


def compared(
    planted: str,
    blamed: Mapping[str, float],
    mended: Mapping[str, float],
    integral: PathIntegral,
    data: Sequence[TokenBatch],
) -> dict[str, object]:
    """What blame says beside what putting back shows; `next` is the most that another place mends."""
    each = 1 / sum(len(batch.examples) for batch in data)
    return {
        "planted": planted,
        "blamed": max(blamed, key=lambda name: blamed[name]),
        "worst": max(mended, key=lambda name: mended[name]),
        "share": blamed[planted] / integral.change,
        "change": integral.change * each,
        "mends": mended[planted] * each,
        "next": max(value for name, value in mended.items() if name != planted) * each,
        "missing": integral.missing,
        "passes": integral.passes,
    }
