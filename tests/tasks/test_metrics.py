"""Metrics against their reference implementations: the values here were computed by those, on these cases."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recalls import recalls

from sensitivity.api.sweeping import grid, sweep
from sensitivity.models.discovery import inspect
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks import retrieval
from sensitivity.tasks.examples.types import Example, Point, Regions, Task
from sensitivity.tasks.scoring import answer_text as answers
from sensitivity.tasks.scoring import captions, grounding, vqa_accuracy
from sensitivity.tasks.scoring.answer_text import equals_squeezed
from sensitivity.tasks.scoring.boxes import DECODINGS, convex, decoded, matches, polygon_iou, written
from sensitivity.tasks.scoring.boxes import corners as corners_
from sensitivity.tasks.scoring.by_kind import accuracies_by_kind
from sensitivity.tasks.scoring.caption_words import words
from sensitivity.tasks.table import task as find_task


def example(*right: str, kind: str = "all", id: str = "1", regions: Regions | None = None) -> Example:
    return Example(id, id, kind, Path("none.png"), "?", right, regions)


# -- VQA: GT-Vision-Lab/VQA, vqaEval.py, run on these


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("The U.S. flag, red/white!", "us flag red white"),
        ("two dogs, a cat", "2 dogs cat"),
        ("isnt that 1,000 birds?", "isn't that 1000 birds"),
        ("y'all'dve 3.5 (left)", "y'all'd've 3.5 left"),
        ("none of the three", "0 of 3"),
        ("t-shirt - blue", "tshirt blue"),
        ("Im somebody'd", "im somebodyd"),
    ],
)
def test_vqa_normalization(said: str, expected: str) -> None:
    assert vqa_accuracy.normalized(said) == expected


VQA_CASES = [
    ("two", ["2"] * 4 + ["two"] * 2 + ["3"] * 4, 1.0),
    ("yes.", ["yes"] * 9 + ["no"], 1.0),
    ("the red, white", ["red white"] * 3 + ["red"] * 7, 0.9),
    ("isnt it", ["isn't it"] * 2 + ["no"] * 8, 0.6),
    ("1,000", ["1000", "1,000"] + ["many"] * 8, 0.6),
    ("T-shirt", ["t shirt"] * 2 + ["t-shirt"] + ["shirt"] * 7, 0.9),
    ("somebody'd", ["somebodyd"] * 5 + ["x"] * 5, 1.0),
    ("none", ["0"] * 3 + ["none"] + ["1"] * 6, 1.0),
    ("2.5", ["2.5"] * 2 + ["25"] * 8, 0.6),
    ("dog\n", ["dog"] + ["a dog"] * 2 + ["cat"] * 7, 0.9),
    ("dog", ["dog"] + ["cat"] * 9, 0.3),
    ("bird", ["dog"] + ["cat"] * 9, 0.0),
]


@pytest.mark.parametrize(("said", "right", "official"), VQA_CASES)
def test_vqa_accuracy_is_the_official_one(said: str, right: list[str], official: float) -> None:
    assert vqa_accuracy.verbatim(said, example(*right)) == pytest.approx(official)
    assert vqa_accuracy.accuracy(said, example(*right)) == pytest.approx(official)


def test_where_all_people_agree_the_official_script_does_not_normalize() -> None:
    everyone = example(*["yes"] * 10)
    assert (vqa_accuracy.verbatim("Yes", everyone), vqa_accuracy.accuracy("Yes", everyone)) == (0.0, 1.0)
    assert vqa_accuracy.verbatim("yes", everyone) == vqa_accuracy.accuracy("yes", everyone) == 1.0


def test_vqa_accuracy_does_not_depend_on_the_order_of_people() -> None:
    for said, right, official in VQA_CASES:
        shuffled = random.Random(0).sample(right, len(right))
        assert vqa_accuracy.accuracy(said, example(*shuffled)) == pytest.approx(official)


@pytest.mark.parametrize(("said", "right", "score"), [("The dog.", "dog", 1), ("no", "yes", 0), ("two", "2", 1)])
def test_gqa_is_exact_match_after_the_same_normalization(said: str, right: str, score: float) -> None:
    assert vqa_accuracy.match(said, example(right)) == score


# -- remote sensing


def test_rsvqa_by_category() -> None:
    asked = (example("yes", kind="presence"), example("no", kind="presence"), example("yes", kind="comp"),
             example("rural", kind="rural_urban"))  # fmt: skip
    said = ["Yes.", "yes", " y e s ", "Urban"]
    task = Task("x", asked, equals_squeezed, metrics=accuracies_by_kind(asked))
    found = task.measure(said)
    assert found == {"comp": 1.0, "presence": 0.5, "rural_urban": 0.0, "mean of the kinds": 0.5}
    assert [equals_squeezed(a, e) for a, e in zip(said, asked, strict=True)] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="3 answers for 4 examples"):
        task.measure(said[:3])


@pytest.mark.parametrize(("said", "right", "score"), [("Bare Land.", "BareLand", 1), ("bare", "BareLand", 0)])
def test_scene_names_are_compared_without_spaces(said: str, right: str, score: float) -> None:
    assert equals_squeezed(said, example(right)) == score


# -- answers


def test_special_tokens_come_off_and_nothing_else() -> None:
    box = "<p> the plane </p> {<12><30><50><60>|<45>}"
    assert answers.without_special(f"<s> {box}</s><pad><pad>") == box
    assert answers.without_special("a cat<|im_end|>") == "a cat"
    assert answers.without_special("<image_1>red<end_of_turn>\n") == "red"
    assert answers.phrase("<p>A large</p> ship. ") == "a large ship"
    assert answers.squeezed(" Dense Residential. ") == "denseresidential"


# -- captions: words by the Stanford tokenizer of pycocoevalcap 1.2, values by its scorers

PTB = {
    "A man's dog isn't here; it's 5:30 p.m.": "a man 's dog is n't here it 's 5:30 p.m.",
    "The U.S. flag, (red/white/blue) flies!": "the u.s. flag -lrb- red/white/blue -rrb- flies",
    "two-story house with $5.00 & 20% off": "two-story house with $ 5.00 & 20 % off",
    'a "stop" sign -- and more...': "a stop sign and more",
    "he cannot gonna go, y'all don't": "he can not gon na go y' all do n't",
    "it's the 1990's, '90s style; 3 o'clock": "it 's the 1990 's '90s style 3 o'clock",
    "St. Mark's sq. and Dr. Smith": "st. mark 's sq. and dr. smith",
    "colour of café naïve": "colour of café naïve",
    "the kids' toys": "the kids toys",
    "3.5 inches 1,000 birds 10-year-old": "3.5 inches 1,000 birds 10-year-old",
    "a man, wearing a hat,sitting": "a man wearing a hat sitting",
    "A dog\u2019s bowl \u2014 full": "a dog 's bowl full",
    "I'm you're they've she'll he'd": "i 'm you 're they 've she 'll he 'd",
    "a cat.a dog": "a cat.a dog",
    "a rock 'n' roll band": "a rock 'n' roll band",
    "what's that?! wow!": "what 's that ?! wow",
    "street sign for W. 34th St.": "street sign for w. 34th st.",
    "a no.7 bus at 10:35pm, 6 pm": "a no. 7 bus at 10:35 pm 6 pm",
    "..": "",
}


@pytest.mark.parametrize("caption", PTB)
def test_words_are_those_of_the_java_program(caption: str) -> None:
    assert " ".join(words(caption)) == PTB[caption]


REFERENCES = [
    ("A man's dog isn't here; it's 5:30 p.m.", "A dog waits for a man.", "the dog of a man is away"),
    ("Two zebras (and a bird) stand in tall grass.", "two zebra's grazing, next to a bird", "Zebras on the plains"),
    ("A red/white kite flies over the beach.", "someone flying a kite at the beach!", "A kite in the U.S. sky"),
    ("a stop sign", 'A red "stop" sign on the corner of Main St.'),
]
CAPTIONS = [
    "a man and a dog wait",
    "two zebras stand in tall grass next to a bird",
    "",
    "A red stop sign on the corner of the street, the street, the street",
]
CIDER = [1.578267720119799, 2.5398630660662125, 0.0, 2.1464728761666927]
EXAMPLES = tuple(example(*right, id=str(i)) for i, right in enumerate(REFERENCES))


def test_cider_of_each_caption_is_pycocoevalcaps() -> None:
    score = captions.cider(EXAMPLES)
    assert [score(said, one) for said, one in zip(CAPTIONS, EXAMPLES, strict=True)] == pytest.approx(CIDER, abs=1e-12)


def test_cider_of_a_random_corpus_is_pycocoevalcaps() -> None:
    library = pytest.importorskip("pycocoevalcap.cider.cider")
    rng = random.Random(1)
    known = ["a", "the", "dog", "cat", "man", "woman", "red", "sits", "runs", "on", "in", "park", "two", "with", "ball"]

    def caption() -> str:
        return " ".join(rng.choices(known, k=rng.randint(0, 12)))

    asked = tuple(example(*(caption() or "a" for _ in range(5)), id=str(i)) for i in range(60))
    said = [caption() for _ in asked]
    right = {i: list(one.answers) for i, one in enumerate(asked)}
    mean, each = library.Cider().compute_score(right, {i: [text] for i, text in enumerate(said)})
    ours = [captions.cider(asked)(text, one) for text, one in zip(said, asked, strict=True)]
    assert ours == pytest.approx(list(each), abs=1e-12)
    assert np.mean(ours) == pytest.approx(mean)


def test_cider_of_one_image_is_zero_and_of_the_reference_itself_is_high() -> None:
    assert captions.cider(EXAMPLES[:1])("a dog waits for a man", EXAMPLES[0]) == 0
    own = example("a red kite flies over the beach", id="0")
    assert captions.cider((own, *EXAMPLES))("A red kite flies over the beach.", own) == pytest.approx(10)


def test_bleu_and_rouge_of_the_corpus() -> None:
    pytest.importorskip("pycocoevalcap")
    assert captions.rouge_l(CAPTIONS, EXAMPLES) == pytest.approx(0.44136815290490916)
    assert captions.bleu4(CAPTIONS, EXAMPLES) == pytest.approx(0.448489044573822)


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("a large ship docked", "the large ships are docking", 2 / 3),
        ("tennis court", "a tennis court at the bottom left", 4 / 9),
        ("small white car", "car", 0.5),
        ("left tennis", "tennis court left", 0.8),
    ],
)
def test_rouge_1_of_a_region(said: str, right: str, expected: float) -> None:
    pytest.importorskip("rouge_score")
    assert captions.rouge("rouge1")(said, right) == pytest.approx(expected)


def test_rouge_l_keeps_the_order() -> None:
    pytest.importorskip("rouge_score")
    assert captions.rouge("rougeL")("left tennis", "tennis court left") == pytest.approx(0.4)


def test_without_java_or_the_library_the_gap_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = captions.task("x", EXAMPLES)
    assert list(found.metrics) == ["BLEU-4", "ROUGE-L"]
    assert found.notes == ("METEOR is left out: it needs Java, and there is none on the path",)
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    found = captions.task("x", EXAMPLES)
    assert not found.metrics
    assert "pip install 'vlm-sensitivity[tasks]'" in found.notes[0]
    assert found.score(CAPTIONS[0], EXAMPLES[0]) == pytest.approx(CIDER[0])
    with pytest.raises(UserError, match=r"rouge_score, which is not installed; type pip install"):
        captions.rouge("rouge1")


def test_quick_metrics_are_in_a_study_over_all_shards_and_slow_ones_are_not(scenes_llava: VLM, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    lines = []
    for one in find_task("caption", n=9).examples:  # more than a first shard of images
        assert isinstance(one.image, np.ndarray)
        Image.fromarray(one.image).save(tmp_path / f"{one.id}.png")
        lines.append({"id": one.id, "image": f"{one.id}.png", "prompt": one.prompt, "answers": list(one.answers)})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    typed = f"caption:{tmp_path / 'own.jsonl'}"
    parts = inspect(scenes_llava, by="part")
    study = sweep(scenes_llava, parts, grid(parts, bits=(3,)), [typed], tmp_path / "run", n=9)
    asked = find_task(typed, n=9)
    for row in study.table().to_dict("records"):
        stored = study.examples(study.plan(row["number"]))
        assert stored is not None
        assert list(stored["example"]) != [one.id for one in asked.examples], "shards have an order of their own"
        said = dict(zip(stored["example"], stored["answer"], strict=True))
        answers = [said[one.id] for one in asked.examples]
        for name in ("BLEU-4", "ROUGE-L"):
            assert row[f"own.{name}"] == pytest.approx(asked.metrics[name](answers, asked.examples))
        assert "own.METEOR" not in row
    assert study.table()["own.ROUGE-L"].max() > 0.5


def test_quick_metrics_of_some_of_the_examples_leave_out_what_has_no_value_yet() -> None:
    examples = tuple(example("yes", kind=kind, id=str(i)) for i, kind in enumerate(["presence", "presence", "comp"]))
    asked = Task("x", examples, equals_squeezed, metrics=accuracies_by_kind(examples))
    rows = {"task": ["x", "x", "other"], "example": ["1", "0", "2"], "answer": ["no", "Yes.", "yes"]}
    assert asked.quick(rows) == {"presence": 0.5}
    rows["task"][2] = "x"
    assert asked.quick(rows) == pytest.approx({"presence": 0.5, "comp": 1, "mean of the kinds": 0.75})
    assert dataclasses.replace(asked, slow=("comp", "presence")).quick(rows) == {"mean of the kinds": 0.75}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_meteor_with_java() -> None:
    pytest.importorskip("pycocoevalcap")
    assert captions.task("x", EXAMPLES).measure(CAPTIONS)["METEOR"] == pytest.approx(0.31669649126873306)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_words_and_cider_against_the_java_program_itself() -> None:
    split = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer().tokenize
    library = pytest.importorskip("pycocoevalcap.cider.cider")
    found = split({i: [{"caption": text}] for i, text in enumerate(PTB)})
    assert [found[i][0] for i in range(len(PTB))] == list(PTB.values())
    right = split({i: [{"caption": text} for text in texts] for i, texts in enumerate(REFERENCES)})
    said = split({i: [{"caption": text}] for i, text in enumerate(CAPTIONS)})
    assert library.Cider().compute_score(right, said)[1].tolist() == pytest.approx(CIDER)


# -- boxes

SQUARE = Regions(200, 100, (((20.0, 10.0), (60.0, 10.0), (60.0, 40.0), (20.0, 40.0)),))  # x 10..30 %, y 10..40 %
EXACT = "{<10><10><30><40>|<0>}"


def test_written_corners_are_per_cent_of_each_side_and_angles_are_turned_in_pixels() -> None:
    assert polygon_iou(decoded(EXACT, 200, 100)[0], SQUARE.polygons[0]) == pytest.approx(1)
    upright = decoded("{<25><25><75><75>|<90>}", 200, 100)[0]  # 100 by 50 pixels, turned to 50 by 100
    assert {tuple(round(v) for v in point) for point in upright} == {(75, 0), (125, 0), (125, 100), (75, 100)}


def test_white_space_inside_a_box_does_not_count() -> None:
    assert decoded("{<10> <10><30> <40>|<0> }", 200, 100) == decoded(EXACT, 200, 100)


def test_the_three_readings_of_an_angle() -> None:
    text = "{<20><40><80><60>|<30>}"
    turned, clockwise, diagonal = (decoded(text, 100, 100, how)[0] for how in DECODINGS)
    assert {(round(x, 6), round(100 - y, 6)) for x, y in turned} == {(round(x, 6), round(y, 6)) for x, y in clockwise}
    assert (
        min(p[1] for p in turned) == min(p[1] for p in clockwise) == pytest.approx(50 - 15 - 10 * math.cos(math.pi / 6))
    )
    sides = sorted(math.dist(diagonal[i], diagonal[i - 1]) for i in range(4))
    length = math.hypot(60, 20)
    assert sides == pytest.approx([length * 0.5] * 2 + [length * math.cos(math.pi / 6)] * 2)
    assert decoded(EXACT, 200, 100, "diagonal") == []  # angle 0: a line


@pytest.mark.parametrize("seed", range(30))
def test_a_true_box_written_as_text_is_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, height = rng.integers(300, 1200, size=2).tolist()
    w, h = rng.uniform(0.2, 0.35, size=2) * min(width, height)
    box = (width / 2 - w, height / 2 - h, width / 2 + w, height / 2 + h, float(rng.uniform(-90, 90)))
    true = convex(corners_(box))
    assert true is not None
    (read,) = decoded(written(true, width, height), width, height)
    assert polygon_iou(read, true) > 0.9


def test_iou_against_shapely() -> None:
    shapely = pytest.importorskip("shapely")
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (convex(rng.uniform(0, 10, size=(3, 2)).tolist()) for _ in range(2))
        assert one
        assert other
        a, b = shapely.Polygon(one), shapely.Polygon(other)
        expected = a.intersection(b).area / a.union(b).area
        assert polygon_iou(one, other) == pytest.approx(expected, abs=1e-9)


def test_boxes_are_matched_one_to_one_and_as_many_as_can_be() -> None:
    def at(x: float) -> tuple[Point, ...]:
        return ((x, 0.0), (x + 10, 0.0), (x + 10, 10.0), (x, 10.0))

    assert matches([at(0), at(0)], [at(0)], 0.5) == 1  # said twice, found once
    assert matches([at(0)], [at(0), at(1)], 0.5) == 1  # one box does not find two
    # the first fits both, the second one only: a greedy choice would find one of them
    assert matches([at(2), at(-2)], [at(0), at(4)], 0.5) == 2
    assert matches([at(-2), at(2)], [at(0), at(4)], 0.5) == 2
    assert matches([], [at(0)], 0.5) == 0


def test_the_mean_of_scores_is_found_of_all_true_boxes() -> None:
    def pixels(*corners: tuple[float, float, float, float]) -> Regions:
        whole = grounding.polygons([list(corner) for corner in corners])
        assert whole
        return Regions(100, 100, whole)

    asked = (
        example("x", regions=pixels((0, 0, 20, 20), (40, 40, 60, 60), (80, 80, 100, 100))),
        example("x", regions=pixels((10, 10, 30, 30)), id="2"),
        example("x", regions=pixels((10, 10, 30, 30)), id="3"),
    )
    said = ["{<0><0><20><20>|<0>} and {<41><41><61><61>|<0>}", "{<10><10><30><18>|<0>}", "none"]
    task = grounding.task("g", asked)
    found = task.measure(said)
    assert found == pytest.approx(
        {
            "acc@0.5": 2 / 5, "acc@0.25": 3 / 5, "any match@0.5": 1 / 3, "any match@0.25": 2 / 3,
            "acc@0.5, read as clockwise": 2 / 5, "acc@0.25, read as clockwise": 3 / 5,
            "acc@0.5, read as diagonal": 0, "acc@0.25, read as diagonal": 0,
        }
    )  # fmt: skip
    scores = [task.score(a, e) for a, e in zip(said, asked, strict=True)]
    assert np.mean(scores) == pytest.approx(found["acc@0.5"])
    with pytest.raises(UserError, match="unknown decoding of boxes 'turnd'; choose from turned, clockwise, diagonal"):
        grounding.task("g", asked, decoding="turnd")


# -- retrieval


def test_recall_by_hand() -> None:
    owner = [0, 0, 1, 1, 2]
    similarity = np.array([[0.1, 0.9, 0.3, 0.2, 0.0], [0.8, 0.1, 0.2, 0.3, 0.9], [0.5, 0.5, 0.5, 0.5, 0.5]])
    found = recalls(similarity, similarity.T, owner)
    assert found["text R@1"] == pytest.approx(1 / 3)  # the second is third, and a tie wins nothing
    assert found["text R@5"] == found["image R@5"] == found["text R@10"] == 1
    # captions: 0 is last, 1 first, 2 third (0.2 after 0.5 and 0.3), 3 second, 4 second
    assert found["image R@1"] == pytest.approx(1 / 5)
    assert found["mean"] == pytest.approx(((1 / 3 + 2) / 3 + (1 / 5 + 2) / 3) / 2)


def test_recall_of_chance_and_of_numbers_that_are_none() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.normal(size=(200, 1000))
    owner = np.repeat(np.arange(200), 5)
    assert recalls(similarity, similarity.T, owner)["image R@10"] == pytest.approx(0.05, abs=0.02)
    nothing = recalls(np.full((200, 1000), np.nan), similarity.T, owner)
    assert nothing["text R@10"] == 0


def test_re_ranking_looks_at_the_first_k_alone() -> None:
    first, second = np.array([[3.0, 2.0, 1.0]]), np.array([[0.0, 5.0, 50.0]])
    assert retrieval.reranked(first, second, 2).tolist() == [[3.0, 7.0, -100.0]]
