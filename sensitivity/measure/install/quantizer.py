"""Quantizer: solves the weights of one model, block by block, and gives what a plan puts into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sensitivity.measure.calibrate.absorbers import Absorber
from sensitivity.measure.calibrate.statistics import Statistics, by_importance
from sensitivity.measure.install.codes_on_disk import CodesOnDisk
from sensitivity.measure.install.past_cache import Magnitudes, cache_magnitudes
from sensitivity.measure.install.run_time_rounding import RunTimeRounding
from sensitivity.measure.install.tweaked_norms import TweakedNorms
from sensitivity.measure.memory.own_weights import OwnWeights
from sensitivity.measure.memory.weight_codes import CachedWeight, Key, WeightCodes, as_cached, tensors
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears, input_of
from sensitivity.quantize.methods import UNIFORM, method_of, needs_data, needs_fisher, token_weighting, weights_of
from sensitivity.quantize.run_time.settings import needs_run_time_data, smooths_cache
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.quantize.stored.weight import StoredWeight
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import KEEP, NOT_ROUNDED, Scheme


class Quantizer:
    """Quantizes the weights of one model; it holds the model's own, a cache of quantized ones, and those installed."""

    def __init__(
        self, model: nn.Module, parts: ComponentMap, memory: WeightCodes, statistics: Statistics | None
    ) -> None:
        self.own = OwnWeights(model)
        self.memory, self.statistics = memory, statistics
        self.installed_so_far: list[tuple[str, Scheme]] = []
        depends_on_plan = statistics is not None and statistics.depends_on_plan
        # what calibration found is kept for later plans; on the exposed path it is for this plan alone
        self.run_time = RunTimeRounding(model, parts, statistics, {} if depends_on_plan else memory.run_time)
        passes = statistics.passes if statistics else lambda: iter(())
        cache = statistics.cache if statistics else None
        self.on_disk = CodesOnDisk(cache, statistics.origin) if cache and statistics else None
        self.norms = TweakedNorms(model, parts, passes, depends_on_plan, memory.norms)
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
        if self.statistics is not None and self.statistics.depends_on_plan and method_of(scheme).calibrated:
            return name, scheme, tuple(self.installed_so_far)
        return name, scheme

    def solve(self, block: Iterable[Weight], schemes_of: Mapping[str, set[Scheme]]) -> None:
        """Quantize what the memory lacks; all weights that read one input are solved together, if any is missing."""
        missing: dict[str, set[Scheme]] = {}
        block = list(block)
        ranges = self.run_time.ranges_to_find(block, schemes_of)
        for weight in block:
            every = {weights_of(scheme) for scheme in schemes_of[weight.name] if scheme.method != KEEP}
            if missing_schemes := {s for s in every if self.key(weight.name, s) not in self.memory}:
                missing.setdefault(input_of(weight), set()).update(missing_schemes)
            for scheme in filter(needs_run_time_data, schemes_of[weight.name]):
                self._check_calibrated(scheme)
        for scheme in {s for schemes in missing.values() for s in schemes}:
            self._check_calibrated(scheme)
        missing = self._without_those_on_disk(missing)
        curvatures: Mapping[str, Mapping[str, Curvature]] = {}
        if self.statistics is not None:
            curvatures = self.statistics.gather_for(missing, self.inputs, tuple(self.installed_so_far))
            self._find_ranges(ranges, curvatures)
        for shared, schemes in missing.items():
            whole = self._linears(shared, schemes)
            for linears, alike in by_importance(whole, schemes, curvatures.get(shared, {})):
                self._remember(linears, self._solved(shared, linears, alike))

    def _linears(self, shared: str, schemes: Iterable[Scheme]) -> Linears:
        """All weights that read an input, without statistics.

        A method may choose scales for an input that weights share; solving all of them keeps the bits independent of
        which of them a plan names.
        """
        names = tuple(weight.name for weight in self.inputs[shared])
        for name in names:
            _check_finite(name, self.own[name])
        # tracing absorbers costs a forward pass, so it waits until a scheme folds its scales
        foldable = any(s.get("scales") == "folded" for s in schemes) and shared in self._absorbers()
        fisher = None if self.statistics is None else self.statistics.fisher_of(names, schemes, self.own)
        normed = self.statistics is not None and self.statistics.after_norm_for(shared, schemes)
        weights = tuple(self.own[name] for name in names)
        return Linears(names, weights, foldable=foldable, after_norm=normed, fisher=fisher)

    def _remember(self, linears: Linears, values_of: Mapping[Scheme, Sequence[CachedWeight]]) -> None:
        """Put quantized weights into the memory."""
        for scheme, values in values_of.items():
            for name, value in zip(linears.names, values, strict=True):
                self.memory[self.key(name, scheme)] = value

    def _without_those_on_disk(self, missing: Mapping[str, set[Scheme]]) -> dict[str, set[Scheme]]:
        """Fill the memory from the cache on disk, without collecting statistics; return what is still missing."""
        left: dict[str, set[Scheme]] = {}
        for shared, schemes in missing.items():
            found: set[Scheme] = set()
            plain = {scheme for scheme in schemes if method_of(scheme).calibrated and not needs_fisher(scheme)}
            if self.on_disk is not None and plain:
                for linears, alike in by_importance(self._linears(shared, plain), plain, {}):
                    device = linears.weights[0].device
                    if known := self.on_disk.statistics_hash(shared, token_weighting(alike[0]), device):
                        cached = self.on_disk.load(linears, known, alike)
                        self._remember(linears, cached)
                        found |= set(cached)
            if schemes - found:
                left[shared] = schemes - found
        return left

    def _find_ranges(self, ranges: Mapping[str, Weight], curvatures_of: Mapping[str, Mapping[str, Curvature]]) -> None:
        """Add the range of some inputs, from statistics in which all tokens count alike; gathered now where missing."""
        known = {name: curvatures[UNIFORM] for name in ranges if UNIFORM in (curvatures := curvatures_of.get(name, {}))}
        if (left := [weight for name, weight in ranges.items() if name not in known]) and self.statistics is not None:
            known |= self.statistics.gather(left, tuple(self.installed_so_far))
        self.run_time.add_ranges({name: known[name] for name in ranges})

    def search(self, given: Mapping[str, Scheme]) -> None:
        """Find how some weights' schemes round in each forward pass, in the model with its present weights."""
        weights = [self.weights[name] for name in given]
        self.run_time.search(weights, given, self.own, lambda name: self.weight(name, given[name]))

    def stored(self, weight: Weight, scheme: Scheme) -> CachedWeight | None:
        """The stored weight if the scheme rounds inputs or a cache, else None; it tells how inputs are transformed."""
        if min(scheme.activations, scheme.cache) == NOT_ROUNDED or scheme.method == KEEP:
            return None
        return self.memory[self.key(weight.name, scheme)]

    def cache_magnitudes(self, model: nn.Module, given: Mapping[str, Scheme]) -> Magnitudes:
        """The magnitudes of cached channels, where a scheme divides by them; `model` must have its own weights."""
        if smoothing := [scheme for scheme in given.values() if smooths_cache(scheme)]:
            self._check_calibrated(smoothing[0])
            if not self.memory.cache_magnitudes and self.statistics is not None:
                found = cache_magnitudes(model, self.weights.values(), self.statistics.passes)
                self.memory.cache_magnitudes = dict(found)
        return self.memory.cache_magnitudes

    def _solved(self, shared: str, linears: Linears, schemes: Sequence[Scheme]) -> dict[Scheme, Sequence[CachedWeight]]:
        """The quantized weights for each scheme; those with statistics come from the cache on disk if it has them."""
        disk = self.on_disk if linears.curvature is not None else None
        statistics_hash = "" if disk is None else disk.hash_statistics(shared, token_weighting(schemes[0]), linears)
        found = {} if disk is None else disk.load(linears, statistics_hash, schemes)
        missing = [scheme for scheme in schemes if scheme not in found]
        solved: dict[Scheme, Sequence[CachedWeight]] = {}
        for scheme, results in zip(missing, solve(linears, missing), strict=True):
            pairs = zip(linears.weights, results, strict=True)
            named = zip(linears.names, pairs, strict=True)
            solved[scheme] = [_checked(name, scheme.method, *pair) for name, pair in named]
        if disk is not None:
            disk.store(linears, statistics_hash, solved)
        return {**found, **solved}

    def _absorbers(self) -> Mapping[str, Absorber]:
        """The module into which each input's scales can be folded; empty without statistics."""
        return {} if self.statistics is None else self.statistics.absorbers

    def bias(self, name: str, scheme: Scheme) -> Tensor:
        """The dequantized bias that a scheme puts into the model; it is quantized as a matrix of one row."""
        scheme = weights_of(scheme)
        if (name, scheme) not in self.memory:
            _check_finite(name, self.own[name])
            bias = self.own[name]
            self.memory[name, scheme] = fake_quantize(bias.reshape(1, -1), scheme).reshape(bias.shape)
        return self.memory.dense((name, scheme), self.own[name])

    def _check_calibrated(self, scheme: Scheme) -> None:
        """Raise an error for a scheme that needs statistics if there are none, or they are of other data."""
        if not needs_data(scheme):
            return
        if self.statistics is None:
            raise UserError(
                f"{scheme.method} needs calibration data: pass statistics, as calibration_statistics() makes them"
            )
        self.statistics.check_scheme(scheme)


