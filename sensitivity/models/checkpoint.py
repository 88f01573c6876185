"""Finds a model's folder, checks its config and weight files before any weight is read, and fingerprints them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sensitivity.spec.errors import UserError, reason, unknown
from sensitivity.spec.fields import (
    FILE_INSIDE,
    FOLDER,
    MISSING,
    OBJECT,
    SHOWN,
    TEXT,
    InvalidValue,
    Kind,
    check,
    either,
    list_of,
    not_a_file,
    one_of,
    read,
    shortened,
)

EMBEDDED = {  # name -> folder
    "scenes-llava": "scenes-llava",
    "scenes-llava-heavy": "scenes-llava",
    "scenes-blip2": "scenes-blip2",
    "scenes-blip2-itm": "scenes-blip2-itm",
}
EMBEDDED_MODELS = Path(__file__).parent / "embedded"
# the files that are downloaded from a hub repository: neither pickles nor code
FILES_TO_DOWNLOAD = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
CONFIG_FILES = ["config.json", "adapter_config.json"]
FLOATS = ("float64", "float32", "float16", "bfloat16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {  # by safetensors' names; numbers of less than a byte have no dtype in torch
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE = either(OBJECT, one_of("auto", *(f"{at}{one}" for at in ("", "torch.") for one in FLOATS)))
CONFIG_FIELDS = {  # fields that are checked before transformers reads a config; null counts as absent
    "model_type": TEXT, "architectures": list_of(TEXT, 0), "quantization_config": OBJECT, "auto_map": OBJECT,
    "dtype": DTYPE, "torch_dtype": DTYPE,
}  # fmt: skip
OTHER_JSON_FILES = (  # files that transformers reads beside the config; it ignores some of them if they are not JSON
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
LAYER_COUNTS = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?|experts?)$")  # counts of repeated modules
MAX_COUNT = 1000  # the deepest models have some hundreds of layers; building a module takes a millisecond and memory
WEIGHT_MAP = Kind(
    "tensors and their files", lambda value: isinstance(value, dict) and all(map(_is_file_name, value.values()))
)
HASHED_WHOLE = 100 * 2**20  # bytes; of a larger file, only the header and PIECE_COUNT pieces are hashed
PIECE_COUNT, PIECE_BYTES = 64, 2**16


def model_folder(name: str, config_only: bool = False) -> Path:
    """The folder of a model: embedded, local, or downloaded from the hub."""
    kind, _, short = name.partition(":")
    if kind == "embedded":
        if short not in EMBEDDED:
            raise unknown("embedded model", name, [f"embedded:{known}" for known in EMBEDDED])
        folder = EMBEDDED_MODELS / EMBEDDED[short]
        if not (folder / "config.json").exists():
            raise UserError(f"{name} is not part of this installation; reinstall sensitivity, or give a model folder")
        return folder
    folder = Path(name).expanduser()
    trouble = not_a_file(folder)
    if trouble == FOLDER:
        return folder
    if trouble != MISSING:
        raise UserError(f"'{shortened(name)}' is a file; give the folder it lies in")
    instead = f"give a folder with config.json and *.safetensors, or {_embedded()}"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"there is no folder '{shortened(name)}'; {instead}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=CONFIG_FILES if config_only else FILES_TO_DOWNLOAD))
    except (OSError, ValueError) as error:
        why = (
            f"'{shortened(name)}' is neither a folder here nor a model that can be downloaded from the hub "
            f"({reason(error)})"
        )
        raise UserError(f"{why}; {instead}") from error


def _embedded() -> str:
    """The names of the embedded models, for error messages."""
    return " or ".join(f"embedded:{known}" for known in EMBEDDED)


def read_config(folder: Path, name: str, quantized: bool = False) -> dict[str, object]:
    """The contents of config.json; raises an error if it, or other JSON that transformers reads, cannot be used.

    A checkpoint that is already quantized is an error, unless `quantized` allows it.
    """
    file = folder / "config.json"
    if not_a_file(file) == MISSING:
        raise UserError(
            f"{name} has no config.json; give a folder that has one, beside *.safetensors, or {_embedded()}"
        )
    config = json_object(file, name)
    try:
        check(config, {}, CONFIG_FIELDS)
        _check_counts(config)
    except InvalidValue as error:
        raise UserError(f"config.json of {name} does not fit: {error}; fetch it again") from error
    if isinstance(quantization := config.get("quantization_config"), dict) and not quantized:
        method = str(quantization.get("quant_method", "by an unnamed method"))[:SHOWN]
        raise UserError(f"{name} is already quantized ({method}); give the model it was made from")
    for beside in OTHER_JSON_FILES:
        if not_a_file(folder / beside) != MISSING:
            json_object(folder / beside, name)
    return config


def json_object(file: Path, name: str) -> dict[str, object]:
    """The JSON object in one of a model's files."""
    try:
        content = read(file)
    except InvalidValue as error:
        raise UserError(f"{file.name} of {name} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file.name} of {name} is not a JSON object; fetch it again")
    return content


