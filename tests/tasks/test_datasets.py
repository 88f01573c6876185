"""Published data sets in their official layouts, written small; what is drawn, what is left out, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recalls import recalls

from experiments.small.datasets import COUNT, WRITE, bench, coco, flickr, gqa, picture, rsvqa, vqav2, write
from sensitivity.cli.arguments.values import task_names
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.generate.batches import batches_by_image
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks import retrieval
from sensitivity.tasks.datasets import geochat
from sensitivity.tasks.datasets import source as layout
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.examples.types import Task
from sensitivity.tasks.own import lines as local
from sensitivity.tasks.scoring import vqa_accuracy
from sensitivity.tasks.table import DATASETS, RETRIEVAL_DATASETS, task


def change(path: Path, how: Callable[[Any], Any]) -> None:
    """Rewrite a file with what `how` makes of it (or leaves in it)."""
    text = path.read_text()
    data = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    write(path, how(data) or data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every data set as it should be; tests that spoil one write their own."""
    folders = {name: tmp_path_factory.mktemp(name) for name in WRITE}
    for name, folder in folders.items():
        WRITE[name](folder)
    return folders


def clusters(found: Task) -> set[str]:
    return {example.cluster for example in found.examples}


def ids(found: Task) -> list[str]:
    return [example.id for example in found.examples]


# -- what holds for all


def test_every_data_set_has_a_layout_here() -> None:
    assert set(WRITE) == {*DATASETS, *RETRIEVAL_DATASETS}


@pytest.mark.parametrize("name", DATASETS)
def test_the_contract_of_a_data_set(whole: dict[str, Path], name: str) -> None:
    typed = f"{name}:{whole[name]}"
    every, some, other = task(typed), task(typed, n=30), task(typed, n=30, seed=1)
    calibration = task(typed, "calibration")
    assert every.name == name
    assert len(every.examples) > len(some.examples) == 30
    assert ids(some) != ids(other)
    assert ids(some) != ids(every)[:30], "never the first n"
    assert ids(task(typed, n=30)) == ids(some)
    assert set(ids(task(typed, n=20))) < set(ids(some)), "more examples include the fewer"
    assert ids(every) == sorted(ids(every))
    assert calibration.examples
    assert clusters(every).isdisjoint(clusters(calibration))
    assert (
        every.notes[0] == "no split for calibration here: evaluation examples leave out one image in 10, chosen by hash"
    )
    for example in some.examples:
        assert isinstance(example.image, Path), "images are not read before they are needed"
        assert example.answers
        assert all(answer.strip() for answer in example.answers)
        assert 0 <= some.score("nothing of the kind", example) < 1
    assert open_image(some.examples[0].image).mode == "RGB"
    assert some.score(some.examples[0].answers[0], some.examples[0]) > 0
    assert some.fingerprint == task(typed, n=30).fingerprint != other.fingerprint


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_not_there_is_named_with_where_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*{tmp_path.name}.*; download .* there"):
        task(f"{name}:{tmp_path}/gone")
    with pytest.raises(UserError, match=f"{name} needs the folder where the data set is; type {name}:FOLDER"):
        task(name)


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png", ".tif"))


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("aid", "ucmerced")])
def test_few_missing_images_are_counted_and_many_refused(tmp_path: Path, name: str) -> None:
    WRITE[name](tmp_path)
    first, *more = [path for path in pictures(tmp_path) if not layout.held_out(stem(name, path))]
    before = len(task(f"{name}:{tmp_path}").examples)
    first.unlink()
    found = task(f"{name}:{tmp_path}")
    lost = before - len(found.examples)
    assert lost in (1, 2, 3)
    assert f"{lost} of {before} examples left out: no image file" in found.notes[-1] + found.notes[-2]
    for path in more[:4]:
        path.unlink()
    with pytest.raises(UserError, match=r"no image file \(.*, \.\.\.\); at most 2 % may be left out; download"):
        task(f"{name}:{tmp_path}")


