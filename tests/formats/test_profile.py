"""Times of layers: which layers are timed at how many tokens, the whole way in OpenVINO, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.cli import main as cli
from sensitivity.cli.verbs.timing import profile as profile_verb
from sensitivity.formats.openvino.exporter import STORED
from sensitivity.formats.openvino.layer_counters import LayerCounters, name_layers
from sensitivity.formats.timing import profile, side_by_side
from sensitivity.formats.timing.kept_times import load_kept_times
from sensitivity.formats.timing.profile import _as_in_graphs, _per_weight, checked, first_inputs
from sensitivity.formats.timing.rows_at_once import rows_by_weight
from sensitivity.formats.timing.timed_process import LayerSeconds, Round, TimedStage
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.layer_times import LayerTimes, is_read, layout_of
from sensitivity.spec.sizes import GB

MODEL = "embedded:scenes-llava"


def test_tokens_are_counted_without_weights() -> None:
    """One row per patch and one for the class token in the tower; only the patches reach the projector."""
    vlm = load(MODEL, config_only=True)
    parts, vision = inspect(vlm, by="part"), vlm.model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    found = rows_by_weight(vlm, parts, first_inputs(MODEL, "vqa"))
    assert set(found) == {weight.name for weight in parts.weights if weight.part != "language"}
    assert {found[w.name] for w in parts["connector"].weights} == {patches}
    used = {found[w.name] for w in parts["vision"].weights}
    assert used <= {0, patches + 1}  # a layer behind the one that is used reads nothing
    assert patches + 1 in used


def test_a_query_transformer_reads_its_queries_and_the_patches() -> None:
    vlm = load("embedded:scenes-blip2", config_only=True)
    parts, config = inspect(vlm, by="kind"), vlm.model.config
    found = rows_by_weight(vlm, parts, first_inputs("embedded:scenes-blip2", "vqa"))
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    seen = {found[weight.name] for weight in parts.weights if weight.part == "connector"}
    assert seen == {config.num_query_tokens, patches}  # keys and values of cross attention come from the patches


def test_a_layer_that_no_graph_reads_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / STORED).write_text(json.dumps({"vision.xml": {"a.weight:codes": "", "a.weight:scale": "", "b": ""}}))
    assert _as_in_graphs({"a.weight": 37, "b": 36, "c.weight": 37}, tmp_path) == {
        "a.weight": 37,
        "b": 36,
        "c.weight": 0,
    }


def test_memory_is_shared_among_the_weights_that_are_read() -> None:
    """So the memory of the layout that was measured is predicted exactly, although the last vision layer takes none."""
    vlm = load(MODEL, config_only=True)
    parts, scheme = inspect(vlm, by="linear"), Scheme("rtn", 4, 32, True)
    last = max(w.block for w in parts.weights if w.part == "vision" and w.block is not None)
    at_once = {w.name: 0 if w.block == last else 37 for w in parts.weights if w.part != "language"}
    tokens = {"image": 36, "prompt": 50, "answer": 3}
    read = [weight for weight in parts.weights if is_read(weight, at_once, tokens)]
    assert len(read) < len(parts.weights)
    full, held = {"image": 9_000_000, "language": 20_000_000}, {"image": 2_000_000, "language": 5_000_000}
    memory = _per_weight(read, layout_of(read[0], scheme, "openvino"), full, held)
    times = LayerTimes("openvino", {}, 1, {}, "vqa", at_once, tokens, {}, sum(full.values()), memory, {})
    found = times.plan_cost(parts, Plan.uniform(parts, scheme), "gb_resident")
    assert found == pytest.approx(sum(held.values()) / GB)


def test_the_seconds_of_layers_are_told_apart_by_stage() -> None:
    """The first round is left out; a process that had the processor half of the time spent half of what was counted."""
    rounds = LayerSeconds(threads=1)
    stage = TimedStage(wall=2.0, cpu=1.0, count=4)
    totals: dict[str, float] = {}
    for took in (100.0, 8.0, 16.0):
        seen = [totals]
        for name, share in (("tower", took), ("language", took / 2), ("language", took / 4)):
            seen.append({**seen[-1], name: seen[-1].get(name, 0.0) + share})
        totals = seen[-1]
        rounds.add(Round(stage, stage, stage, 9), seen)
    found = {stage: {k: v for k, v in of.items() if v} for stage, of in rounds.means().items()}
    assert found == {  # of 8 and 16, per image and token (4) and per prompt
        "image": {"tower": 12 / 2 / 4},
        "prompt": {"language": 6 / 2},
        "new": {"language": 3 / 2 / 4},
    }


def test_layers_are_counted_under_the_names_of_their_weights() -> None:
    """A large layer, a small one with a bias and an activation, and a product of two computed operands."""
    openvino = pytest.importorskip("openvino", reason="needs the extra `openvino` (60 MB), which CI does not install")
    from openvino import Type, op, opset14

    def constant(name: str, rows: int, cols: int) -> Any:
        node = opset14.constant(np.full((rows, cols), 1e-3, np.float32))
        node.set_friendly_name(name)
        return node

    x = op.Parameter(Type.f32, openvino.PartialShape([-1, 512]))
    large = opset14.matmul(x, constant("large.weight", 4096, 512), False, True)
    both = opset14.matmul(opset14.matmul(large, opset14.transpose(large, [1, 0]), False, False), x, False, False)
    small = opset14.matmul(both, constant("small.weight", 8, 512), False, True)
    result = opset14.result(opset14.relu(opset14.add(small, np.ones((1, 8), np.float32))))
    graph = openvino.Model([result], [x], "two")
    weights = name_layers(graph)
    assert sorted(weights) == ["large.weight", "small.weight"]
    options = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    counters = LayerCounters(compiled, request := compiled.create_infer_request(), weights)
    assert counters.seconds() == {}
    for _ in range(20):
        request.infer([np.ones((256, 512), np.float32)])
        counters.passes += 1
    found = counters.seconds()
    assert set(found) == set(weights)
    assert found["large.weight"] > 10 * found["small.weight"] > 0


def test_what_cannot_be_timed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in (["profile", MODEL], ["demo", "--out", str(tmp_path / "demo")]):
        assert cli.main([*verb, "--runtime", "gguf"]) == 2
        assert "layers are not timed in gguf" in (said := capsys.readouterr().err)
        assert said.rstrip().endswith("name openvino, or time an export with `sensitivity bench`")
        assert cli.main([*verb, "--runtime", "opnvino"]) == 2
        assert "unknown runtime 'opnvino'; choose from openvino" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # at once, before anything loads torch
        patch.setitem(sys.modules, "sensitivity.formats.timing.profile", None)
        assert cli.main(["profile", MODEL, "--runtime", "opnvino"]) == 2
    with pytest.raises(UserError, match="ranks captions"):
        checked(MODEL, [Scheme("rtn", 4)], "openvino", "retrieval")
    with pytest.raises(UserError, match="openvino can load none of these schemes"):
        checked(MODEL, [Scheme("rtn", 4, 7)], "openvino", "vqa")


def test_what_a_kill_left_of_temporary_exports_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of profile and of bench; the folders say whose they are, and only their owner reads the model in them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = (
        "import os, signal, sys, tempfile\n"
        "from sensitivity.formats.writing.unfinished import temporary_folder\n"
        "with temporary_folder('profile') as space:\n"
        "    (space / 'model').write_text('large')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", killed], env=environment, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".sensitivity-profile.")
    assert left.stat().st_mode & 0o077 == 0
    for module in (profile, side_by_side):
        monkeypatch.setattr(module, "write", lambda job, out, *_: out.mkdir())
    linears = inspect(MODEL, by="linear")
    with profile._written(MODEL, linears, {"native": Plan.uniform(linears, None)}, "openvino") as folders:
        assert folders["native"].is_dir()
        assert not left.exists()
        with side_by_side.full_precision(MODEL, "openvino", "float32") as native:
            assert Path(native).parent.name.startswith(".sensitivity-bench.")
            assert folders["native"].is_dir()  # a living process's
    assert list(tmp_path.iterdir()) == []


def test_where_times_are_kept_and_what_they_replace(capsys: pytest.CaptureFixture[str]) -> None:
    layers = {(8, 8, layout, 1): took for layout, took in (("native", 2.0), ("four", 1.0), ("eight", 2.5))}
    few = {"image": 1, "prompt": 1, "answer": 1}
    times = LayerTimes("openvino", {}, 1, {}, "vqa", {}, few, {}, 0.0, {}, layers)
    said = profile_verb.kept_words(times, None, Path("kept.json"))
    assert said == "the times are kept in kept.json"
    before = replace(times, layers={key: took for key, took in layers.items() if key[2] != "eight"})
    said = profile_verb.kept_words(times, before, Path("kept.json"))
    assert said == "the times are kept in kept.json; they replace earlier ones of native, four"
    costs = dict.fromkeys(("ms_per_image", "ms_per_prompt", "ms_per_token", "ms_per_answer", "gb_resident"), 2.0)
    profile_verb.show(times, {"full precision": costs, "rtn:8": {**costs, "ms_per_token": 2.5}}, 6)
    assert "a new token: no faster than full precision, as far as 6 rounds tell: rtn:8" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino` (60 MB), which CI does not install")
    monkeypatch.setenv("SENSITIVITY_CACHE", str(tmp_path))
    words = ["profile", MODEL, "--runtime", "openvino", "--bits", "2,3,4", "--n", "6", "--threads", "1", "--json"]
    assert cli.main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    parts = inspect(MODEL, by="part")
    times = load_kept_times(parts, "openvino", 1)
    assert found["layers"] == times.to_json()["layers"]
    # OpenVINO counts whole microseconds, and some of these layers take as few for a single token
    assert all(ms > 0 for (_, _, _, at_once), ms in times.layers.items() if at_once > 1)
    assert sum(ms for (_, _, _, at_once), ms in times.layers.items() if at_once == 1) > 0
    native = Plan.uniform(parts, None)
    for cost, value in found["uniform"]["full precision"].items():
        assert value == times.plan_cost(parts, native, cost)
        assert value > 0  # what was measured of the whole model
    assert found["uniform"]["rtn:3"]["ms_per_token"] == found["uniform"]["rtn:4"]["ms_per_token"]  # stored alike
