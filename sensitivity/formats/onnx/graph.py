"""Replaces a graph's weight inputs by constants in a file of their own, and its quantized layers by MatMulNBits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sensitivity.formats.halved.traceable import WEIGHTS, parameter_input
from sensitivity.formats.onnx.layout import Blocks, Constant
from sensitivity.spec.errors import UserError

if TYPE_CHECKING:
    from onnx_ir import Model, Node, Value

ALIGNMENT = 64  # bytes, for vector instructions
FLOAT_SUMS = 1  # MatMulNBits' accuracy level at which activations stay in float32


def weights_of(program: Model, names: Sequence[str]) -> dict[str, Value]:
    """Parameter name -> the graph input that stands for it, for the parameters that the graph reads."""
    inputs = {value.name: value for value in program.graph.inputs}
    values = {name: inputs[parameter_input(name)] for name in names if parameter_input(name) in inputs}
    return {name: value for name, value in values.items() if value.uses()}


def offsets_of(constants: Sequence[Constant]) -> dict[str, int]:
    """The offset of each constant in its file."""
    offsets, end = {}, 0
    for constant in constants:
        offsets[constant.name] = end
        end += constant.bytes + -constant.bytes % ALIGNMENT
    return offsets


def put_constants(
    program: Model,
    parameters: Mapping[str, Sequence[Constant]],
    blocks: Mapping[str, Blocks],
    file: str,
    offsets: Mapping[str, int],
) -> None:
    """Replace each weight input by constants that lie in a file, and the layers of quantized ones by MatMulNBits."""
    inputs = weights_of(program, list(parameters))
    for name, stored in parameters.items():
        values = [_constant(program, one, file, offsets[one.name]) for one in stored]
        if name in blocks:
            _use_codes(program, name, inputs[name], values, blocks[name])
        else:
            _use_values(program, name, inputs[name], values[0])
    for value in list(program.graph.inputs):
        if value.name and value.name.startswith(f"{WEIGHTS}."):
            # it was replaced, or belongs to the other half
            assert not value.uses(), f"{value.name} is read, but not stored"
            program.graph.inputs.remove(value)
    program.graph.opset_imports["com.microsoft"] = 1


def _constant(program: Model, constant: Constant, file: str, offset: int) -> Value:
    """A constant of the graph whose bytes are in another file."""
    from onnx_ir import DataType, ExternalTensor, Shape, TensorType
    from onnx_ir import Value as Made

    type, shape = DataType[constant.type], Shape(constant.shape)
    tensor = ExternalTensor(file, offset, constant.bytes, type, shape=shape, name=constant.name)
    value = Made(name=constant.name, shape=shape, type=TensorType(type), const_value=tensor)
    program.graph.register_initializer(value)
    return value


def _use_values(program: Model, name: str, old: Value, new: Value) -> None:
    """Let the readers of an unquantized weight read the constant; all but look-ups compute in float32."""
    from onnx_ir import DataType

    lookups = [use.node for use in old.uses() if use.node.op_type == "Gather" and use.idx == 0]
    if new.dtype == DataType.FLOAT:
        old.replace_all_uses_with(new)
        return
    for node in lookups:
        # rows are converted after they are looked up, since ONNX Runtime would keep a float32 copy of the whole table
        node.replace_input_with(0, new)
        rows = node.outputs[0]
        readers = list(rows.uses())
        cast = _node(program, "Cast", [rows], f"{rows.name}:float32", to=DataType.FLOAT.value)
        rows.type = new.type
        for use in readers:
            use.node.replace_input_with(use.idx, cast)
    if old.uses():
        old.replace_all_uses_with(_node(program, "Cast", [new], f"{name}:float32", to=DataType.FLOAT.value))


def _use_codes(program: Model, name: str, old: Value, stored: Sequence[Value], blocks: Blocks) -> None:
    """Replace what reads a weight by what reads codes; scales that are stored once for many blocks are repeated."""
    from onnx_ir import DataType

    codes, scale, *zeros = stored
    groups = blocks.scales[1]
    scale = _node(program, "Cast", [scale], f"{name}:float32", to=DataType.FLOAT.value)
    scale = _resized(program, "Expand", scale, (blocks.rows, groups, blocks.count // groups), f"{name}:repeated")
    scale = _resized(program, "Reshape", scale, (blocks.rows, blocks.count), f"{name}:scales")
    zeros = [_resized(program, "Expand", one, (blocks.rows, blocks.zero_bytes), f"{name}:zeros") for one in zeros]
    for use in list(old.uses()):
        products = _products(use.node, use.idx)
        for product in products:
            _multiply(program, product, [codes, scale, *zeros], blocks)
        if use.node.op_type == "Gather" and use.idx == 0:
            _look_up(program, use.node, [codes, scale, *zeros], blocks)
        elif not products:
            raise UserError(
                f"{name} is read by {use.node.op_type}, which the onnx format cannot do with a quantized weight"
            )


def _products(node: Node, place: int) -> list[Node]:
    """The products with a transposed weight that one of its readers computes (Gemm) or prepares (Transpose)."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **given}
        is_linear = place == 1 and plain == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
        return [node] if is_linear else []
    if node.op_type != "Transpose" or tuple(given["perm"]) != (1, 0):
        return []
    uses = list(node.outputs[0].uses())
    return [use.node for use in uses] if all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses) else []


