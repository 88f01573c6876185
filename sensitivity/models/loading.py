"""load(): a VLM from a folder, the hub or this package, with every weight accounted for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypedDict, cast

import torch
import transformers
from torch import nn
from transformers import LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
from transformers.utils.import_utils import is_accelerate_available

from sensitivity.models.adapters import WEIGHTS, Adapter, merge_adapter, resolve
from sensitivity.models.already_quantized import quantized_before
from sensitivity.models.checkpoint import common_width, fingerprint, header, read_config, weight_files
from sensitivity.models.families import FAMILIES, family_of
from sensitivity.models.original_llava import (
    converted,
    converted_config,
    is_original,
    original_processor,
    original_weight_files,
    with_geochat_label,
)
from sensitivity.models.outliers import NOTE, plant_outliers
from sensitivity.models.processors import load_processor
from sensitivity.models.tensor_check import Shape, check_none, check_tensors, first_names, other_widths
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, check_is_path, reason, unknown

DTYPES = ("float32", "float16", "bfloat16")
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
UNUSED_BUFFERS = re.compile(r"(position_ids|inv_freq|masked_bias)$")  # buffers in old checkpoints that no model reads


class LoadingInfo(TypedDict):
    """What transformers reports of tensors that did not fit."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, object, object]]


def set_cudnn() -> None:
    """Choose what cudnn computes on a GPU: convolutions in all bits, and no attention."""
    # by default it may round a convolution's inputs to 10 bits: pixels of a model in float32 would lose 13
    torch.backends.cudnn.allow_tf32 = False
    # it prepares each length of a question anew, which took half of the time of the first questions (reports/gpu.md)
    torch.backends.cuda.enable_cudnn_sdp(False)


def load(
    name: str | PathLike[str],
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    config_only: bool = False,
    quantized: bool = False,
) -> VLM:
    """Load a model from a folder, the hub, or `embedded:...`.

    With `config_only` it neither needs nor loads weights. With `quantized` it accepts a checkpoint that is already
    quantized, such as an export, and unpacks its weights at once. The device `auto` spreads a model over all devices.
    An adapter is merged into the base model that its config names, or into BASE if `name` is ADAPTER@BASE.

    Examples:
        >>> from sensitivity import load
        >>> vlm = load("embedded:scenes-llava")
    """
    check_is_path("name", name)
    name, torch_device, torch_dtype = os.fspath(name), device_of(device), dtype_of(dtype)
    if torch_device is None or torch_device.type == "cuda":
        set_cudnn()
    folder, adapter = resolve(name, config_only)
    if adapter is not None:
        base = load(adapter.base, device=device, dtype=dtype, config_only=config_only)
        return _with_adapter(base, adapter, name, config_only)
    raw = read_config(folder, name, quantized)
    original = is_original(raw)
    files = [] if config_only else original_weight_files(folder, name) if original else weight_files(folder, name)
    with_outliers = name == "embedded:scenes-llava-heavy"
    if torch_dtype is None and name.startswith("embedded:") and device == "cpu":
        torch_dtype = torch.float32
    # outliers are planted in float32 and rounded afterwards, which changes the model's function least
    loaded_dtype = torch.float32 if with_outliers else torch_dtype
    model: nn.Module
    stored: Mapping[str, tuple[torch.dtype, Shape]] = {}
    with quiet():
        config, architecture = _config(folder, name, raw)
        # an export may ask transformers to unpack its weights in 16 bits; `_unpack` does so in the requested dtype
        (getattr(config, "quantization_config", None) or {}).pop("dequantize", None)
        if config_only:
            model, processor = _meta_model(architecture, config, name), None
        elif original:
            assert isinstance(config, LlavaConfig)
            tensors = {key: read() for key, (_, read) in converted(raw, config, files, name).items()}
            stored = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
            check_tensors(_meta_model(architecture, config, name), stored, name)
            model = _with_weights(architecture, config, None, name, torch_dtype, torch_device, tensors)
            processor = original_processor(folder, name, config)
        else:
            if not quantized:
                stored = _check_files(architecture, config, files, name)
            model = _with_weights(architecture, config, folder, name, loaded_dtype, torch_device)
            processor = load_processor(folder, name, config)
    if quantized and not config_only:
        _unpack(model)
    if with_outliers and not config_only:
        plant_outliers(model)
        model = model.to(torch_dtype or torch.float16)
    model = model.eval().requires_grad_(False)
    exported = quantized_before(folder)
    native_bits = common_width(files) or _config_bits(config)
    note = NOTE if with_outliers else _note_on_dead_blocks(config)
    return VLM(
        name=name,
        model=model if config_only or torch_device is None else model.to(torch_device),
        processor=processor,
        family=with_geochat_label(raw, family_of(model)) if original else family_of(model),
        fingerprint=fingerprint(raw, files, NOTE if with_outliers else None),
        native_bits=native_bits,
        other_bits=other_widths(model, stored, native_bits),
        note="; ".join(filter(None, [note, exported])) or None,
        quantized_before=exported,
    )


def _with_adapter(base: VLM, adapter: Adapter, name: str, config_only: bool) -> VLM:
    """The base model with an adapter merged in, under a fingerprint of both."""
    if not config_only:
        with quiet():
            base.model = merge_adapter(base.model, adapter, name).eval().requires_grad_(False)
    mark = fingerprint(adapter.config, [] if config_only else [adapter.folder / WEIGHTS], base.fingerprint)
    return replace(base, name=name, fingerprint=mark)


