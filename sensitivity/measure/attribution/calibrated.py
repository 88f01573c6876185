"""Calibrated: all that component scores are computed from; each part is computed once, when first asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from sensitivity.measure.attribution.answer_changes import AnswerChanges, PredictionChange
from sensitivity.measure.attribution.weight_errors import WeightErrors, plan_changes
from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.gradients.backward import in_rows_that_fit
from sensitivity.measure.gradients.first_order import Change, Fisher, Gathering, Passed, Squares, gather
from sensitivity.measure.gradients.path_integral import integrate_path
from sensitivity.measure.install.plan_in_model import prepare, quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.measure.passes.token_batches import ROWS, TokenBatch
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.linears import input_of
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.plan import Plan, Scheme, without_unused_cache
from sensitivity.spec.stage import each

Scores = dict[str, dict[Scheme, float]]  # component -> scheme -> damage, in the score's own unit
GATHERED = ("squares", "fisher", "change")  # the properties of Calibrated that backward passes gather


@dataclass(frozen=True)
class LayerErrors:
    """The errors of one layer's weight and output under each scheme, and the norms with which they are compared."""

    weight: float  # squared norm of the weight
    output: float  # tr(W H W'), with H the Gram matrix of the inputs
    weight_errors: list[float]  # squared norm of each error
    output_errors: Tensor  # schemes x rows: E H E' of each row of each error


