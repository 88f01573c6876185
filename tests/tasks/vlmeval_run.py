"""Answers and scores of data sets by VLMEvalKit's own code and a plain generate(); none of our code takes part.

python vlmeval_run.py PACKAGE OUT NAME,NAME MODEL..., with the tables in the folder that LMUData names.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

warnings.simplefilter("ignore")
CLASSES = {
    "A-OKVQA": ("image_mcq", "ImageMCQDataset"), "MMMU_DEV_VAL": ("image_mcq", "MMMUDataset"),
    "POPE": ("image_yorn", "ImageYORNDataset"), "MME": ("image_yorn", "ImageYORNDataset"),
}  # fmt: skip


def dataset(name: str) -> Any:
    module, kind = CLASSES.get(name, ("image_vqa", "ImageVQADataset"))
    made = getattr(importlib.import_module(f"vlmeval.dataset.{module}"), kind)
    made.DATASET_MD5 = {}
    return made(dataset=name)


@torch.inference_mode()
def answer(model: Any, processor: Any, pieces: list[dict[str, str]]) -> str:
    content = [{"type": "image"} if p["type"] == "image" else {"type": "text", "text": p["value"]} for p in pieces]
    images = [Image.open(piece["value"]).convert("RGB") for piece in pieces if piece["type"] == "image"]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=128, do_sample=False)
    return str(processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]).strip()


def run(folder: str, name: str, out: Path) -> dict[str, Any]:
    """The library's loop over a data set, the table that it writes of answers, and what its evaluation writes."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    found = dataset(name)
    table = found.data.copy()
    table["prediction"] = [answer(model, processor, found.build_prompt(line)) for _, line in table.iterrows()]
    table = table.drop(columns="image")
    out.mkdir(parents=True)
    file = out / f"model_{name}.tsv"
    table.to_csv(file, sep="\t", index=False)
    result = found.evaluate(str(file), model="exact_matching", nproc=1)
    tables = {one.name: pd.read_csv(one, sep="\t").to_dict("list") for one in out.glob("*.tsv") if one != file}
    answers = dict(zip(map(str, table["index"]), table["prediction"], strict=True))
    return {"answers": answers, "tables": tables, "result": pd.DataFrame(result).to_dict("list")}


if __name__ == "__main__":
    package, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name, path in (("vlmeval", package), ("vlmeval.dataset", package / "dataset")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    os.environ["PRED_FORMAT"] = "tsv"
    names = sys.argv[3].split(",")
    found = [{name: run(model, name, out / str(i) / name) for name in names} for i, model in enumerate(sys.argv[4:])]
    (out / "results.json").write_text(json.dumps(found, default=str))
