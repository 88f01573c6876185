"""What several test files need: the embedded model, loaded once, and one thread so that tests do not fight."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a test that fails somewhere
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; threads that wait cost more than they give
os.environ.pop("COLUMNS", None)  # a runner's terminal: tables are as wide as off a terminal
gc.disable()  # until all modules are imported, of which nothing is freed

ROOT = Path(__file__).parent.parent


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a test that waits for a process of its own, or for a lock, computes nothing."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """Modules and collected tests stay: the garbage collector need not visit them again (9 % of some files' time)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 50)  # with the usual 700, cycles are looked for in 8 % of the time of tests/models
    gc.enable()


def pytest_sessionfinish() -> None:
    """The browser that tests share ends with them."""
    if "browser" in sys.modules:
        sys.modules["browser"].close()


@pytest.fixture(scope="session")
def scenes_llava():  # type: ignore[no-untyped-def]
    from sensitivity.models.loading import load

    return load("embedded:scenes-llava")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes half of a report: for tests of what its sentences say."""
    from sensitivity.analysis.reporting import figures

    monkeypatch.setattr(figures, "svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr(figures, "png", lambda figure: b"")


@pytest.fixture(scope="module")
def few_trees() -> Iterator[None]:
    """Forests that are grown many times have a fifth of their trees: for tests of what is said, not of numbers."""
    from sensitivity.analysis.importance import estimators

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "tree_count", lambda trees, trials: trees // 5)
        yield


@pytest.fixture
def briefly_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast times each operation for a millisecond, not for 50: for tests of what it counts and says."""
    from sensitivity.measure.forecast import hardware

    monkeypatch.setattr(hardware, "SECONDS_PER_MEASUREMENT", 0.001)


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of published tables, which are not part of the repository."""
    folder = Path(os.environ.get("SENSITIVITY_SHARED", ROOT.parent / "shared")) / "data" / "published"
    if not folder.exists():
        pytest.skip("the published tables are not here; SENSITIVITY_SHARED says where they are")
    return folder
