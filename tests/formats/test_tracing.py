"""Tracing in a process of its own: crashes are survived, and an export that is killed leaves nothing that runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import called
import pytest
import saved_vlms
from few import few
from test_own_process import wait_until_gone

from sensitivity.formats.halved.tracing import kept, traced
from sensitivity.formats.onnx import trace as onnx
from sensitivity.formats.openvino import trace as openvino
from sensitivity.formats.writing import manifest, own_process
from sensitivity.models.loading import load
from sensitivity.spec.errors import UserError

NEEDED = {"openvino": ("openvino",), "onnx": ("onnxscript", "onnx", "onnxruntime")}
TRACES = {"openvino": openvino, "onnx": onnx}
FORMATS = tuple(NEEDED)
FIRST_OUTPUT = {"vision": "image_features", "language": "logits"}

# before the program of a process that traces: the first crashes before it has begun, the second between the halves
CRASHING = """
import os, signal
from pathlib import Path
said = Path({said!r})
def say(word):
    said.write_text(said.read_text() + word + " ")
def crash():
    os.kill(os.getpid(), signal.SIGSEGV)
say("begun")
count = said.read_text().split().count("begun")
if count == 1 or {always}:
    crash()
rename = Path.rename
def renaming(old, new):
    rename(old, new)
    say(Path(new).name)
    if count == 2:
        crash()
Path.rename = renaming
"""


@pytest.fixture
def _found_by_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of `called` can be imported there."""
    place = str(Path(called.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])]))


def plant(monkeypatch: pytest.MonkeyPatch, said: Path, always: bool = False) -> None:
    said.write_text("")
    monkeypatch.setattr(own_process, "PROGRAM", CRASHING.format(said=str(said), always=always) + own_process.PROGRAM)


@pytest.mark.usefixtures("_found_by_the_process")
def test_a_process_that_crashes_is_started_again_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, said := tmp_path / "said")
    (space := tmp_path / "space").mkdir()
    with traced("a model", "onnx", called.write_graphs, space) as graphs:
        assert {half: (graph / "half").read_text() for half, graph in graphs.items()} == {
            "vision": "vision of a model",
            "language": "language of a model",
        }
    assert said.read_text().split() == ["begun", "begun", "vision", "begun", "language"]
    assert list(space.iterdir()) == []


@pytest.mark.usefixtures("_found_by_the_process")
def test_after_three_crashes_or_one_error_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = r"^a model cannot be traced for onnx \(the vision half: no such operation\)$"
    with pytest.raises(UserError, match=says), traced("a model", "onnx", called.refuse_graphs, tmp_path):
        pass
    plant(monkeypatch, said := tmp_path / "said", always=True)
    says = "^tracing the vision half of a model for onnx crashed 3 times; try again$"
    with pytest.raises(UserError, match=says), traced("a model", "onnx", called.write_graphs, tmp_path):
        pass
    assert said.read_text().split() == ["begun"] * 3
    assert list(tmp_path.iterdir()) == [said]


@pytest.mark.usefixtures("_found_by_the_process")
def test_kept_graphs_are_traced_once_for_each_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    call = own_process.call
    monkeypatch.setattr(own_process, "call", lambda *a, **kw: calls.append(kw["model"]) or call(*a, **kw))  # type: ignore[func-returns-value]
    with kept(tmp_path / "kept"):
        for model, format in [("a", "onnx"), ("a", "onnx"), ("b", "onnx"), ("a", "openvino"), ("b", "onnx")]:
            with traced(model, format, called.write_graphs, tmp_path) as graphs:
                assert (graphs["language"] / "half").read_text() == f"language of {model}"
    assert calls == ["a", "b", "a"]
    with traced("a", "onnx", called.write_graphs, tmp_path):
        assert calls == ["a", "b", "a", "a"]


# -- the tracers of the formats


@pytest.fixture
def format(request: pytest.FixtureRequest) -> str:
    for package in NEEDED[request.param]:
        pytest.importorskip(package, reason=f"needs the extra `{request.param}`, which CI does not install")
    return str(request.param)


@pytest.mark.parametrize("format", few(FORMATS, ("onnx",)), indirect=True)
def test_a_tracer_that_crashes_is_started_again(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load(str(saved_vlms.save("llava", tmp_path / "llava")), config_only=True)
    plant(monkeypatch, said := tmp_path / "said")
    with traced(vlm.name, format, TRACES[format].write_graphs, tmp_path) as graphs:
        for half, graph in graphs.items():
            program = TRACES[format].read(graph)
            outputs = program.outputs if format == "openvino" else program.graph.outputs
            names = [output.any_name if format == "openvino" else output.name for output in outputs]
            assert FIRST_OUTPUT[half] in names
    assert said.read_text().split() == ["begun", "begun", "vision", "begun", "language"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to find the process that traces")
@pytest.mark.usefixtures("_found_by_the_process")
@pytest.mark.parametrize("number", few((signal.SIGKILL, signal.SIGTERM), (signal.SIGKILL,)))
@pytest.mark.parametrize("format", few(FORMATS, ("openvino",)), indirect=True)
def test_an_export_that_is_killed_while_it_traces_leaves_nothing(
    format: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that traces ends, and the next export removes the files; the system's temporary folder is empty."""
    folder, temporary, outs = (tmp_path / name for name in ("llava", "temporary", "outs"))
    saved_vlms.save("llava", folder)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    asked = str(folder), str(outs / "one"), format
    code = f"import called; called.export(*{asked})"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code]) as export:
        while not list(outs.glob(".one.*.unfinished/tracing-*/tmp*")):  # the first half is being traced
            assert export.poll() is None
            time.sleep(0.02)
        children = Path(f"/proc/{export.pid}/task/{export.pid}/children").read_text().split()
        export.send_signal(number)
    assert len(children) == 1
    wait_until_gone(int(children[0]))
    assert not [*temporary.glob("tmp*"), *temporary.glob("*tracing*")]  # libraries have files with other names there
    (left,) = outs.iterdir()
    assert left.name.endswith(".unfinished")
    called.export(*asked)
    assert [one.name for one in outs.iterdir()] == ["one"]
    assert manifest.damaged_files(outs / "one", manifest.read(outs / "one")) == []
    assert not [file for file in (outs / "one").rglob("*") if "tracing" in file.name]