def stem(name: str, path: Path) -> str:
    """The image's id in the data set's own files."""
    if name == "xbd":
        return path.stem.removesuffix("_pre_disaster").removesuffix("_post_disaster")
    return str(int(path.stem.rpartition("_")[2])) if name in ("coco-captions", "vqav2") else path.stem


def test_the_hash_split_is_a_tenth_and_a_property_of_the_name() -> None:
    names = [str(i) for i in range(5000)]
    assert 0.085 < np.mean([layout.held_out(name) for name in names]) < 0.115
    assert [name for name in names[:200] if layout.held_out(name)] == HELD_OUT, "the same on every machine, for ever"


HELD_OUT = ["18", "72", "74", "87", "96", "105", "111", "127", "148", "154", "155", "157", "181", "187", "188", "193"]


# -- what is particular


def test_official_splits_are_used_where_their_images_are_too(tmp_path: Path) -> None:
    coco(tmp_path)
    coco(tmp_path, "train2017", 5000)
    found, calibration = task(f"coco-captions:{tmp_path}"), task(f"coco-captions:{tmp_path}", "calibration")
    assert len(found.examples) == len(calibration.examples) == COUNT
    assert {str(example.image.parent.name) for example in calibration.examples} == {"train2017"}  # type: ignore[union-attr]
    assert not [note for note in found.notes if "hash" in note]
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")  # the annotations come in one archive, the images do not
    assert len(task(f"coco-captions:{tmp_path}").examples) < COUNT

    vqav2(tmp_path / "v")
    vqav2(tmp_path / "v", "train2014", 7000)
    assert len(task(f"vqav2:{tmp_path / 'v'}").examples) == 2 * COUNT
    gqa(tmp_path / "g")
    gqa(tmp_path / "g", "val", 500)
    assert min(clusters(task(f"gqa:{tmp_path / 'g'}", "calibration"))) == "n500"
    for prefix, first in (("LR_split_test", 0), ("LR_split_train", 300)):
        rsvqa(tmp_path / "r", prefix, "Images_LR", first)
    assert clusters(task(f"rsvqa-lrben:{tmp_path / 'r'}", "calibration")) == {str(i) for i in range(300, 300 + COUNT)}


def test_coco_has_five_references_and_bad_captions_are_counted(tmp_path: Path) -> None:
    coco(tmp_path)
    file = tmp_path / "annotations/captions_val2017.json"
    change(file, lambda data: data["annotations"].append({"id": 7, "image_id": 99999, "caption": "A dog."}))
    found = task(f"coco-captions:{tmp_path}")
    assert {len(example.answers) for example in found.examples} == {5}
    assert "a caption of an image that is not in the list (7)" in found.notes[1]
    change(file, lambda data: {**data, "annotations": [a for a in data["annotations"] if a["image_id"] > 150]})
    with pytest.raises(UserError, match=r"51 of \d+ examples left out: no caption \(100, 101, 102, \.\.\.\)"):
        task(f"coco-captions:{tmp_path}")


def test_vqav2_puts_the_commonest_answer_first_and_counts_what_does_not_fit(tmp_path: Path) -> None:
    vqav2(tmp_path)
    notes = tmp_path / "v2_mscoco_val2014_annotations.json"

    def spoil(data: Any) -> None:
        data["annotations"][0]["image_id"] = 5
        data["annotations"][2]["answers"] = [{"answer": " "}]
        del data["annotations"][4]

    change(notes, spoil)
    found = task(f"vqav2:{tmp_path}")
    assert found.examples[0].answers == ("yes",) * 6 + ("no",) * 3 + ("maybe",)
    assert found.examples[0].prompt == "Is it a cat?\nAnswer the question using a single word or phrase."
    assert found.score("no", found.examples[0]) == pytest.approx(vqa_accuracy.accuracy("no", found.examples[0]))
    assert found.score("Yes.", found.examples[0]) == 1
    said = " ".join(found.notes)
    assert all(
        why in said for why in ("annotated on another image (100000)", "no answers (101000)", "no annotation (102000)")
    )
    change(notes, lambda data: {"annotations": data["annotations"][20:]})
    with pytest.raises(UserError, match="at most 2 % may be left out"):
        task(f"vqav2:{tmp_path}")


