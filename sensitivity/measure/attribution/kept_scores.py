"""Scores of components kept in the cache, with what they cost, so that a command that continues computes none again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.measure.attribution.scores import Attribution, attribute
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Scheme

VERSION = 1  # raised when a score's formula changes


@dataclass(frozen=True)
class KeptScores:
    """Where the scores of these components and schemes are kept.

    origin: what the statistics of calibration depend on: the model, the data, and how it was read.
    """

    cache: Cache
    origin: Mapping[str, object]
    parts: ComponentMap
    schemes: Sequence[Scheme]
    device: torch.device

    def attribute(self, calibrated: Calibrated, names: Sequence[str]) -> list[Attribution]:
        """Some of SCORES: those that are kept as they were, the others computed and kept."""
        found = {name: one for name in names if (one := self._read(calibrated, name)) is not None}
        computed = attribute(calibrated, [name for name in names if name not in found])
        for one in computed:
            self._store(calibrated, one)
        found |= {one.name: one for one in computed}
        return [found[name] for name in names]

    def holds(self, names: Sequence[str]) -> bool:
        """Whether all of these scores are kept."""
        return all(self.cache.load(self._about(name), self.device) is not None for name in names)

    def _read(self, calibrated: Calibrated, name: str) -> Attribution | None:
        kept = self.cache.load(self._about(name), self.device)
        if kept is None:
            return None
        if math.isfinite(loss := float(kept["loss"])):
            calibrated.loss = loss
        rows = kept["scores"].tolist()
        scores = {
            component: dict(zip(calibrated.schemes, row, strict=True))
            for component, row in zip(self.parts.names, rows, strict=True)
        }
        return Attribution(name, scores, float(kept["seconds"]), kept=True)

    def _store(self, calibrated: Calibrated, one: Attribution) -> None:
        rows = [[one.scores[component][scheme] for scheme in calibrated.schemes] for component in self.parts.names]
        facts = {"seconds": one.seconds, "loss": math.nan if calibrated.loss is None else calibrated.loss}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in facts.items()}
        tensors["scores"] = torch.tensor(rows, dtype=torch.float64)
        self.cache.store(self._about(one.name), tensors, self.device)

    def _about(self, name: str) -> dict[str, object]:
        return {
            "scores": name,
            "version": VERSION,
            **self.origin,
            "components": [[one.name, [weight.name for weight in one.weights]] for one in self.parts.components],
            "schemes": [scheme.to_json() for scheme in self.schemes],
        }
