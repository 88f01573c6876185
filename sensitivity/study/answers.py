"""Per-example answers and scores: a Parquet file for each plan of a study, checked whenever it is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.files import replacing
from sensitivity.spec.plan import Plan
from sensitivity.study.storage import paths
from sensitivity.study.trial import Trial

COLUMNS = ("task", "example", "cluster", "kind", "score", "nll", "answer")
# cut: generation stopped at the token limit; malformed: the answer lacks what the score reads. Both are missing values
# in a study of an earlier version
FLAGS = ("cut", "malformed")


class Damaged(UserError):
    """A file of answers that is missing, or does not hold what was written."""


def write(path: Path, frame: pd.DataFrame) -> None:
    """Write the file whole or not at all, with checksums, so that reading notices a single wrong bit."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as unfinished:
        frame.to_parquet(unfinished, index=False, write_page_checksum=True)


def read(path: Path) -> pd.DataFrame:
    """The rows of a file; raises Damaged with what is wrong with them."""
    try:
        if not path.is_file():
            raise Damaged("there is no such file")
        # no threads: the file is small, and if memory is short, pyarrow waits forever for a thread that cannot start
        frame = pd.read_parquet(path, page_checksum_verification=True, use_threads=False, pre_buffer=False)
    except (UserError, MemoryError):  # too little memory is no damage
        raise
    except Exception as error:  # pyarrow raises errors of many types on damaged bytes
        raise Damaged("it cannot be read as Parquet") from error
    if lacking := [name for name in COLUMNS if name not in frame]:
        raise Damaged(f"it has no column '{lacking[0]}'")
    if not len(frame):
        raise Damaged("it has no rows")
    score = frame["score"].to_numpy() if pd.api.types.is_numeric_dtype(frame["score"]) else np.array([np.nan])
    if not np.isfinite(score.astype(float)).all():
        raise Damaged("a score is not a number")
    if not all(isinstance(task, str) for task in frame["task"].unique()) or frame["cluster"].isna().any():
        raise Damaged("a row does not say which task or which image it is about")
    if frame.duplicated(["task", "example"]).any():
        raise Damaged("it holds an example twice")
    if wrong := [name for name in FLAGS if name in frame and not pd.api.types.is_bool_dtype(frame[name].dropna())]:
        raise Damaged(f"'{wrong[0]}' is not true or false")
    return _with_flags(frame)


def _with_flags(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, with each flag as a Boolean column that may hold missing values."""
    return frame.assign(**{name: pd.array(frame.get(name, [None] * len(frame)), dtype="boolean") for name in FLAGS})


class Answers:
    """The answers to all plans of a study."""

    def __init__(self, study: Path) -> None:
        self._study = study
        self._warned: set[str] = set()
        # files that were read whole, as they were then: a search asks about all of them before each plan that it draws
        self._whole: dict[Path, tuple[int, int, int]] = {}

    def file(self, key: str) -> Path:
        """The file of a plan's answers, by the plan's key."""
        return paths.answers_file(self._study, key)

    def of(self, plan: Plan) -> pd.DataFrame | None:
        """Per-example scores of a plan; None where there are none, or, with one warning, where they are damaged."""
        file = self.file(plan.key)
        if not file.exists():
            return None
        try:
            return read(file)
        except Damaged as error:
            what = _damage(plan, file, error)
        if what not in self._warned:
            self._warned.add(what)
            end = "its mean scores still count, and the same sweep command runs that plan again"
            warnings.warn(f"{what}; {end}", Notice, stacklevel=3)
        return None

    def add(self, trial: Trial, examples: Mapping[str, Sequence[object]]) -> pd.DataFrame:
        """Add new answers to those that a trial already has, write all of them, and return them."""
        frame = _with_flags(pd.DataFrame(dict(examples), columns=[*COLUMNS, *(f for f in FLAGS if f in examples)]))
        if trial.done:
            before = self._stored(trial.plan)
            # an example is in both if a process was killed after it wrote the answers and before it stored `done`
            new = set(zip(frame["task"], frame["example"], strict=True))
            again = [one in new for one in zip(before["task"], before["example"], strict=True)]
            frame = pd.concat([before[~np.array(again, dtype=bool)], frame], ignore_index=True)
        write(self.file(trial.key), frame)
        return frame

    def _stored(self, plan: Plan) -> pd.DataFrame:
        """The answers that a plan already has; an error if they are missing or damaged."""
        file = self.file(plan.key)
        try:
            return read(file)
        except Damaged as error:
            raise UserError(f"{_damage(plan, file, error)}; the same command runs that plan again") from error

    def is_whole(self, trial: Trial) -> bool:
        """Whether a trial's answers can be read; warns where they cannot. A file is read again only if it changed."""
        file = self.file(trial.key)
        now = _on_disk(file)
        if now is not None and self._whole.get(file) == now:
            return True
        try:
            read(file)
        except Damaged as error:
            warnings.warn(f"{_damage(trial.plan, file, error)}; that plan is run again", Notice, stacklevel=2)
            return False
        if now is not None:
            self._whole[file] = now
        return True


def _on_disk(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where it cannot be looked at."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _damage(plan: Plan, file: Path, error: Damaged) -> str:
    """The beginning of a message about damaged answers."""
    return f"the answers of the plan {plan.describe()} are damaged ({file}: {error})"