def test_duplicates_are_refused(tmp_path: Path) -> None:
    vqav2(tmp_path)
    change(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", lambda d: d["questions"].append(d["questions"][-3]))
    with pytest.raises(UserError, match="has the id '218001' twice; every example needs its own"):
        task(f"vqav2:{tmp_path}")


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}'])
def test_files_that_are_something_else_are_named(tmp_path: Path, text: str) -> None:
    coco(tmp_path)
    (tmp_path / "annotations/captions_val2017.json").write_text(text)
    with pytest.raises(
        UserError, match=r"captions_val2017.json (as JSON|is not of the coco-captions layout).*download"
    ):
        task(f"coco-captions:{tmp_path}")


@pytest.mark.parametrize("text", ["{", '{"questions": [{"image_id": 1}, {"ima', '{"questions": [', '{"questions": [}'])
def test_long_files_are_read_one_entry_at_a_time_and_named_where_they_break(tmp_path: Path, text: str) -> None:
    source = layout.DatasetFolder("x", tmp_path, "download it")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"(cannot read .*a.json as JSON|it has no questions).*; download it"):
        list(source.records("a.json", "questions"))
    (tmp_path / "a.json").write_text('{"info": {}, "questions" : [ {"a": "]"} ,\n{"a": [{}]}\n], "more": [1]}')
    assert list(source.records("a.json", "questions")) == [{"a": "]"}, {"a": [{}]}]
    (tmp_path / "a.json").write_text('{"questions": []}')
    assert list(source.records("a.json", "questions")) == []


def test_entries_that_lack_a_field_are_named(tmp_path: Path) -> None:
    gqa(tmp_path)
    change(tmp_path / "testdev_balanced_questions.json", lambda data: data["200003"].pop("imageId") and None)
    with pytest.raises(
        UserError, match=r"gqa in .* is not of the official layout: an entry has no 'imageId'; download"
    ):
        task(f"gqa:{tmp_path}")


def test_rsvqa_asks_three_kinds_and_reports_each(whole: dict[str, Path]) -> None:
    found = task(f"rsvqa-lrben:{whole['rsvqa-lrben']}", n=200)
    assert {example.kind for example in found.examples} == {"presence", "comp", "rural_urban"}
    answers = ["Rural." if example.kind == "rural_urban" else "no" for example in found.examples]
    measured = found.measure(answers)
    assert measured == pytest.approx({"comp": 0, "presence": 0, "rural_urban": 1, "mean of the kinds": 1 / 3})


def test_scene_classes_are_in_the_prompt_and_chance_is_honest(whole: dict[str, Path]) -> None:
    found = task(f"aid:{whole['aid']}")
    assert found.examples[0].prompt == (
        "Classify the image from the following classes: Airport, BareLand, Beach. Answer in one word or a short phrase."
    )
    assert found.chance == pytest.approx(1 / 3, abs=0.1)
    bare = next(example for example in found.examples if example.answers == ("BareLand",))
    assert found.score("bare land.", bare) == 1


def test_grounding_knows_each_images_size_and_writes_its_boxes(whole: dict[str, Path]) -> None:
    found = task(f"geochat-grounding:{whole['geochat-grounding']}", n=60)
    ref = next(example for example in found.examples if example.kind == "ref")
    both = next(example for example in found.examples if example.kind == "grounding")
    assert ref.prompt == "[refer] Give me the location of <p> the large ship </p>"
    assert both.prompt == "[grounding]the large ship"
    assert ref.answers == ("{<10><10><50><50>|<0>}",)
    assert ref.regions
    assert (ref.regions.width, ref.regions.height) == (60, 40)
    assert found.measure([example.answers[0] for example in found.examples])["acc@0.5"] == 1
    assert found.measure([example.answers[0] for example in found.examples])["acc@0.5, read as diagonal"] == 0
    diagonal = geochat.geochat_boxes(whole["geochat-grounding"], "evaluation", 60, 0, decoding="diagonal")
    assert diagonal.measure([example.answers[0] for example in found.examples])["acc@0.5"] == 0


