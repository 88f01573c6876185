"""A model folder before it is loaded: where it is, what it is, whether its weights are whole, its fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from sensitivity.errors import UserError, reason, unknown

EMBEDDED = {  # name -> folder
    "scenes-llava": "scenes-llava",
    "scenes-llava-heavy": "scenes-llava",
    "scenes-blip2": "scenes-blip2",
    "scenes-blip2-itm": "scenes-blip2-itm",
}
HERE = Path(__file__).parent / "embedded"
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub repository: no pickle, no code
CONFIGS = ["config.json", "adapter_config.json"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
WHOLE = 100 * 2**20  # a file up to this size is hashed to the last byte
PIECES, PIECE = 64, 2**16  # of a larger one, beside its header


def find(name: str, config_only: bool = False) -> Path:
    """The folder of a model: embedded, local, or fetched from the hub."""
    kind, _, short = name.partition(":")
    if kind == "embedded":
        if short not in EMBEDDED:
            raise unknown("embedded model", name, [f"embedded:{known}" for known in EMBEDDED])
        folder = HERE / EMBEDDED[short]
        if not (folder / "config.json").exists():
            raise UserError(f"{name} is not part of this installation; reinstall sensitivity, or give a model folder")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"'{name}' is a file; give the folder it lies in")
    instead = f"give a folder with config.json and *.safetensors, or {_embedded()}"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"there is no folder '{name}'; {instead}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=CONFIGS if config_only else WANTED))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{name}' is neither a folder here nor a model that could be had from the hub ({reason(error)}); {instead}"
        ) from error


def _embedded() -> str:
    return " or ".join(f"embedded:{known}" for known in EMBEDDED)


def read_config(folder: Path, name: str, quantised: bool = False) -> dict[str, Any]:
    """config.json, refused where transformers alone cannot build the model from it."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(
            f"{name} has no config.json; give a folder that has one, beside *.safetensors, or {_embedded()}"
        )
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"config.json of {name} is not JSON ({reason(error)}); fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"config.json of {name} is not a JSON object; fetch it again")
    if "quantization_config" in config and not quantised:
        method = (config["quantization_config"] or {}).get("quant_method", "by an unnamed method")
        raise UserError(f"{name} is already quantised ({method}); give the model it was made from")
    return config


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model, all there and none cut short; never a pickle."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted({folder / shard for shard in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index.name} of {name} cannot be read ({reason(error)}); fetch it again") from error
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{name} lacks {', '.join(missing)}, which its index names; fetch the missing files")
    else:
        files = [folder / "model.safetensors"]
        if not files[0].exists():
            raise _no_weights(folder, name)
    for file in files:
        header(file)
    return files


def _no_weights(folder: Path, name: str) -> UserError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return UserError(
            f"{name} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code when read and are "
            "never loaded; save the model as safetensors: model.save_pretrained(folder)"
        )
    return UserError(f"{name} has no model.safetensors; fetch the weights, or inspect it with --config-only")


def header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, after a look at whether all its bytes are there."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            if end != size:
                raise ValueError(f"{size:,} bytes instead of {end:,}")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{file.name} is no whole safetensors file ({reason(error)}); fetch it again") from error
    return dict(entries)


def stored_bits(files: Sequence[Path]) -> int | None:
    """How wide most weights are stored; None without files."""
    widths: Counter[int] = Counter()
    for file in files:
        for entry in header(file).values() if file.suffix == ".safetensors" else ():
            if entry["dtype"] in BITS:
                widths[BITS[entry["dtype"]]] += prod(entry["shape"])
    return widths.most_common(1)[0][0] if widths else None


def fingerprint(config: Mapping[str, Any], files: Sequence[Path], note: str | None = None) -> str:
    """Who a model is, wherever it lies: its config, its weights' names, sizes and content, what was done to it."""
    lasting = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            if size <= WHOLE:
                digest.update(stream.read())
                continue
            # the header of a safetensors file; a pickle has none, and its first bytes say nothing about its size
            digest.update(stream.read(8 + min(int.from_bytes(stream.read(8), "little"), WHOLE)))
            for i in range(PIECES):
                stream.seek(i * (size - PIECE) // (PIECES - 1), os.SEEK_SET)
                digest.update(stream.read(PIECE))
    digest.update((note or "").encode())
    return digest.hexdigest()[:16]
