"""A few training steps end to end leave folders that load and answer, and cards that say how they were trained."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import embedded
from experiments.embedded.scenes_blip2 import card as blip2_card
from experiments.embedded.scenes_blip2 import model as blip2
from experiments.embedded.scenes_llava import card as llava_card
from sensitivity.measure.evaluation import evaluate
from sensitivity.models.loading import load
from sensitivity.tasks import scenes as S
from sensitivity.tasks.table import task

ROOT = Path(embedded.__file__).resolve().parents[2]
STAGES = {
    "scenes_llava": ["1a", "1b", "2", "3", "4", "5"],
    "scenes_blip2": ["eye", "cells", "contrast", "match", "symbols", "bridge"],
}
CARDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "scenes-llava": llava_card.text,
    "scenes-blip2": partial(blip2_card.text, "scenes-blip2"),
    "scenes-blip2-itm": partial(blip2_card.text, "scenes-blip2-itm"),
}


def python(module: str, *words: object) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"experiments.embedded.{module}", *map(str, words), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def train(model: str, folder: Path) -> Path:
    python(f"{model}.train", "--smoke", "--out", folder / "out", "--work", folder / "work")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("scenes_llava", tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("scenes_blip2", tmp_path_factory.mktemp("training"))


@pytest.mark.slow
def test_the_folder_loads_and_answers(trained: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = trained / "out"
    processor, model = AutoProcessor.from_pretrained(out), AutoModelForImageTextToText.from_pretrained(out)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is the 3?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    image = S.scene("calibration", 0, 0).image
    inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36
    assert (inputs["pixel_values"][0].permute(1, 2, 0) * 127.5 + 127.5).round().numpy().astype("uint8").tolist() == (
        image.tolist()
    )
    generated = model.float().generate(**inputs, max_new_tokens=3)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert (out / "model.safetensors").stat().st_size < 10_000_000


@pytest.mark.slow
def test_the_siblings_answer_and_search(siblings: Path) -> None:
    asked = {"scenes-blip2": task("vqa", n=4), "scenes-blip2-itm": task("retrieval", n=4)}
    for name, some in asked.items():
        vlm = load(str(siblings / "out" / name), dtype="fp32")
        assert len(evaluate(vlm, some)["answer"]) == len(some.examples)
        assert vlm.native_bits == 16
        assert (siblings / "out" / name / "model.safetensors").stat().st_size < 6_500_000


@pytest.mark.slow
@pytest.mark.parametrize("model", STAGES)
def test_every_stage_leaves_a_log_and_its_last_line_is_in_the_card(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("trained" if model == "scenes_llava" else "siblings")
    cards = {path.parent.name: json.loads(path.read_text())["training"] for path in folder.rglob("out/**/card.json")}
    assert len(cards) == (1 if model == "scenes_llava" else 2)
    seen = set()
    for training in cards.values():
        for stage, last in training.items():
            seen.add(stage)
            lines = [json.loads(line) for line in (folder / "work" / f"{stage}.jsonl").read_text().splitlines()]
            assert last["step"] == lines[-1]["step"] == 3
            assert lines[-1].items() <= {**last, "stage": stage}.items()
            assert len(last) > 1
            assert all(math.isfinite(value) for value in last.values())
    assert seen == set(STAGES[model])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), [("scenes_llava", "."), ("scenes_blip2", "scenes-blip2")])
def test_an_evaluation_writes_the_card_of_what_was_trained(
    model: str, name: str, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue("trained" if model == "scenes_llava" else "siblings") / "out"
    only = [] if model == "scenes_llava" else ["--model", name]
    before = json.loads((out / name / "card.json").read_text())["training"]
    python(f"{model}.evaluate", "--folder", out, "--scenes", 4, *only)
    card = json.loads((out / name / "card.json").read_text())
    assert card["training"] == before
    assert card["scenes"] == 4
    text = (out / name / "README.md").read_text()
    for stage, last in before.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {stage} | {last['step']} |")]
        assert all(f"{key} {value:.3f}" in row for key, value in last.items() if key != "step")
    assert "Targets not reached: " in text


@pytest.mark.parametrize("name", CARDS)
def test_the_shipped_card_is_what_its_numbers_give(name: str) -> None:
    folder = ROOT / "sensitivity" / "models" / "embedded" / name
    card = json.loads((folder / "card.json").read_text())
    assert CARDS[name](card) == (folder / "README.md").read_text()
    first = next(iter(card["training"]))
    card["training"][first]["step"] = 987_654
    assert "987,654" in CARDS[name](card)


@pytest.mark.parametrize("model", STAGES)
def test_a_smoke_run_does_not_overwrite_the_shipped_model(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [model, "--smoke"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"experiments.embedded.{model}.train").main()
    assert "overwrite" in capsys.readouterr().err


def test_the_vision_tower_is_copied_all_but_the_norm_before_its_blocks() -> None:
    """Without that norm both towers compute the same hidden states; with it, almost."""
    clip = load("embedded:scenes-llava").model.model.vision_tower
    blip = blip2.build().vision_model
    pixels = torch.from_numpy(S.scene("calibration", 0, 0).image).permute(2, 0, 1)[None] / 127.5 - 1
    blip2.copy_vision_tower(clip, blip, pixels)
    with torch.no_grad():
        inside = clip.pre_layrnorm(clip.embeddings(pixels))
        for layer in clip.encoder.layers:
            inside = layer(inside, attention_mask=None)
        same = blip.encoder(inputs_embeds=clip.pre_layrnorm(clip.embeddings(pixels))).last_hidden_state
        torch.testing.assert_close(same, inside, rtol=1e-4, atol=1e-4)
        seen = torch.nn.functional.layer_norm(inside, (128,))[:, 1:]
        away = (blip(pixels).last_hidden_state[:, 1:] - seen).square().mean() / seen.var()
    assert away < 0.2
