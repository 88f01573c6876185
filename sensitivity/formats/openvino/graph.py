"""Replaces a graph's weight inputs by constants, and writes its XML with the offset of each in the binary file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from sensitivity.formats.halved.traceable import WEIGHTS, parameter_input
from sensitivity.formats.openvino.layout import CODES, ZERO, Constant

if TYPE_CHECKING:
    from openvino import Model, Node

ALIGNMENT = 64  # bytes, as OpenVINO aligns the constants that it writes
# Compile options: sums in float32 give the answers that torch measured, and activations are not rounded, as some
# processors do by default, to 8 bits or bfloat16. Graphs store them, too, but OpenVINO 2026.4 ignores the first there.
OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


def weights_of(graph: Model, names: Sequence[str]) -> dict[str, Node]:
    """Parameter name -> the graph input that stands for it, for the parameters that the graph reads."""
    inputs = {name: port.get_node() for port in graph.inputs for name in port.get_names()}
    node_of = {name: inputs[parameter_input(name)] for name in names if parameter_input(name) in inputs}
    return {name: node for name, node in node_of.items() if node.output(0).get_target_inputs()}


def put_constants(graph: Model, parameters: Mapping[str, Sequence[Constant]]) -> None:
    """Replace each weight input by an input for each of its constants, and the operations that dequantize them.

    They stay inputs until `write_xml` declares them constants, since OpenVINO's own constants would take memory.
    """
    from openvino import PartialShape, Type, op

    nodes = weights_of(graph, list(parameters))
    for name, stored in parameters.items():
        old, made = nodes[name], []
        for constant in stored:
            node = op.Parameter(getattr(Type, constant.type), PartialShape(list(constant.shape)))
            node.set_friendly_name(constant.name)
            made.append(node)
        value = dequantized(stored, made)
        for reader in old.output(0).get_target_inputs():
            reader.replace_source_output(value.output(0))
        graph.add_parameters(made)
    for port in list(graph.inputs):
        if weight := [name for name in port.get_names() if name.startswith(f"{WEIGHTS}.")]:
            # it was replaced, or belongs to the other half
            assert not port.get_node().output(0).get_target_inputs(), f"{weight[0]} is read, but not stored"
            graph.remove_parameter(port.get_node())
    for option, value in OPTIONS.items():
        graph.set_rt_info(value, ["runtime_options", option])
    graph.validate_nodes_and_infer_types()


def dequantized(stored: Sequence[Constant], made: Sequence[Node]) -> Node:
    """One weight as floats: the last of the operations that dequantize it.

    They have the form for which OpenVINO keeps the codes packed in memory.
    """
    from openvino import opset14 as ops

    node = made[0]
    if not stored[0].name.endswith(CODES):
        return node if stored[0].type == "f32" else ops.convert(node, "f32")
    scale, type = made[1], stored[1].type
    if type == "bf16":  # in which OpenVINO does not compute
        scale, type = ops.convert(scale, "f32"), "f32"
    node = ops.convert(node, type)
    if stored[-1].name.endswith(ZERO):
        node = ops.subtract(node, ops.convert(made[-1], type))
    node = ops.multiply(node, scale)
    if len(stored[0].shape) > 2:
        rows, groups, columns = stored[0].shape
        node = ops.reshape(node, ops.constant(np.array([rows, groups * columns], np.int64)), special_zero=False)
    return node if type == "f32" else ops.convert(node, "f32")


def write_xml(graph: Model, constants: Sequence[Constant], xml: Path) -> tuple[bytes, dict[str, int]]:
    """Write a graph's XML; returns the first bytes of its binary file, and the offset of each constant there."""
    from openvino import serialize

    binary = xml.with_suffix(".bin")
    serialize(graph, str(xml), str(binary))
    begin = binary.read_bytes()  # OpenVINO's own constants, such as shapes
    offsets, end = {}, len(begin)
    for constant in constants:
        end += -end % ALIGNMENT
        offsets[constant.name] = end
        end += constant.bytes
    tree, left = ElementTree.parse(xml), {constant.name: constant for constant in constants}
    for layer in tree.iterfind("./layers/layer"):
        if layer.get("type") == "Parameter" and (constant := left.pop(str(layer.get("name")), None)):  # type: ignore[arg-type]
            layer.set("type", "Const")
            data = layer.find("data")
            assert data is not None
            data.set("offset", str(offsets[constant.name]))
            data.set("size", str(constant.bytes))
    assert not left, f"{xml.name} has no {', '.join(left)}"
    tree.write(xml, encoding="utf-8", xml_declaration=True)
    return begin, offsets