def test_lines_without_boxes_are_counted(tmp_path: Path) -> None:
    bench(tmp_path, geochat.REFERRING)
    change(tmp_path / geochat.REFERRING, lambda lines: lines[0].update(ground_truth=[]))
    change(tmp_path / geochat.REFERRING, lambda lines: lines[1].update(ground_truth=[[[5, 5], [9, 5], [9, 5], [5, 5]]]))
    found = task(f"geochat-grounding:{tmp_path}")
    assert "2 of" in found.notes[1]
    assert "no true box with an area (0-00001, 1-00002)" in found.notes[1]
    (tmp_path / geochat.REFERRING).write_text("[1]\n")
    with pytest.raises(UserError, match=r"line 1 is not a JSON object \(it is \[1\] instead.*\); download"):
        task(f"geochat-grounding:{tmp_path}")


def test_regions_are_scored_by_rouge(whole: dict[str, Path]) -> None:
    pytest.importorskip("rouge_score")
    found = task(f"geochat-region-captions:{whole['geochat-region-captions']}", n=40)
    assert found.examples[0].prompt == "[identify] What is the object present at {<10><10><50><50>|<0>}"
    assert found.score("<p>A large ship</p>.", found.examples[0]) == 1
    assert found.metrics["ROUGE-1"](["ship large"] * 40, found.examples) == pytest.approx(0.8)


def test_flickr_gives_images_captions_and_owners(tmp_path: Path) -> None:
    flickr(tmp_path)
    found, calibration = retrieval.flickr30k(tmp_path), retrieval.flickr30k(tmp_path, "calibration")
    assert len(found.images) == len(calibration.images) == COUNT // 3
    assert set(found.images).isdisjoint(calibration.images)
    assert len(found.captions) == len(found.owner) == 5 * len(found.images)
    assert all(f"of {int(found.images[i].stem)} ." in text for i, text in zip(found.owner, found.captions, strict=True))
    perfect = np.equal.outer(np.arange(len(found.images)), np.array(found.owner)).astype(float)
    assert recalls(perfect, perfect.T, found.owner)["mean"] == 1
    assert len(retrieval.flickr30k(tmp_path, n=10, seed=3).images) == 10
    with pytest.raises(UserError, match=r"flickr30k needs dataset_flickr30k.json in .*; download"):
        retrieval.flickr30k(tmp_path / "gone")


def test_a_model_answers_a_data_set(scenes_llava: VLM, whole: dict[str, Path]) -> None:
    """Through the code that real models run: images from files, questions in batches, scores and likelihoods."""
    found = task(f"rsvqa-lrben:{whole['rsvqa-lrben']}", n=6)
    rows = evaluate(scenes_llava, found, plain=True)
    assert rows["example"] == [
        example.id for example in sorted(found.examples, key=lambda e: rows["example"].index(e.id))
    ]
    assert all(np.isfinite(rows["nll"]))
    assert set(found.measure(rows["answer"])) >= {"mean of the kinds"}


def test_a_truncated_image_is_named_while_tensors_are_made_before_any_plan(scenes_llava: VLM, tmp_path: Path) -> None:
    gqa(tmp_path)
    found = task(f"gqa:{tmp_path}", n=4)
    broken = found.examples[2].image
    assert isinstance(broken, Path)
    broken.write_bytes(picture(tmp_path / "large.jpg", (90, 90)).read_bytes()[:400])
    with pytest.raises(UserError, match=f"cannot read the image .*{broken.name}"):
        list(batches_by_image(scenes_llava, found))


# -- a user's own


