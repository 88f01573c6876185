"""A model in a runtime, image half and language half: greedy answers, and the likelihood of the right answers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sensitivity.formats.halved.halves import Array
from sensitivity.measure.evaluation import Rows, example_rows
from sensitivity.measure.generate.answer_tokens import (
    Answer,
    answer_of,
    cannot_be_right,
    end_tokens,
    greedy_takes_argmax,
    mean_nll,
)
from sensitivity.measure.generate.batches import Batch, batches_by_image
from sensitivity.models.config_only import without_weights
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Task

IMAGE_INPUTS = ("pixel_values", "image_grid_thw")  # the processor's outputs that the image half reads


class HalvedModel(ABC):
    """A model in a runtime, one prompt with its images at a time."""

    @abstractmethod
    def image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Array:
        """The rows that the language model reads in place of an image's placeholder tokens."""

    @abstractmethod
    def logits(self, ids: Sequence[int], keep: int, features: Array | None = None) -> Array:
        """Read the next tokens of the prompt that `forget` began; returns logits at the last `keep` of them."""

    @abstractmethod
    def forget(self) -> None:
        """Begin a new prompt."""

    def layer_seconds(self) -> Mapping[str, float]:
        """Weight -> the seconds that its layer has taken so far; empty if the runtime counts none."""
        return {}

    @staticmethod
    def image_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's outputs that the image half reads."""
        mask = inputs.get("pixel_attention_mask")
        if mask is not None and not bool(mask.all()):
            raise UserError(
                "the processor pads images, and the image half does not read the mask of the padding; set "
                "do_image_splitting in preprocessor_config.json to true"
            )
        return {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}

    @staticmethod
    def image_count(inputs: Mapping[str, Tensor]) -> int:
        """The number of images, or of tiles, in a processor's output."""
        grids = inputs.get("image_grid_thw")
        return len(inputs["pixel_values"].flatten(0, -4)) if grids is None else len(grids)

    def generate(
        self,
        ids: Sequence[int],
        features: Array,
        ends: set[int],
        max_new_tokens: int,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> list[int]:
        """Greedy decoding, up to an end token, or until `stop` is true for the tokens so far."""
        self.forget()
        logits = self.logits(ids, 1, features)
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < max_new_tokens and tokens[-1] not in ends and not (stop and stop(tokens)):
            logits = self.logits(tokens[-1:], 1)
            tokens.append(int(logits[-1].argmax()))
        return tokens


def unlike(found: Mapping[str, Array], hashes: Mapping[str, str]) -> list[str]:
    """The names of tensors that a runtime does not find, or finds with other bytes than were written."""
    return [n for n, sha in hashes.items() if n not in found or hashlib.sha256(found[n].tobytes()).hexdigest() != sha]


@dataclass(frozen=True)
class Running:
    """An export in its runtime, with a processor, which evaluates tasks."""

    model: HalvedModel
    vlm: VLM  # without weights
    runtime: str

    @classmethod
    def of(cls, folder: Path, model: HalvedModel, runtime: str) -> Running:
        """An export that was opened in a runtime; an error if its settings ask for more than greedy answers."""
        vlm = without_weights(str(folder))
        if (folder / "generation_config.json").exists():
            vlm.model.generation_config = GenerationConfig.from_pretrained(folder)
        if not greedy_takes_argmax(vlm):
            raise UserError(
                f"generation_config.json of {folder} asks for more than greedy decoding, which only transformers can do"
            )
        return cls(model, vlm, runtime)

    def evaluate(self, task: Task) -> Rows:
        """The same rows as `measure.evaluation.evaluate`, computed one example at a time."""
        if task.gallery:
            raise UserError(f"{self.runtime} generates text, and {task.name} ranks captions")
        rows: Rows = {}
        for example in task.examples:
            (batch,) = batches_by_image(self.vlm, replace(task, examples=(example,)), plain=True)
            for name, values in example_rows(task, batch, *self._answer(task, batch)).items():
                rows.setdefault(name, []).extend(values)
        return rows

    def _answer(self, task: Task, batch: Batch) -> tuple[list[Answer], list[float]]:
        """The answer to one example, and the negative log-likelihood per token of the right answer."""
        ids, targets = batch.inputs["input_ids"][0].tolist(), batch.targets[0]
        features = self.model.image_features(**self.model.image_inputs(batch.inputs))
        never = cannot_be_right(self.vlm, task, batch.examples)
        stop = partial(never, 0) if never else None
        tokens = self.model.generate(ids, features, end_tokens(self.vlm), task.max_new_tokens, stop)
        self.model.forget()
        logits = torch.from_numpy(self.model.logits([*ids, *targets[:-1]], len(targets), features))
        return [answer_of(self.vlm, tokens, task)], mean_nll(logits[None], torch.tensor([targets]))
