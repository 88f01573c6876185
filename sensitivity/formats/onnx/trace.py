"""Traces the two halves of a model into ONNX graphs, whose weights are inputs, so that none is read or copied."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from sensitivity.formats.halved.halves import LANGUAGE, VISION
from sensitivity.formats.halved.traceable import WEIGHTS, parameter_input, prepared, skeleton
from sensitivity.models.loading import quiet
from sensitivity.models.vlm import VLM
from sensitivity.spec.errors import UserError, reason
from sensitivity.spec.files import replacing

if TYPE_CHECKING:
    from onnx_ir import Model

CACHE = "past_key_values"  # the argument that holds the cache
PAST, PRESENT = "past.", "present."  # what its inputs and outputs are named, with a number for each tensor
OPSET = 21
TRIES = 3  # how many processes may crash before an error is raised
PROGRAM = "import json, sys; from sensitivity.formats.onnx import trace; trace.write_graphs(**json.load(sys.stdin))"


def traced(vlm: VLM) -> dict[str, Model]:
    """Each half of a model as an onnx_ir.Model; the input of parameter P is named `parameter_input(P)`.

    Tracing has a process of its own, which frees nothing and is started again if it crashes: with torch 2.13, a process
    that converts to ONNX often finds its memory damaged later, when it collects garbage.
    """
    import onnx_ir

    with tempfile.TemporaryDirectory() as space:
        files = {half: Path(space) / f"{half}.onnx" for half in (VISION, LANGUAGE)}
        for _ in range(TRIES):
            if missing := {half: str(file) for half, file in files.items() if not file.exists()}:
                _in_own_process(vlm.name, missing)
        for half, file in files.items():
            if not file.exists():
                raise UserError(f"tracing the {half} half of {vlm.name} for onnx crashed {TRIES} times; try again")
        return {half: onnx_ir.load(file) for half, file in files.items()}


def _in_own_process(model: str, files: dict[str, str]) -> None:
    """Run `write_graphs` in a process; if that crashes, some files are missing, and if it fails, an error is raised."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps({"model": model, "files": files}), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode > 0:  # below zero it crashed
        last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise UserError(f"{model} cannot be traced for onnx ({last.partition('UserError: ')[2] or last})")


def write_graphs(model: str, files: dict[str, str]) -> None:
    """Write the graphs of some halves to files, and end the process: this runs in the process that traces."""
    import onnx_ir

    gc.disable()
    vlm = skeleton(model)
    kept: list[Any] = []
    for half, file in files.items():
        module, inputs, shapes = prepared(vlm, half)
        try:
            program = converted(module, inputs, shapes, kept)
        except Exception as error:
            raise UserError(f"the {half} half: {reason(error)}") from error
        with replacing(Path(file)) as unfinished:
            onnx_ir.save(without_notes(program), unfinished)
    os._exit(0)  # nothing is freed


def converted(module: Any, inputs: dict[str, Any], shapes: dict[str, Any], kept: list[Any]) -> Model:
    """The graph of one half; what was made on the way is added to `kept`, so that nothing is freed."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    with quiet(), _silent():
        exported, _ = DynamoExporter().export_program(  # type: ignore[no-untyped-call]
            module, inputs, DynamoConfig(dynamic_shapes=shapes)
        )
        _drop_assertions(exported.graph)
        # not transformers' exporter for ONNX, which replaces methods of tensors: it crashes still more often
        found = torch.onnx.export(exported, args=(), opset_version=OPSET, verbose=False)
    assert found is not None
    kept += [module, inputs, exported, found]
    _name(found.model, inputs)
    return found.model


def _drop_assertions(graph: torch.fx.Graph) -> None:
    """Drop the tracer's checks of shapes, with what only they read: Qwen2-VL's use operations that ONNX lacks."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _name(program: Model, inputs: dict[str, Any]) -> None:
    """Name the inputs and outputs of a graph; the tensors of the cache come in the same order in both."""
    names: list[str] = []
    for name, value in inputs.items():
        if name == WEIGHTS:
            names += [parameter_input(key.removeprefix("model.")) for key in value]
        elif name == CACHE:
            names += [f"{PAST}{number}" for number in range(len(pytree.tree_leaves(value)))]
        else:
            names.append(name)
    for value, name in zip(program.graph.inputs, names, strict=True):
        value.name = name
    first = "logits" if CACHE in inputs else "image_features"
    for number, value in enumerate(program.graph.outputs):
        value.name = f"{PRESENT}{number - 1}" if number else first


@contextmanager
def _silent() -> Iterator[None]:
    """Silence other libraries' warnings about versions and operators, which do not help a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def without_notes(program: Model) -> Model:
    """The graph without what the tracer notes beside each operation, such as the lines of source code it came from."""
    program.metadata_props.clear()
    program.graph.metadata_props.clear()
    for node in program.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    return program
