"""Scenes, their questions and their boxes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from sensitivity.tasks import scenes as S
from sensitivity.tasks.examples.types import Box
from sensitivity.tasks.scoring.boxes import corners, oriented_iou, parse

FOLDER = Path(__file__).resolve().parents[2] / "sensitivity" / "models" / "embedded" / "scenes-llava"
SAMPLE = S.draw_scenes("evaluation", 120, seed=5)


def test_splits_share_no_handwriting_and_cover_all_of_it() -> None:
    found = {split: set(S.split_indices(split).tolist()) for split in S.SPLITS}
    assert {split: len(found[split]) for split in S.SPLITS} == S.SPLITS
    for a, b in itertools.combinations(found.values(), 2):
        assert not a & b
    assert set().union(*found.values()) == set(range(1797))


def test_splits_are_stratified_by_digit() -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    for split, size in S.SPLITS.items():
        share = np.bincount(target[S.split_indices(split)], minlength=10) / size
        assert np.abs(share - np.bincount(target) / len(target)).max() < 0.01


def test_no_bitmap_of_one_split_is_in_another() -> None:
    seen = {split: {b.tobytes() + bytes(b.shape) for s in S._samples(split) for b in s} for split in S.SPLITS}
    for a, b in itertools.combinations(seen.values(), 2):
        assert not a & b


@pytest.mark.parametrize("split", S.SPLITS)
def test_the_same_seed_makes_the_same_scenes_and_a_longer_list_starts_alike(split: str) -> None:
    short, long = S.draw_scenes(split, 5, seed=3), S.draw_scenes(split, 9, seed=3)
    for a, b in zip(short, long, strict=False):
        assert (a.id, a.background, a.digits) == (b.id, b.background, b.digits)
        assert np.array_equal(a.image, b.image)
        assert S.questions_about(a, 1) == S.questions_about(b, 1)
    assert len({s.id for s in long}) == 9
    assert not np.array_equal(S.draw_scenes(split, 1, seed=4)[0].image, short[0].image)


def test_a_layout_without_a_drawing_is_the_same_layout() -> None:
    drawn, not_drawn = S.scene("train", 0, 7), S.scene("train", 0, 7, draw=False)
    assert (drawn.digits, drawn.background) == (not_drawn.digits, not_drawn.background)
    assert S.questions_about(drawn) == S.questions_about(not_drawn)


def test_scenes_are_as_promised() -> None:
    assert SAMPLE[17].id == "evaluation-5-000017"
    for scene in SAMPLE:
        assert (scene.image.shape, scene.image.dtype) == ((48, 48, 3), np.uint8)
        assert 1 <= len(scene.digits) <= 4
        assert scene.background in S.BACKGROUNDS
        for attribute in ("value", "color", "cell"):
            assert len({getattr(d, attribute) for d in scene.digits}) == len(scene.digits)
        for d in scene.digits:
            x1, y1, x2, y2 = d.box
            assert 0 <= x1 < x2 <= 100
            assert 0 <= y1 < y2 <= 100
            assert not any(v % S.STEP for v in d.box)
            assert d.angle in S.ANGLES
            assert ((x1 + x2) / 2 > 50, (y1 + y2) / 2 > 50) == (d.cell % 2 == 1, d.cell >= 2)


def test_a_digit_is_drawn_in_its_turned_box_in_its_color() -> None:
    for scene in SAMPLE[:40]:
        for d in scene.digits:
            ys, xs = np.mgrid[0:48, 0:48]
            inside = _inside((*d.box, d.angle), (xs + 0.5) / 0.48, (ys + 0.5) / 0.48)
            near = np.abs(scene.image.astype(int) - S.COLORS[d.color]).sum(-1) < 90
            cell = (xs >= 24) == (d.cell % 2 == 1)
            cell &= (ys >= 24) == (d.cell >= 2)
            assert (near & inside).sum() >= 15
            assert (near & inside & cell).sum() >= 0.9 * (near & cell).sum() - 3


def test_every_answer_is_true_of_its_scene() -> None:
    for scene in SAMPLE:
        asked = S.questions_about(scene, seed=2)
        by_value, by_color = {d.value: d for d in scene.digits}, {d.color: d for d in scene.digits}
        for q in asked:
            number = next((int(c) for c in q.prompt if c.isdigit()), None)
            match q.kind:
                case "position":
                    assert q.answer == S.CELLS[by_value[number].cell]
                case "colour":
                    assert q.answer == by_value[number].color
                case "digit":
                    assert by_color[q.prompt.removesuffix("?").split()[-1]].value == int(q.answer)
                case "exists":
                    assert q.answer == ("yes" if number in by_value else "no")
                case "count":
                    assert q.answer == S.COUNTS[len(scene.digits) - 1]
                case "scene":
                    assert q.answer == scene.background
                case "caption":
                    for d in scene.digits:
                        assert f"{d.color} {d.value} {S.CELLS[d.cell]}" in q.answer
                    assert q.answer.endswith(f"on {scene.background}")
                case "ground":
                    assert parse(q.answer) == [(*by_value[number].box, by_value[number].angle)]
                case _:
                    raise AssertionError(q.kind)
        assert {q.kind for q in asked} == set(S.KINDS)
        assert sorted(q.answer for q in asked if q.kind == "exists") == ["no", "yes"]


def test_answers_are_balanced() -> None:
    asked = [q for i in range(1500) for q in S.questions_about(S.scene("evaluation", 1, i, draw=False))]
    for kind, n in {"position": 4, "colour": 6, "digit": 10, "exists": 2, "count": 4, "scene": 5}.items():
        answers = [q.answer for q in asked if q.kind == kind]
        for answer in set(answers):
            assert answers.count(answer) / len(answers) == pytest.approx(1 / n, abs=0.035)
        assert len(set(answers)) == n


def test_the_tokenizer_knows_every_word_and_gives_it_back() -> None:
    transformers = pytest.importorskip("transformers")
    words = transformers.AutoTokenizer.from_pretrained(FOLDER)
    for scene in SAMPLE:
        for q in S.questions_about(scene):
            for text in (q.prompt, q.answer):
                ids = words.encode(text)
                assert words.unk_token_id not in ids
                assert words.decode(ids) == text
    boxed = words.decode(words.encode("{<0><4><100><96>|<-30>}"))
    assert boxed == "{<0><4><100><96>|<-30>}"


# -- boxes


def test_boxes_are_read_and_anything_else_is_not() -> None:
    text = "a {<0><4><100><96>|<-30>} and {<8><8><4><12>|<0>} and {<1><2><3>|<4>} and {<4><8><12><16>|<15>}"
    assert parse(text) == [(0, 4, 100, 96, -30), (4, 8, 12, 16, 15)]
    assert parse("") == []


def test_a_positive_angle_is_counterclockwise_as_seen() -> None:
    right_end = corners((0, 40, 100, 60, 30))[1:3]
    assert all(y < 50 for _, y in right_end)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10, 0), (0, 0, 10, 10, 0), 1.0),
        ((0, 0, 10, 10, 0), (5, 0, 15, 10, 0), 1 / 3),
        ((0, 0, 10, 10, 0), (20, 20, 30, 30, 0), 0.0),
        ((0, 0, 10, 10, 0), (10, 0, 20, 10, 0), 0.0),
        ((0, 0, 10, 10, 0), (0, 0, 10, 10, 90), 1.0),
        ((0, 0, 10, 10, 30), (0, 0, 10, 10, 30), 1.0),
        ((2, 2, 8, 8, 45), (0, 0, 10, 10, 0), 0.36),
        # A square and itself turned by 45 degrees share a regular octagon.
        ((0, 0, 10, 10, 0), (0, 0, 10, 10, 45), 1 / math.sqrt(2)),
        # A cross of two bars of 30 by 10.
        ((0, 10, 30, 20, 0), (0, 10, 30, 20, 90), 100 / 500),
        # Two bars of 100 by 10 crossing at 30 degrees share a rhombus of area 10 * 10 / sin 30.
        ((0, 45, 100, 55, 0), (0, 45, 100, 55, 30), 200 / 1800),
    ],
)
def test_overlaps_known_in_closed_form(a: Box, b: Box, expected: float) -> None:
    assert oriented_iou(a, b) == pytest.approx(expected, abs=1e-9)
    assert oriented_iou(b, a) == pytest.approx(expected, abs=1e-9)


def _inside(box: Box, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Written apart from `boxes`: turn the point back instead of the box."""
    x1, y1, x2, y2, angle = box
    turn = np.exp(1j * np.radians(angle))
    back = ((x - (x1 + x2) / 2) + 1j * (y - (y1 + y2) / 2)) * turn
    return (np.abs(back.real) <= (x2 - x1) / 2) & (np.abs(back.imag) <= (y2 - y1) / 2)


def test_overlaps_against_counting_points() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-50:150:800j, -50:150:800j]
    for _ in range(60):
        a, b = (
            (*(p := rng.uniform(0, 60, 2)), *(p + rng.uniform(5, 60, 2)), float(rng.uniform(-90, 90))) for _ in range(2)
        )
        first, second = _inside(a, x, y), _inside(b, x, y)
        counted = (first & second).sum() / (first | second).sum()
        assert oriented_iou(a, b) == pytest.approx(counted, abs=0.02)
