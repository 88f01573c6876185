"""Adapters (LoRA and the like): merged into their base model by PEFT before anything is quantized."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from sensitivity.models.checkpoint import header, json_object, model_folder
from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.fields import FILE, FOLDER, MISSING, InvalidValue, check, not_a_file, shortened

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder, and the model that it is merged into."""

    folder: Path
    config: dict[str, object]
    base: str


def resolve(name: str, config_only: bool = False) -> tuple[Path, Adapter | None]:
    """The folder of a model name, and the adapter in it if there is one; `name` is a model, ADAPTER or ADAPTER@BASE."""
    # an @ may also be part of a folder's name
    first, at, base = (name, "", "") if Path(name).expanduser().is_dir() else name.rpartition("@")
    first = first or name
    folder = model_folder(first, config_only)
    config = adapter_config(folder, first)
    if config is None:
        if at:
            raise UserError(
                f"{first} is not an adapter, and only an adapter takes a base model after an @; type {first}"
            )
        return folder, None
    adapter = Adapter(folder, config, base or base_of(config, folder, first))
    _check_chain(adapter, name)
    return folder, adapter


def full_model(name: str, config_only: bool = False) -> tuple[str, Path]:
    """The name and folder of a full model; for an adapter, those of its base model."""
    folder, adapter = resolve(name, config_only)
    return (name, folder) if adapter is None else full_model(adapter.base, config_only)


def adapter_config(folder: Path, name: str) -> dict[str, object] | None:
    """The configuration of the adapter in a folder; None if it holds a full model, or nothing."""
    file = folder / CONFIG
    if not_a_file(file) == MISSING or not_a_file(folder / "config.json") != MISSING:
        return None
    config = json_object(file, name)
    try:
        check(config, {}, {"base_model_name_or_path": FILE})
    except InvalidValue as error:
        raise UserError(f"{CONFIG} of {name} does not fit: {error}; fetch it again") from error
    if not_a_file(folder / WEIGHTS) == MISSING:
        raise UserError(f"{name} has no {WEIGHTS}; save the adapter with model.save_pretrained(folder)")
    return config


def _check_chain(adapter: Adapter, name: str) -> None:
    """Raise an error if an adapter's chain of base models leads back to itself."""
    seen = [adapter.folder.resolve()]
    base = Path(adapter.base).expanduser()
    while not_a_file(base) == FOLDER:
        if base.resolve() in seen:
            raise UserError(f"the adapter {name} is its own base model; type {name}@BASE, where BASE is a full model")
        seen.append(base.resolve())
        config = adapter_config(base, str(base))
        if config is None:
            return
        base = Path(base_of(config, base, str(base))).expanduser()


def base_of(config: dict[str, object], folder: Path, name: str) -> str:
    """The base model that an adapter names: a folder beside the adapter's, or any model's name."""
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{CONFIG} of {name} names no base model; type {name}@BASE, where BASE is its folder or name")
    if not_a_file(folder / base) == FOLDER:
        return str(folder / base)
    try:
        model_folder(base, config_only=True)
    except UserError as error:
        why = f"{name} is an adapter for {shortened(base)}, which cannot be loaded"
        raise UserError(f"{why} ({error}); type {name}@FOLDER, where FOLDER holds that model") from error
    return base


def merge_adapter(model: PreTrainedModel, adapter: Adapter, name: str) -> nn.Module:
    """Merge an adapter into the weights of a model; raise an error if a tensor matches no layer, or is missing."""
    folder = adapter.folder
    stored = header(folder / WEIGHTS)
    if rounded := [key for key, one in stored.items() if not one.dtype.is_floating_point or one.dtype.itemsize < 2]:
        raise UserError(f"the adapter {name} stores {rounded[0]} as whole numbers or in 8 bits; save it in float32")
    _check_rank(adapter, max((max(one.shape, default=0) for one in stored.values()), default=0), name)
    try:
        import peft
    except ImportError:
        raise UserError(
            f"{name} is an adapter, which PEFT merges into its base model; "
            "type `pip install 'vlm-sensitivity[adapters]'`"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of tensors that match no layer; below they are an error
            adapted = peft.PeftModel.from_pretrained(model, folder, local_files_only=True)
    except Exception as error:  # PEFT's own, torch's on shapes
        raise UserError(f"the adapter {name} does not fit its base model ({reason(error)})") from error
    stored_names = set(stored)
    expected_names = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if mismatched := sorted(stored_names ^ expected_names):
        problem = "has tensors for no layer of" if mismatched[0] in stored_names else "lacks tensors for"
        raise UserError(
            f"the adapter {name} {problem} its base model: {', '.join(mismatched[:4])}; is the base model right?"
        )
    try:
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # NaN, most often
        raise UserError(f"the adapter {name} cannot be merged into its base model ({reason(error)})") from error
    return merged


def _check_rank(adapter: Adapter, largest: int, name: str) -> None:
    """Raise an error for a rank above the longest dimension of all tensors.

    PEFT allocates memory for the rank in the config before it reads a tensor.
    """
    ranks = adapter.config.get("rank_pattern")
    for rank in (adapter.config.get("r"), *(ranks.values() if isinstance(ranks, dict) else ())):
        if isinstance(rank, int | float) and not 0 <= rank <= largest:
            raise UserError(
                f"{CONFIG} of {name} has the rank {rank}, and no stored tensor has a dimension above {largest}"
            )
