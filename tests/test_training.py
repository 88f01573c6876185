"""A few steps of the training scripts end to end: they leave folders that load, answer and are what the recipe says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sensitivity.evaluate import evaluate
from sensitivity.models import load
from sensitivity.tasks import scenes as S
from sensitivity.tasks import task

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "train_scenes_llava": ["1a", "1b", "2", "3", "4", "5"],
    "train_scenes_blip2": ["eye", "cells", "contrast", "match", "symbols", "bridge"],
}


def train(script: str, folder: Path) -> Path:
    options = ["--smoke", "--threads", "1", "--out", folder / "out", "--work", folder / "work", "--log", folder / "log"]
    command = [sys.executable, str(ROOT / "experiments" / f"{script}.py"), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("train_scenes_llava", tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("train_scenes_blip2", tmp_path_factory.mktemp("training"))


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
@pytest.mark.parametrize("script", STAGES)
def test_the_log_has_every_stage_and_no_machine_in_it(script: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("trained" if script == "train_scenes_llava" else "siblings")
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert [stage for stage in STAGES[script] if any(line.get("stage") == stage for line in lines)] == STAGES[script]
    assert str(folder) not in (folder / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_the_shipped_model_is_not_overwritten_by_a_smoke_run(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setattr(sys, "argv", [script, "--smoke"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    assert "overwrite" in capsys.readouterr().err


def test_the_eye_is_transplanted_but_for_the_norm_before_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that norm does nothing but centre, the two towers see the same; with it, almost."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    shape = importlib.import_module("scenes_blip2")
    clip = load("embedded:scenes-llava").model.model.vision_tower
    blip = shape.build().vision_model
    pixels = torch.from_numpy(S.scene("calibration", 0, 0).image).permute(2, 0, 1)[None] / 127.5 - 1
    shape.transplant(clip, blip, pixels)
    with torch.no_grad():
        inside = clip.pre_layrnorm(clip.embeddings(pixels))
        for layer in clip.encoder.layers:
            inside = layer(inside, attention_mask=None)
        same = blip.encoder(inputs_embeds=clip.pre_layrnorm(clip.embeddings(pixels))).last_hidden_state
        torch.testing.assert_close(same, inside, rtol=1e-4, atol=1e-4)
        seen = torch.nn.functional.layer_norm(inside, (128,))[:, 1:]
        away = (blip(pixels).last_hidden_state[:, 1:] - seen).square().mean() / seen.var()
    assert away < 0.2
