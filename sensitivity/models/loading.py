"""load(): a VLM from a folder, the hub or this package, with every weight accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
from transformers.utils.import_utils import is_accelerate_available

from sensitivity.models.adapters import WEIGHTS, Adapter, merged, resolve
from sensitivity.models.checkpoint import fingerprint, header, read_config, stored_bits, weight_files
from sensitivity.models.families import FAMILIES, family_of
from sensitivity.models.match import check_tensors, few, refuse
from sensitivity.models.original_llava import (
    converted,
    converted_config,
    files_of,
    is_original,
    labeled,
    processor_for,
)
from sensitivity.models.outliers import NOTE, plant_outliers
from sensitivity.models.processors import processor_of
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, reason, unknown

DTYPES = ("float32", "float16", "bfloat16")


SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


STALE = re.compile(r"(position_ids|inv_freq|masked_bias)$")  # buffers in old checkpoints that no model reads


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    config_only: bool = False,
    quantized: bool = False,
) -> VLM:
    """Load a model from a folder, the hub, or `embedded:...`; with config_only it needs no weights and has none.

    `quantized` accepts a checkpoint that is already quantized, such as an export; its weights are unpacked at once.
    The device `auto` spreads a model over all devices. An adapter is merged into its base model, which it names
    itself, or which follows an @ in its name.

    Examples:
        >>> from sensitivity import load
        >>> vlm = load("embedded:scenes-llava")
    """
    target, wanted = device_of(device), dtype_of(dtype)
    folder, adapter = resolve(name, config_only)
    if adapter is not None:
        base = load(adapter.base, device=device, dtype=dtype, config_only=config_only)
        return _adapted(base, adapter, name, config_only)
    raw = read_config(folder, name, quantized)
    original = is_original(raw)
    files = [] if config_only else files_of(folder, name) if original else weight_files(folder, name)
    planted = name == "embedded:scenes-llava-heavy"
    if wanted is None and name.startswith("embedded:") and device == "cpu":
        wanted = torch.float32
    with _quiet():
        config, architecture = _config(folder, name, raw)
        if config_only:
            model, processor = _empty(architecture, config, name), None
        elif original:
            tensors = {key: read() for key, (_, read) in converted(raw, config, files, name).items()}
            stored = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
            check_tensors(_empty(architecture, config, name), stored, name)
            model = _filled(architecture, config, None, name, wanted, target, tensors)
            processor = processor_for(folder, name, config)
        else:
            # checked on an empty model, so that a wrong checkpoint is refused before it fills memory
            if not quantized:
                stored = {key: (one.dtype, one.shape) for file in files for key, one in header(file).items()}
                check_tensors(_empty(architecture, config, name), stored, name)
            # outliers are planted in float32 and rounded afterwards, which changes the model's function least
            model = _filled(architecture, config, folder, name, torch.float32 if planted else wanted, target)
            processor = processor_of(folder, name, config)
    if quantized and not config_only:
        _unpack(model)
    if planted and not config_only:
        plant_outliers(model)
        model = model.to(wanted or torch.float16)
    model = model.eval().requires_grad_(False)
    return VLM(
        name=name,
        model=model if config_only or target is None else model.to(target),
        processor=processor,
        family=labeled(raw, family_of(model)) if original else family_of(model),
        fingerprint=fingerprint(raw, files, NOTE if planted else None),
        native_bits=stored_bits(files) or _config_bits(config),
        note=NOTE if planted else _dead_blocks(config),
    )


def _adapted(base: VLM, adapter: Adapter, name: str, config_only: bool) -> VLM:
    """The base model with an adapter merged in, under a fingerprint of both."""
    if not config_only:
        with _quiet():
            base.model = merged(base.model, adapter, name).eval().requires_grad_(False)
    mark = fingerprint(adapter.config, [] if config_only else [adapter.folder / WEIGHTS], base.fingerprint)
    return replace(base, name=name, fingerprint=mark)


def _config(folder: Path, name: str, raw: Mapping[str, Any]) -> tuple[Any, Any]:
    """The config, and the model class that it names in transformers; else one that reads images and text."""
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
        raise UserError(
            f"model_type {raw.get('model_type')!r} of {name} is not known to transformers {transformers.__version__}; "
            f"the tested families are {', '.join(key for key in FAMILIES if key[0].islower())}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each family checks its own config, with its own types of error
        why = f"config.json of {name} does not fit its model_type ({reason(error)}); fetch it again"
        raise UserError(why) from error
    named = getattr(transformers, (raw.get("architectures") or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return config, named
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return config, found[0] if isinstance(found, tuple | list) else found
    raise UserError(f"transformers {transformers.__version__} has no model class for {raw['model_type']!r} of {name}")


def _empty(architecture: Any, config: Any, name: str) -> nn.Module:
    """The model on the meta device, which takes no memory for weights."""
    try:
        with torch.device("meta"):
            return architecture(config)  # type: ignore[no-any-return]
    except Exception as error:
        why = f"{architecture.__name__} cannot be built from the config of {name} ({reason(error)})"
        raise UserError(why) from error


def _filled(
    architecture: Any,
    config: Any,
    folder: Path | None,
    name: str,
    dtype: torch.dtype | None,
    target: torch.device | None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """The model with the folder's weights, or the given ones: all of them, no others, and all finite."""
    spread = {"device_map": "auto"} if target is None else {}
    try:
        model, loading = architecture.from_pretrained(
            folder,
            state_dict=tensors,
            config=config,
            dtype=dtype or (config.dtype if tensors else "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **spread,
        )
    except Exception as error:
        raise UserError(f"{name} cannot be loaded as {architecture.__name__} ({reason(error)})") from error
    refuse(model, name, "lacks", loading["missing_keys"])
    refuse(model, name, "unknown", [key for key in loading["unexpected_keys"] if not STALE.search(key)])
    refuse(model, name, "shape", [key for key, *_ in loading["mismatched_keys"]])
    if wrong := [key for key, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UserError(f"{name} has NaN or infinite weights in {few(wrong)}; fetch the checkpoint again")
    return model  # type: ignore[no-any-return]


def _unpack(model: Any) -> None:
    """Unpack compressed-tensors weights now.

    The library does so on the first forward pass of the whole model, and some families generate without one.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)


def _dead_blocks(config: Any) -> str | None:
    """A note if the last vision blocks have no effect, as in LLaVA, which by default reads features before the last."""
    layer = getattr(config, "vision_feature_layer", None)
    if not isinstance(layer, int) or layer >= -1:
        return None
    return f"without effect: the last {-layer - 1} of the vision blocks, since vision_feature_layer is {layer}"


def _config_bits(config: Any) -> int:
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
        target = torch.device(device)
    except RuntimeError:  # torch's message lists many devices that are not usable here
        raise UserError(f"unknown device '{device}'; {usable}") from None
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise UserError(f"device '{device}' cannot be used ({reason(error)}); {usable}") from error
    if target.type == "meta" or (target.type == "cpu" and target.index):
        why = "it computes nothing" if target.type == "meta" else "a machine has one cpu, and it has no number"
        raise UserError(f"device '{device}' cannot be used ({why}); {usable}")
    return target


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name, which may be short (bf16)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    dtype = SHORT.get(dtype, dtype)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, (*DTYPES, *SHORT))
    return getattr(torch, dtype)  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load report and progress bar: what they report is an error here, or nothing."""
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