def _check_counts(config: object, path: str = "") -> None:
    """Raise an error for a repetition count so high that building the model, even without weights, takes too long."""
    inside = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in inside:
        below = path if isinstance(key, int) else f"{path}.{key}" if path else str(key)
        if isinstance(value, int) and value > MAX_COUNT and LAYER_COUNTS.search(below.rpartition(".")[2]):
            raise InvalidValue(f"{below} is {value}, and {MAX_COUNT:,} is the most")
        _check_counts(value, below)


def _is_file_name(value: object) -> bool:
    """Whether a value of an index is the name of a file in the same folder."""
    return FILE_INSIDE.fits(value) and "/" not in str(value)


def shards_of(index: Path, name: str) -> list[Path]:
    """The weight files that an index names; a missing one is an error."""
    try:
        file_of = check(json_object(index, name), {"weight_map": WEIGHT_MAP})["weight_map"]
    except InvalidValue as error:
        raise UserError(f"{index.name} of {name} cannot be used: {error}; fetch it again") from error
    files = sorted({index.parent / file for file in file_of.values()})
    if missing := [shortened(file.name) for file in files if not_a_file(file) == MISSING]:
        raise UserError(f"{name} lacks {', '.join(missing[:8])}, which its index names; fetch the missing files")
    return files


def weight_files(folder: Path, name: str) -> list[Path]:
    """A model's safetensors files, all present and none cut short; never a pickle."""
    index = folder / "model.safetensors.index.json"
    if not_a_file(index) != MISSING:
        files = shards_of(index, name)
    else:
        files = [folder / "model.safetensors"]
        if not_a_file(files[0]) == MISSING:
            raise _no_weights(folder, name)
    for file in files:
        header(file)
    return files


def _no_weights(folder: Path, name: str) -> UserError:
    """The error for a folder without safetensors files."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return UserError(
            f"{name} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code when read and are "
            "never loaded; save the model as safetensors: model.save_pretrained(folder)"
        )
    return UserError(f"{name} has no model.safetensors; fetch the weights, or inspect it with --config-only")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, and the byte at which it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """The size of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


def header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, none of which is read; safetensors checks that all of their bytes exist.

    safetensors does not report where a tensor begins. Tensors follow each other without gaps, so their sizes give it.
    """
    if trouble := not_a_file(file):
        raise UserError(f"{file.name} is not a complete safetensors file ({trouble}); fetch it again")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = [(key, opened.get_slice(key)) for key in opened.offset_keys()]
            stored = [(key, one.get_dtype(), tuple(one.get_shape())) for key, one in slices]
    except (SafetensorError, OSError) as error:
        why = reason(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{file.name} is not a complete safetensors file ({why}); fetch it again") from error
    if strange := sorted({dtype for _, dtype, _ in stored} - set(DTYPES)):
        raise UserError(f"{file.name} holds numbers of the type {strange[0]}; known are {', '.join(DTYPES)}")
    entries, start = {}, file.stat().st_size - sum(prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in stored)
    for key, dtype, shape in stored:
        entries[key] = StoredTensor(DTYPES[dtype], shape, start)
        start += entries[key].bytes
    return entries


def common_width(files: Sequence[Path]) -> int | None:
    """The bits in which most weights are stored; None without safetensors files."""
    widths: Counter[int] = Counter()
    for file in files:
        for entry in header(file).values() if file.suffix == ".safetensors" else ():
            if entry.dtype.is_floating_point:
                widths[8 * entry.dtype.itemsize] += prod(entry.shape)
    return widths.most_common(1)[0][0] if widths else None


def fingerprint(config: Mapping[str, object], files: Sequence[Path], note: str | None = None) -> str:
    """A hash of a model's config and weight files, and of a note on what was done to it; the same in any folder."""
    # without the two fields that change with the folder or the library, though the model is the same
    lasting = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            if size <= HASHED_WHOLE:
                digest.update(stream.read())
                continue
            # the first 8 bytes are the header's length; of a pickle, which has no header, they may be any number
            digest.update(stream.read(8 + min(int.from_bytes(stream.read(8), "little"), HASHED_WHOLE)))
            for i in range(PIECE_COUNT):
                stream.seek(i * (size - PIECE_BYTES) // (PIECE_COUNT - 1), os.SEEK_SET)
                digest.update(stream.read(PIECE_BYTES))
    digest.update((note or "").encode())
    return digest.hexdigest()[:16]
