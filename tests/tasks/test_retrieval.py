"""Searching end to end: ranks as the model's own forward gives them, in a sweep, from files, and after calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import saved_vlms
import torch
from recalls import recalls

from experiments.small.datasets import flickr
from sensitivity.api.sweeping import one_at_a_time, sweep, with_calibration
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.measure.speculation import check_drafts
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.examples.types import Example, Task
from sensitivity.tasks.retrieval import ranks, reranked
from sensitivity.tasks.table import task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_vlms.save("blip2_itm", tmp_path_factory.mktemp("models") / "itm")


@pytest.fixture(scope="module")
def itm(folder: Path) -> VLM:
    return load(str(folder))


def by_forward(vlm: VLM, asked: Task) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and match of every image with every caption, by the class's own forward pass."""
    images = [e for e in asked.examples if e.kind == "text"]
    captions = [e for e in asked.examples if e.kind == "image"]
    words = vlm.processor.tokenizer
    words.padding_side = "right"
    texts = words([e.prompt for e in captions], padding=True, return_tensors="pt")
    pictures = [open_image(e.image) for e in images]
    pixels = vlm.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    queries = torch.full((len(captions), 4), vlm.model.config.image_token_index)
    ids = torch.cat([queries, texts["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(queries), texts["attention_mask"]], 1)
    similar, match = np.zeros((len(images), len(captions))), np.zeros((len(images), len(captions)))
    with torch.no_grad():
        for i in range(len(images)):
            similar[i] = vlm.model(pixels[i : i + 1], ids, attention_mask=mask).logits_per_image[0]
            copies = pixels[i : i + 1].expand(len(captions), -1, -1, -1)
            read = vlm.model(copies, ids, attention_mask=mask, use_image_text_matching_head=True)
            match[i] = read.logits_per_image[:, 1]
    return similar, match


@pytest.mark.parametrize("top", [3, 100])
def test_ranks_are_those_of_the_models_own_forward(itm: VLM, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensitivity.measure.generate.retrieval.CHUNK", 7)  # no chunk is whole
    asked = task("retrieval", n=12)
    assert asked.gallery is not None
    object.__setattr__(asked.gallery, "top", top)
    rows = evaluate(itm, asked)
    similar, match = by_forward(itm, asked)
    own = np.eye(12, dtype=bool)
    for kind, scores, again in (("text", similar, match), ("image", similar.T, match.T)):
        mine = [i for i, way in enumerate(rows["kind"]) if way == kind]
        assert [int(rows["answer"][i]) - 1 for i in mine] == ranks(reranked(scores, again, top), own).tolist()
        share = np.exp(scores / 0.07)
        expected = -np.log(share[own] / share.sum(1))
        np.testing.assert_allclose([rows["nll"][i] for i in mine], expected, rtol=1e-4)
    found = asked.measure(rows["answer"])
    assert found == pytest.approx(recalls(reranked(similar, match, top), reranked(similar.T, match.T, top), range(12)))
    assert rows["score"] == [float(answer == "1") for answer in rows["answer"]]
    assert asked.chance == 1 / 12


def test_what_chance_would_score_is_not_known_from_one_example() -> None:
    for name in ("vqa", "retrieval"):
        asked = task(name, n=8)
        assert asked.chance is not None
        first = asked.examples[0].cluster
        alone = [one for one in asked.examples if one.cluster == first]
        single = replace(asked, examples=tuple(alone if name == "retrieval" else alone[:1]))
        assert single.chance is None


def test_scenes_have_captions_of_their_own_and_pools_of_256() -> None:
    asked = task("retrieval", n=300)
    captions = [e.prompt for e in asked.examples if e.kind == "image"]
    assert len(captions) == len(set(captions)) == 300
    assert asked.chance == 1 / 256
    assert {e.cluster for e in asked.examples}.isdisjoint(
        e.cluster for e in task("retrieval", "calibration", n=50).examples
    )


def test_pools_do_not_see_each_other(itm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = task("retrieval", n=12)
    alone = [evaluate(itm, task_of(asked, start, 4))["answer"] for start in (0, 4, 8)]
    object.__setattr__(asked.gallery, "pool", 4)
    assert evaluate(itm, asked)["answer"] == [answer for answers in alone for answer in answers]


def task_of(asked: Task, start: int, images: int) -> Task:
    few = asked.examples[2 * start : 2 * (start + images)]
    return Task("few", few, asked.score, gallery=asked.gallery)


def test_a_sweep_from_a_folder_is_the_plain_loop(folder: Path, tmp_path: Path) -> None:
    vlm = load(str(folder))
    parts = inspect(vlm, by="part")
    plans = one_at_a_time(parts, bits=(3,))
    study = sweep(vlm, parts, plans, ["retrieval"], tmp_path / "study", n=8)
    assert study.tasks == ("retrieval",)
    asked = task("retrieval", n=8)
    for plan in plans:
        rows = study.examples(plan)
        assert rows is not None
        assert len(rows) == 16
        with quantized(vlm.model, parts, plan):
            plain = evaluate(vlm, asked)
        found = dict(zip(rows["example"], rows["answer"], strict=True))
        assert found == dict(zip(plain["example"], plain["answer"], strict=True))
    assert "retrieval" in study.table().columns


def test_calibrated_methods_read_pairs(itm: VLM) -> None:
    parts = inspect(itm, by="part")
    schemes, statistics = with_calibration(itm, parts, [scheme("gptq", 3)], ["retrieval"], n=4, cache_gb=0)
    plan = Plan.uniform(parts, schemes[0])
    before = evaluate(itm, task("retrieval", n=8))["nll"]
    with quantized(itm.model, parts, plan, None, statistics):
        assert evaluate(itm, task("retrieval", n=8))["nll"] != before


def test_flickr30k_from_its_files(itm: VLM, tmp_path: Path) -> None:
    flickr(tmp_path)
    asked = task(f"flickr30k:{tmp_path}", n=6)
    assert asked.name == "flickr30k"
    assert [e.kind for e in asked.examples] == ["text", *["image"] * 5] * 6
    rows = evaluate(itm, asked)
    assert len(rows["answer"]) == 36
    assert all(1 <= int(answer) <= 30 for answer in rows["answer"])
    assert set(asked.measure(rows["answer"])) == {
        *(f"{way} R@{k}" for way in ("text", "image") for k in (1, 5, 10)), "text mean", "image mean", "mean"
    }  # fmt: skip
    with pytest.raises(UserError, match="flickr30k needs the folder where the data set is; type flickr30k:FOLDER"):
        task("flickr30k")


def test_models_are_told_what_they_cannot_do(itm: VLM, scenes_llava: VLM) -> None:
    with pytest.raises(
        UserError, match=r"scenes-llava cannot search, having no head .*; take .* or embedded:scenes-blip2-itm"
    ):
        evaluate(scenes_llava, task("retrieval", n=4))
    with pytest.raises(UserError, match="generates no text, so that nothing can be drafted"):
        check_drafts(itm, task("vqa", n=1))
    with pytest.raises(UserError, match=r"generates no text: its tasks are retrieval and flickr30k:FOLDER"):
        evaluate(itm, task("vqa", n=4))


def test_a_score_that_is_no_number_finds_nothing(folder: Path) -> None:
    vlm = load(str(folder))
    vlm.model.vision_projection.weight.fill_(float("nan"))
    rows = evaluate(vlm, task("retrieval", n=5))
    assert rows["score"] == [0.0] * 10


def test_an_example_is_one_image_and_its_captions() -> None:
    text, image = task("retrieval", n=1).examples
    assert isinstance(text, Example)
    assert (text.prompt, image.prompt) == ("", text.answers[0])


def test_the_embedded_model_finds_and_is_lost_among_others_images() -> None:
    vlm = load("embedded:scenes-blip2-itm")
    asked = task("retrieval", n=24)
    assert asked.measure(evaluate(vlm, asked)["answer"])["mean"] > 0.95
    moved = [*asked.examples[2:], *asked.examples[:2]]
    wrong = tuple(replace(e, image=other.image) for e, other in zip(asked.examples, moved, strict=True))
    assert np.mean(evaluate(vlm, replace(asked, examples=wrong))["score"]) < 0.1