def test_own_lines_with_a_scorer(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (100, 50))
    write(tmp_path / "q.jsonl", [{"image": "a.png", "prompt": "?", "answers": ["cat"] * 3 + ["dog"] * 2}])
    found = task(f"vqa:{tmp_path / 'q.jsonl'}")
    assert found.score("a dog", found.examples[0]) == pytest.approx((2 / 3 * 3 + 1 / 3 * 2) / 5)
    write(
        tmp_path / "c.jsonl",
        [{"image": "a.png", "prompt": "?", "answers": [f"{w} cat sits here"]} for w in ("a", "one")],
    )
    found = task(f"caption:{tmp_path / 'c.jsonl'}")
    assert found.score("a cat sits here", found.examples[0]) > found.score("a dog", found.examples[0])
    assert found.score("no word of it", found.examples[0]) == 0
    write(tmp_path / "b.jsonl", [{"image": "a.png", "prompt": "where?", "boxes": [[10, 10, 30, 40]]}])
    found = task(f"iou:{tmp_path / 'b.jsonl'}")
    assert found.examples[0].answers == ("{<10><20><30><80>|<0>}",)
    assert found.score(found.examples[0].answers[0], found.examples[0]) == 1
    longer = local.own_task(tmp_path / "q.jsonl", "evaluation", 5, 0, score=lambda answer, example: float(len(answer)))
    assert longer.score("four", longer.examples[0]) == 4


def test_fields_of_lines_that_mean_nothing_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (100, 50))
    line = {"image": "a.png", "prompt": "?", "answers": ["cat"]}
    known = {"id": "one", "kind": "animal", "split": "evaluation", "turns": [["?", "!"]]}
    write(
        tmp_path / "q.jsonl", [{**line, **known}, {**line, "splt": "calibration", "source": "web"}, {**line, "splt": 1}]
    )
    (note,) = task(str(tmp_path / "q.jsonl")).notes
    told = "splt in 2 of them (did you mean split?), source in 1 of them"
    assert note == f"fields of lines of {tmp_path / 'q.jsonl'} that are not read: {told}"
    write(tmp_path / "q.jsonl", [{**line, **known}])
    assert task(str(tmp_path / "q.jsonl")).notes == ()


@pytest.mark.parametrize(
    ("scorer", "line", "message"),
    [
        ("vqa", {"answers": ["cat"]}, "fewer than 4 answers, so the accuracy of VQA cannot reach 1"),
        ("exact", {"answers": ["cat", " "]}, "line 1 has an empty answer"),
        ("iou", {"answers": ["cat"]}, r"line 1 lacks boxes; .*in pixels"),
        ("iou", {"boxes": []}, "line 1 lacks boxes"),
        ("iou", {"boxes": [[10, 10, 10, 40]]}, "line 1 has a box without an area"),
        (
            "iou",
            {"boxes": [[60, 10, 20, 30]]},
            r"line 1 has the box \[60, 10, 20, 30\], which ends before it begins: box",
        ),
        (
            "recall",
            {"boxes": [[1, 1, 9, 9], [9999, 1, 10010, 9]]},
            "line 1 has a box outside of its image, which is 8 by 6 pixels",
        ),
        ("iou", {"boxes": [[1, 1, math.inf, 9]]}, "line 1: boxes is .* instead of"),
        ("yesno", {"answers": ["yes", "No."]}, "is answered with 'yes' and 'No.'; in yesno: .* one of them alone"),
        ("bleu", {"answers": ["cat"]}, "unknown scorer 'bleu'; choose from exact, vqa, iou,"),
        ("yseno", {"answers": ["yes"]}, "unknown scorer 'yseno'; .*did you mean yesno"),
        (
            "exact",
            {"image": "https://a.org/b.png", "answers": ["cat"]},
            "line 1 names https://a.org/b.png, .*download it",
        ),
        (
            "exact",
            {"answers": ["cat"], "image": "gone.png"},
            r"1 of 1 examples left out: no image file \(line-000001: gone.png\)",
        ),
    ],
)
def test_own_lines_that_do_not_fit_are_refused(tmp_path: Path, scorer: str, line: dict[str, Any], message: str) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "x.jsonl", [{"image": "a.png", "prompt": "?", **line}])
    with pytest.raises(UserError, match=message):
        task(f"{scorer}:{tmp_path / 'x.jsonl'}")


def test_a_line_that_is_a_list_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('\n["a.png", "what?", "cat"]\n')
    with pytest.raises(
        UserError, match=r'line 2 is \["a.png", "what\?", "cat"\] instead of an object; each line is like'
    ):
        task(str(tmp_path / "x.jsonl"))


