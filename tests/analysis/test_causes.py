"""Which part's bits caused a failure: as planted, and as found by running every part put back on every example."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import answered
import pandas as pd
import planted
import pytest
from answered import NATIVE

from sensitivity.analysis.failures.causes import NO_PART, Cause, cause, put_back, tally
from sensitivity.analysis.failures.changes import Change
from sensitivity.analysis.failures.gallery import changed, galleries
from sensitivity.analysis.reporting.failures_page import write
from sensitivity.api.finding_causes import begin_causes
from sensitivity.cli.main import main
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.spec.sizes import size
from sensitivity.study import answers
from sensitivity.study.storage import paths
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

VISION, CONNECTOR, LANGUAGE = planted.PARTS
LOW = planted.plan(planted.PARTS, [2, 2, 2])
BITS = (2, 8, 16)


def needs(example: Example) -> tuple[set[str], ...]:
    """Which sets of parts mend an example if all of a set have at least 8 bits."""
    number = int(example.id.split("-")[2])
    return (({CONNECTOR}, {VISION}), ({VISION},), ({VISION, LANGUAGE},), ({LANGUAGE},), (set(),))[number % 5]


def given(plan: Plan, example: Example) -> str:
    wide = {name for name, bits in plan.bits().items() if bits >= 8}
    return example.answers[0] if any(group <= wide for group in needs(example)) else "wrong"


def study(path: Path, widths: tuple[int, ...] = BITS) -> Study:
    rows = [list(row) for row in itertools.product(widths, repeat=3) if set(row) != {16}]
    plans = [NATIVE, *(planted.plan(planted.PARTS, row) for row in rows)]
    return answered.study(path, [task("vqa", n=60)], given, ["vqa"], n=60, plans=plans)


def expected(made: Study, example: Example) -> str:
    """The cheapest part that mends an example alone, by its definition."""
    order = sorted(planted.PARTS, key=lambda part: size(made.parts, put_to(part)).bits)
    return next((part for part in order if {part} in needs(example)), NO_PART)


def put_to(part: str) -> Plan:
    return Plan(tuple((name, None if name == part else scheme) for name, scheme in LOW.schemes))


@pytest.mark.parametrize("widths", [BITS, (2, 8)])
def test_the_planted_part_is_found_from_plans_of_the_study(widths: tuple[int, ...], tmp_path: Path) -> None:
    made = study(tmp_path / "run", widths)
    parts = put_back(made, LOW)
    assert parts[0].part == CONNECTOR
    assert [one.bits for one in parts] == sorted(one.bits for one in parts)
    asked = {example.id: example for example in task("vqa", n=60).examples}
    found = changed(made, LOW)
    assert len(found) > 40
    for change in found:
        why = cause(change, parts)
        assert why is not None
        assert why.name == expected(made, asked[change.example])
        assert (why.scheme is None) == (16 in widths or why.part is None)
        if why.part is not None:  # the cost of the width that is named
            raised = Plan(tuple((name, why.scheme if name == why.part else one) for name, one in LOW.schemes))
            assert why.bits == size(made.parts, raised).bits - size(made.parts, LOW).bits
    (shown,) = galleries(made, [("x", LOW)], 60)
    assert dict(shown.causes) == Counter(expected(made, asked[change.example]) for change in found)
    assert min(dict(shown.causes).values()) > 5
    assert shown.causes[-1][0] == NO_PART
    assert shown.unexplained == 0


def test_nothing_is_guessed_where_a_cheaper_part_was_not_measured(tmp_path: Path) -> None:
    made = answered.study(
        tmp_path / "run", [task("vqa", n=60)], given, ["vqa"], n=60, plans=(NATIVE, LOW, put_to(VISION))
    )
    (shown,) = galleries(made, [("x", LOW)], 60)
    assert shown.causes == ()
    assert shown.unexplained == shown.changed > 40
    assert f"sensitivity failures {made.path} --plan {LOW.key[:8]} --n {shown.unexplained} --causes" == shown.ask
    write(tmp_path / "page.html", "m", [shown])
    assert f"is not measured for {shown.changed} answers that got worse" in (tmp_path / "page.html").read_text()


def test_a_part_that_fails_at_few_bits_is_not_said_to_fail_at_full_precision(tmp_path: Path) -> None:
    """At 4 bits nothing mends an answer here, at 8 and above something does: which part was not measured."""
    made = study(tmp_path / "run", (2, 4))
    (shown,) = galleries(made, [("x", LOW)], 60)
    assert shown.causes == ()
    assert shown.unexplained == shown.changed > 40
    assert "--causes" in shown.ask


def test_an_answer_that_did_not_get_worse_has_no_cause(tmp_path: Path) -> None:
    made = study(tmp_path / "run")
    change = changed(made, LOW)[0]
    better = Change(change.task, change.example, change.kind, change.after, change.before, None)
    assert cause(better, put_back(made, LOW)) is None
    assert tally([None, Cause(None), Cause("b"), Cause("b"), Cause("a")]) == [("b", 2), ("a", 1), (NO_PART, 1)]


def test_a_part_is_a_filter_of_the_verb_and_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = study(tmp_path / "run")
    asked = {example.id: example for example in task("vqa", n=60).examples}
    count = Counter(expected(made, asked[change.example]) for change in changed(made, LOW))
    words = ["failures", str(made.path), "--plan", LOW.key[:8], "--part", VISION]
    assert main([*words, "--out", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert f"Changed answers: {min(count[VISION], 20)} of {count[VISION]}" in out
    assert "mended by" in out
    assert "Mended by the cheapest part that is enough, given back its bits alone: " in out
    assert f"{VISION} {count[VISION]}" in out
    assert (tmp_path / "page.html").read_text().count(f'data-part="{VISION}"') == count[VISION]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["cause"]["part"] for one in found["examples"]} == {VISION}
    assert found["mended_by"] == count
    assert main([*words[:-1], "visoin"]) == 2
    assert f"unknown part 'visoin'; choose from {VISION}" in capsys.readouterr().err
    assert main(["failures", str(made.path), "--device", "cpu"]) == 2
    assert "--device would do nothing without --causes" in capsys.readouterr().err


def test_measured_causes_are_those_of_running_every_part_on_every_example(
    scenes_llava: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["sweep", "embedded:scenes-llava", "--n", "24", "--bits", "2", "--search", "one-at-a-time", "--out"]
    assert main([*line, str(tmp_path / "run")]) == 0
    made = Study(tmp_path / "run")
    plan = next(trial.plan for trial in made.trials() if trial.plan.is_uniform and trial.plan[LANGUAGE])
    failed = [one for one in changed(made, plan) if one.cost > 0]
    assert len(failed) > 5
    steps = list(begin_causes(scenes_llava, made, plan, failed))
    assert steps[0].new == len(failed)
    assert [step.done for step in steps] == list(itertools.accumulate(step.new for step in steps))
    assert steps[-1].left == 0 or len(steps) < 3
    scores = {}
    for one in put_back(made, plan):
        with quantized(scenes_llava.model, made.parts, one.plan):
            rows = evaluate(scenes_llava, task("vqa", n=24), plain=True)
        scores[one.part] = dict(zip(rows["example"], rows["score"], strict=True))
    for change in failed:
        why = cause(change, put_back(made, plan))
        mending = [part for part, known in scores.items() if known[change.example] >= change.before.score]
        assert why == (Cause(None) if not mending else Cause(mending[0], None, why.bits if why else 0))
    assert list(begin_causes(scenes_llava, made, plan, failed)) == [], "nothing is run twice"
    capsys.readouterr()
    assert main(["failures", str(made.path), "--plan", plan.key, "--causes", "--n", "60"]) == 0
    assert "nothing was left to do" in capsys.readouterr().err
    file = paths.put_back_file(made.path, put_back(made, plan)[0].plan.key)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert next(iter(begin_causes(scenes_llava, made, plan, failed))).new == len(failed), "a damaged file is replaced"
    pd.testing.assert_frame_equal(answers.read(file), answers.read(file))


def test_only_what_can_be_run_is_run(scenes_llava: Any, tmp_path: Path) -> None:
    made = study(tmp_path / "run")
    with pytest.raises(UserError, match=r"was measured on planted, and .* is another model"):
        next(begin_causes(scenes_llava, made, LOW, changed(made, LOW)))
