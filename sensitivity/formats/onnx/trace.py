"""Traces the two halves of a model into ONNX graphs, whose weights are inputs, so that none is read or copied."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from sensitivity.formats.halved.traceable import WEIGHTS, Half, Inputs, parameter_input
from sensitivity.formats.halved.tracing import write_traced
from sensitivity.models.loading import quiet

if TYPE_CHECKING:
    from onnx_ir import Model

CACHE = "past_key_values"  # the argument that holds the cache
PAST, PRESENT = "past.", "present."  # what its inputs and outputs are named, with a number for each tensor
OPSET = 21
GRAPH = "graph.onnx"


def read(graph: Path) -> Model:
    """One of the traced graphs."""
    import onnx_ir

    return onnx_ir.load(graph / GRAPH)


def write_graphs(model: str, graphs: dict[str, str]) -> None:
    """Write the graphs of some halves; this runs in the process that traces."""
    write_traced(model, graphs, _write)


def _write(module: Half, inputs: Inputs, shapes: Inputs, folder: Path) -> object:
    import onnx_ir
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
    _name(found.model, inputs)
    onnx_ir.save(without_notes(found.model), folder / GRAPH)
    return exported, found


def _drop_assertions(graph: torch.fx.Graph) -> None:
    """Drop the tracer's checks of shapes, with what only they read: Qwen2-VL's use operations that ONNX lacks."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _name(program: Model, inputs: Inputs) -> None:
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