def _config(folder: Path, name: str, raw: Mapping[str, object]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config, and the model class that it names, or else transformers' class for its type."""
    if is_original(raw):
        return converted_config(raw, name), transformers.LlavaForConditionalGeneration
    known = raw.get("model_type") in transformers.CONFIG_MAPPING
    remote = raw.get("auto_map")
    if not known:
        if remote:
            raise UserError(
                f"{name} needs code of its own (trust_remote_code), which is never run here; give a model whose class "
                f"is part of transformers {transformers.__version__}"
            )
        if not raw.get("model_type"):
            raise UserError(f"config.json of {name} names no model_type; fetch it again")
        raise UserError(
            f"model_type {raw.get('model_type')!r} of {name} is not known to transformers {transformers.__version__}; "
            f"the tested families are {', '.join(key for key in FAMILIES if key[0].islower())}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each family checks its own config, with its own types of error
        why = f"config.json of {name} does not fit its model_type ({reason(error)}); fetch it again"
        raise UserError(why) from error
    architectures = raw.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    named = getattr(transformers, first, None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return config, named
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            classes = mapping[type(config)]
            if (first_class := classes[0] if isinstance(classes, tuple | list) else classes) is not None:
                return config, first_class
    raise UserError(f"transformers {transformers.__version__} has no model class for {raw['model_type']!r} of {name}")


def _meta_model(architecture: type[PreTrainedModel], config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """The model on the meta device, which takes no memory for weights."""
    try:
        with torch.device("meta"):
            return architecture(config)
    except Exception as error:
        why = f"{architecture.__name__} cannot be built from the config of {name} ({reason(error)})"
        raise UserError(why) from error


def _check_files(
    architecture: type[PreTrainedModel], config: PreTrainedConfig, files: Sequence[Path], name: str
) -> dict[str, tuple[torch.dtype, Shape]]:
    """Refuse weight files that do not fit the model, by their headers alone, before they fill memory; returns these."""
    stored = {key: (one.dtype, one.shape) for file in files for key, one in header(file).items()}
    check_tensors(_meta_model(architecture, config, name), stored, name)
    return stored


def _with_weights(
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path | None,
    name: str,
    dtype: torch.dtype | None,
    torch_device: torch.device | None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """The model with the folder's weights, or the given ones: all of them, no others, and all finite."""
    device_map = {"device_map": "auto"} if torch_device is None else {}
    # the type hint of from_pretrained leaves out that `output_loading_info` adds a second result
    build = cast(Callable[..., tuple[nn.Module, LoadingInfo]], architecture.from_pretrained)
    try:
        model, loading = build(
            folder,
            state_dict=tensors,
            config=config,
            dtype=dtype or (config.dtype if tensors else "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **device_map,
        )
    except Exception as error:
        raise UserError(f"{name} cannot be loaded as {architecture.__name__} ({reason(error)})") from error
    check_none(model, name, "lacks", loading["missing_keys"])
    check_none(model, name, "unknown", [key for key in loading["unexpected_keys"] if not UNUSED_BUFFERS.search(key)])
    check_none(model, name, "shape", [key for key, *_ in loading["mismatched_keys"]])
    if wrong := [key for key, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UserError(f"{name} has NaN or infinite weights in {first_names(wrong)}; fetch the checkpoint again")
    return model


def _unpack(model: nn.Module) -> None:
    """Unpack compressed-tensors weights now.

    The library does so on the first forward pass of the whole model, and some families generate without one.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)


def _note_on_dead_blocks(config: PreTrainedConfig) -> str | None:
    """A note on the last vision blocks if they have no effect, as in LLaVA, which reads an earlier block's output."""
    layer = getattr(config, "vision_feature_layer", None)
    if not isinstance(layer, int) or layer >= -1:
        return None
    return f"without effect: the last {-layer - 1} of the vision blocks, since vision_feature_layer is {layer}"


def _config_bits(config: PreTrainedConfig) -> int:
    """Bits of the config's dtype, for a model without weight files."""
    dtype = getattr(config, "dtype", None)
    return torch.finfo(dtype).bits if isinstance(dtype, torch.dtype) else 16


def device_of(device: str) -> torch.device | None:
    """The torch device of a name; None for `auto`, where accelerate places each layer."""
    usable = "choose from cpu, cuda, cuda:1, mps, auto"
    if device == "auto":
        if not is_accelerate_available():
            raise UserError("device 'auto' spreads a model over devices with accelerate; type `pip install accelerate`")
        return None
    try:
        torch_device = torch.device(str(device))
    except RuntimeError:  # torch's message lists many devices that are not usable here
        raise UserError(f"unknown device '{device}'; {usable}") from None
    try:  # torch raises an AssertionError where it was built without CUDA, and others for other devices
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError, ValueError) as error:
        known: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if torch_device.type in known and not known[torch_device.type]():
            why = "torch sees none here, or was built without it"
            raise UserError(f"device '{device}' cannot be used: {why}; leave it out to run on the CPU") from error
        raise UserError(f"device '{device}' cannot be used ({reason(error)}); {usable}") from error
    if torch_device.type == "meta" or (torch_device.type == "cpu" and torch_device.index):
        why = "it computes nothing" if torch_device.type == "meta" else "a machine has one cpu, and it has no number"
        raise UserError(f"device '{device}' cannot be used ({why}); {usable}")
    return torch_device


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name, which may be short (bf16)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    dtype = DTYPE_ALIASES.get(dtype, dtype)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, (*DTYPES, *DTYPE_ALIASES))
    return getattr(torch, dtype)  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' load report and progress bar: `load` raises an error for what the report would warn of."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
