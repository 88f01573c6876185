"""Writes a study as a folder for a hub: tables, a card, and its trials, from which others can choose plans."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.files import discard, write_atomically
from sensitivity.study import identity
from sensitivity.study.sharing import table_file
from sensitivity.study.storage import expected, paths
from sensitivity.study.storage.opening import open_storage
from sensitivity.study.study import Study

CARD = "README.md"  # which a hub shows as the page of the data set
TRIALS, ANSWERS = "trials.parquet", "answers.parquet"
OURS = {CARD, TRIALS, ANSWERS, *paths.FIRST_FILES, paths.expected_file(Path()).name} - {paths.ADDRESS}


def check(out: Path, force: bool) -> None:
    """Raise an error if the folder may not be written: it holds other things, or an earlier study without `force`."""
    if out.is_dir() and (there := sorted(one.name for one in out.iterdir())):
        if not force:
            raise UserError(f"{out} is already there; choose another --share or add --force")
        if foreign := [name for name in there if name not in OURS]:
            raise UserError(f"{out} is not replaced: {foreign[0]} is no file of a shared study; choose another --share")
        if not table_file.is_ours(out / CARD):
            raise UserError(f"{out} is not replaced: its {CARD} was not written here; choose another --share")


def write(study: Study, out: Path, answers: bool) -> int:
    """Write the folder, with answers only on request; return the number of rows of the table of trials."""
    out.mkdir(parents=True, exist_ok=True)
    rows = table_file.write_rows(study, out / TRIALS, False)[1]
    files = {"trials": TRIALS}
    if answers:
        files["answers"] = ANSWERS
        table_file.write_rows(study, out / ANSWERS, True)
    else:
        # answers that an earlier call wrote: this time they are not to be shared
        discard(out / ANSWERS, ours=table_file.is_ours(out / CARD))
    _share_expected(study, out)
    write_atomically(out / paths.JOURNAL, _journal(study))
    write_atomically(out / CARD, table_file.folder_card(study, out / TRIALS, rows, files).encode("utf-8", "replace"))
    _warn_of_folders(study, out)
    return rows


def _warn_of_folders(study: Study, out: Path) -> None:
    """Warn if schemes name calibration data in a folder of this machine: a plan's key depends on what they say."""
    schemes = {scheme for trial in study.measured() for _, scheme in trial.plan.schemes if scheme is not None}
    sources = {source for one in schemes for source in str(one.get("calibration", "")).split(",")}
    if named := sorted(source for source in sources if identity.without_folder(source) != source):
        warnings.warn(
            f"{out} names folders of this machine: its plans were calibrated on {', '.join(named)}; sweeps with a "
            "path relative to the current folder name none",
            Notice,
            stacklevel=2,
        )


def _share_expected(study: Study, out: Path) -> None:
    """Write the damages that the study expected before it measured: without them, other plans would be chosen."""
    shared = paths.expected_file(out)
    if expected.read(study.path) is None:
        discard(shared, ours=table_file.is_ours(out / CARD))
    else:
        write_atomically(shared, paths.expected_file(study.path).read_bytes())


def _journal(study: Study) -> bytes:
    """A journal with all trials of a study, wherever they are stored."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / paths.JOURNAL
        identity.copy(study.optuna_study, open_storage(file))
        return file.read_bytes()