def _checked(name: str, method: str, own: Tensor, result: StoredWeight | None) -> CachedWeight:
    """What a method made of a weight, as it is cached; an error where that cannot take the weight's place."""
    if result is None:  # nothing to round; the copy has an address of its own, as `quantized` expects
        if own.min() != own.max():
            raise UserError(
                f"the method {method} returned nothing for {name}: only a constant weight may stay as it is"
            )
        return own.clone()
    if isinstance(result, Tensor) or not hasattr(result, "dequantize"):
        what = f"a {type(result).__name__} for {name}, and no stored weight such as a QuantizedWeight"
        raise UserError(f"the method {method} returned {what}")
    value = as_cached(result)
    whole = value if isinstance(value, Tensor) else value.codes if isinstance(value, QuantizedWeight) else None
    if whole is not None and whole.shape != own.shape:
        raise UserError(f"the method {method} made {name} {tuple(whole.shape)}, and it is {tuple(own.shape)}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors(value).values() if tensor.is_floating_point()):
        raise UserError(f"the method {method} made {name} NaN or infinite")
    return value


def _check_finite(name: str, weight: Tensor) -> None:
    """Raise an error if a weight holds NaN or infinite values."""
    if not torch.isfinite(weight).all():
        raise UserError(f"{name} holds NaN or infinite values and cannot be quantized")
