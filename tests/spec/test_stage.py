"""What runs now is named with how much of it is done, and is gone when it has ended, however it ended."""

from __future__ import annotations

import pytest

from sensitivity.spec import stage


def test_a_stage_counts_its_items_and_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 30.0))
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))
    batches = stage.each(("ab", "cd"), "calibrating", "examples", 4, len)
    assert next(batches) == "ab"
    assert stage.now() == "calibrating: 0 of 4 examples"
    assert next(batches) == "cd"
    assert stage.now() == "calibrating: 2 of 4 examples, 0:00:30 left"
    assert list(batches) == []
    assert stage.now() == ""


def test_a_stage_that_may_end_early_says_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 30.0))
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))
    passes = stage.each((1, 2), "loss", "passes", 4, at_most=True)
    assert (next(passes), next(passes)) == (1, 2)
    assert stage.now() == "loss: 1 of at most 4 passes, at most 0:01:30 left"
    passes.close()


def test_a_stage_inside_another_is_named_after_it() -> None:
    for _ in stage.each([1], "quantizing", "blocks", 1):
        for _ in stage.each([1], "calibrating", "batches", 1):
            assert stage.now() == "quantizing: 0 of 1 blocks, calibrating: 0 of 1 batches"


def test_a_stage_that_fails_or_is_left_early_is_over() -> None:
    with pytest.raises(ZeroDivisionError):
        sum(1 / x for x in stage.each([0], "quantizing", "blocks", 1))
    assert next(iter(stage.each([1, 2], "calibrating", "batches", 2))) == 1
    assert stage.now() == ""
