"""ONNX Runtime runs the packed codes: the same numbers, the same tokens as torch, the bytes that were predicted."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch
from few import few
from hypothesis import given, settings
from hypothesis import strategies as st

from sensitivity.api import exporting
from sensitivity.api.sweeping import sweep
from sensitivity.cli import main as cli
from sensitivity.formats.onnx import exporter, layout
from sensitivity.formats.table import write
from sensitivity.formats.timing.side_by_side import bench
from sensitivity.formats.verification import verify
from sensitivity.formats.writing import manifest
from sensitivity.formats.writing.job import Job, codes_from_weights
from sensitivity.measure.generate.batches import prompt_text
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.stored.integer_grid import QuantizedWeight
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.headers import header_bytes
from sensitivity.spec.runtimes.table import RUNTIMES
from sensitivity.spec.stored_bits import FILES
from sensitivity.study.study import Study
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.table import task


def rtn(bits: int, group: int | str = "row", symmetric: bool = True) -> Scheme:
    return Scheme("rtn", bits, group, symmetric)


@pytest.fixture(scope="module")
def onnxruntime() -> Any:
    for package in ("onnxscript", "onnx", "onnxruntime"):
        found = pytest.importorskip(package, reason="needs the extra `onnx` (60 MB), which CI does not install")
    return found


SCHEMES = [rtn(2), rtn(2, 32), rtn(3, 48), rtn(4), rtn(6, 16), rtn(8), rtn(4, "tensor"), rtn(2, 32, False)]
SCHEMES += [rtn(3, "row", False), rtn(4, 48, False), rtn(5, 32, False), rtn(8, "tensor", False), rtn(2, 192, False)]


def quantized(scheme: Scheme, rows: int, cols: int, seed: int) -> tuple[Weight, QuantizedWeight]:
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    found = codes_from_weights("a.weight", values, scheme)
    assert isinstance(found, QuantizedWeight)
    return Weight("a.weight", rows, cols, "language", 0, 1, "ff"), found


# -- what is stored


@given(st.sampled_from(SCHEMES), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_constants_hold_the_weight_in_the_bytes_that_are_counted(scheme: Scheme, rows: int, seed: int) -> None:
    cols = 192 if isinstance(scheme.group, int) else 37
    weight, found = quantized(scheme, rows, cols, seed)
    constants = layout.constants(weight, scheme, torch.float16)
    contents = layout.contents(found, weight, scheme, torch.float16)
    assert [len(content) for content in contents] == [constant.bytes for constant in constants]
    assert 8 * sum(constant.bytes for constant in constants) == FILES["onnx"](scheme, rows, cols)
    blocks = layout.Blocks.of(weight, scheme)

    def codes_of(content: torch.Tensor, each: int) -> torch.Tensor:
        """The slow, plain version: each code from its own bits."""
        bits = int.from_bytes(content.numpy().tobytes(), "little")
        return torch.tensor([(bits >> blocks.width * i) & (2**blocks.width - 1) for i in range(each)])

    per_byte = 8 // blocks.width
    codes = codes_of(contents[0], len(contents[0]) * per_byte).reshape(rows, -1)[:, :cols]
    scale = contents[1].view(torch.float16).float().reshape(blocks.scales)
    spread = -(-cols // scale.shape[1])
    zero = torch.tensor(2 ** (blocks.width - 1))
    if not scheme.symmetric:
        zero = codes_of(contents[2], len(contents[2]) * per_byte).reshape(blocks.scales[0], -1)
        each = blocks.size if blocks.scales[1] > 1 else cols
        zero = zero.repeat_interleave(each, dim=1)[:, :cols]
    number = (codes - zero).float() * scale.repeat_interleave(spread, dim=1)[:, :cols]
    assert torch.equal(number, found.dequantize())


@pytest.mark.parametrize("group", RUNTIMES["onnx"].groups or ())
def test_every_group_that_is_searched_is_blocks_of_a_power_of_two(group: int | str) -> None:
    blocks = layout.Blocks.of(Weight("a.weight", 2, 3072, "language", 0, 1, "ff"), rtn(4, group))
    assert 16 <= blocks.size <= 128
    assert blocks.size & (blocks.size - 1) == 0
    assert isinstance(group, str) or group % blocks.size == 0


@pytest.mark.parametrize("rounded", [False, True], ids=["float sums", "rounded activations"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_graph_computes_with_the_numbers_of_the_codes(onnxruntime: Any, scheme: Scheme, rounded: bool) -> None:
    """A layer with a bias, one without, and a look-up, as ONNX Runtime computes them."""
    import onnx_ir
    from onnx_ir import DataType, Shape, TensorType, Value

    from sensitivity.formats.halved.traceable import parameter_input
    from sensitivity.formats.onnx.graph import FLOAT_SUMS, put_constants

    rows, cols = 9, 192 if isinstance(scheme.group, int) else 200
    weight, found = quantized(scheme, rows, cols, 0)
    stored = layout.constants(weight, scheme, torch.float16)
    value = Value(name=parameter_input("a.weight"), shape=Shape((rows, cols)), type=TensorType(DataType.FLOAT))
    x = Value(name="x", shape=Shape(("tokens", cols)), type=TensorType(DataType.FLOAT))
    bias = np.arange(rows, dtype=np.float32)
    offset = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(bias)})
    turned = onnx_ir.node("Transpose", [value], {"perm": [1, 0]})
    nodes = [offset, turned, onnx_ir.node("MatMul", [x, turned.outputs[0]])]
    nodes.append(onnx_ir.node("Gemm", [x, value, offset.outputs[0]], {"transB": 1}))
    ids = Value(name="ids", shape=Shape(("tokens",)), type=TensorType(DataType.INT64))
    nodes.append(onnx_ir.node("Gather", [value, ids]))
    nodes.append(onnx_ir.node("Identity", [nodes[-1].outputs[0]]))
    outputs = [nodes[place].outputs[0] for place in (2, 3, 5)]
    for name, output in zip(("plain", "biased", "rows"), outputs, strict=True):
        output.name, output.type = name, TensorType(DataType.FLOAT)
    graph = onnx_ir.Graph([x, ids, value], outputs, nodes=nodes, opset_imports={"": 20})
    program = onnx_ir.Model(graph, ir_version=10)
    offsets = dict.fromkeys((one.name for one in stored), 0)
    put_constants(program, {"a.weight": stored}, {"a.weight": layout.Blocks.of(weight, scheme)}, "none", offsets)
    assert {node.op_type for node in program.graph} >= {"MatMulNBits"}
    assert "Transpose" not in {node.op_type for node in program.graph}
    contents = layout.contents(found, weight, scheme, torch.float16)
    for constant, content in zip(stored, contents, strict=True):
        types = {"UINT8": np.uint8, "FLOAT16": np.float16}
        array = content.numpy().view(types[constant.type]).reshape(constant.shape)
        program.graph.initializers[constant.name].const_value = onnx_ir.tensor(array, name=constant.name)
    for node in program.graph:
        if node.op_type == "MatMulNBits" and rounded:
            assert node.attributes["accuracy_level"].as_int() == FLOAT_SUMS
            node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", 4)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(program).SerializeToString())
    inputs = torch.randn(5, cols, generator=torch.Generator().manual_seed(1))
    given = {"x": inputs.numpy(), "ids": np.array([rows - 1, 0, 2])}
    plain, biased, found_rows = session.run(["plain", "biased", "rows"], given)
    np.testing.assert_array_equal(found_rows, found.dequantize()[given["ids"]].numpy())
    expected = (inputs.double() @ found.dequantize().double().T).numpy()
    atol = 0.03 * np.abs(expected).max() if rounded else 5e-5
    np.testing.assert_allclose(plain, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(biased, expected + bias, rtol=0, atol=atol)


# -- what is refused


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("internvl", "can be run half by half, .* is of type internvl"),
        ("blip2_t5", "only a decoder can be run half by"),
    ],
)
def test_a_model_that_it_cannot_hold_is_refused_before_the_sweep(
    onnxruntime: Any, name: str, says: str, tmp_path: Path
) -> None:
    folder = saved_vlms.save(name, tmp_path / name)
    with pytest.raises(UserError, match=says):
        exporter.check(str(folder))
    typed = ["sweep", str(folder), "--task", "vqa", "--runtime", "onnx", "--bits", "4", "--method", "rtn"]
    assert cli.main([*typed, "--out", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()


def test_without_onnx_runtime_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    typed = ["sweep", "embedded:scenes-llava", "--task", "vqa", "--runtime", "onnx", "--bits", "4"]
    assert cli.main([*typed, "--method", "rtn", "--out", str(tmp_path / "r")]) == 2
    assert "pip install 'vlm-sensitivity[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# -- what it computes


CHANGES = {"vision": rtn(2), "connector": rtn(5), "language": rtn(2, 32)}  # such a plan changes answers


@pytest.fixture(scope="module")
def study(onnxruntime: Any, scenes_llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> Study:
    parts = inspect(scenes_llava, by="part")
    return sweep(scenes_llava, parts, [Plan.of(parts, CHANGES)], ["vqa"], tmp_path_factory.mktemp("runs") / "one", n=40)


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan.of(study.parts, CHANGES)
    return exporting.export(study, plan, tmp_path_factory.mktemp("out") / "onnx", "onnx")


def test_the_packed_codes_answer_as_torch_does(study: Study, folder: Path) -> None:
    found = verify(folder)
    assert (found["verdict"], found["examples"]) == ("as measured", 40)
    rounded: dict[str, Any] = found["onnx-int8"]  # type: ignore[assignment]
    assert rounded["largest_nll_difference"] > 1e-4  # activations are rounded
    assert re.search(r"are those that were measured; .* rounded to 8 bits, .* \d+ .*answers", str(found["words"]))
    assert found["largest_nll_difference"] < 1e-4  # type: ignore[operator]
    mine, native = (study.examples(plan) for plan in (Plan.of(study.parts, CHANGES), study.native))
    assert mine is not None
    assert native is not None
    assert (mine["answer"] != native["answer"]).sum() >= 4  # a plan that changes nothing proves nothing


def test_the_lines_of_the_card_answer(study: Study, folder: Path, scenes_llava: VLM) -> None:
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    example = task("vqa", n=40, seed=0).examples[0]
    space = {"FOLDER": str(folder), "image": open_image(example.image), "prompt": prompt_text(scenes_llava, example)}
    assert lines is not None
    exec(lines[1], space)
    given = space["processor"].decode(space["tokens"], skip_special_tokens=True)
    measured = study.examples(Plan.of(study.parts, CHANGES))
    assert measured is not None
    expected = measured.set_index("example").loc[example.id, "answer"]
    assert given.strip().startswith(expected.rstrip("…").strip())  # an answer that cannot be right was cut off


def test_predicted_bytes_are_written_bytes(study: Study, folder: Path) -> None:
    facts = json.loads((folder / "sensitivity.json").read_bytes())
    assert facts["written"]["bytes"] == facts["predicted_size"]["bytes"]
    assert 0.4 * header_bytes(study.parts, "onnx") < facts["written"]["headers"]
    assert facts["written"]["headers"] <= header_bytes(study.parts, "onnx")  # what --gb leaves for them
    files = [folder / name for file in exporter.FILES.values() for name in (file, f"{file}{exporter.DATA}")]
    assert sum(file.stat().st_size for file in files) == facts["written"]["bytes"] + facts["written"]["headers"]
    graph = (folder / exporter.FILES["language"]).read_bytes()
    assert b"site-packages" not in graph  # the tracer notes source files of this machine beside each operation


def test_a_weight_that_did_not_arrive_is_told(onnxruntime: Any, folder: Path, tmp_path: Path) -> None:
    from sensitivity.formats.onnx.run import check_arrived

    check_arrived(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    graph = copy / exporter.FILES["language"]
    names = [f"layers.{i}.mlp.up_proj.weight:codes".encode() for i in (0, 1)]
    swapped = graph.read_bytes().replace(names[0], b"@" * len(names[0])).replace(names[1], names[0])
    graph.write_bytes(swapped.replace(b"@" * len(names[0]), names[1]))
    with pytest.raises(UserError, match=r"does not read .*up_proj\.weight:codes"):
        check_arrived(copy)


# runs a command, and kills it when so many tensors were written
KILLED = """
import os, signal, sys
from sensitivity.cli import main
from sensitivity.formats.writing import stream
content, left = stream._content, [int(sys.argv[1])]
def last(*tensor):
    left[0] -= 1
    return content(*tensor) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
