"""Several images and several turns: what the model reads is what its own template and processor make of them."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import saved_vlms
import torch
from few import few
from PIL import Image

from sensitivity.api.sweeping import sweep
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.generate.batches import on_device, prompt_text
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.study.examples.questions import read_questions
from sensitivity.tasks.table import task

TURN = ["what is this?", "a red 3"]
LINES = (
    {"id": "two", "image": ["a.png", "b.png"]},
    {"id": "swapped", "image": ["b.png", "a.png"]},
    {"id": "one", "image": "a.png"},
    {"id": "turns", "image": "a.png", "turns": [TURN]},
    {"id": "both", "image": ["a.png", "b.png"], "turns": [TURN, TURN]},
)


def asked(folder: Path) -> str:
    draw = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(draw.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    lines = [{"prompt": "where is the 3?", "answers": ["top left"], **line} for line in LINES]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "q.jsonl")


def likelihood(vlm: VLM, folder: Path, line: dict[str, object]) -> float:
    """Of the right answer, by the model's forward pass over what its own processor makes."""
    named = line["image"] if isinstance(line["image"], list) else [line["image"]]
    turns = [*line.get("turns", []), ["where is the 3?", None]]  # type: ignore[misc]
    chat = []
    for number, (prompt, answer) in enumerate(turns):
        images = [{"type": "image"}] * len(named) if number == 0 else []
        chat.append({"role": "user", "content": [*images, {"type": "text", "text": prompt}]})
        if answer is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = vlm.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = dict(
        vlm.processor(images=[[Image.open(folder / str(n)) for n in named]], text=[text], return_tensors="pt")
    )
    tokenizer = vlm.processor.tokenizer
    right = [*tokenizer("top left", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    for name, value in inputs.items():
        if value.shape == inputs["input_ids"].shape and name != "input_ids":
            inputs[name] = torch.cat([value, torch.full((1, len(right)), int(name == "attention_mask"))], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([right])], 1)
    with torch.no_grad():
        logits = vlm.model(**inputs).logits[0, -len(right) - 1 : -1]
    return float(-logits.log_softmax(-1).gather(1, torch.tensor(right)[:, None]).mean())


@pytest.mark.parametrize("name", few(["smolvlm", "qwen2_vl"], ["smolvlm"]))
def test_images_and_turns_reach_the_model(name: str, tmp_path: Path) -> None:
    vlm, file = load(str(saved_vlms.save(name, tmp_path / name))), asked(tmp_path)
    rows = evaluate(vlm, task(file), plain=True)
    nll = dict(zip(rows["example"], rows["nll"], strict=True))
    for line in LINES:
        assert nll[line["id"]] == pytest.approx(likelihood(vlm, tmp_path, line), abs=1e-4), line["id"]
    assert len({round(float(value), 7) for value in nll.values()}) == len(LINES), "each image and turn counts"
    study = sweep(vlm, inspect(vlm, by="part"), [], [file], tmp_path / "run")
    fast = study.examples(study.native)
    assert fast is not None
    assert dict(zip(fast["example"], fast["nll"], strict=True)) == pytest.approx(nll, abs=1e-4)
    known = read_questions(study.path, study.meta)["q", "both"]
    assert [file and file.name for file in known.images] == ["a.png", "b.png"]
    assert "a red 3" in known.prompt


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    vlm, file = load(str(saved_vlms.save("blip2_opt", tmp_path / "m"))), asked(tmp_path)
    with pytest.raises(UserError, match="has no chat template, so that it cannot be asked about several images"):
        evaluate(vlm, task(file))


@pytest.mark.parametrize("turns", [[["what?"]], [["what?", ""]], "what?", [["a", "b", "c"]], [[1, "b"]]])
def test_turns_that_are_none(turns: object, tmp_path: Path) -> None:
    asked(tmp_path)
    line = {"image": "a.png", "prompt": "?", "answers": ["x"], "turns": turns}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"line 1: turns is .* instead of a list of \[prompt, answer\]"):
        task(str(tmp_path / "q.jsonl"))


def test_the_fingerprint_knows_further_images_and_turns(tmp_path: Path) -> None:
    file = asked(tmp_path)
    before = task(file).fingerprint
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(tmp_path / "b.png")
    assert task(file).fingerprint != before
    (tmp_path / "b.png").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"3 of 5 examples left out"):
        task(file)


def test_cut_and_malformed_answers_are_the_same_on_both_paths(scenes_llava: VLM, tmp_path: Path) -> None:
    """One token is too short for a box, and long enough for nothing but the end of an empty answer."""
    from dataclasses import replace

    boxes = replace(task("ground", n=6), max_new_tokens=2)
    plain = evaluate(scenes_llava, boxes, plain=True)
    assert plain["cut"] == [True] * 6
    assert plain["malformed"] == [True] * 6
    whole = evaluate(scenes_llava, task("ground", n=6), plain=True)
    assert whole["cut"] == whole["malformed"] == [False] * 6
    study = sweep(scenes_llava, inspect(scenes_llava, by="part"), [], ["ground"], tmp_path / "run", n=6)
    fast = study.examples(study.native)
    assert fast is not None
    assert fast["cut"].tolist() == fast["malformed"].tolist() == [False] * 6  # any() would pass over missing values


def test_images_among_the_texts_of_a_prompt() -> None:
    vlm, scenes = load("embedded:scenes-llava"), task("vqa", n=2)
    first, second = scenes.examples
    mixed = replace(first, prompt="is", more=(second.image,), pieces=("is this", None, "that", None, "?"))
    processor = copy(vlm.processor)  # its own template has all images first
    processor.chat_template = (
        "{% for one in messages[0].content %}{{ '<image>' if one.type == 'image' else one.text }} {% endfor %}"
    )
    assert prompt_text(replace(vlm, processor=processor), mixed) == "is this <image> that <image> ? "
    assert prompt_text(replace(vlm, processor=processor), replace(mixed, pieces=())) == "<image> <image> is "
    alone = [replace(scenes, examples=(example,)) for example in (mixed, replace(mixed, pieces=()))]
    assert alone[0].fingerprint != alone[1].fingerprint


def test_a_task_may_ask_for_beams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are generated by transformers' own beam search, in a sweep, too: drafts are greedy."""
    vlm = load("embedded:scenes-llava")
    beams = replace(task("caption", n=3), search={"num_beams": 3}, exact=False)
    found = evaluate(vlm, beams)
    for example, answer in zip(beams.examples, found["answer"], strict=True):
        picture, text = [[Image.fromarray(example.image)]], [prompt_text(vlm, example)]
        inputs = on_device(vlm, dict(vlm.processor(images=picture, text=text, return_tensors="pt")))
        tokens = vlm.model.generate(**inputs, num_beams=3, max_new_tokens=beams.max_new_tokens)
        whole = vlm.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert whole.strip() == str(answer).strip()
    monkeypatch.setattr("sensitivity.api.sweeping.find_task", lambda *_: beams)
    study = sweep(vlm, inspect(vlm, by="part"), [], ["caption"], tmp_path / "run")
    fast = study.examples(study.native)
    assert fast is not None
    by_name = [dict(zip(rows["example"], rows["answer"], strict=True)) for rows in (fast, found)]
    assert by_name[0] == by_name[1]