def test_boxes_that_reach_beyond_their_image_are_kept_with_a_note_unless_by_rounding(tmp_path: Path) -> None:
    width, height = 80, 60
    picture(tmp_path / "a.png", (width, height))
    line = {"image": "a.png", "prompt": "where?"}
    boxes = [[-0.5, 0, width + 1, height], [0, 0, width + 12.5, 9], [-3, 0, 9, 9], [1, 1, 9, 9]]
    write(tmp_path / "x.jsonl", [{**line, "id": f"box {i}", "boxes": [box]} for i, box in enumerate(boxes)])
    found = task(f"iou:{tmp_path / 'x.jsonl'}")
    beyond = (
        "2 of 4 examples have boxes that reach beyond their image, by at most 12.5 pixels (line 2, 3); they are used"
    )
    assert [note for note in found.notes if "boxes" in note] == [f"{beyond} as they are"]
    kept = [example.regions.polygons[0] for example in found.examples if example.regions]
    assert max(x for x, _ in kept[1]) == width + 12.5


def test_a_file_whose_name_has_a_comma_or_a_colon_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    for name in ("my, own.jsonl", "b.jsonl", "at 12:30.jsonl"):
        write(tmp_path / name, [{"image": "a.png", "prompt": "?", "answers": ["cat"]}])
    typed = "vqa,exact:my, own.jsonl, b.jsonl,my, own.jsonl,gone, too.jsonl,lmms-eval:chartqa,textvqa_val"
    library = ("lmms-eval:chartqa", "lmms-eval:textvqa_val")
    assert task_names(typed) == (
        "vqa",
        "exact:my, own.jsonl",
        "b.jsonl",
        "my, own.jsonl",
        "gone",
        "too.jsonl",
        *library,
    )
    for name in ("exact:my, own.jsonl", "at 12:30.jsonl", "exact:at 12:30.jsonl"):
        assert len(task(name).examples) == 1


