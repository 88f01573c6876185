"""quantized() puts a plan into a model and takes it out bit for bit; prepare() quantizes for many plans at once."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sensitivity.measure.calibrate.absorbers import Absorber
from sensitivity.measure.calibrate.cache import fingerprint
from sensitivity.measure.calibrate.statistics import Statistics, by_importance
from sensitivity.measure.install.past_cache import Sizes, cache_sizes, past_cache_hooks
from sensitivity.measure.install.pruned_tokens import pruning_hooks
from sensitivity.measure.install.rounding import check_cache
from sensitivity.measure.install.run_time import RunTime
from sensitivity.measure.install.tweaked_norms import TweakedNorms
from sensitivity.measure.memory.own_weights import OwnWeights
from sensitivity.measure.memory.weight_codes import CachedWeight, Key, WeightCodes, as_cached, from_tensors, tensors
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears, input_of
from sensitivity.quantize.methods import UNIFORM, method_of, needs_data, needs_fisher, quantize, solve, weights_of
from sensitivity.quantize.run_time.settings import needs_run_time_data, smooths_cache
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEEP, NOT_ROUNDED, Plan, Scheme, Setting, scheme_of
from sensitivity.spec.stage import each

QUANTIZING = "quantizing", "blocks"  # what progress lines call the work and its unit


@contextmanager
def quantized(
    model: nn.Module,
    parts: ComponentMap,
    plan: Plan,
    memory: WeightCodes | None = None,
    statistics: Statistics | None = None,
) -> Iterator[set[str]]:
    """Inside the block the model has the plan's weights; afterwards, also after an exception, it has its own again.

    Yields the names of the changed parameters, which are exactly those that the plan asks for; else it is an error.
    `memory` keeps the codes of quantized weights for later plans, and dequantizes only weights that change.
    Methods that need calibration take it from `statistics`, block by block in the direction of data flow.

    Examples:
        >>> from sensitivity import quantized
        >>> with quantized(vlm.model, parts, plan) as changed:
        ...     len(changed) == sum(len(parts[name].weights) for name in ("vision", "language"))
        True
    """
    parameters = dict(model.named_parameters())
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    schemes, given = targets(parts, plan), _given(parts, plan)
    if unknown_names := sorted(set(schemes) - set(parameters)):
        raise UserError(f"the plan names weights that this model does not have: {', '.join(unknown_names[:4])}")
    quantizer = _Quantizer(model, parts, WeightCodes(0) if memory is None else memory, statistics)
    blocks, exposed = list(_blocks(parts, given)), statistics is not None and statistics.exposed
    if not exposed:  # float statistics are collected before the first weight is replaced
        for block in each(blocks, *QUANTIZING, len(blocks)):
            quantizer.solve(block, {weight.name: {given[weight.name]} for weight in block})
    sizes = quantizer.cache_sizes(model, given)  # of the float model, too
    asked = set(schemes)  # parameters to change; norms join them where a scheme tweaks those of a block
    with ExitStack() as installed:
        try:
            if not exposed:
                quantizer.search(given)
            for block in each(blocks, *QUANTIZING, len(blocks)):
                # the blocks before this one hold their quantized weights by now, and its calibration inputs pass
                # through them
                if exposed:
                    quantizer.solve(block, {weight.name: {given[weight.name]} for weight in block})
                    quantizer.search({weight.name: given[weight.name] for weight in block})
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
                asked |= set(norms)
                quantizer.installed_so_far += [(weight.name, given[weight.name]) for weight in block]
            beside = (past_cache_hooks(model, parts.weights, given, sizes), pruning_hooks(model, parts.weights, given))
            for hook in itertools.chain(*beside):
                installed.callback(hook.remove)
            for hook in quantizer.run_time.match(given):
                installed.callback(hook.remove)
            # compared by address: a weight whose values survive quantizing unchanged counts as changed, too
            changed = {name for name, p in parameters.items() if p.data_ptr() != addresses[name]}
            if changed != asked:
                missed, surplus = sorted(asked - changed), sorted(changed - asked)
                raise UserError(f"coverage: not quantized {missed[:4]}, quantized without being asked {surplus[:4]}")
            yield changed
        finally:
            # before the model's own weights come back, so that memory never holds both whole
            quantizer.memory.trim_dense()
            for name, parameter in parameters.items():
                parameter.data = quantizer.own.take(name)


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
    if statistics is not None and statistics.exposed:
        return
    schemes_of: dict[str, set[Scheme]] = {}
    for plan in plans:
        for name, scheme in _given(parts, plan).items():
            schemes_of.setdefault(name, set()).add(scheme)
    quantizer = _Quantizer(model, parts, memory, statistics)
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
    """The scheme of every weight that has one, also of those that stay as they are while their inputs are rounded."""
    scheme_by_weight: dict[str, Scheme] = {}
    for component in parts.components:
        if (scheme := plan[component.name]) is not None:
            check_cache(component.name, scheme, component.weights)
            scheme_by_weight |= {weight.name: scheme_of(weight, scheme) for weight in component.weights}
    return scheme_by_weight


class _Quantizer:
    """Quantizes the weights of one model: its own weights, the memory of quantized ones, and those installed so far."""

    def __init__(
        self, model: nn.Module, parts: ComponentMap, memory: WeightCodes, statistics: Statistics | None
    ) -> None:
        self.own = OwnWeights(model)
        self.memory, self.statistics = memory, statistics
        self.installed_so_far: list[tuple[str, Scheme]] = []
        exposed = statistics is not None and statistics.exposed
        # what calibration gives for run time; on the exposed path it is this plan's alone
        self.run_time = RunTime(model, parts, statistics, {} if exposed else memory.run_time)
        passes = statistics.passes if statistics else lambda: iter(())
        self.norms = TweakedNorms(model, parts, passes, exposed, memory.norms)
        self.inputs: dict[str, list[Weight]] = {}
        self.weights = {weight.name: weight for weight in parts.weights}
        for weight in parts.weights:
            self.inputs.setdefault(input_of(weight), []).append(weight)

    def weight(self, name: str, scheme: Scheme) -> Tensor:
        """The dequantized weight that a scheme puts into the model."""
        return self.memory.dense(self.key(name, scheme), self.own[name])

    def key(self, name: str, scheme: Scheme) -> Key:
        """What a quantized weight depends on; on the exposed path also everything that was quantized before it."""
        scheme = weights_of(scheme)
        if self.statistics is not None and self.statistics.exposed and method_of(scheme).calibrated:
            return name, scheme, tuple(self.installed_so_far)
        return name, scheme

    def solve(self, block: Iterable[Weight], schemes_of: Mapping[str, set[Scheme]]) -> None:
        """Quantize what the memory lacks; weights that read one input are solved together, and always all of them."""
        missing: dict[str, set[Scheme]] = {}
        block = list(block)
        ranges = self.run_time.ranges_to_find(block, schemes_of)
        for weight in block:
            every = {weights_of(scheme) for scheme in schemes_of[weight.name] if scheme.method != KEEP}
            if missing_schemes := {s for s in every if self.key(weight.name, s) not in self.memory}:
                missing.setdefault(input_of(weight), set()).update(missing_schemes)
            for scheme in filter(needs_run_time_data, schemes_of[weight.name]):
                self._check_calibrated(scheme)
        # a method may choose scales for an input that its weights share; solving all of them together keeps the bits
        # independent of which of them a plan names
        for scheme in {s for schemes in missing.values() for s in schemes}:
            self._check_calibrated(scheme)
        curvatures: Mapping[str, Mapping[str, Curvature]] = {}
        if self.statistics is not None:
            curvatures = self.statistics.gather_for(missing, self.inputs, tuple(self.installed_so_far))
            self._find_ranges(ranges, curvatures)
        for shared, schemes in missing.items():
            names = tuple(weight.name for weight in self.inputs[shared])
            for name in names:
                _check_finite(name, self.own[name])
            # tracing absorbers costs a forward pass, so it waits until a scheme folds its scales
            foldable = any(s.get("scales") == "folded" for s in schemes) and shared in self._absorbers()
            fisher = None if self.statistics is None else self.statistics.fisher_of(names, schemes, self.own)
            normed = self.statistics is not None and self.statistics.behind_norm_for(shared, schemes)
            weights = tuple(self.own[name] for name in names)
            whole = Linears(names, weights, foldable=foldable, behind_norm=normed, fisher=fisher)
            for linears, alike in by_importance(whole, schemes, curvatures.get(shared, {})):
                for chosen, values in zip(alike, self._values(linears, alike), strict=True):
                    for name, value in zip(names, values, strict=True):
                        self.memory[self.key(name, chosen)] = value

    def _find_ranges(self, ranges: Mapping[str, Weight], curvatures_of: Mapping[str, Mapping[str, Curvature]]) -> None:
        """Add the range of some inputs, from statistics in which all tokens count alike, gathered now if missing."""
        known = {name: curvatures[UNIFORM] for name in ranges if UNIFORM in (curvatures := curvatures_of.get(name, {}))}
        if (left := [weight for name, weight in ranges.items() if name not in known]) and self.statistics is not None:
            known |= self.statistics.gather(left, tuple(self.installed_so_far))
        self.run_time.add_ranges({name: known[name] for name in ranges})

    def search(self, given: Mapping[str, Scheme]) -> None:
        """Find how some weights' schemes round in each forward pass, on the model as it is."""
        weights = [self.weights[name] for name in given]
        self.run_time.search(weights, given, self.own, lambda name: self.weight(name, given[name]))

    def stored(self, weight: Weight, scheme: Scheme) -> CachedWeight | None:
        """The stored weight if the scheme rounds its inputs, which it may transform first, or a cache; else None."""
        if min(scheme.activations, scheme.cache) == NOT_ROUNDED or scheme.method == KEEP:
            return None
        return self.memory[self.key(weight.name, scheme)]

    def cache_sizes(self, model: nn.Module, given: Mapping[str, Scheme]) -> Sizes:
        """The sizes of the channels of keys and values, where a scheme divides by them; `model` has its own weights."""
        if smoothing := [scheme for scheme in given.values() if smooths_cache(scheme)]:
            self._check_calibrated(smoothing[0])
            if not self.memory.cache_sizes and self.statistics is not None:
                self.memory.cache_sizes = dict(cache_sizes(model, self.weights.values(), self.statistics.passes))
        return self.memory.cache_sizes

    def _values(self, linears: Linears, schemes: Sequence[Scheme]) -> list[list[CachedWeight]]:
        """The quantized weights for each scheme; calibrated ones come from the cache on disk if it has them."""
        cache = self.statistics.cache if self.statistics is not None and linears.curvature is not None else None
        # keyed by the bits of weights and statistics, not by names: the same content gives the same result in any model
        content = (
            None
            if cache is None
            else [
                linears.foldable,
                linears.behind_norm,
                fingerprint([*linears.weights, *linears.input_statistics.content]),
            ]
        )
        gradients = fingerprint(linears.fisher) if cache is not None and linears.fisher is not None else None
        about: dict[Scheme, dict[str, object]] = {
            s: {"scheme": replace(s, settings=_method_settings(s)).to_json(), "content": content}
            | ({"gradients": gradients} if needs_fisher(s) else {})
            for s in schemes
        }
        cached = {s: cache.load(about[s], linears.weights[0].device) for s in schemes} if cache is not None else {}
        missing = [s for s in schemes if cached.get(s) is None]
        values: dict[Scheme, list[CachedWeight]] = {}
        for scheme, results in zip(missing, solve(linears, missing), strict=True):
            pairs = zip(linears.weights, results, strict=True)
            # None is a weight that the method leaves alone; its copy has an address of its own, as `quantized` expects
            values[scheme] = [w.clone() if r is None else as_cached(r) for w, r in pairs]
            if cache is not None:
                every = enumerate(values[scheme])
                stored = {f"{i}.{name}": tensor for i, value in every for name, tensor in tensors(value).items()}
                cache.store(about[scheme], stored, linears.weights[0].device)
        for scheme, kept in cached.items():
            if kept is not None:
                values[scheme] = [from_tensors(_without_prefix(f"{i}.", kept)) for i in range(len(linears.weights))]
        return [values[scheme] for scheme in schemes]

    def _absorbers(self) -> Mapping[str, Absorber]:
        """What each input's scales can be folded into; nothing without statistics."""
        return {} if self.statistics is None else self.statistics.absorbers

    def bias(self, name: str, scheme: Scheme) -> Tensor:
        """The dequantized bias that a scheme puts into the model; it is quantized as a matrix of one row."""
        scheme = weights_of(scheme)
        if (name, scheme) not in self.memory:
            _check_finite(name, self.own[name])
            bias = self.own[name]
            self.memory[name, scheme] = quantize(bias.reshape(1, -1), scheme).reshape(bias.shape)
        return self.memory.dense((name, scheme), self.own[name])

    def _check_calibrated(self, scheme: Scheme) -> None:
        """Raise an error for a scheme that needs statistics if there are none, or they are of other data."""
        if not needs_data(scheme):
            return
        if self.statistics is None:
            raise UserError(f"{scheme.method} needs calibration data: pass statistics, as calibrate() makes them")
        self.statistics.check_scheme(scheme)


def _without_prefix(prefix: str, cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in cached.items() if name.startswith(prefix)}


def _blocks(parts: ComponentMap, schemes: Container[str]) -> Iterator[list[Weight]]:
    """The weights that are asked for, block by block in the direction of data flow."""
    for block in parts.regroup("block").components:
        if quantized_weights := [weight for weight in block.weights if weight.name in schemes]:
            yield quantized_weights


def _method_settings(scheme: Scheme) -> tuple[tuple[str, Setting], ...]:
    """A scheme's own settings, without the facts of its calibration data: the hash of the content covers those."""
    return tuple((name, value) for name, value in scheme.settings if name in method_of(scheme).settings)


def _check_finite(name: str, weight: Tensor) -> None:
    """Raise an error if a weight holds NaN or infinite values."""
    if not torch.isfinite(weight).all():
        raise UserError(f"{name} holds NaN or infinite values and cannot be quantized")
