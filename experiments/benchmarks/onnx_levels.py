"""The time of a layer in ONNX Runtime at each width, with float sums and with rounded inputs.

    python -m experiments.benchmarks.onnx_levels

Each layer is of 1,536 by 1,536 random codes in groups of 32, six copies after each other, so that weights come from
memory. In each round all variants take their turn, in one thread; the numbers are medians of CPU time and of its ratio
to float32 in the same round.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from sensitivity.formats.timing.machine import this_machine, versions_of
from sensitivity.spec.files import overwrite

ROOT = Path(__file__).parent.parent.parent
SIZE, GROUP, COPIES, ROUNDS = 1536, 32, 6, 15
TOKENS = (1, 256)
LEVELS = {"float sums (level 1)": 1, "inputs in 8 bits (level 4)": 4}


def session(bits: int | None, level: int) -> Any:
    """Copies of a layer, each reading the output of the one before; without bits, in float32."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    draw, nodes, numbers = np.random.default_rng(0), [], []
    for i in range(COPIES):
        inputs = [f"x{i}", f"w{i}"]
        if bits is None:
            numbers.append(numpy_helper.from_array(draw.standard_normal((SIZE, SIZE), np.float32) / 40, f"w{i}"))
            nodes.append(helper.make_node("MatMul", inputs, [f"x{i + 1}"]))
            continue
        shape = (SIZE, SIZE // GROUP, GROUP * bits // 8)
        numbers.append(numpy_helper.from_array(draw.integers(0, 256, shape, np.uint8), f"w{i}"))
        scale = np.full((SIZE, SIZE // GROUP), 2.0**-bits / 20, np.float32)
        numbers.append(numpy_helper.from_array(scale, f"s{i}"))
        how = {"K": SIZE, "N": SIZE, "bits": bits, "block_size": GROUP, "accuracy_level": level}
        inputs.append(f"s{i}")
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"x{i + 1}"], domain="com.microsoft", **how))
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [None, SIZE]) for i in (0, COPIES)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], numbers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def milliseconds(one: Any, inputs: np.ndarray) -> float:
    """CPU milliseconds of one layer."""
    began = time.process_time()
    one.run(None, {"x0": inputs})
    return 1e3 * (time.process_time() - began) / COPIES


def main() -> None:
    made = {("float32", ""): session(None, 0)}
    made |= {(name, str(bits)): session(bits, level) for name, level in LEVELS.items() for bits in (2, 4, 8)}
    took: dict[tuple[str, str], dict[int, list[float]]] = {key: {count: [] for count in TOKENS} for key in made}
    for number in range(ROUNDS + 1):
        for count in TOKENS:
            inputs = np.random.default_rng(number).standard_normal((count, SIZE), np.float32)
            for key, one in made.items():
                took[key][count].append(milliseconds(one, inputs))
    heads = ["MatMulNBits", "bits", *(head for n in TOKENS for head in (f"ms, {n} at once", "float32 / this"))]
    lines = [heads, ["---"] * len(heads)]
    for key, times in took.items():
        lines.append(list(key))
        for count in TOKENS:
            mine, full = (np.array(one[count][1:]) for one in (times, took["float32", ""]))  # the first is slower
            lines[-1] += [f"{np.median(mine):.3g}", f"{np.median(full / mine):.2f}"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about, facts = this_machine(), versions_of("onnxruntime")
    overwrite(
        ROOT / "reports" / "onnx-levels.md",
        "# The time of a layer in ONNX Runtime\n\n"
        f"`python -m experiments.benchmarks.onnx_levels`: onnxruntime {facts['onnxruntime']}, {about['processor']} "
        f"({' '.join(about['instructions'])}), one thread, {ROUNDS} rounds; load average at the end "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. A layer of {SIZE} by {SIZE}, groups of {GROUP}: median "
        "CPU milliseconds of one layer that reads so many tokens at once, and the median ratio to float32 in the same "
        f"round.\n\n{table}\n",
    )


if __name__ == "__main__":
    main()