stream._content = last
main.main(sys.argv[2:])
"""


def test_after_a_kill_in_the_middle_the_same_command_writes_a_whole_export(
    study: Study, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sensitivity.formats.onnx.run import check_arrived

    out = shutil.copytree(folder, tmp_path / "out")
    mine = tmp_path / ".mine.1.2.unfinished" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    there = set(tmp_path.iterdir())
    typed = ["export", str(study.path), "--bpw", "9", "--format", "onnx", "--out", str(out), "--force"]
    first = len(json.loads((folder / exporter.STORED).read_bytes())[exporter.FILES["vision"]])
    program = [sys.executable, "-c", KILLED, str(first + 20)]
    killed = subprocess.run([*program, *typed], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    note, *lines = killed.stderr.splitlines()
    assert note.startswith("note: chosen for 9 bpw: ")
    for line in lines:  # without a terminal
        assert re.fullmatch(r"export: (writing: \d+ of \d+ weights(, \d:\d\d:\d\d left)?; )?\d:\d\d:\d\d so far", line)
    (left,) = set(tmp_path.iterdir()) - there
    assert (left / "language.onnx.data").exists()
    assert manifest.damaged_files(out, manifest.read(out)) == []
    assert manifest.read(out)["key"] == manifest.read(folder)["key"]
    assert cli.main(typed) == 0
    assert str(left) in capsys.readouterr().err
    assert manifest.damaged_files(out, manifest.read(out)) == []
    assert manifest.read(out)["key"] != manifest.read(folder)["key"]
    check_arrived(out)
    assert set(tmp_path.iterdir()) == there
    assert mine.read_text() == "mine"


@pytest.mark.slow
def test_a_head_as_a_component_and_a_q_former(onnxruntime: Any, tmp_path: Path) -> None:
    """OPT's positions, a Q-Former with one layer for keys and values: the embedded BLIP-2 on a few examples."""
    vlm = load("embedded:scenes-blip2")
    parts = inspect(vlm, by="part")
    study = sweep(vlm, parts, [Plan.uniform(parts, rtn(2, 32))], ["vqa"], tmp_path / "run", n=20)
    out = exporting.export(study, Plan.uniform(parts, rtn(2, 32)), tmp_path / "out", "onnx", model=vlm)
    assert verify(out)["verdict"] == "as measured"
    headers = json.loads((out / "sensitivity.json").read_bytes())["written"]["headers"]
    assert headers <= header_bytes(parts, "onnx")


