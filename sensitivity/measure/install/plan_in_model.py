"""quantized() puts a plan into a model and takes it out bit for bit; prepare() quantizes for many plans at once."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

from torch import nn

from sensitivity.measure.calibrate.statistics import Statistics
from sensitivity.measure.install.past_cache import past_cache_hooks
from sensitivity.measure.install.pruned_tokens import pruning_hooks
from sensitivity.measure.install.quantizer import Quantizer
from sensitivity.measure.install.rounding import check_cache
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError, check_is
from sensitivity.spec.plan import KEEP, Plan, Scheme, scheme_of
from sensitivity.spec.stage import each

HOLDING: WeakSet[nn.Module] = WeakSet()  # models that hold a plan at this moment
QUANTIZING = "quantizing", "blocks"  # what progress lines call the work and its unit


@contextmanager
def quantized(
    model: nn.Module,
    parts: ComponentMap,
    plan: Plan,
    memory: WeightCodes | None = None,
    statistics: Statistics | None = None,
) -> Iterator[set[str]]:
    """Inside the `with` block the model has the plan's weights; afterwards, even after an exception, its own again.

    Yields the names of the changed parameters, which are exactly those that the plan asks for; else it is an error.
    `memory` keeps the codes of quantized weights for later plans, and dequantizes only those that a plan changes.
    Methods that need calibration take it from `statistics`, block by block in the direction of data flow.

    Examples:
        >>> from sensitivity import quantized
        >>> with quantized(vlm.model, parts, plan) as changed:
        ...     len(changed) == sum(len(parts[name].weights) for name in ("vision", "language"))
        True
    """
    check_is("model", model, nn.Module)
    check_is("plan", plan, Plan)
    plan.check(parts)
    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise UserError("this model was loaded without weights (config_only=True); load it with them")
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    schemes, given = targets(parts, plan), _given(parts, plan)
    asked = set(schemes)  # parameters to change; norms join them where a scheme tweaks those of a block
    if unknown_names := sorted(set(schemes) - set(parameters)):
        raise UserError(f"the plan names weights that this model does not have: {', '.join(unknown_names[:4])}")
    quantizer = Quantizer(model, parts, WeightCodes(0, model) if memory is None else memory, statistics)
    blocks, depends_on_plan = list(_blocks(parts, given)), statistics is not None and statistics.depends_on_plan
    if not depends_on_plan:  # float statistics are collected before the first weight is replaced
        for block in each(blocks, *QUANTIZING, len(blocks)):
            quantizer.solve(block, {weight.name: {given[weight.name]} for weight in block})
    magnitudes = quantizer.cache_magnitudes(model, given)  # of the float model as well
    with ExitStack() as installed:
        try:
            if not depends_on_plan:
                quantizer.search(given)
            for block in each(blocks, *QUANTIZING, len(blocks)):
                # the blocks before this one hold quantized weights by now, through which its calibration inputs pass
                if depends_on_plan:
                    quantizer.solve(block, {weight.name: {given[weight.name]} for weight in block})
                    quantizer.search({weight.name: given[weight.name] for weight in block})
                asked |= _put_block(block, given, schemes, parameters, quantizer, installed)
            # matching attention runs the model, so its hooks come last
            for hook in itertools.chain(
                past_cache_hooks(model, parts.weights, given, magnitudes),
                pruning_hooks(model, parts.weights, given),
                quantizer.run_time.match(given),
            ):
                installed.callback(hook.remove)
            # compared by address: a weight whose values survive quantizing unchanged counts as changed, too
            changed = {name for name, p in parameters.items() if p.data_ptr() != addresses[name]}
            if changed != asked:
                missed, surplus = sorted(asked - changed), sorted(changed - asked)
                raise UserError(f"coverage: not quantized {missed[:4]}, quantized without being asked {surplus[:4]}")
            HOLDING.add(model)
            yield changed
        finally:
            HOLDING.discard(model)
            # before the model's own weights come back, so that memory never holds all of both
            quantizer.memory.trim_dense()
            for name, parameter in parameters.items():
                parameter.data = quantizer.own.take(name)


def _put_block(
    block: Sequence[Weight],
    given: Mapping[str, Scheme],
    schemes: Container[str],
    parameters: Mapping[str, nn.Parameter],
    quantizer: Quantizer,
    installed: ExitStack,
) -> set[str]:
    """Put a block's quantized weights and hooks into the model; return the norms that were tweaked with them."""
    for weight in block:
        scheme = given[weight.name]
        # the tensor is replaced and not overwritten, so that restoring it is exact and copies nothing
        if weight.name in schemes:
            parameters[weight.name].data = quantizer.weight(weight.name, scheme)
            quantizer.own.narrow(weight.name)
        if weight.bias and weight.bias in schemes:
            parameters[weight.bias].data = quantizer.bias(weight.bias, scheme)
        for hook in quantizer.run_time.hooks(weight, scheme, quantizer.stored(weight, scheme)):
            installed.callback(hook.remove)
    norms = quantizer.norms.of_block(block, given, quantizer.own)
    for name, value in norms.items():
        parameters[name].data = value
    quantizer.installed_so_far += [(weight.name, given[weight.name]) for weight in block]
    return set(norms)


def prepare(
    model: nn.Module,
    parts: ComponentMap,
    plans: Iterable[Plan],
    memory: WeightCodes,
    statistics: Statistics | None = None,
) -> None:
    """Fill the memory with every weight at every scheme that a plan asks for, solving each layer once for all.

    The bits are those that `quantized` would compute plan by plan. On the exposed path they depend on the plan, so
    there is nothing to prepare.
    """
    if statistics is not None and statistics.depends_on_plan:
        return
    schemes_of: dict[str, set[Scheme]] = {}
    for plan in plans:
        for name, scheme in _given(parts, plan).items():
            schemes_of.setdefault(name, set()).add(scheme)
    quantizer = Quantizer(model, parts, memory, statistics)
    blocks = list(_blocks(parts, schemes_of))
    for block in each(blocks, *QUANTIZING, len(blocks)):
        quantizer.solve(block, schemes_of)


def targets(parts: ComponentMap, plan: Plan) -> dict[str, Scheme]:
    """The parameters that a plan changes, each with its scheme; biases only where the scheme says so."""
    schemes: dict[str, Scheme] = {}
    for component in parts.components:
        if (scheme := plan[component.name]) is not None and scheme.method != KEEP:
            for weight in component.weights:
                schemes[weight.name] = scheme_of(weight, scheme)
                if weight.bias and scheme.get("biases"):
                    schemes[weight.bias] = scheme
    return schemes


def _given(parts: ComponentMap, plan: Plan) -> dict[str, Scheme]:
    """The scheme of every weight that has one, also where the weight stays and only its inputs are rounded."""
    scheme_by_weight: dict[str, Scheme] = {}
    for component in parts.components:
        if (scheme := plan[component.name]) is not None:
            check_cache(component.name, scheme, component.weights)
            scheme_by_weight |= {weight.name: scheme_of(weight, scheme) for weight in component.weights}
    return scheme_by_weight


def _blocks(parts: ComponentMap, schemes: Container[str]) -> Iterator[list[Weight]]:
    """The weights that are asked for, block by block in the direction of data flow."""
    for block in parts.regroup("block").components:
        if quantized_weights := [weight for weight in block.weights if weight.name in schemes]:
            yield quantized_weights
