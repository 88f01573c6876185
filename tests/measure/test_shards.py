"""Shards outside, plans inside: every plan has a first score soon, the rest goes where it matters, nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from few import few
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from PIL import Image

from sensitivity.analysis.observations import observations_of
from sensitivity.api.sweeping import begin_sweep, grid, sweep
from sensitivity.cli.main import main
from sensitivity.cli.output.progress import Pace
from sensitivity.measure.loop import Step, _SharedWork, run_plans
from sensitivity.measure.shards import FIRST_SHARD, MAX_IMAGES, shard, shard_ends, shard_ends_of_total
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study.queue import choose
from sensitivity.study.racing import FALSE_DROP_RATE, _beats, _difference, frontier_trials, still_in_race, uncertainty
from sensitivity.study.stopping import Until
from sensitivity.study.study import Study
from sensitivity.study.trial import Trial
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.table import task

pytestmark = pytest.mark.usefixtures("few_trees")
PIXEL = np.zeros((1, 1, 3), np.uint8)


def asked(name: str, images: int, per_image: int) -> Task:
    ids = [(i, j) for i in range(images) for j in range(per_image)]
    examples = (Example(f"{i}.{j}", f"i{i}", "all", PIXEL, "?", ("x",)) for i, j in ids)
    return Task(name, tuple(examples), lambda *_: 1.0)


@given(st.lists(st.tuples(st.integers(1, 1200), st.integers(1, 3)), min_size=1, max_size=3), st.booleans())
def test_shards_are_all_examples_once_and_never_too_many(sizes: list[tuple[int, int]], growing: bool) -> None:
    tasks = [asked(f"t{i}", images, per_image) for i, (images, per_image) in enumerate(sizes)]
    ends = shard_ends(tasks, growing)
    assert ends == sorted(set(ends))
    assert max(np.diff([0, *ends])) <= MAX_IMAGES
    for one in tasks:
        found = [e for begin, end in zip([0, *ends], ends, strict=False) for e in shard(one, begin, end, ends[-1])]
        assert sorted(e.id for e in found) == sorted(e.id for e in one.examples)
    if growing:
        assert ends[0] <= FIRST_SHARD
        assert len(ends) <= 5 + ends[-1] // MAX_IMAGES
        assert all(shard(one, 0, ends[0], ends[-1]) for one in tasks)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1, [1]), (2, [2]), (4, [4]), (5, [2, 5]), (13, [2, 13]), (64, [3, 12, 64]), (200, [4, 16, 64, 200]),
        (1000, [4, 16, 64, 256, 768, 1000]),
    ],
)  # fmt: skip
def test_a_first_shard_is_a_twentieth_and_what_is_left_over_is_none_of_its_own(
    images: int, expected: list[int]
) -> None:
    assert shard_ends_of_total(images) == expected


def test_a_task_of_few_images_beside_one_of_many_has_a_score_at_once(scenes_llava: VLM, tmp_path: Path) -> None:
    few = json.dumps({"image": "a.png", "prompt": "what?", "answers": ["this"]})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "few.jsonl").write_text(few)
    parts = inspect(scenes_llava, by="part")
    tasks, sources = [task("caption", n=90), task(str(tmp_path / "few.jsonl"), n=90)], ["caption", "few"]
    study = Study.create(tmp_path / "study", parts, ["caption", "few"], {"tasks": sources})
    steps = run_plans(scenes_llava, study, tasks, [])
    assert set(next(steps).scores) == {"caption", "few"}


def test_a_shard_is_no_matter_of_the_order_of_the_data() -> None:
    one = asked("t", 40, 2)
    backwards = dataclasses.replace(one, examples=one.examples[::-1])
    ours, theirs = (sorted(e.id for e in shard(each, 0, 10, 40)) for each in (one, backwards))
    assert ours == theirs
    assert ours != sorted(e.id for e in one.examples[:20])


def trial(number: int, state: TrialState, done: int = 0) -> Trial:
    return Trial(Plan(()), str(number), number, state=state, done=done)


def walk(order: str) -> list[Trial]:
    """w waiting, r running elsewhere, d done, one plan each."""
    states = {"w": TrialState.WAITING, "r": TrialState.RUNNING, "d": TrialState.COMPLETE}
    return [trial(i, states[letter]) for i, letter in enumerate(order)]


@pytest.mark.parametrize(
    ("order", "last", "expected"),
    [
        ("wwwwww", None, 0),  # alone: from the beginning
        ("dwwwww", 0, 1),
        ("rwwwwwwww", None, 5),  # another is at it: the middle of what nobody has begun
        ("ddrwwwddww", 9, 5),  # the longest stretch
        ("ddrwwddrww", 1, 4),  # what follows is taken by another: not right behind it
        ("ddwwdd", 5, 2),  # wraps
        ("dddd", 3, None),
    ],
)
def test_neighbors_are_taken_one_after_the_other(order: str, last: int | None, expected: int | None) -> None:
    found = choose(walk(order), last)
    assert (None if found is None else found.number) == expected


def test_those_that_have_seen_least_come_first_and_only_wanted_ones() -> None:
    waiting = [trial(i, TrialState.WAITING, done) for i, done in enumerate((4, 0, 4, 0))]
    assert choose(waiting, 1).number == 3  # type: ignore[union-attr]
    assert choose(waiting[::2], 0).number == 2  # type: ignore[union-attr]
    assert choose(waiting, None, {"2"}).number == 2  # type: ignore[union-attr]
    assert choose(waiting, None, set()) is None


def plans_for(vlm: VLM, widths: tuple[int, ...] = (2, 4, 8)) -> tuple[Any, list[Plan]]:
    parts = inspect(vlm, by="part")
    return parts, grid(parts, schemes=[scheme("uniform", bits) for bits in widths])


def test_after_the_first_shard_every_plan_has_a_score(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, plans = plans_for(scenes_llava, (2, 8))
    study, steps = begin_sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / "a", n=40)
    done = []
    for step in steps:
        done.append(step.done)
        if len(done) == len(plans):
            break
    table = study.table()
    assert len(table) == len(plans)
    assert not table["complete"].any()
    assert table["vqa.n"].max() < 35
    assert table["vqa.delta.se"].notna().all()
    assert done == sorted(done)
    assert step.done + step.left == len(plans) * step.images
    # and it goes on to what an undisturbed sweep finds, in another order of plans
    sweep(scenes_llava, parts, plans[::-1], ["vqa"], tmp_path / "a", n=40)
    sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / "b", n=40)
    ours, theirs = (Study(tmp_path / name).table().drop(columns=["number", "seconds"]) for name in "ab")
    pd.testing.assert_frame_equal(
        ours.set_index("key").sort_index(), theirs.set_index("key").sort_index(), check_exact=True
    )
    assert ours["complete"].all()
    assert (ours["vqa.n"] == 40).all()


def test_an_error_that_is_small_enough_ends_it_and_hopeless_plans_see_less(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, plans = plans_for(scenes_llava, (2, 8))
    study = sweep(scenes_llava, parts, plans, ["vqa"], tmp_path, n=600, until=["error<5%"])
    table = study.table().set_index("key")
    seen = table["vqa.n"]
    assert seen.min() < 100 < seen.max()
    best = [found.key for found in frontier_trials(study.measured(), "vqa")]
    assert seen[best].min() > seen.min()
    assert uncertainty(study) < 0.05
    hopeless = table[table["language"] == 2]
    assert hopeless["vqa.n"].min() < seen.max()
    assert table.loc[Plan.uniform(parts, None).key, "vqa.n"] == seen.max()


def test_no_error_ends_a_search_that_has_plans_left(scenes_llava: VLM, tmp_path: Path) -> None:
    """Full precision alone is known exactly, which says nothing about plans that were not drawn yet."""
    parts, plans = plans_for(scenes_llava, (2, 8))
    drawn = iter(plans[:3])
    study = sweep(scenes_llava, parts, lambda study: drawn, ["vqa"], tmp_path, n=10, until=["error<90%"])
    assert {trial.plan for trial in study.measured()} == {Plan.uniform(parts, None), *plans[:3]}


def test_a_tight_memory_budget_is_kept_and_changes_nothing(
    scenes_llava: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, plans = plans_for(scenes_llava, (2, 8))
    widest, used, run_one = [0, 0], [], _SharedWork.run

    def watched(self: _SharedWork, *where: Any) -> Any:
        found = run_one(self, *where)
        assert self.weights is not None
        assert self.prefix_cache is not None
        used.append((self.weights.bytes, self.prefix_cache._bytes))
        return found

    monkeypatch.setattr(_SharedWork, "run", watched)
    ample = sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / "ample", n=25)
    widest = [max(one) for one in zip(*used, strict=True)]
    used.clear()
    tight = sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / "tight", n=25, memory_gb=min(widest) / 1e9)
    assert used
    assert all(weights <= min(widest) / 2 and states <= min(widest) / 2 for weights, states in used)
    ours, theirs = (study.table().drop(columns=["number", "seconds"]) for study in (tight, ample))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_time_ends_it(scenes_llava: VLM, tmp_path: Path) -> None:
    parts, plans = plans_for(scenes_llava)
    study = Study.create(tmp_path, parts, ["vqa"], {})
    steps = run_plans(scenes_llava, study, [task("vqa", n=300)], plans, until=Until(seconds=0.0))
    assert len(list(steps)) == 1  # one is always run, so that every call gets on
    assert study.counts() == {"done": 0, "waiting": len(plans), "running": 0}


def test_an_interrupted_plan_waits_again(scenes_llava: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, plans = plans_for(scenes_llava)
    study = Study.create(tmp_path, parts, ["vqa"], {})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    steps = run_plans(scenes_llava, study, [task("vqa", n=20)], plans)
    next(steps)
    monkeypatch.setattr(_SharedWork, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert study.counts() == {"done": 1, "waiting": len(plans) - 1, "running": 0}


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_a_plan_that_nobody_beats_is_seldom_dropped(sigma: float) -> None:
    """Ten equally good plans, of which the luckiest is each time taken for the rival, looked at after every shard."""
    rng = np.random.default_rng(5)
    rounds, rivals, runs, dropped = [4, 16, 64, 256], 10, 400, 0
    for _ in range(runs):
        skill = rng.normal(0.7, sigma * 0.3, size=(256, 1)).clip(0, 1)  # images differ in difficulty
        right = rng.random((256, rivals + 1)) < skill
        level = FALSE_DROP_RATE / (len(rounds) * (rivals + 1))
        for end in rounds:
            best = int(np.argmax(right[:end, 1:].mean(0))) + 1
            rival, plan = (pd.DataFrame({"sum": right[:end, i] * 1.0, "count": 1}) for i in (best, 0))
            if _beats(_difference(rival, plan, made_up=True), level):
                dropped += 1
                break
    assert dropped / runs <= FALSE_DROP_RATE
    worse = pd.DataFrame({"sum": (rng.random(256) < 0.3) * 1.0, "count": 1})
    better = pd.DataFrame({"sum": (rng.random(256) < 0.9) * 1.0, "count": 1})
    assert _beats(_difference(better, worse, made_up=True), level)
    # four images are no proof, however clear they look
    assert not _beats(_difference(better.head(4), worse.head(4) * 0, made_up=True), level)


def test_only_what_is_worse_on_every_task_is_dropped(tmp_path: Path, scenes_llava: VLM) -> None:
    parts = inspect(scenes_llava, by="part")
    small, large = (Plan.uniform(parts, scheme("uniform", bits)) for bits in (4, 8))
    study = Study.create(tmp_path, parts, ["a", "b"], {})
    study.enqueue([small, large, study.native])
    quality = {small.key: {"a": 0.95, "b": 0.2}, large.key: {"a": 0.2, "b": 0.95}, study.native.key: {"a": 1, "b": 1}}

    def told(drop: str | None = None) -> None:
        while (found := study.ask()) is not None:
            rng, rows = np.random.default_rng(1), []
            for name in ("a", "b"):
                share = 0.1 if name == drop and found.plan is not study.native else quality[found.plan.key][name]
                rows += [
                    {"task": name, "example": f"e{i}", "cluster": f"c{i}", "kind": "k", "score": float(r < share)}
                    for i, r in enumerate(rng.random(300))
                ]
            frame = pd.DataFrame(rows).assign(nll=0.0, answer="")
            study.tell(found, frame.to_dict("list"), {}, 4)
            if found.done:
                study.requeue(found)
                return

    told()
    assert still_in_race(study, 4) == {small.key, large.key, study.native.key}  # each is best at something


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("soon", "--until 'soon' is none of: complete, a time such as 10min"),
        ("0min", "--until '0min' needs a number above zero"),
        ("error<1.2.3%", "needs a number above zero"),
    ],
)
def test_until_says_what_it_wants(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Until.parse([word])


def test_until_takes_the_first_that_is_reached() -> None:
    until = Until.parse(["2h", "90 min", "error < 0.5%", "complete"])
    assert (until.seconds, until.error) == (5400, 0.005)
    assert not Until.parse([]).may_stop_early


def test_lines_for_machines_and_one_object_at_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = f"sweep embedded:scenes-llava --bits 2,8 --n 60 --until error<30% --out {tmp_path} --json"
    assert main(words.split()) == 0
    printed, told = capfd.readouterr()
    facts = json.loads(printed)
    assert facts["waiting"] > 0
    lines = [json.loads(line) for line in told.splitlines()]
    assert lines[-1]["done"] > 0
    assert lines[-1]["left"] > 0
    best = lines[-1]["frontier"]
    assert [point["bpw"] for point in best] == sorted(point["bpw"] for point in best)
    means = [point["scores"]["vqa"]["mean"] for point in best]
    assert means == sorted(means)


# -- a sweep that was stopped


@pytest.fixture(scope="module")
def stopped(scenes_llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Every plan has seen a first shard, a few a second one, and full precision alone all examples."""
    parts, plans = plans_for(scenes_llava, (2, 8))
    study, steps = begin_sweep(scenes_llava, parts, plans, ["vqa"], tmp_path_factory.mktemp("study") / "stopped", n=300)
    for step in steps:
        if step.complete:
            break
    steps.close()  # type: ignore[attr-defined]
    return study


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_study_can_be_ranked_and_recommends_and_says_what_it_rests_on(
    stopped: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = stopped.counts()
    assert counts["done"] == 1
    table, full = stopped.table(), stopped.examples(stopped.native)
    assert full is not None
    assert len(full) == 300
    note = f"{counts['waiting']} of {len(table)} trials have not seen all examples; those that saw fewer than full"
    assert main(["rank", str(stopped.path), "--bootstraps", "2"]) == 0
    assert note in capsys.readouterr().out
    assert main(["recommend", str(stopped.path), "--bpw", "6", "--no-run"]) == 0
    assert note in capsys.readouterr().out
    assert main(["report", str(stopped.path)]) == 0
    assert note in (stopped.path / "report" / "index.html").read_text()


def test_what_saw_few_examples_counts_by_its_difference_to_full_precision_on_those(stopped: Study) -> None:
    observations, full = observations_of(stopped, "vqa"), stopped.examples(stopped.native)
    assert full is not None
    apart = 0
    for key, plan, score in zip(observations.keys, observations.plans, observations.score, strict=True):
        mine = stopped.examples(plan)
        assert mine is not None
        both = mine.merge(full, on="example")
        expected = full["score"].mean() + (both["score_x"] - both["score_y"]).mean()
        assert score == pytest.approx(expected, abs=1e-12)
        apart += key != stopped.native.key and abs(score - mine["score"].mean()) > 1e-6
    assert apart > 0  # the first examples were not like all of them


def test_two_tasks_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps({"image": "a.png", "prompt": "what?", "answers": ["this"]})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "own.jsonl").write_text(line)
    named = f"{tmp_path}/own.jsonl,exact:{tmp_path}/own.jsonl"
    assert main(["sweep", "embedded:scenes-blip2", "--task", named, "--out", str(tmp_path / "s")]) == 2
    said = capsys.readouterr().err
    both = f"{tmp_path}/own.jsonl and exact:{tmp_path}/own.jsonl are both called own"
    assert f"{both}; give one of them a copy of the file under another name" in said


