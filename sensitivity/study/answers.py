"""Per-example answers and scores of one plan: a Parquet file that is checked whenever it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sensitivity.spec.errors import UserError
from sensitivity.spec.files import replacing

COLUMNS = ("task", "example", "cluster", "kind", "score", "nll", "answer")


class Damaged(UserError):
    """A file of answers that is missing, or does not hold what was written."""


def write(path: Path, frame: pd.DataFrame) -> None:
    """Write the file whole or not at all, with checksums, so that reading notices a single wrong bit."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as unfinished:
        frame.to_parquet(unfinished, index=False, write_page_checksum=True)


def read(path: Path) -> pd.DataFrame:
    """The rows, or Damaged with what is wrong with them."""
    try:
        if not path.is_file():
            raise Damaged("there is no such file")
        frame = pd.read_parquet(path, page_checksum_verification=True)
    except UserError:
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
    return frame
