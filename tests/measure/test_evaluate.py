"""The fast path against generation by transformers, example by example; images and data that are not in order."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sensitivity.measure import loop
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.generate.answer_tokens import cannot_be_right
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.models.discovery import inspect
from sensitivity.models.families import FAMILIES
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import TASKS, task


def same(fast: dict[str, list[Any]], plain: dict[str, list[Any]]) -> None:
    """Equal examples, scores and likelihoods; equal answers, or one that was left off and begins like the other."""
    assert fast["example"] == plain["example"]
    assert fast["score"] == plain["score"]
    np.testing.assert_allclose(fast["nll"], plain["nll"], rtol=1e-3, atol=2e-4)
    for ours, theirs in zip(fast["answer"], plain["answer"], strict=True):
        assert ours == theirs or (ours.endswith("…") and theirs.startswith(ours[:-1].rstrip()))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_full_precision_answers_equal_generate(scenes_llava: VLM, name: str) -> None:
    asked = task(name, n=20)
    same(evaluate(scenes_llava, asked), evaluate(scenes_llava, asked, plain=True))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    name=st.sampled_from(sorted(TASKS)), n=st.integers(1, 23), seed=st.integers(0, 99),
    bits=st.lists(st.sampled_from([None, 2, 3, 4, 8]), min_size=7, max_size=7),
)  # fmt: skip
def test_fast_answers_equal_generate_under_random_plans(
    scenes_llava: VLM, name: str, n: int, seed: int, bits: list[int | None]
) -> None:
    parts = inspect(scenes_llava, by="group")
    chosen = [None if width is None else scheme("rtn", width, group="tensor") for width in bits]
    plan = Plan(tuple(zip(parts.names, chosen, strict=True)))
    asked = task(name, n=n, seed=seed)
    with quantized(scenes_llava.model, parts, plan):
        same(evaluate(scenes_llava, asked), evaluate(scenes_llava, asked, plain=True))


def test_likelihood_is_the_sum_over_the_answers_tokens(scenes_llava: VLM) -> None:
    """Once more by hand, for one example, without batches or caches."""
    asked = task("vqa", n=5)
    rows = evaluate(scenes_llava, asked)
    example, words = asked.examples[1], scenes_llava.processor.tokenizer
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.prompt}]}]
    text = scenes_llava.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = scenes_llava.processor(images=[open_image(example.image)], text=[text], return_tensors="pt")
    answer = torch.tensor([[*words(example.answers[0], add_special_tokens=False)["input_ids"], words.eos_token_id]])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    logits = scenes_llava.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    chances = logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1).gather(1, answer[0][:, None])
    assert rows["nll"][1] == pytest.approx(-chances.mean().item(), abs=1e-5)


def test_a_users_own_jsonl(scenes_llava: VLM, tmp_path: Path) -> None:
    asked = task("vqa", n=10)
    lines = []
    for example in asked.examples:
        assert isinstance(example.image, np.ndarray)
        Image.fromarray(example.image).save(tmp_path / f"{example.cluster}.png")
        lines.append({"id": example.id, "image": f"{example.cluster}.png", "prompt": example.prompt,
                      "answers": list(example.answers), "kind": example.kind})  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own = task(str(tmp_path / "mine.jsonl"), n=100)
    mine, theirs = evaluate(scenes_llava, own, plain=True), evaluate(scenes_llava, asked, plain=True)
    assert mine["answer"] == theirs["answer"]
    assert mine["score"] == theirs["score"]
    assert set(mine["task"]) == {"mine"}


def write(path: Path, mode: str, size: tuple[int, int] = (8, 6), **how: Any) -> Path:
    Image.new(mode, size, 0).save(path, **how)
    return path


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "L"), ("a.jpg", "CMYK"), ("a.png", "P"), ("a.png", "RGBA"), ("a.png", "I;16"), ("a.png", "1")],
)
def test_pictures_of_every_kind_become_rgb(tmp_path: Path, name: str, mode: str) -> None:
    assert open_image(write(tmp_path / name, mode)).mode == "RGB"


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png")).flatten().tolist() == [128] * 48


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    assert open_image(write(tmp_path / "a.jpg", "RGB", exif=exif)).size == (6, 8)


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jpg", "RGB", (64, 64)).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("half.jpg", "text.png"):
        with pytest.raises(UserError, match=f"cannot read the image .*{name}"):
            open_image(tmp_path / name)
    with pytest.raises(UserError, match=r"no image at .*gone\.png"):
        open_image(tmp_path / "gone.png")


GOOD = {"image": "a.png", "prompt": "what?", "answers": ["this"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        ([json.dumps({"image": "a.png", "prompt": "?"})], 'line 1 lacks answers; each line is like {"image"'),
        (["[]"], "line 1 is [] instead of an object; each line is like {"),
        ([json.dumps({**GOOD, "id": 7}), json.dumps({**GOOD, "id": 7})], "has the id '7' twice"),
        ([json.dumps({**GOOD, "split": "calibration"})], "has no evaluation lines"),
        ([], "has no evaluation lines"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("{", r"\{")):
        task(str(tmp_path / "x.jsonl"))


def test_unknown_tasks_and_splits() -> None:
    with pytest.raises(UserError, match=r"unknown task 'vqaa'; choose from vqa, .* \(did you mean vqa\?\)"):
        task("vqaa")
    with pytest.raises(UserError, match="unknown split 'test'; choose from evaluation, calibration"):
        task("vqa", "test")
    with pytest.raises(UserError, match="at least one example, not 0"):
        task("vqa", n=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_users_tokenizer_keeps_its_padding_side(scenes_llava: VLM, side: str) -> None:
    tokenizer, asked = scenes_llava.processor.tokenizer, task("vqa", n=6)
    expected, own = evaluate(scenes_llava, asked, plain=True), tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        assert evaluate(scenes_llava, asked, plain=True) == expected
        assert tokenizer.padding_side == side
    finally:
        tokenizer.padding_side = own


def test_a_defect_is_not_blamed_on_the_model(scenes_llava: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the model's code is told in a sentence; one in ours keeps its type and its traceback."""
    for module, expected in (("sensitivity.measure.evaluation", AttributeError), ("torch.nn.modules", UserError)):
        namespace: dict[str, Any] = {"__name__": module}
        exec("def failing(*_): raise AttributeError('no such field')", namespace)
        monkeypatch.setattr(loop, "answer", namespace["failing"])
        with pytest.raises(expected, match="no such field"):
            loop.check_runs(scenes_llava, [task("vqa", n=1)])


