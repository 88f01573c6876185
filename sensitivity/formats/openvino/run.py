"""Runs an export in OpenVINO on its packed codes: greedy answers, and the likelihood of the right answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from sensitivity.formats.openvino.export import FILES, STORED, check
from sensitivity.formats.openvino.halves import LANGUAGE, VISION, Array
from sensitivity.measure.evaluation import Rows, example_rows
from sensitivity.measure.generate.answer_tokens import (
    Answer,
    answer_of,
    cannot_be_right,
    end_tokens,
    greedy_takes_argmax,
    mean_nll,
)
from sensitivity.measure.generate.batches import Batch, batches
from sensitivity.models.config_only import without_weights
from sensitivity.spec.errors import UserError
from sensitivity.tasks.examples.types import Task


class OpenVINOModel:
    """Both graphs of an export, compiled; one prompt with its image at a time."""

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        """Compile both graphs; `threads` is how many threads OpenVINO uses, and 0 leaves that to OpenVINO."""
        import openvino

        self.folder = Path(folder)
        core = openvino.Core()
        options = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        graphs = {half: core.read_model(self.folder / file) for half, file in FILES.items()}
        self.vision = core.compile_model(graphs[VISION], "CPU", options).create_infer_request()
        self.language = core.compile_model(graphs[LANGUAGE], "CPU", options).create_infer_request()
        self.read = 0  # tokens in the cache

    def image_features(self, pixel_values: Tensor) -> Array:
        """The rows that the language model reads in place of an image's placeholder tokens."""
        each = (self.vision.infer({"pixel_values": one[None].float().numpy()}) for one in pixel_values)
        return np.concatenate([np.array(output["image_features"]) for output in each])

    def logits(self, ids: Sequence[int], keep: int, features: Array | None = None) -> Array:
        """Read the next tokens of the prompt that `forget` began; returns logits at the last `keep` of them."""
        width = self.language.get_compiled_model().input("image_features").get_partial_shape()[1].get_length()
        seen = self.read + len(ids)
        output = self.language.infer(
            {
                "input_ids": np.array([ids], np.int64),
                "image_features": np.zeros((1, width), np.float32) if features is None else features,
                "attention_mask": np.ones((1, seen), np.int64),
                "logits_to_keep": np.arange(len(ids) - keep, len(ids), dtype=np.int64),
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self.read = seen
        return np.array(output["logits"][0])

    def forget(self) -> None:
        """Begin a new prompt."""
        self.language.reset_state()
        self.read = 0

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


class Running:
    """An export in OpenVINO with its processor, which evaluates tasks."""

    def __init__(self, folder: Path) -> None:
        check(str(folder))
        check_arrived(folder)
        self.vlm = without_weights(str(folder))
        if (folder / "generation_config.json").exists():
            self.vlm.model.generation_config = GenerationConfig.from_pretrained(folder)
        if not greedy_takes_argmax(self.vlm):
            raise UserError(
                f"generation_config.json of {folder} asks for more than the most likely token, which only "
                "transformers applies"
            )
        self.model = OpenVINOModel(folder, torch.get_num_threads())

    def evaluate(self, task: Task) -> Rows:
        """The same rows as `measure.evaluation.evaluate`, computed one example at a time."""
        if task.gallery:
            raise UserError(f"openvino generates text, and {task.name} ranks captions")
        rows: Rows = {}
        for example in task.examples:
            (batch,) = batches(self.vlm, replace(task, examples=(example,)), plain=True)
            for name, values in example_rows(task, batch, *self._answer(task, batch)).items():
                rows.setdefault(name, []).extend(values)
        return rows

    def _answer(self, task: Task, batch: Batch) -> tuple[list[Answer], list[float]]:
        """The answer to one example, and the negative log-likelihood per token of the right answer."""
        ids, targets = batch.inputs["input_ids"][0].tolist(), batch.targets[0]
        features = self.model.image_features(batch.inputs["pixel_values"])
        never = cannot_be_right(self.vlm, task, batch.examples)
        stop = partial(never, 0) if never else None
        tokens = self.model.generate(ids, features, end_tokens(self.vlm), task.max_new_tokens, stop)
        self.model.forget()
        logits = torch.from_numpy(self.model.logits([*ids, *targets[:-1]], len(targets), features))
        return [answer_of(self.vlm, tokens, task)], mean_nll(logits[None], torch.tensor([targets]))


def check_arrived(folder: Path) -> None:
    """Raise an error unless OpenVINO reads every weight, under its own name, with the bytes that were written."""
    import openvino

    stored: Mapping[str, Mapping[str, str]] = json.loads((folder / STORED).read_bytes())
    for file, expected in stored.items():
        graph = openvino.Core().read_model(folder / file)
        constants = {op.get_friendly_name(): op for op in graph.get_ops() if op.get_type_name() == "Constant"}
        wrong = [
            name
            for name, digest in expected.items()
            if name not in constants or hashlib.sha256(constants[name].data.tobytes()).hexdigest() != digest
        ]
        if wrong:
            named = ", ".join(wrong[:4])
            raise UserError(f"OpenVINO does not read {named} of {folder / file} as written; export again")
