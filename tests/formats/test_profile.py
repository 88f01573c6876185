"""Times of layers: which layers are timed at how many tokens, the whole way in OpenVINO, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.cli import main as cli
from sensitivity.formats.openvino.export import STORED
from sensitivity.formats.openvino.layer_graph import LayerGraph
from sensitivity.formats.timing.kept_times import kept_times
from sensitivity.formats.timing.profile import _as_in_graphs, checked, first_inputs
from sensitivity.formats.timing.rows_at_once import rows_at_once
from sensitivity.models.discover import inspect
from sensitivity.models.loading import load
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme

MODEL = "embedded:scenes-llava"


def test_tokens_are_counted_without_weights() -> None:
    """One row per patch and one for the class token in the tower; only the patches reach the projector."""
    vlm = load(MODEL, config_only=True)
    parts, vision = inspect(vlm, by="part"), vlm.model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    found = rows_at_once(vlm, parts, first_inputs(MODEL, "vqa"))
    assert set(found) == {weight.name for weight in parts.weights if weight.part != "language"}
    assert {found[w.name] for w in parts["connector"].weights} == {patches}
    used = {found[w.name] for w in parts["vision"].weights}
    assert used <= {0, patches + 1}  # a layer behind the one that is used reads nothing
    assert patches + 1 in used


def test_a_query_transformer_reads_its_queries_and_the_patches() -> None:
    vlm = load("embedded:scenes-blip2", config_only=True)
    parts, config = inspect(vlm, by="kind"), vlm.model.config
    found = rows_at_once(vlm, parts, first_inputs("embedded:scenes-blip2", "vqa"))
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


def test_a_layer_keeps_its_weights_until_it_has_packed_them() -> None:
    """Passes of one token and of many are packed apart, each in its first pass: both see the same weights."""
    pytest.importorskip("openvino", reason="needs the extra `openvino` (60 MB), which CI does not install")
    weight = Weight("a.weight", 128, 128, "language", 0, 1, "ff")
    layer = LayerGraph(weight, Scheme("rtn", 2, 32, True), 4, 1)
    one, many = np.ones((1, 128), np.float32), np.ones((30, 128), np.float32)
    first = [np.array(output) for output in layer.request.infer([one]).values()]
    overwritten = [np.full(size, 255, np.uint8) for size in 8 * (128 * 128 // 4, 128 * 128, 1024)]
    second = [np.array(output)[:1] for output in layer.request.infer([many]).values()]
    np.testing.assert_allclose(np.concatenate(first), np.concatenate(second), atol=1e-4)
    assert len(overwritten) == 24


def test_what_cannot_be_timed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["profile", MODEL], ["demo", "--out", str(tmp_path / "demo")]):
        assert cli.main([*verb, "--runtime", "gguf"]) == 2
        assert "layers are not timed in gguf" in (said := capsys.readouterr().err)
        assert said.rstrip().endswith("name openvino, or time an export with `sensitivity bench`")
        assert cli.main([*verb, "--runtime", "opnvino"]) == 2
        assert "unknown runtime 'opnvino'; choose from openvino" in capsys.readouterr().err
    with pytest.raises(UserError, match="ranks captions"):
        checked(MODEL, [Scheme("rtn", 4)], "openvino", "retrieval")
    with pytest.raises(UserError, match="openvino can load nothing of this space"):
        checked(MODEL, [Scheme("rtn", 4, 7)], "openvino", "vqa")


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino` (60 MB), which CI does not install")
    monkeypatch.setenv("SENSITIVITY_CACHE", str(tmp_path))
    words = ["profile", MODEL, "--runtime", "openvino", "--bits", "2,3,4", "--n", "6", "--threads", "1", "--json"]
    assert cli.main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    parts = inspect(MODEL, by="part")
    times = kept_times(parts, "openvino", 1)
    assert found["layers"] == times.to_json()["layers"]
    assert all(ms > 0 for ms in times.layers.values())
    native = Plan.uniform(parts, None)
    for cost, value in found["uniform"]["full precision"].items():
        assert value == times.plan_cost(parts, native, cost)
        assert value > 0  # what was measured of the whole model
    assert found["uniform"]["rtn:3"]["ms_per_token"] == found["uniform"]["rtn:4"]["ms_per_token"]  # stored alike
