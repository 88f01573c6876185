"""The sweep: fast against plain, killed and resumed against undisturbed, nothing computed twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import saved_vlms
from few import few

from sensitivity.api.recommending import recommend
from sensitivity.api.sweeping import begin_sweep, grid, one_at_a_time, sweep
from sensitivity.cli.main import VERBS, parser_of
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.study import Study
from sensitivity.tasks.table import TASKS

pytestmark = pytest.mark.usefixtures("few_trees")
BITS = (2, 4, 8)


def plans_for(vlm: VLM) -> tuple[Any, list[Plan]]:
    parts = inspect(vlm, by="part")
    return parts, grid(parts, schemes=[scheme("uniform", bits) for bits in BITS])


def table(study: Study) -> pd.DataFrame:
    return study.table().drop(columns=["number", "seconds"]).set_index("key").sort_index()


def assert_ended_alike(fast: Study, plain: Study, plans: Sequence[Plan]) -> None:
    """Answers that the fast path did not stop because they could no longer be right are those of the plain path."""
    for plan in plans:
        ours, theirs = fast.examples(plan), plain.examples(plan)
        assert ours is not None
        assert theirs is not None
        ended = ~ours["answer"].str.endswith("…")
        columns = ["answer", "cut", "malformed"]
        pd.testing.assert_frame_equal(ours.loc[ended, columns], theirs.loc[ended, columns])


def test_the_fast_path_equals_the_plain_one(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, plans = plans_for(scenes_llava)
    some, tasks = plans[:: len(plans) // 6], ["vqa", "ground"]
    fast = sweep(scenes_llava, parts, some, tasks, tmp_path / "fast", n=15)
    plain = sweep(scenes_llava, parts, some, tasks, tmp_path / "plain", n=15, plain=True)
    for plan in some:
        ours, theirs = fast.examples(plan), plain.examples(plan)
        assert ours is not None
        assert theirs is not None
        cut_off = ["nll", "answer", "cut"]  # the plain path generates on where an answer can no longer be right
        pd.testing.assert_frame_equal(ours.drop(columns=cut_off), theirs.drop(columns=cut_off))
        pd.testing.assert_series_equal(ours["nll"], theirs["nll"], rtol=1e-3, atol=2e-4)
    assert_ended_alike(fast, plain, some)


def test_the_same_seed_gives_the_same_table_bit_for_bit(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, plans = plans_for(scenes_llava)
    first = sweep(scenes_llava, parts, plans[:5], ["vqa"], tmp_path / "a", n=20, seed=3)
    second = sweep(scenes_llava, parts, plans[:5], ["vqa"], tmp_path / "b", n=20, seed=3)
    pd.testing.assert_frame_equal(table(first), table(second), check_exact=True)
    for plan in plans[:5]:
        files = [study.path / "examples" / f"{plan.key}.parquet" for study in (first, second)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_is_run_twice(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, plans = plans_for(scenes_llava)
    sweep(scenes_llava, parts, plans[:4], ["vqa"], tmp_path, n=10)
    study, steps = begin_sweep(scenes_llava, parts, plans[:6], ["vqa"], tmp_path, n=10)
    assert [step.plan for step in steps] == plans[4:6]
    assert study.counts()["done"] == 6


def test_the_model_is_itself_again_after_a_sweep(scenes_llava: VLM, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in scenes_llava.model.named_parameters()}
    parts, plans = plans_for(scenes_llava)
    sweep(scenes_llava, parts, plans[:3], ["vqa"], tmp_path, n=5)
    assert all(p.equal(before[name]) for name, p in scenes_llava.model.named_parameters())
    assert "forward" not in vars(scenes_llava.vision)


def test_another_seed_or_number_is_refused(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, plans = plans_for(scenes_llava)
    sweep(scenes_llava, parts, plans[:1], ["vqa"], tmp_path, n=5)
    with pytest.raises(UserError, match=r"holds another study \(n: there 5, here 6\); choose another --out"):
        sweep(scenes_llava, parts, plans[:1], ["vqa"], tmp_path, n=6)
    with pytest.raises(UserError, match="seed: there 0, here 1"):
        sweep(scenes_llava, parts, plans[:1], ["vqa"], tmp_path, n=5, seed=1)


def test_one_task_and_one_width_need_no_list(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, _ = plans_for(scenes_llava)
    assert grid(parts, bits=3) == grid(parts, bits=[3])
    assert one_at_a_time(parts, bits=3) == one_at_a_time(parts, bits=[3])
    study = sweep(scenes_llava, parts, grid(parts, bits=8)[:2], "vqa", tmp_path / "one", n=5)
    assert (study.tasks, study.meta["tasks"]) == (("vqa",), ["vqa"])
    assert [
        trial.plan.is_native for trial in sweep(scenes_llava, parts, [], "vqa", tmp_path / "none", n=5).trials()
    ] == [True]


def test_without_a_budget_python_and_the_command_line_take_the_same() -> None:
    typed = parser_of(VERBS).parse_args(["recommend", "runs/first"])
    assert typed.bpw == (signature(recommend).parameters["bpw"].default,)


def command(out: Path) -> list[str]:
    words = f"sweep embedded:scenes-llava --task vqa --bits 2,4,8 --by part --method uniform --n 40 --out {out} --json"
    return [sys.executable, "-m", "sensitivity", *words.split()]


def answers(out: Path) -> int:
    """How many answers are stored, over all plans."""
    return sum(pq.read_metadata(file).num_rows for file in out.glob("examples/[!.]*.parquet"))


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    """Three kills, at whatever the process was doing, then a run to the end."""
    out, kills = tmp_path / "killed", 0
    while kills < 3:
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = (100, 400, 800)[kills]  # of 28 plans x 40 answers: in the first shard, later, and near the end
        while process.poll() is None and answers(out) < wanted:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 3
    assert 0 < Study(out).counts()["done"] < 28
    assert len(Study(out).table()) == 28  # every plan has a score from its first shard
    resumed = subprocess.run(command(out), capture_output=True, text=True, check=True)
    assert json.loads(resumed.stdout)["done"] == 28
    subprocess.run(command(tmp_path / "whole"), capture_output=True, check=True)
    ours, theirs = Study(out), Study(tmp_path / "whole")
    assert ours.counts() == theirs.counts() == {"done": 28, "waiting": 0, "running": 0}
    pd.testing.assert_frame_equal(table(ours), table(theirs), check_exact=True)
    for file in (out / "examples").glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "whole" / "examples" / file.name).read_bytes()
    assert not list(out.rglob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("family", few(["blip2_opt", "blip2_t5"], ["blip2_t5"]))
def test_a_folder_of_another_family(family: str, tmp_path: Path) -> None:
    """A small random model in the real format: Q-Former, decoder or encoder-decoder, no chat template."""
    vlm = load(str(saved_vlms.save(family, tmp_path / "model")), dtype="float32")
    parts = inspect(vlm, by="part")
    plans = grid(parts, bits=(3, 8))
    study = sweep(vlm, parts, plans, ["vqa"], tmp_path / "fast", n=6)
    plain = sweep(vlm, parts, plans, ["vqa"], tmp_path / "plain", n=6, plain=True)
    ours, theirs = table(study), table(plain)
    likely = [name for name in ours if name.startswith("vqa.nll")]  # sums over other shapes of the same numbers
    others = [*likely, "vqa.cut"]  # the plain path generates on where an answer can no longer be right
    pd.testing.assert_frame_equal(ours.drop(columns=others), theirs.drop(columns=others), check_exact=True)
    pd.testing.assert_frame_equal(ours[likely], theirs[likely], rtol=0 if family == "blip2_t5" else 1e-6, atol=0)
    assert_ended_alike(study, plain, plans)
    assert len(study.table()) == 2 ** len(parts.names) + 1
    assert study.table()["vqa.nll"].notna().all()
    assert study.table()["vqa.nll"].nunique() > 2  # the plans really differ


FAMILIES = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of a tokenizer of sentencepiece's
@pytest.mark.parametrize("family", few(FAMILIES, ["llava", "qwen2_vl"]))
def test_fast_equals_plain_on_random_models_plans_and_shards(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers written out in full by shared states and drafts, and by generate() alone: the same, letter for letter."""
    rng = np.random.default_rng(sum(map(ord, family)))

    tokens = int(rng.integers(2, 7))
    monkeypatch.setitem(
        TASKS, "free",
        lambda *asked: dataclasses.replace(TASKS["vqa"](*asked), name="free", exact=False, max_new_tokens=tokens),
    )  # fmt: skip
    monkeypatch.setattr("sensitivity.measure.shards.FIRST_SHARD", int(rng.integers(1, 4)))
    monkeypatch.setattr("sensitivity.measure.shards.GROWTH", int(rng.integers(2, 4)))
    monkeypatch.setattr("sensitivity.measure.generate.batches.IMAGES_PER_BATCH", int(rng.integers(1, 5)))
    vlm = load(str(saved_vlms.save(family, tmp_path / "model")), dtype="float32")
    parts = inspect(vlm, by=str(rng.choice(["part", "group", "kind"])))
    widths = [None, *(scheme("rtn", bits) for bits in (2, 3, 8))]
    plans = [Plan(tuple((name, widths[rng.integers(4)]) for name in parts.names)) for _ in range(3)]
    fast = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "fast", n=12)
    plain = sweep(vlm, parts, plans, ["vqa", "free"], tmp_path / "plain", n=12, plain=True)
    for plan in plans:
        ours, theirs = (study.examples(plan).set_index(["task", "example"]) for study in (fast, plain))
        pd.testing.assert_frame_equal(ours[["score"]], theirs[["score"]])
        pd.testing.assert_series_equal(ours["nll"], theirs["nll"], rtol=1e-3, atol=2e-4)
        pd.testing.assert_series_equal(ours.loc["free", "answer"], theirs.loc["free", "answer"])
    assert plain.table()["free.nll"].nunique() > 2  # the plans really differ


def test_the_program_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, with fewer widths and examples."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    program = text.split("```python\n")[1].split("```")[0]
    shorter = program.replace("bits=(2, 3, 4, 6, 8)", "bits=(1, 8)")  # 9 plans: with fewer than 8, nothing is ranked
    shorter = shorter.replace('tasks=["vqa"],', 'tasks=["vqa"], n=24,')
    assert shorter.count("n=24") == shorter.count("(1, 8)") == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(shorter, "README.md", "exec"), {})
    out = tmp_path / "runs" / "demo-api"
    assert json.loads((out / "plan.json").read_text())["size"]["bpw"] <= 4
    assert (out / "report" / "index.html").exists()
