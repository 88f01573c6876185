"""The errors of quantized weights: of every weight under each scheme, or of a whole plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import prepare, quantized, targets
from sensitivity.measure.memory.weight_codes import BYTES_PER_CODE, WeightCodes
from sensitivity.quantize.methods import method_of, weights_of
from sensitivity.quantize.run_time.settings import tweaks_norms
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme

CODE_BYTES = 1 << 30  # bytes of codes in memory at once; one block of a 7B model has 1.2 GB at five widths


def groups_that_fit(parts: ComponentMap, schemes: int, limit: float = CODE_BYTES) -> list[list[str]]:
    """Neighboring blocks whose codes under so many schemes fit into the limit together, or one block."""
    groups: list[list[str]] = []
    bytes_left = 0.0
    for block in parts.regroup("block").components:
        bytes_ = BYTES_PER_CODE * block.numel * schemes
        if not groups or bytes_ > bytes_left:
            groups, bytes_left = [*groups, []], limit
        groups[-1].append(block.name)
        bytes_left -= bytes_
    return groups


class WeightErrors:
    """Quantized minus float, for every weight under each scheme, with the codes of a few blocks in memory at a time."""

    def __init__(
        self,
        model: nn.Module,
        parts: ComponentMap,
        schemes: Sequence[Scheme],
        statistics: Statistics | None,
        limit: float = CODE_BYTES,
    ) -> None:
        if statistics is not None and statistics.depends_on_plan:
            raise UserError(
                "scores of single components need float inputs, and behind quantized layers they differ from plan to "
                "plan; leave out --path"
            )
        self.model, self.schemes, self.statistics = model, schemes, statistics
        self.blocks = parts.regroup("block")
        self.own = {weight.name: model.get_parameter(weight.name).data for weight in parts.weights}
        room = self._no_codes().room  # on a GPU, where the codes of more blocks may fit
        self.groups = groups_that_fit(parts, len(schemes), max(limit, room))
        self.held: tuple[int, WeightCodes] | None = None
        self.place = {weight.name: i for i, group in enumerate(self.by_group()) for weight in group}

    def of(self, weight: Weight) -> list[Tensor]:
        """The errors of a weight, one for each scheme; its group is quantized unless it is the one in memory."""
        codes, own = self._codes(self.place[weight.name]), self.own[weight.name]
        return [codes.dequantized((weight.name, weights_of(scheme)), own) - own for scheme in self.schemes]

    def hold(self, group: Sequence[Weight]) -> None:
        """Quantize a group now, not when its first error is asked for."""
        self._codes(self.place[group[0].name])

    def release(self) -> bool:
        """Move codes from a GPU into host memory, because its memory is needed; false if none lay there."""
        return self.held is not None and self.held[1].release()

    def by_group(self) -> Iterator[list[Weight]]:
        """All weights in groups; whoever asks for errors in this order has each weight quantized once."""
        for group in self.groups:
            yield [weight for name in group for weight in self.blocks[name].weights]
        if len(self.groups) > 1:  # whoever begins again needs the first group, not the last
            self.held = None

    def _no_codes(self) -> WeightCodes:
        """Memory for codes, which on a GPU lie beside the batches alone: no plan runs."""
        return WeightCodes(beside=self.model, one_in=2)

    def _codes(self, group: int) -> WeightCodes:
        """The codes of a group, quantized now unless they are in memory."""
        if self.held is None or self.held[0] != group:
            self.held = None  # freed before the next ones are computed
            codes, asked = self._no_codes(), set(self.groups[group])
            plans = [
                Plan(tuple((name, scheme if name in asked else None) for name in self.blocks.names))
                for scheme in map(weights_of, self.schemes)
            ]
            prepare(self.model, self.blocks, plans, codes, self.statistics)
            self.held = group, codes
        return self.held[1]


def plan_changes(
    model: nn.Module, parts: ComponentMap, plan: Plan, statistics: Statistics | None = None
) -> dict[str, Tensor]:
    """By how much a plan changes each parameter."""
    schemes = targets(parts, plan)
    if any(map(tweaks_norms, schemes.values())):
        raise UserError("this plan also changes norms: changes of weights alone do not explain its damage")
    rounding = any(method_of(one).inputs or min(one.activations, one.cache) < NOT_ROUNDED for one in schemes.values())
    if rounding or plan.prunes:
        raise UserError("this plan also changes what layers read: changes of weights alone do not explain its damage")
    if any((weight.is_embedding or weight.tied) and weight.name in schemes for weight in parts.weights):
        raise UserError("this plan quantizes the embedding, whose rows are looked up; explain one that keeps it")
    before = {name: model.get_parameter(name).data for name in schemes}
    with quantized(model, parts, plan, None, statistics):
        return {name: model.get_parameter(name).data - before[name] for name in schemes}
