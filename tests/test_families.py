"""Families end to end, from a saved folder: processor, prompt, a sweep, and answers that are the likeliest words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch
from PIL import Image

from sensitivity import verbs
from sensitivity.batches import prompt_text
from sensitivity.errors import UserError
from sensitivity.evaluate import evaluate
from sensitivity.models import FAMILIES, VLM, load
from sensitivity.plan import Plan
from sensitivity.quantize import scheme
from sensitivity.tasks import SHORT, Example, task

ASKING = [name for name in saved_vlms.BUILDERS if name != "blip2_itm"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions to each of two pictures, one wide and one high."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    lines = []
    for name, shape in (("wide", (20, 40, 3)), ("high", (48, 24, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{name}.png")
        for i, words in enumerate(("where is the 3?", "how many digits are there?")):
            lines.append({"id": f"{name}-{i}", "image": f"{name}.png", "prompt": words, "answers": ["top left"]})
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "own.jsonl"


def greedy(vlm: VLM, example: Example, steps: int) -> list[int]:
    """The likeliest word after the prompt, again and again, by the model's forward pass alone."""
    with Image.open(example.image) as picture:
        inputs = dict(
            vlm.processor(images=[[picture]], text=[prompt_text(vlm, example)], padding=True, return_tensors="pt")
        )
    said: list[int] = []
    for _ in range(steps):
        more = dict(inputs)
        if vlm.encoder_decoder:
            more["decoder_input_ids"] = torch.tensor([[0, *said]])
        else:
            for name, value in inputs.items():
                if value.shape == inputs["input_ids"].shape:
                    tail = said if name == "input_ids" else [int(name == "attention_mask")] * len(said)
                    more[name] = torch.cat([value, torch.tensor([tail], dtype=value.dtype)], 1)
        with torch.no_grad():
            said.append(int(vlm.model(**more).logits[0, -1].argmax()))
        if said[-1] in (vlm.processor.tokenizer.eos_token_id, vlm.model.config.image_token_id):
            break  # after the image's own word, the forward pass would look for another image
    return said


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("name", ASKING)
def test_a_sweep_of_two_plans_from_a_saved_folder(name: str, own: Path, tmp_path: Path) -> None:
    vlm = load(str(saved_vlms.save(name, tmp_path / name)))
    parts = verbs.inspect(vlm, by="part")
    plan = Plan.uniform(parts, scheme("rtn", 3))
    study = verbs.sweep(vlm, parts, [plan], [str(own)], tmp_path / "study", n=4)
    native, quantised = study.examples(study.native), study.examples(plan)
    assert native is not None
    assert quantised is not None
    assert len(native) == len(quantised) == 4
    assert np.isfinite(native["nll"]).all()
    assert not np.allclose(native["nll"], quantised["nll"])
    answers = dict(zip(native["example"], native["answer"], strict=True))
    for example in task(str(own), n=4).examples[:2]:
        words = vlm.processor.tokenizer.decode(greedy(vlm, example, 3), skip_special_tokens=True).strip()
        assert answers[example.id].removesuffix("…").startswith(words.removesuffix("…")) or (
            words.startswith(answers[example.id].removesuffix("…"))
        )


def test_video_parts_are_left_out_and_pictures_stay(tmp_path: Path) -> None:
    processor = load(str(saved_vlms.save("qwen2_5_vl", tmp_path / "qwen"))).processor
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert isinstance(processor, type(processor).__mro__[1])
    assert type(processor.image_processor).__name__.startswith("Qwen2VLImageProcessor")


def example(kind: str, prompt: str) -> Example:
    return Example("one", "one", kind, np.zeros((4, 4, 3), np.uint8), prompt, ("yes",))


@pytest.mark.parametrize(
    ("family", "kind", "prompt", "expected"),
    [
        ("blip-2", "yes/no", "is it a cat?" + SHORT, "Question: is it a cat? Short answer:"),
        ("blip-2", "caption", "Provide a caption.", ""),
        ("paligemma", "yes/no", "is it a cat?" + SHORT, "<image>answer en is it a cat?"),
        ("paligemma", "caption", "Provide a caption.", "<image>caption en"),
        ("llava", "caption", "Provide a caption.", "USER: <image>\nProvide a caption. ASSISTANT:"),
        ("llava", "all", "is {it}?" + SHORT, f"USER: <image>\nis {{it}}?{SHORT} ASSISTANT:"),
    ],
)
def test_prompts_as_the_family_wants_them(family: str, kind: str, prompt: str, expected: str) -> None:
    vlm = VLM("x", None, None, FAMILIES[family], "", 16)
    assert prompt_text(vlm, example(kind, prompt)) == expected


def test_special_tokens_that_the_tokenizer_leaves_in_are_no_part_of_an_answer(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(str(saved_vlms.save("blip2_opt", tmp_path / "blip2")))
    asked = task(str(own), n=2)
    before = evaluate(vlm, asked, plain=True)["answer"]
    decode = type(vlm.processor.tokenizer).batch_decode
    monkeypatch.setattr(
        type(vlm.processor.tokenizer),
        "batch_decode",
        lambda *args, **how: [f"<image>{text}</s><pad><|im_end|>" for text in decode(*args, **how)],
    )
    assert evaluate(vlm, asked, plain=True)["answer"] == before


def drop_words(folder: Path) -> None:
    """A tokenizer that was fetched without its added words."""
    file = folder / "tokenizer.json"
    data: dict[str, Any] = json.loads(file.read_text())
    data["model"]["vocab"].pop("<image>", None)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<image>"]
    file.write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))


def test_a_tokenizer_without_an_image_token_is_named(tmp_path: Path) -> None:
    folder = saved_vlms.save("llava", tmp_path / "llava")
    drop_words(folder)
    with pytest.raises(UserError, match=r"the tokenizer of .*llava does not know '<image>', which marks images"):
        load(str(folder))
    shutil.copy(saved_vlms.save("llava", tmp_path / "whole") / "tokenizer.json", folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_token_index": 999}))
    with pytest.raises(UserError, match=r"has no word number 999, by which config.json marks images"):
        load(str(folder))


@pytest.mark.parametrize(("name", "least"), [("vqa", 0.9), ("caption", 0.8), ("scene", 0.9)])
def test_the_embedded_blip2_answers_and_guesses_about_others_images(name: str, least: float) -> None:
    vlm = load("embedded:scenes-blip2")
    asked = task(name, n=25)
    rows = evaluate(vlm, asked, plain=True)
    assert np.mean(rows["score"]) > least
    moved = [*asked.examples[5:], *asked.examples[:5]]
    wrong = tuple(replace(e, image=other.image) for e, other in zip(asked.examples, moved, strict=True))
    assert np.mean(evaluate(vlm, replace(asked, examples=wrong), plain=True)["score"]) < 0.6
