"""Loads a task of lmms-eval with its data from this machine: the hub's cache, or a folder that save_to_disk wrote."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import ImageFile

from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import InvalidValue
from sensitivity.tasks.harness import task_files
from sensitivity.tasks.harness.judges import JUDGE_MODULES, judge_of

if TYPE_CHECKING:
    from sensitivity.tasks.datasets.source import Record

GENERATES = "generate_until"
LOGGING = ("lmms_eval", "utils")  # tasks are modules without a package, most of them named utils
# arguments of load_dataset that concern downloads, which are left out
NETWORK = ("token", "max_retries", "num_proc", "revision", "force_download", "local_files_only")


class Docs(Protocol):
    """The part of a `datasets.Dataset` that is used here; the library has no type hints."""

    column_names: list[str]
    features: Mapping[str, object]

    def __getitem__(self, number: int | slice, /) -> Record: ...

    def __len__(self) -> int: ...

    def select_columns(self, names: list[str], /) -> Docs: ...

    def cast_column(self, name: str, kind: object, /) -> Docs: ...


class Config(Protocol):
    """The fields of a task's YAML file that are used here."""

    generation_kwargs: Mapping[str, object] | None
    training_split: str | None
    test_split: str | None
    validation_split: str | None
    doc_to_target: object
    process_docs: Callable[[Docs], Docs] | None


class Filters(Protocol):
    """The part of lmms-eval's FilterEnsemble that is used here."""

    def apply(self, instances: Sequence[object], docs: Sequence[Record]) -> None: ...


class LibraryTask(Protocol):
    """The part of lmms-eval's ConfigurableMessagesTask that is used here."""

    config: Config
    dataset: dict[str, Docs]
    dataset_no_image: dict[str, Docs]
    _filters: Sequence[Filters]

    def doc_to_messages(self, doc: Record) -> object: ...

    def doc_to_target(self, doc: Record) -> object: ...

    def process_results(self, doc: Record, results: Sequence[object]) -> Mapping[str, object]: ...

    def aggregation(self) -> Mapping[str, Callable[[Sequence[object]], object]]: ...

    def higher_is_better(self) -> Mapping[str, bool]: ...


class _Hub(Protocol):
    """A module with the setting that forbids requests to the hub."""

    HF_HUB_OFFLINE: bool


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lmms-eval from printing and logging until the block ends, and undo what it changes in Pillow.

    When it is imported, the library lets Pillow read truncated images in the whole process.
    """
    from loguru import logger

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    for module in LOGGING:
        logger.disable(module)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in LOGGING:
            logger.enable(module)
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _from_this_machine() -> Iterator[None]:
    """Until the block ends, `datasets` asks no hub, writes no cache beside the data and shows no progress bar."""
    import datasets
    import huggingface_hub.constants

    cached, bars = datasets.is_caching_enabled(), datasets.are_progress_bars_disabled()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    try:
        with _offline(datasets.config), _offline(huggingface_hub.constants):
            yield
    finally:
        (datasets.enable_caching if cached else datasets.disable_caching)()
        (datasets.disable_progress_bars if bars else datasets.enable_progress_bars)()


@contextlib.contextmanager
def _offline(settings: _Hub) -> Iterator[None]:
    """Until the block ends, a library does not use the network."""
    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before


@lru_cache(maxsize=8)
def library_task(name: str, folder: str | None) -> LibraryTask:
    """The task as lmms-eval makes it, with its data; kept, since several steps of a sweep ask for it."""
    path = task_files.file_of(name)
    with _needed_packages(name), quiet():
        # checked before the task's own code is imported, which may need packages
        check_asks_about_images(name, _config(path, "simple"))
        config = _config(path, "full")
    check_scored_by_rule(name, config)
    source, which = config["dataset_path"], config.get("dataset_name")
    if folder is not None:
        _check_folder(name, Path(folder), config)
        config.pop("dataset_name", None)
        config |= {"dataset_path": str(Path(folder).resolve()), "dataset_kwargs": {"load_from_disk": True}}
    else:
        settings = config.get("dataset_kwargs")
        kept = settings.items() if isinstance(settings, Mapping) else ()
        config["dataset_kwargs"] = {key: value for key, value in kept if key not in NETWORK} or None
    try:
        with _needed_packages(name), quiet(), _from_this_machine():
            ImageFile.LOAD_TRUNCATED_IMAGES = True  # the library tries one document, whose image may be truncated
            return _local_class()(config=config)
    except UserError:
        raise
    except Exception as error:  # of datasets, of Arrow, or of the task's own code
        if folder is not None:
            raise UserError(f"lmms-eval cannot read {folder} as the data of {name} ({reason(error)})") from error
        raise UserError(
            f"the data of lmms-eval:{name} are not on this machine, or not all of them ({reason(error)}); type "
            f"{fetch(str(source), which)} or name a folder that save_to_disk wrote, lmms-eval:{name}:FOLDER"
        ) from error


def fetch(source: str, name: object) -> str:
    """The command that downloads a data set into the hub's cache."""
    names = ", ".join(f"'{one}'" for one in (source, name) if one)
    return f'python -c "from datasets import load_dataset; load_dataset({names})"'


