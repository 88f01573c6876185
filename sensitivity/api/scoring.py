"""Cheap scores of all components from one calibration, with which `plan`, `sweep --scores` and `explain` begin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sensitivity.api.sweeping import CACHE_GB, with_calibration
from sensitivity.measure.attribution.calibrated import Calibrated
from sensitivity.measure.attribution.kept_scores import KeptScores
from sensitivity.measure.attribution.scores import Attribution, attribute
from sensitivity.measure.calibrate.cache import Cache, cache_folder
from sensitivity.measure.calibrate.calibration import (
    calibration_examples,
    calibration_facts,
    calibration_statistics,
)
from sensitivity.measure.passes.token_batches import answer_batches
from sensitivity.models.loading import device_of
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Scheme
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Task


@dataclass(frozen=True)
class Scored:
    """Cheap scores of every component at every scheme, and what they were computed from."""

    schemes: list[Scheme]  # with their calibration data in their settings
    given: Calibrated
    scores: list[Attribution]


def scored(
    vlm: VLM,
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    tasks: Sequence[str],
    names: Sequence[str],
    n: int = 128,
    seed: int = 0,
    against: Iterable[Task] = (),
    cache_gb: float = CACHE_GB,
) -> Scored:
    """Calibrate on n examples of the tasks' calibration splits, and compute some of SCORES, unless they are kept."""
    against, cache = list(against), _cache(cache_gb)
    named, statistics = with_calibration(vlm, parts, schemes, tasks, n, seed, "float", against, cache_gb)
    if statistics is None:  # the methods need none, the scores do
        statistics = calibration_statistics(vlm, parts, tasks, n, seed, "float", against, cache)
    data = calibration_examples(tasks, n, seed)
    given = Calibrated(vlm, parts, named, statistics, lambda rows: answer_batches(vlm, data, rows))
    if cache is None or statistics.origin is None:
        return Scored(named, given, attribute(given, names))
    kept = KeptScores(cache, statistics.origin, parts, schemes, vlm.model.device)
    return Scored(named, given, kept.attribute(given, names))


def scores_are_kept(
    out: Path,
    parts: ComponentMap,
    schemes: Sequence[Scheme],
    tasks: Sequence[str],
    names: Sequence[str],
    n: int,
    seed: int,
    cache_gb: float,
    device: str,
) -> bool:
    """Whether `scored` would find all of these scores in the cache, for the model that a study was measured on."""
    cache, study = _cache(cache_gb), Study.begun(out)
    if cache is None or study is None:
        return False
    meta = study.meta
    about = {"model": meta.get("fingerprint"), "dtype": f"torch.{meta.get('dtype')}"}
    origin = {**calibration_facts(tasks, calibration_examples(tasks, n, seed), seed, "float"), **about}
    return KeptScores(cache, origin, parts, schemes, device_of(device) or torch.device("cpu")).holds(names)


def _cache(cache_gb: float) -> Cache | None:
    """The cache; None where it may hold nothing."""
    return Cache(cache_folder(), cache_gb) if cache_gb > 0 else None