def test_an_export_without_weights_read_by_name(onnxruntime: Any, tmp_path: Path) -> None:
    """A folder of a family, by its name alone: the weights are streamed from the file and never loaded."""
    folder = saved_vlms.save("llava", tmp_path / "llava")
    parts = inspect(str(folder), by="part", include=("head",))
    job = Job(str(folder), parts, Plan.uniform(parts, rtn(4)), dtype=torch.float32)
    found = write(job, tmp_path / "out", "onnx")
    assert found["written"]["bytes"] == found["predicted_size"]["bytes"]


FAMILIES = ("smolvlm", "idefics3", "qwen2_vl", "qwen2_5_vl")


@pytest.mark.parametrize("name", few(FAMILIES, ()))
def test_other_families_answer_as_torch_does(onnxruntime: Any, name: str, tmp_path: Path) -> None:
    """Tiles of a picture, and patches of an image of any size with places in a plane, some within windows."""
    vlm = load(str(saved_vlms.save(name, tmp_path / name)))
    parts = inspect(vlm, by="part")
    plan = Plan.uniform(parts, rtn(3))
    study = sweep(vlm, parts, [plan], ["vqa"], tmp_path / "run", n=6)
    out = exporting.export(study, plan, tmp_path / "out", "onnx", model=vlm)
    found = verify(out)
    assert (found["verdict"], found["examples"]) == ("as measured", 6)
    mine, native = (study.examples(one) for one in (plan, study.native))
    assert mine is not None
    assert native is not None
    moved = (mine["nll"] - native["nll"]).abs().max()  # by the plan: it does something
    assert found["largest_nll_difference"] < min(1e-4, moved / 10)  # type: ignore[operator]


def test_bench_finds_packed_codes_in_memory(folder: Path) -> None:
    found = bench(folder, "onnx-int8", n=6, threads=1)
    assert found["runtime"] == "onnx-int8"
    ours, full = found["export"], found["full_precision"]
    assert ours["memory"]
    assert full["memory"]
    assert found["versions"]["onnxruntime"]
    assert full["memory"]["anonymous"] - ours["memory"]["anonymous"] > 1_000_000
