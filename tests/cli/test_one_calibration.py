"""A folder holds plans of one calibration: another is refused by each verb before anything is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sensitivity.api.one_calibration import check_calibration
from sensitivity.api.sweeping import sweep, with_calibration
from sensitivity.cli import main as cli
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study

MODEL = "embedded:scenes-llava"
FEW = "--by part --method gptq --bits 4 --calibration-n"
SWEEP, EXPLAIN = f"sweep {MODEL} --n 5 {FEW}", f"explain {MODEL} --scores gram --check 0 {FEW}"
PLAN = f"plan {MODEL} --bpw 5 --n 5 {FEW}"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENSITIVITY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def refused(line: str, capsys: pytest.CaptureFixture[str], message: str) -> bool:
    capsys.readouterr()
    return cli.main(line.split()) == 2 and message in capsys.readouterr().err


def test_another_calibration_is_refused_by_each_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    assert cli.main(f"{SWEEP} 4 --out {out}".split()) == 0
    before = sorted(file for file in out.rglob("*") if file.is_file())
    for line in (SWEEP, SWEEP.replace("--n 5", "--n 5 --dry-run"), PLAN, EXPLAIN):
        assert refused(
            f"{line} 8 --out {out}", capsys, f"{out} holds another study (calibration-n: there 4, here 8); choose"
        )
    assert refused(f"{SWEEP} 4 --path exposed --out {out}", capsys, "(path: there float, here exposed); choose another")
    assert sorted(file for file in out.rglob("*") if file.is_file()) == before
    assert cli.main(f"{SWEEP} 4 --out {out}".split()) == 0  # the same one goes on
    assert cli.main(f"{SWEEP} 4 --out {out}".replace("gptq", "rtn").replace("--calibration-n 4", "").split()) == 0


def test_a_search_without_calibration_would_verify_plans_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scores are calibrated all the same, and the best plan may be one that the study measured before."""
    assert cli.main(f"{SWEEP} 4 --out {tmp_path}".split()) == 0
    line = PLAN.replace("gptq", "rtn")
    assert refused(f"{line} 8 --out {tmp_path}", capsys, "(calibration-n: there 4, here 8); choose another --out")
    assert cli.main(f"{line} 4 --out {tmp_path}".split()) == 0


def test_plans_that_were_only_verified_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where the time was over before the search measured any."""
    assert cli.main(f"{PLAN} 4 --minutes 0.001 --out {tmp_path}".split()) == 0
    assert len(Study(tmp_path).trials()) < 2
    for line in (PLAN, SWEEP):
        assert refused(f"{line} 8 --out {tmp_path}", capsys, "(calibration-n: there 4, here 8); choose another --out")


def test_scores_that_came_first_count_until_a_plan_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(f"{EXPLAIN} 4 --out {tmp_path}".split()) == 0
    for line in (SWEEP, PLAN):
        assert refused(f"{line} 8 --out {tmp_path}", capsys, "attributions.json has scores of another calibration (")
    assert cli.main(f"{EXPLAIN} 8 --out {tmp_path}".split()) == 0  # scores alone are replaced
    assert cli.main(f"{SWEEP} 8 --out {tmp_path}".split()) == 0


def test_a_study_that_holds_two_calibrations_is_read_and_continued(
    scenes_llava: VLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = inspect(scenes_llava, by="part")
    for n in (4, 8):  # as versions took them that did not compare them
        (one,), data = with_calibration(scenes_llava, parts, [scheme("gptq", 4)], ["vqa"], n)
        sweep(scenes_llava, parts, Plan.uniform(parts, one), "vqa", tmp_path, n=5, statistics=data)
    assert Study(tmp_path).counts()["done"] == 3  # with full precision
    assert cli.main(f"table {tmp_path} --out {tmp_path / 'plans.csv'}".split()) == 0
    for n in (4, 8):
        check_calibration(tmp_path, [scheme("gptq", 4)], ["vqa"], n, 0)
    assert refused(f"{SWEEP} 16 --out {tmp_path}", capsys, "(calibration-n: there 4 and 8, here 16)")
