"""Half of a model as a function of its weights, with example inputs, as tracers take it; no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sensitivity.formats.halved.halves import VISION, half_of
from sensitivity.models.halves.positions import in_plane
from sensitivity.models.halves.vision_half import vision_half_of
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM

Half = Any  # a module; tracers name a narrower type, but take it
Inputs = dict[str, Any]  # the arguments of a traced half by name, or which of their sizes are dynamic
WEIGHTS = "weights"  # the argument of a traced half that holds its parameters
# Sizes of the traced inputs. Torch treats equal sizes as the same dimension, so each is a prime that no model uses.
PROMPTS, CACHED, TOKENS, FEATURES, KEPT = 17, 19, 23, 29, 13


def skeleton(model: VLM | str) -> VLM:
    """A model without its weights, loaded by name; a model that is loaded already is returned as it is."""
    return load(model, config_only=True) if isinstance(model, str) else model


class _WithWeights(nn.Module):
    """A half as a function of its weights; it has no parameters itself, since tracing would find them."""

    def __init__(self, half: nn.Module) -> None:
        super().__init__()
        self.inner = (half,)  # in a tuple, where torch does not look for modules

    def forward(self, weights: Mapping[str, Tensor], **inputs: Any) -> Any:
        return torch.func.functional_call(self.inner[0], dict(weights), kwargs=inputs, tie_weights=True)


def prepared(vlm: VLM, half: str) -> tuple[Half, Inputs, Inputs]:
    """One half of a model as a function of its weights, example inputs, and which of their sizes are dynamic."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes, register_cache_pytrees_for_model

    empty = replace(vlm, model=without_values(vlm.model))
    module: Half = _WithWeights(half_of(empty, half))
    register_cache_pytrees_for_model(module)
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors with a type and a shape, but no values
        weights = shapes_of_weights(empty)
        inputs = _inputs(empty, half)
    varying = vision_half_of(vlm).varies if half == VISION else tuple(inputs)
    shapes = {name: get_auto_dynamic_shapes(value) if name in varying else None for name, value in inputs.items()}
    # weights last: the exporter reads the batch size from the first input
    return module, {**inputs, WEIGHTS: weights}, {**shapes, WEIGHTS: dict.fromkeys(weights)}


def parameter_input(name: str) -> str:
    """The name of the graph's input that stands for a parameter."""
    return f"{WEIGHTS}.model.{name}"


def shapes_of_weights(vlm: VLM) -> dict[str, Tensor]:
    """A tensor with the shape of each parameter; inside FakeTensorMode it takes no memory."""
    return {f"model.{name}": torch.empty(p.shape) for name, p in vlm.model.named_parameters()}


def _inputs(vlm: VLM, half: str) -> Inputs:
    """Example inputs of a half; only their shapes matter."""
    from transformers import DynamicCache

    if half == VISION:
        return dict(vision_half_of(vlm).example(vlm.model.config))
    text = vlm.model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = DynamicCache()
    for layer in range(text.num_hidden_layers):
        keys, values = (torch.empty(PROMPTS, heads, CACHED, width) for _ in range(2))
        cache.update(keys, values, layer)
    positions = {"position_ids": torch.empty(3, PROMPTS, TOKENS, dtype=torch.int64)} if in_plane(vlm) else {}
    return {
        "input_ids": torch.empty(PROMPTS, TOKENS, dtype=torch.int64),
        "image_features": torch.empty(FEATURES, text.hidden_size),
        "attention_mask": torch.empty(PROMPTS, CACHED + TOKENS, dtype=torch.int64),
        "past_key_values": cache,
        "logits_to_keep": torch.empty(KEPT, dtype=torch.int64),
        **positions,
    }


def without_values(model: nn.Module) -> Any:
    """A copy of the model with its parameters on the meta device and real buffers, such as rotary frequencies."""
    with _parameters_on_meta():
        return type(model)(model.config).eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside the block, new modules put their parameters on the meta device, as in accelerate's init_empty_weights."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one is on meta already: keep the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