@dataclass
class Calibrated:
    """All that scores are computed from: a model, schemes, the statistics of calibration data, and the data itself."""

    vlm: VLM
    parts: ComponentMap
    schemes: Sequence[Scheme]
    statistics: Statistics
    data: Callable[[int], Iterable[TokenBatch]]  # takes the most rows that a batch may have
    gathered: dict[str, Gathering] = field(default_factory=dict, init=False)  # by kind: those of GATHERED so far
    seconds: dict[str, float] = field(default_factory=dict, init=False)  # of the processor: what each kind takes alone
    loss: float | None = field(default=None, init=False)  # mean over the examples of a backward pass

    @cached_property
    def errors(self) -> WeightErrors:
        """The errors of quantized weights."""
        return WeightErrors(self.vlm.model, self.parts, self.schemes, self.statistics)

    @cached_property
    def weights(self) -> list[Weight]:
        """The weights of layers that multiply an input."""
        return [weight for weight in self.parts.weights if not weight.is_embedding]

    @cached_property
    def layers(self) -> dict[str, LayerErrors]:
        """The errors of each layer, by weight name; computed block by block, so that few codes are in memory."""
        found: dict[str, LayerErrors] = {}
        for group in self.errors.by_group():
            found |= self._layers_of(group)
        return found

    def _layers_of(self, group: Sequence[Weight]) -> dict[str, LayerErrors]:
        """The errors of the layers of a group of blocks."""
        found, began = {}, time.process_time()
        for weight in (weight for weight in group if not weight.is_embedding):
            own, gram = self.errors.own[weight.name].float(), self.statistics.gather([weight])[input_of(weight)].gram
            errors = [error.float() for error in self.errors.of(weight)]
            found[weight.name] = LayerErrors(
                float(own.square().sum()),
                float(_quadratic(own, gram).sum()),
                [float(error.square().sum()) for error in errors],
                torch.stack([_quadratic(error, gram) for error in errors]).cpu(),
            )
        self.seconds["layers"] = self.seconds.get("layers", 0.0) + time.process_time() - began
        return found

    def gather(self, *kinds: str) -> None:
        """Compute some of GATHERED, as far as they are missing; those asked for together share backward passes.

        `layers` may be asked for beside them, to have its errors computed together with theirs.

        Errors take a pass for each group of blocks whose errors fit into memory together, squares of gradients one: the
        last of those, when the errors of all layers are known, so that each group is quantized once.
        """
        missing = [kind for kind in GATHERED if kind in kinds and kind not in self.gathered]
        with_errors = [kind for kind in missing if kind != "squares"]
        wanted = ("squares" in missing or "layers" in kinds) and "layers" not in vars(self)
        layers: dict[str, LayerErrors] | None = {} if wanted and with_errors else None
        if wanted and missing and not with_errors:
            self.layers  # noqa: B018 - computed before the pass, which is timed
        groups = self.errors.by_group() if with_errors else [[]] if missing else []
        for place, group in enumerate(groups, start=1):
            began = time.process_time()
            if group:
                self.errors.hold(group)  # only some kinds need it, which count its seconds
            quantizing = time.process_time() - began
            is_last = not group or place == len(self.errors.groups)
            if group and layers is not None:
                layers |= self._layers_of(group)
                self.seconds["layers"] += quantizing
                if is_last:
                    vars(self)["layers"] = layers
            together = missing if is_last else with_errors
            run = partial(self._pass, together, {weight.name for weight in group})
            found, passed = in_rows_that_fit(self.vlm, self.data, run, release=self.errors.release)
            self.loss = passed.loss / max(passed.examples, 1)
            for kind, one, own in zip(together, found, passed.own_seconds, strict=True):
                self.seconds[kind] = self.seconds.get(kind, 0.0) + passed.seconds + own
                self.seconds[kind] += quantizing if kind in with_errors else 0.0
                self.gathered.setdefault(kind, one).sums.update(one.sums)

    def _pass(
        self, kinds: Sequence[str], scored: Collection[str], data: Callable[[], Iterable[TokenBatch]]
    ) -> tuple[list[Gathering], Passed]:
        """One backward pass over the data."""
        found: list[Gathering] = []
        for kind in kinds:
            if kind == "squares":
                found.append(Squares({name: layer.output_errors for name, layer in self.layers.items()}))
            else:
                found.append((Fisher if kind == "fisher" else Change)(self.errors.of, scored))
        return found, gather(self.vlm, self.weights, data(), found)

    @property
    def squares(self) -> Squares:
        """Squared gradients of the loss with respect to layers' outputs."""
        self.gather("squares")
        found = self.gathered["squares"]
        assert isinstance(found, Squares)
        return found

    @property
    def fisher(self) -> dict[str, Tensor]:
        """By weight, for each scheme: the sum of (gradient x change)^2 over tokens and outputs."""
        self.gather("fisher")
        return self.gathered["fisher"].sums

    @property
    def change(self) -> dict[str, Tensor]:
        """By weight, for each scheme: |gradient x change| of each example, summed over examples."""
        self.gather("change")
        return self.gathered["change"].sums

    @cached_property
    def answers(self) -> AnswerChanges:
        """The float model's predictions of the right answers."""
        return in_rows_that_fit(self.vlm, self.data, partial(AnswerChanges, self.vlm), ROWS)

    @cached_property
    def one_at_a_time(self) -> dict[str, dict[Scheme, PredictionChange]]:
        """How the answers change with one component quantized, by component and scheme; a forward pass for each."""
        self.answers  # noqa: B018 - computed on the float model, before any component is quantized
        found: dict[str, dict[Scheme, PredictionChange]] = {}
        for name in self.parts.names:
            memory, plans = WeightCodes(beside=self.vlm.model), [self.alone(name, scheme) for scheme in self.schemes]
            prepare(self.vlm.model, self.parts, plans, memory, self.statistics)  # all widths of a layer at once
            found[name] = {
                scheme: self.answers.under(quantized(self.vlm.model, self.parts, plan, memory, self.statistics))
                for scheme, plan in zip(self.schemes, plans, strict=True)
            }
        return found

    def alone(self, name: str, scheme: Scheme) -> Plan:
        """The plan that quantizes one component."""
        choice = {
            one.name: without_unused_cache(one, scheme) if one.name == name else None for one in self.parts.components
        }
        return Plan(tuple(choice.items()))

    @cached_property
    def path_integral_shares(self) -> dict[Scheme, dict[str, float]]:
        """For each uniform plan, each component's share of the change of the loss, from a path integral."""
        found: dict[Scheme, dict[str, float]] = {}
        for scheme in each(self.schemes, "integrals", "widths", len(self.schemes)):
            plan = Plan.uniform(self.parts, scheme)
            changes = plan_changes(self.vlm.model, self.parts, plan, self.statistics)
            integral = in_rows_that_fit(self.vlm, self.data, partial(integrate_path, self.vlm, self.parts, changes))
            found[scheme] = dict.fromkeys(self.parts.names, 0.0)
            for (_, name, _), values in integral.terms.items():
                found[scheme][name] += float(values.sum())
        return found

    def by_component(self, of_weight: Callable[[Weight], Iterable[float]]) -> Scores:
        """Sum the scores of weights, one for each scheme, over each component."""
        found: Scores = {name: dict.fromkeys(self.schemes, 0.0) for name in self.parts.names}
        for weight in self.weights:
            sums = found[weight.component_name(self.parts.by)]
            for scheme, value in zip(self.schemes, of_weight(weight), strict=True):
                sums[scheme] += float(value)
        return found


def _quadratic(error: Tensor, gram: Tensor) -> Tensor:
    """e H e' of each row."""
    return (error @ gram).mul_(error).sum(1)
