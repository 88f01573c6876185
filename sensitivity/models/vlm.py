"""VLM: a loaded model with its processor, family and fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn

from sensitivity.models.families import Family
from sensitivity.models.towers import Towers
from sensitivity.spec.errors import UserError


@dataclass
class VLM:
    """A loaded model, its processor, and what the package must know about it.

    Examples:
        >>> vlm.family.label, vlm.native_bits
        ('LLaVA', 16)
    """

    name: str
    model: Any  # of transformers, or any nn.Module with its getters
    processor: Any  # of transformers; None where the folder has none
    family: Family
    fingerprint: str
    native_bits: int  # per weight, as the checkpoint stores most of them
    transformers: str = transformers.__version__  # the version that loaded it
    note: str | None = None  # what a reader of its scores must know
    other_bits: Mapping[str, int] = field(default_factory=dict)  # of parameters that it stores in others
    quantized_before: str | None = None  # a sentence, a part of `note`, if an export's weights were loaded

    def check_weights(self) -> None:
        """Raise an error for a model that was loaded without weights."""
        if self.device.type == "meta":
            raise UserError(f"{self.name} was loaded without weights (config_only=True); load it with them")

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def vision(self) -> nn.Module:
        """The module that turns pixels into features."""
        part_of = Towers(self.model, self.family).part_of_module
        module: nn.Module = self.model.get_submodule(next(path for path, part in part_of.items() if part == "vision"))
        return module

    @property
    def text_generator(self) -> Any:
        """The module that generates text: the model, or a language model in it with its own output head (BLIP-2)."""
        inner = getattr(self.model, "language_model", None)
        return inner if isinstance(inner, transformers.PreTrainedModel) and inner.can_generate() else self.model

    @property
    def encoder_decoder(self) -> bool:
        """Whether the language model is an encoder-decoder, such as T5."""
        return bool(self.model.config.get_text_config().is_encoder_decoder)
