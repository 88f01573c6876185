"""Where a study keeps its files: the only module that knows the names in a study's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sensitivity.spec.files import slug

JOURNAL = "journal.log"  # Optuna's journal: all trials, unless they are in a database
ADDRESS = "storage.url"  # the URL of that database
QUEUE_LOCK = "queue"  # the lock that is held while the queue is changed; the name of its file has a suffix
# all files of a study before its first trial
FIRST_FILES = (ADDRESS, JOURNAL, "journal.kernel-lock", "queue.kernel-lock")
ATTRIBUTIONS = "attributions.json"  # scores of components, in a study's folder or in one of its own
LOGS = (".log", ".txt", ".out", ".err")  # endings of files that a shell or a cluster writes a command's output to
PLAN = "plan.json"  # the recommendation for the first budget that was asked for


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study, be its trials in a journal or in a database."""
    return (folder / JOURNAL).exists() or (folder / ADDRESS).exists()


def strangers(folder: Path) -> list[str]:
    """The names in a folder that a study may not be begun beside: all but its first files, hidden ones, and logs."""
    found = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    # a killed process may leave locks, whose names begin with that of what they lock
    own = (*FIRST_FILES, ATTRIBUTIONS)
    beside = (".", "journal.", f"{QUEUE_LOCK}.")
    return [name for name in found if name not in own and not name.startswith(beside) and not name.endswith(LOGS)]


def answers_file(study: Path, key: str) -> Path:
    """The per-example answers and scores of a plan, by the plan's key."""
    return study / "examples" / f"{key}.parquet"


def questions_file(study: Path) -> Path:
    """What was asked in each example."""
    return study / "questions.parquet"


def verification_folder(study: Path) -> Path:
    """The folder of a second study, in which plans run on fresh examples."""
    return study / "verify"


def is_verification(study: Path) -> bool:
    """Whether a study is the verification of another one."""
    return study.resolve() == verification_folder(study.resolve().parent) and is_study(study.resolve().parent)


def ranking_file(study: Path, digest: str) -> Path:
    """A cached ranking, by a hash of all that it depends on."""
    return study / "rankings" / f"{digest}.json"


def expected_file(study: Path) -> Path:
    """What each component's schemes were expected to cost before any plan was measured."""
    return study / "expected.json"


def layer_times_file(study: Path) -> Path:
    """The times of the model's layers in a runtime by which a plan was last chosen."""
    return study / "layer-times.json"


def attributions_file(folder: Path) -> Path:
    """A table of attributions, in a study's folder or in one of its own."""
    return folder / ATTRIBUTIONS


def explanation_file(folder: Path, key: str, failures: bool = False, tasks: Sequence[str] = ()) -> Path:
    """Where a plan's damage comes from, by the plan's key: on calibration examples, or on answers that got worse.

    tasks: the names of those that were explained, where they are not all tasks of the study.
    """
    name = "-".join([key, *map(slug, tasks), *(["failures"] if failures else [])])
    return folder / "explained" / f"{name}.json"


def explanation_files(folder: Path, key: str) -> list[Path]:
    """All that was explained of a plan."""
    return sorted((folder / "explained").glob(f"{key}*.json"))


def put_back_file(study: Path, key: str) -> Path:
    """Answers of a plan with one part put back to full precision, only to examples that the plan answers worse."""
    return study / "put_back" / f"{key}.parquet"


def recommendation_file(study: Path, budget: float | None = None) -> Path:
    """A saved recommendation: the first one, or that for a further budget in bits per weight."""
    return study / (PLAN if budget is None else f"plan-{budget:g}bpw.json")


def card_file(recommendation: Path) -> Path:
    """The model card of a recommended plan, beside the plan's file."""
    return recommendation.with_suffix(".md")


def export_notes_folder(study: Path) -> Path:
    """The folder of notes on exports."""
    return study / "exports"


def report_folder(study: Path) -> Path:
    """The folder of the report, unless another one is named."""
    return study / "report"
