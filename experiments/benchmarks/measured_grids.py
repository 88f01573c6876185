"""Complete grids of plans of the embedded models, measured once: what a search would read, and what is true.

    for model in scenes-llava-heavy scenes-llava scenes-blip2; do
        sensitivity sweep embedded:$model --task vqa --method rtn --bits 2,3,4,5,6,8 --out runs/grids/$model
    done

A reading is the mean over the first 200 examples; what is true is the mean over all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sensitivity.spec.components import ComponentMap
from sensitivity.spec.plan import Plan
from sensitivity.study.storage import paths
from sensitivity.study.study import Study

READ = 200  # examples that a search sees of each plan


@dataclass(frozen=True)
class Grid:
    """All plans of a study, and the score of each one on each example."""

    name: str
    parts: ComponentMap
    plans: list[Plan]
    scores: np.ndarray  # plans x examples
    clusters: np.ndarray

    @property
    def reading(self) -> np.ndarray:
        """The mean over the first examples."""
        return np.asarray(self.scores[:, :READ].mean(axis=1))

    @property
    def truth(self) -> np.ndarray:
        """The mean over all others."""
        return np.asarray(self.scores[:, READ:].mean(axis=1))

    @property
    def noise(self) -> np.ndarray:
        """The standard error of each reading, with 1/4 of the mean one as the least."""
        each = self.scores[:, :READ].std(axis=1, ddof=1) / np.sqrt(READ)
        return np.asarray(np.maximum(each, np.sqrt(np.mean(each**2)) / 4))


def grids(folder: Path) -> Iterator[Grid]:
    """The grids whose sweep has ended, among the studies in a folder."""
    for path in sorted(folder.glob("*")):
        if paths.is_study(path):
            study = Study(path)
            counts = study.counts()
            if not counts["waiting"] + counts["running"]:
                yield read(study)


def read(study: Study) -> Grid:
    """A grid from its study, with examples in the order of their numbers."""
    plans, rows = [], []
    for trial in study.trials():
        frame = study.examples(trial.plan)
        assert frame is not None
        frame = frame[frame["task"] == study.tasks[0]].sort_values("example")
        plans.append(trial.plan)
        rows.append(frame["score"].to_numpy(dtype=float))
    shuffled = np.random.default_rng(0).permutation(len(rows[0]))  # neighbors may ask about the same image
    clusters = frame["cluster"].to_numpy()[shuffled]
    return Grid(study.path.name, study.parts, plans, np.array(rows)[:, shuffled], clusters)