def _multiply(program: Model, product: Node, stored: Sequence[Value], blocks: Blocks) -> None:
    """Put MatMulNBits in place of a multiplication."""
    inputs: list[Value | None] = [product.inputs[0], *stored]
    if product.op_type == "Gemm" and len(product.inputs) > 2:
        inputs += [*[None] * (5 - len(inputs)), product.inputs[2]]  # the bias is input 5; those before may be missing
    attributes = {
        "K": blocks.cols, "N": blocks.rows, "bits": blocks.width, "block_size": blocks.size,
        "accuracy_level": FLOAT_SUMS,
    }  # fmt: skip
    _replace(program, product, "MatMulNBits", inputs, attributes)


def _look_up(program: Model, gather: Node, stored: Sequence[Value], blocks: Blocks) -> None:
    """Put GatherBlockQuantized in place of a look-up, and cut off what pads the last block of a row."""
    codes, *others = stored
    row = blocks.count * blocks.size * blocks.width // 8
    codes = _resized(program, "Reshape", codes, (blocks.rows, row), f"{codes.name}:rows")
    attributes = {"bits": blocks.width, "block_size": blocks.size, "gather_axis": 0, "quantize_axis": 1}
    found = _replace(program, gather, "GatherBlockQuantized", [codes, gather.inputs[1], *others], attributes)
    if blocks.cols % blocks.size:
        readers = list(found.uses())
        ends = [_numbers(program, (number,), f"{found.name}:{number}") for number in (0, blocks.cols, -1)]
        cut = _node(program, "Slice", [found, *ends], f"{found.name}:columns")
        found.shape = None
        for node, place in readers:
            node.replace_input_with(place, cut)


def _replace(
    program: Model, old: Node, op: str, inputs: Sequence[Value | None], attributes: Mapping[str, int]
) -> Value:
    """Put an operation of ONNX Runtime's own in place of another one; returns its output."""
    import onnx_ir

    new = onnx_ir.node(op, inputs, attributes, domain="com.microsoft")
    read = [one.producer() for one in old.inputs if one is not None]
    onnx_ir.convenience.replace_nodes_and_values(program.graph, old, [old], [new], old.outputs, new.outputs)
    for node in read:
        if node is not None and node.op_type == "Transpose" and not node.outputs[0].uses():
            program.graph.remove(node, safe=True)
    return new.outputs[0]


def _resized(program: Model, op: str, value: Value, shape: Sequence[int], name: str) -> Value:
    """A value that is expanded or reshaped; ONNX Runtime computes it once, when it loads the graph."""
    return _node(program, op, [value, _numbers(program, shape, f"{name}:shape")], name)


def _numbers(program: Model, numbers: Sequence[int], name: str) -> Value:
    """A few whole numbers as a constant at the start of the graph."""
    import onnx_ir

    node = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(np.array(numbers, np.int64))})
    node.outputs[0].name = name
    program.graph.insert_before(program.graph[0], node)
    return node.outputs[0]


def _node(program: Model, op: str, inputs: Sequence[Value], name: str, **attributes: Any) -> Value:
    """The output of a new operation, which is placed behind those that compute its inputs."""
    import onnx_ir

    node = onnx_ir.node(op, inputs, attributes)
    node.outputs[0].name = name
    made = [producer for value in inputs if (producer := value.producer())]
    if made:
        program.graph.insert_after(made[0], node)  # the other inputs are from `_numbers`, at the start of the graph
    else:
        program.graph.insert_before(program.graph[0], node)
    return node.outputs[0]