def test_ctrl_c_leaves_the_frontier_on_the_screen(tmp_path: Path) -> None:
    words = ["embedded:scenes-blip2", "--bits", "2,4,8", "--n", "2000", "--out", str(tmp_path / "s")]
    command = [sys.executable, "-m", "sensitivity", "sweep", *words]
    # what a shell runs in the background ignores it, and a process passes that on
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, before)
        while len(list(tmp_path.glob("s/examples/[!.]*.parquet"))) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Frontier: no smaller plan scores higher on vqa" in out
    assert "(n 20)" in out
    assert told.splitlines()[-1] == "stopped; what was finished is kept, and the same command continues"
    assert Study(tmp_path / "s").counts()["running"] == 0


def test_an_error_that_was_not_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embedded:scenes-blip2", "--bits", "2", "--n", "20", "--until", "error<0.5%", "--out", str(tmp_path / "s")]
    assert main(["sweep", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    known = uncertainty(Study(tmp_path / "s"))
    assert known > 0.005
    assert f"to full precision are known to within {known:.4f}; --until asked for 0.0050; all examples were used" in out


def test_the_time_left_is_of_this_run_alone() -> None:
    """Twenty images of a hundred were there before; four more took two seconds."""
    pace = Pace()
    plan = Plan((("a", None),))
    images, seconds = pace.after(Step(plan, {}, 2.0, False, 24, 76, 10, 4))
    assert images == 76
    assert seconds == pytest.approx(76 * 2 / 4, rel=0.01)
    assert Pace(seconds=5).after(Step(plan, {}, 2.0, False, 24, 76, 10, 4))[1] == pytest.approx(5, rel=0.01)
    assert Pace(plans=20).after(Step(plan, {}, 2.0, False, 24, 0, 10, 4))[0] == 176


@pytest.mark.parametrize("name", few(["vqa", "caption"], ["vqa"]))
def test_whole_answers_are_those_of_the_plain_path_letter_for_letter(name: str, tmp_path: Path) -> None:
    words = ["sweep", "embedded:scenes-blip2", "--task", name, "--by", "part", "--bits", "2", "--n", "20", "--json"]
    found = {}
    for how in ((), ("--whole-answers",), ("--whole-answers", "--plain")):
        out = tmp_path / "-".join(["study", *how])
        assert main([*words, *how, "--out", str(out)]) == 0
        study = Study(out)
        frames = [study.examples(study.plan(i)) for i in range(len(study.trials()))]
        found[how] = pd.concat([frame for frame in frames if frame is not None], ignore_index=True)
    short, ours, theirs = found.values()
    assert (ours["answer"] == theirs["answer"]).all()
    assert (ours["score"] == theirs["score"]).all()
    assert (short["score"] == theirs["score"]).all()
    assert not ours["answer"].str.endswith("…").any()
    assert short["answer"].str.endswith("…").any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--memory-gb", "-1"], "--memory-gb takes an amount from 0 to 1,000,000 GB, such as 8 or 0.5, not '-1'"),
        (["--memory-gb", "nan"], "--memory-gb takes an amount from 0 to 1,000,000 GB, such as 8 or 0.5, not 'nan'"),
        (["--cache-gb", "inf"], "--cache-gb takes an amount from 0 to 1,000,000 GB, such as 8 or 0.5, not 'inf'"),
        (["--storage", "nonsense"], "--storage takes a URL such as postgresql+psycopg://HOST/DB, not 'nonsense'"),
        (["--out", "FILE"], "--out takes a folder, and"),
        (["--out", "FILE/below"], "is a file, not a folder"),
    ],
)
def test_bad_words_are_refused_in_a_sentence(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("")
    more = [word.replace("FILE", str(tmp_path / "FILE")) for word in more]
    words = ["sweep", "embedded:scenes-blip2", "--bits", "4", "--n", "2", "--out", str(tmp_path / "s"), *more]
    with contextlib.suppress(SystemExit):
        assert main(words) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "s").exists()
