"""A few steps of the training script end to end: it leaves a folder that loads, answers and is what the recipe says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sensitivity.tasks import scenes as S

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "experiments" / "train_scenes_llava.py"
STAGES = ["1a", "1b", "2", "3", "4", "5"]


def train(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = ["--smoke", "--threads", "1", "--out", folder / "out", "--work", folder / "work", "--log", folder / "log"]
    command = [sys.executable, str(SCRIPT), *map(str, options), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder


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
def test_the_log_has_every_stage_and_no_machine_in_it(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log").read_text().splitlines()]
    assert [stage for stage in STAGES if any(line["stage"] == stage for line in lines)] == STAGES
    assert str(trained) not in (trained / "log").read_text()


@pytest.mark.slow
def test_the_shipped_model_is_not_overwritten_by_a_smoke_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--smoke"])
    with pytest.raises(SystemExit):
        importlib.import_module("train_scenes_llava").main()
    assert "overwrite" in capsys.readouterr().err
