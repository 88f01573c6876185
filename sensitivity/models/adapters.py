"""Adapters (LoRA and the like): merged into their base model by PEFT before anything is quantised."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sensitivity.errors import UserError, reason
from sensitivity.models.checkpoint import find

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder, and the model that it is merged into."""

    folder: Path
    config: dict[str, Any]
    base: str


def resolve(name: str, config_only: bool = False) -> tuple[Path, Adapter | None]:
    """The folder that a name means, and the adapter if one lies in it: ADAPTER, or ADAPTER@BASE."""
    alone, at, base = (name, "", "") if Path(name).expanduser().is_dir() else name.rpartition("@")
    alone = alone or name
    folder = find(alone, config_only)
    config = adapter_config(folder, alone)
    if config is None:
        if at:
            raise UserError(f"{alone} is no adapter, which alone takes a base model behind an @; type {alone}")
        return folder, None
    return folder, Adapter(folder, config, base or base_of(config, folder, alone))


def whole(name: str, config_only: bool = False) -> tuple[str, Path]:
    """The whole model behind a name, and its folder: that of an adapter's base model."""
    folder, adapter = resolve(name, config_only)
    return (name, folder) if adapter is None else whole(adapter.base, config_only)


def adapter_config(folder: Path, name: str) -> dict[str, Any] | None:
    """What a folder says about the adapter in it; None where there is a whole model, or nothing."""
    file = folder / CONFIG
    if not file.exists() or (folder / "config.json").exists():
        return None
    try:
        config = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{CONFIG} of {name} cannot be read ({reason(error)}); fetch it again") from error
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{name} has no {WEIGHTS}; save the adapter with model.save_pretrained(folder)")
    return config


def base_of(config: dict[str, Any], folder: Path, name: str) -> str:
    """The model that an adapter was made for: as the adapter names it, or beside the adapter's folder."""
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{CONFIG} of {name} names no base model; type {name}@BASE, where BASE is its folder or name")
    if (folder / base).is_dir():
        return str(folder / base)
    try:
        find(base, config_only=True)
    except UserError as error:
        why = f"{name} is an adapter for {base}, which cannot be had"
        raise UserError(f"{why} ({error}); type {name}@FOLDER, where FOLDER holds that model") from error
    return str(base)


def merged(model: Any, adapter: Adapter, name: str) -> Any:
    """The model with the adapter in its weights, every tensor of which has found its place."""
    folder = adapter.folder
    try:
        import peft
    except ImportError:
        raise UserError(
            f"{name} is an adapter, which PEFT merges into its base model; "
            "type `pip install 'vlm-sensitivity[adapters]'`"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of tensors without a place, which are named below
            adapted = peft.PeftModel.from_pretrained(model, folder, local_files_only=True)
    except Exception as error:  # PEFT's own, torch's on shapes
        raise UserError(f"the adapter {name} does not fit its base model ({reason(error)})") from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        there = set(file.keys())
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if astray := sorted(there ^ wanted):
        how = "has tensors for no layer of" if astray[0] in there else "lacks tensors for"
        raise UserError(f"the adapter {name} {how} its base model: {', '.join(astray[:4])}; is the base model right?")
    return adapted.merge_and_unload(safe_merge=True)
