"""Counts the seconds of each layer inside the running model, with the caches and fused operations that it has there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensitivity.formats.openvino.layout import CODES

if TYPE_CHECKING:
    from openvino import CompiledModel, InferRequest, Model, Node

# the names that we give to the matrix product that reads a weight, and to the addition of its bias: if OpenVINO fuses
# both, the fused operation has the name of the addition
NAME, WITH_BIAS = "layer {}", "layer {} with bias"
# operations between a constant and the product that reads it
BETWEEN = ("Convert", "Multiply", "Reshape", "Subtract", "Transpose")
PRODUCTS = ("FullyConnected", "MatMul", "LLMMLP", "QKVProjection")  # how OpenVINO names products when it runs them


def name_layers(graph: Model) -> list[str]:
    """Name each matrix product after the weight that it reads, before the graph is compiled; returns the weights."""
    found = []
    for node in graph.get_ops():
        if node.get_type_name() == "MatMul" and (weight := _constant(node.input_value(1).get_node())):
            node.set_friendly_name(NAME.format(weight))
            found.append(weight)
            for reader in (one.get_node() for one in node.output(0).get_target_inputs()):
                if reader.get_type_name() == "Add" and any(_constant(v.get_node()) for v in reader.input_values()):
                    reader.set_friendly_name(WITH_BIAS.format(weight))
    return found


def _constant(node: Node) -> str | None:
    """The parameter behind an operand; None where the operand is computed."""
    while node.get_type_name() in BETWEEN:
        node = node.input_value(0).get_node()
    return node.get_friendly_name().removesuffix(CODES) if node.get_type_name() == "Constant" else None


class LayerCounters:
    """The counters of one compiled graph."""

    def __init__(self, compiled: CompiledModel, request: InferRequest, weights: list[str]) -> None:
        self.request = request
        self.passes = 0  # OpenVINO tells the mean of all passes
        names = {name.format(weight): weight for weight in weights for name in (NAME, WITH_BIAS)}
        self.weights_of: dict[str, list[str]] = {}  # operation as it runs -> the weights that it reads
        for node in compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            # if OpenVINO fuses a norm into the product behind it, the list names only the norm, and the operation
            # itself still has the name of the product
            fused = (node.get_friendly_name(), *info["originalLayersNames"].astype(str).split(","))
            read = list(dict.fromkeys(names[name] for name in fused if name in names))
            if read and info["layerType"].astype(str) in PRODUCTS:
                self.weights_of[node.get_friendly_name()] = read

    def seconds(self) -> dict[str, float]:
        """Weight -> the seconds that its product took in all passes; weights that share an operation share its time."""
        found: dict[str, float] = {}
        for one in self.request.get_profiling_info() if self.passes else ():
            for weight in (read := self.weights_of.get(one.node_name, [])):
                took = one.real_time.total_seconds() * self.passes / len(read)
                found[weight] = found.get(weight, 0.0) + took
        return found