@pytest.mark.parametrize("found", [math.nan, math.inf, None, "1", np.ones(2)], ids=str)
def test_a_scorer_of_ones_own_must_give_a_number(found: Any, scenes_llava: VLM) -> None:
    own = dataclasses.replace(task("vqa", n=2), name="own", score=lambda answer, example: found, together=None)
    with pytest.raises(UserError, match=r"the scorer of own gave .* for the example .*, which is no number"):
        evaluate(scenes_llava, own)


def test_numbers_of_other_libraries_are_scores(scenes_llava: VLM) -> None:
    for one in (True, np.float32(0.5), torch.tensor(0.25), np.bool_(False)):
        own = dataclasses.replace(task("vqa", n=2), score=lambda answer, example, one=one: one, together=None)
        assert evaluate(scenes_llava, own)["score"] == [float(one)] * 2


def test_a_model_without_a_processor_is_refused(scenes_llava: VLM) -> None:
    with pytest.raises(UserError, match=r"has neither processor_config\.json nor preprocessor_config\.json"):
        evaluate(dataclasses.replace(scenes_llava, processor=None), task("vqa", n=2))


def test_evaluation_and_calibration_share_no_image_and_no_handwriting() -> None:
    ours, theirs = task("vqa", "evaluation", 50), task("vqa", "calibration", 50)
    assert {e.id for e in ours.examples}.isdisjoint({e.id for e in theirs.examples})
    pictures = {np.asarray(e.image).tobytes() for e in ours.examples}
    assert pictures.isdisjoint({np.asarray(e.image).tobytes() for e in theirs.examples})


def test_the_fingerprint_notices_a_single_pixel() -> None:
    asked = task("vqa", n=5)
    image = np.array(asked.examples[2].image)
    image[0, 0, 0] ^= 1
    examples = list(asked.examples)
    examples[2] = Example(*dataclasses.astuple(examples[2])[:3], image, *dataclasses.astuple(examples[2])[4:])
    assert dataclasses.replace(asked, examples=tuple(examples)).fingerprint != asked.fingerprint
    assert task("vqa", n=5).fingerprint == asked.fingerprint


@pytest.mark.parametrize(
    ("said", "left_off"),
    [
        ("", False), ("top", False), ("top left", False), ("Top", False), ("to", False), ("bottom", True),
        ("top right", True), ("top left corner", True), ("<pad>", False), ("<pad>top", False), ("<98>", True),
        ("<", False), ("ΟΔΟΣ", False), ("ΟΔΟΣΑ", False),
    ],
)  # fmt: skip
def test_an_answer_is_left_off_only_where_it_can_no_longer_be_right(said: str, left_off: bool) -> None:
    """Whatever tokens say it: other case, other pieces of words and special tokens may still become the right one."""

    class Words:
        def decode(self, tokens: list[str], **_: Any) -> str:
            return "".join(tokens)

    class Processor:
        tokenizer = Words()

    vlm = VLM("x", None, Processor(), FAMILIES["llava"], "", 16)
    example = Example("1", "1", "all", np.zeros((1, 1, 3), np.uint8), "where?", ("top left", "up left", "οδοσα"))
    asked = dataclasses.replace(task("vqa", n=1), examples=(example,))
    cannot = cannot_be_right(vlm, asked, asked.examples)
    assert cannot is not None
    assert cannot(0, list(said)) == left_off  # type: ignore[arg-type]
    assert cannot_be_right(vlm, dataclasses.replace(asked, exact=False), asked.examples) is None