def test_boxes_are_in_pixels_of_the_upright_image(tmp_path: Path) -> None:
    """As the model sees it: a camera that was held sideways says so in the file."""
    for orientation, size in ((1, (80, 40)), (3, (80, 40)), (6, (40, 80)), (8, (40, 80))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
        write(tmp_path / "b.jsonl", [{"image": "a.jpg", "prompt": "where?", "boxes": [[0, 0, 20, 30]]}])
        (example,) = task(f"iou:{tmp_path / 'b.jsonl'}").examples
        assert example.regions is not None
        assert (example.regions.width, example.regions.height) == size == open_image(example.image).size


def test_boxes_of_fractions_are_noted(tmp_path: Path) -> None:
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg")
    lines = [{"image": "a.jpg", "prompt": "where?", "boxes": [[0, 0.5, 1, 1]]}]
    write(tmp_path / "b.jsonl", lines)
    noted = [note for note in task(f"iou:{tmp_path / 'b.jsonl'}").notes if "between 0 and 1" in note]
    assert noted == [
        f"all boxes of {tmp_path / 'b.jsonl'} lie between 0 and 1: boxes are in pixels, so fractions must be "
        "multiplied by the width and the height of their image"
    ]
    write(tmp_path / "b.jsonl", [*lines, {"image": "a.jpg", "prompt": "who?", "boxes": [[0, 0.5, 20, 30]]}])
    assert not any("between 0 and 1" in note for note in task(f"iou:{tmp_path / 'b.jsonl'}").notes)


def test_a_data_set_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def rows(first: int, count: int) -> Any:
        pixels = [Image.fromarray(np.full((6, 8, 3), i, np.uint8)) for i in range(first, first + count)]
        columns = {"image": pixels, "question": ["what?"] * count, "answer": [f"number {i}" for i in range(count)]}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    datasets.DatasetDict({"train": rows(0, 20), "test": rows(100, 20)}).save_to_disk(str(tmp_path / "d"))
    found, calibration = task(f"exact:{tmp_path / 'd'}", n=12), task(f"exact:{tmp_path / 'd'}", "calibration")
    assert (len(found.examples), len(calibration.examples)) == (12, 20)
    assert clusters(found).isdisjoint(clusters(calibration))
    assert np.asarray(open_image(found.examples[0].image))[0, 0, 0] >= 100
    assert found.fingerprint == task(f"exact:{tmp_path / 'd'}", n=12).fingerprint != calibration.fingerprint
    drawn: list[list[tuple[str, ...]]] = []
    for name in ("one", "other"):
        rows(0, 60).save_to_disk(str(tmp_path / name))
        found, calibration = task(f"exact:{tmp_path / name}"), task(f"exact:{tmp_path / name}", "calibration")
        assert (len(found.examples), len(calibration.examples)) == (54, 6)
        assert clusters(found).isdisjoint(clusters(calibration))
        note = "evaluation examples leave out 6 of 60 images, which are kept for calibration"
        assert found.notes == (f"no split for calibration here: {note}",)
        drawn.append([one.answers for one in calibration.examples])
    assert drawn[0] == drawn[1]  # whatever the folder is called
    rows(0, 6).save_to_disk(str(tmp_path / "six"))
    assert len(task(f"exact:{tmp_path / 'six'}", "calibration").examples) == 1
    rows(0, 4).save_to_disk(str(tmp_path / "four"))
    assert len(task(f"exact:{tmp_path / 'four'}").examples) == 4
    with pytest.raises(UserError, match="four asks about fewer than 5 images, too few to keep one for calibration"):
        task(f"exact:{tmp_path / 'four'}", "calibration")
    nothing = rows(0, 6).to_dict() | {"image": [None, *rows(0, 6)["image"][1:]]}
    datasets.Dataset.from_dict(nothing, rows(0, 6).features).save_to_disk(str(tmp_path / "null"))
    with pytest.raises(UserError, match=r"of [56] examples left out: no image file \(line-000001\)"):
        task(f"exact:{tmp_path / 'null'}")
    with pytest.raises(UserError, match="has no column boxes; it takes a folder that datasets' save_to_disk wrote"):
        task(f"iou:{tmp_path / 'one'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*empty as a saved data set"):
        task(f"exact:{tmp_path / 'empty'}")


def test_pairs_of_images_and_what_is_asked_about_them(whole: dict[str, Path]) -> None:
    for example in task(f"levir-cd:{whole['levir-cd']}").examples:
        assert example.answers == (("no", "yes")[int(example.id.removeprefix("test_")) % 2],)
        assert [path.parent.name for path in example.images] == ["A", "B"]  # type: ignore[union-attr]
    for example in task(f"levir-cc:{whole['levir-cc']}").examples:
        assert example.kind == ("unchanged", "changed")[int(example.id.removeprefix("test_")) % 2]
        assert len(example.answers) == 5
    damages = ("no damage", "minor damage", "major damage", "destroyed")
    found = task(f"xbd:{whole['xbd']}")
    for example in found.examples:
        worst = int(example.cluster.rpartition("_")[2]) % 4
        assert example.answers[0] == (damages[worst] if example.kind == "worst" else ("no", "yes")[worst > 0])
        before, after = example.images
        assert str(before).endswith("_pre_disaster.png")
        assert str(after).endswith("_post_disaster.png")
    assert {example.kind for example in found.examples} == {"any", "worst"} <= set(found.metrics)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('"flooded"', "socal-fire_00000003 has the damage flooded"),
        ('["destroyed"]', r'subtype is \["destroyed"\] instead of text'),
    ],
    ids=["another word", "a list"],
)
def test_damage_that_is_none_of_the_data_sets_is_named(tmp_path: Path, written: str, said: str) -> None:
    WRITE["xbd"](tmp_path)
    file = tmp_path / "test" / "labels" / "socal-fire_00000003_post_disaster.json"
    file.write_text(file.read_text().replace('"destroyed"', written))
    with pytest.raises(UserError, match=f"not of the official layout: {said}"):
        task(f"xbd:{tmp_path}")
