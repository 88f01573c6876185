"""A model without its weights but with its processor, which is enough to turn examples into tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sensitivity.models.adapters import full_model
from sensitivity.models.checkpoint import read_config
from sensitivity.models.loading import load
from sensitivity.models.original_llava import is_original, original_processor
from sensitivity.models.processors import NO_PROCESSOR, load_processor
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError

ALL_BUT_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"]  # of a hub repository: all but the weights


def without_weights(name: str) -> VLM:
    """Load a model's config and processor, but no weights; for an adapter, those of its base model."""
    vlm = load(name, config_only=True)
    name, folder = full_model(name, config_only=True)  # an adapter has no processor of its own
    if not (name.startswith("embedded:") or Path(name).expanduser().is_dir()):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=ALL_BUT_WEIGHTS))
    processor_from = original_processor if is_original(read_config(folder, name)) else load_processor
    processor = processor_from(folder, name, vlm.model.config)
    if processor is None:
        raise UserError(f"{name} {NO_PROCESSOR}")
    return replace(vlm, processor=processor)
