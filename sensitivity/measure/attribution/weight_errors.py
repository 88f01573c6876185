"""The errors of quantized weights: of every weight under each scheme, or of a whole plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.plan_in_model import prepare, quantized, targets
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.quantize.methods import method_of
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import NOT_ROUNDED, Plan, Scheme


class WeightErrors:
    """Quantized minus own, for every weight under each scheme; codes are kept, errors are computed when asked for."""

    def __init__(
        self, model: nn.Module, parts: ComponentMap, schemes: Sequence[Scheme], statistics: Statistics | None
    ) -> None:
        if statistics is not None and statistics.exposed:
            raise UserError(
                "scores of single components need float inputs, and behind quantized layers they differ from plan to "
                "plan; leave out --path"
            )
        self.schemes = schemes
        self.own = {weight.name: model.get_parameter(weight.name).data for weight in parts.weights}
        self.codes = WeightCodes()
        prepare(model, parts, [Plan.uniform(parts, scheme) for scheme in schemes], self.codes, statistics)

    def of(self, weight: Weight) -> list[Tensor]:
        """The errors of a weight, one for each scheme."""
        float_weight = self.own[weight.name]
        return [self.codes.dense((weight.name, scheme), float_weight) - float_weight for scheme in self.schemes]


def plan_changes(
    model: nn.Module, parts: ComponentMap, plan: Plan, statistics: Statistics | None = None
) -> dict[str, Tensor]:
    """By how much a plan changes each parameter."""
    schemes = targets(parts, plan)
    if any(method_of(one).inputs or min(one.activations, one.cache) < NOT_ROUNDED for one in schemes.values()):
        raise UserError("this plan also changes what layers read, and is not explained by changes of weights alone")
    if any((weight.is_embedding or weight.tied) and weight.name in schemes for weight in parts.weights):
        raise UserError("this plan quantizes the embedding, whose rows are looked up; explain one that keeps it")
    before = {name: model.get_parameter(name).data for name in schemes}
    with quantized(model, parts, plan, None, statistics):
        return {name: model.get_parameter(name).data - before[name] for name in schemes}