@contextlib.contextmanager
def _needed_packages(name: str) -> Iterator[None]:
    """Turn an import error into a message that names the missing package: each task may need packages of its own."""
    try:
        yield
    except ImportError as error:
        missing = getattr(error, "name", None) or getattr(error.__cause__, "name", None)
        if missing is None:
            raise UserError(f"lmms-eval:{name} cannot be imported: {reason(error)}") from error
        if missing.split(".")[0] in JUDGE_MODULES:
            raise _judged(name, missing) from error
        raise UserError(f"lmms-eval:{name} needs the package {missing}; type pip install {missing}") from error


def _config(path: Path, mode: str) -> dict[str, object]:
    from lmms_eval.utils import load_yaml_config

    importlib.import_module("lmms_eval.api.metrics")  # fills the library's table of metrics and aggregates

    config: dict[str, object] = load_yaml_config(str(path), mode=mode)
    return config


def check_asks_about_images(name: str, config: Mapping[str, object]) -> None:
    """Raise an error unless a task asks about images and its answers are generated."""
    if "class" in config:
        raise UserError(f"lmms-eval:{name} is a program of its own and not a list of questions; choose another task")
    output_type = config.get("output_type", GENERATES)
    if output_type != GENERATES:
        raise UserError(
            f"lmms-eval:{name} asks for {output_type}; tasks whose answers are written ({GENERATES}) can be swept"
        )
    if config.get("doc_to_visual") is None and config.get("doc_to_messages") is None:
        raise UserError(f"lmms-eval:{name} shows no images; choose a task that asks about images")
    settings = config.get("dataset_kwargs")
    if isinstance(settings, Mapping) and (settings.get("video") or settings.get("From_YouTube")):
        raise UserError(f"lmms-eval:{name} asks about videos; choose a task that asks about images")


def check_scored_by_rule(name: str, config: Mapping[str, object]) -> None:
    """Raise an error if a task asks another model to judge answers."""
    metrics = config.get("metric_list")
    aggregates = [one.get("aggregation") for one in metrics] if isinstance(metrics, list) else []
    for judge in map(judge_of, (config.get("process_results"), *aggregates)):
        if judge is not None:
            raise _judged(name, judge)


def _judged(name: str, judge: str) -> UserError:
    return UserError(
        f"lmms-eval:{name} asks another model to judge the answers ({judge}), which needs the network and is not the "
        "same twice; choose a task that is scored by rule"
    )


def _check_folder(name: str, folder: Path, config: Mapping[str, object]) -> None:
    """Raise an error unless the folder is a saved data set that holds the task's split."""
    import datasets

    split = str(config.get("test_split") or config.get("validation_split"))
    needs = f"it takes what save_to_disk wrote of {config['dataset_path']}, with the split {split}"
    try:
        if not folder.is_dir():
            raise InvalidValue("there is no such folder")
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.DatasetDict) or split not in saved:
            raise InvalidValue(f"it has {', '.join(saved) if isinstance(saved, datasets.DatasetDict) else 'no splits'}")
        if not len(saved[split]):
            raise InvalidValue(f"the split {split} is empty")
    except Exception as error:  # a folder may be damaged in many ways
        raise UserError(f"cannot read {folder} as the data of lmms-eval:{name} ({reason(error)}); {needs}") from error


def _local_class() -> Callable[..., LibraryTask]:
    from lmms_eval.api.task import ConfigurableMessagesTask

    class Local(ConfigurableMessagesTask):  # type: ignore[misc]
        """A task that reads its data once: the library tries a failed download five times, seconds apart."""

        def download(self, dataset_kwargs: object = None) -> None:
            ConfigurableMessagesTask.download.__wrapped__(self, dataset_kwargs)

    local: Callable[..., LibraryTask] = Local
    return local
