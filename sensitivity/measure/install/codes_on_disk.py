"""Quantized weights in the cache on disk, keyed by what they depend on: weights, statistics of their input, scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sensitivity.measure.calibrate.cache import Cache, fingerprint
from sensitivity.measure.memory.weight_codes import CachedWeight, from_tensors, tensors
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.methods import method_of, needs_fisher
from sensitivity.spec.plan import Scheme, Setting


@dataclass(frozen=True)
class CodesOnDisk:
    """Finds and stores what calibrated methods made of weights that share an input.

    Weights and statistics count by their bits, not by names: the same content gives the same result in any model. The
    Gram matrices of a large model exceed the cache, but their hashes do not: with these, weights that were quantized
    before are found without calibrating again.
    """

    cache: Cache
    origin: Mapping[str, object] | None  # what the statistics depend on; None: they differ from plan to plan

    def statistics_hash(self, input_name: str, importance: str, device: torch.device) -> str | None:
        """The hash of an input's statistics, if they were collected before under the same conditions."""
        if self.origin is None:
            return None
        cached = self.cache.load(self._hash_entry(input_name, importance), device)
        return None if cached is None else bytes(cached["hash"].cpu().tolist()).hex()

    def hash_statistics(self, input_name: str, importance: str, linears: Linears) -> str:
        """The hash of the statistics in `linears`, which is stored so that the next run finds it."""
        found = fingerprint(linears.input_statistics.content)
        if self.origin is not None:
            entry = {"hash": torch.tensor(list(bytes.fromhex(found)), dtype=torch.uint8)}
            self.cache.store(self._hash_entry(input_name, importance), entry, linears.weights[0].device)
        return found

    def load(
        self, linears: Linears, statistics_hash: str, schemes: Sequence[Scheme]
    ) -> dict[Scheme, list[CachedWeight]]:
        """The quantized weights of those schemes that the cache has."""
        entries = self._entries(linears, statistics_hash, schemes)
        cached = {scheme: self.cache.load(entry, linears.weights[0].device) for scheme, entry in entries.items()}
        return {
            scheme: [from_tensors(_without_prefix(f"{i}.", kept)) for i in range(len(linears.weights))]
            for scheme, kept in cached.items()
            if kept is not None
        }

    def store(self, linears: Linears, statistics_hash: str, values: Mapping[Scheme, Sequence[CachedWeight]]) -> None:
        """Store the quantized weights of some schemes."""
        for scheme, entry in self._entries(linears, statistics_hash, list(values)).items():
            every = enumerate(values[scheme])
            named = {f"{i}.{name}": tensor for i, value in every for name, tensor in tensors(value).items()}
            self.cache.store(entry, named, linears.weights[0].device)

    def _entries(
        self, linears: Linears, statistics_hash: str, schemes: Sequence[Scheme]
    ) -> dict[Scheme, dict[str, object]]:
        """For each scheme, what its quantized weights depend on."""
        content = [fingerprint(linears.weights), statistics_hash]
        gradients = None if linears.fisher is None else fingerprint(linears.fisher)
        return {
            scheme: {"scheme": replace(scheme, settings=_method_settings(scheme)).to_json()}
            | {"content": [_takes_scales(linears, scheme), *content]}
            | ({"gradients": gradients} if needs_fisher(scheme) else {})
            for scheme in schemes
        }

    def _hash_entry(self, input_name: str, importance: str) -> dict[str, object]:
        return {"hash of statistics": {**(self.origin or {}), "input": input_name, "importance": importance}}


def _takes_scales(linears: Linears, scheme: Scheme) -> bool:
    """Whether the layer before these can fold their scales, or is a norm, whichever the scheme asks for; else False."""
    return {"folded": linears.foldable, "norms": linears.after_norm}.get(str(scheme.get("scales")), False)


def _method_settings(scheme: Scheme) -> tuple[tuple[str, Setting], ...]:
    """A scheme's own settings, without the facts of its calibration data: the hash of the statistics covers those."""
    return tuple((name, value) for name, value in scheme.settings if name in method_of(scheme).settings)


def _without_prefix(prefix: str, cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in cached.items() if name.startswith(prefix)}
