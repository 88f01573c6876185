"""OpenVINO runs the packed codes: the same numbers, the same tokens as torch, the bytes that were predicted."""

from __future__ import annotations

import hashlib
import json
import math
import re
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
from PIL import Image

from sensitivity.api import exporting
from sensitivity.api.sweeping import sweep
from sensitivity.cli import main as cli
from sensitivity.formats.halved.tracing import kept
from sensitivity.formats.openvino import exporter, layout
from sensitivity.formats.table import write
from sensitivity.formats.timing.open_models import TorchHalves
from sensitivity.formats.timing.side_by_side import bench
from sensitivity.formats.verification import verify
from sensitivity.formats.writing import manifest
from sensitivity.formats.writing.job import Job, codes_from_weights
from sensitivity.measure.generate.answer_tokens import end_tokens
from sensitivity.measure.generate.batches import on_device, prompt_text
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import Weight
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.headers import header_bytes
from sensitivity.spec.sizes import size
from sensitivity.spec.stored_bits import FILES
from sensitivity.study.study import Study
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.table import task


def rtn(bits: int, group: int | str = "row", symmetric: bool = True) -> Scheme:
    return Scheme("rtn", bits, group, symmetric)


@pytest.fixture(scope="module")
def openvino() -> Any:
    return pytest.importorskip("openvino", reason="needs the extra `openvino` (60 MB), which CI does not install")


SCHEMES = [rtn(2), rtn(2, 32), rtn(3, 32), rtn(4), rtn(6, 32), rtn(8), rtn(4, "tensor"), rtn(2, 32, False)]
SCHEMES += [rtn(3, "row", False), rtn(4, 32, False), rtn(5, 32, False), rtn(8, "tensor", False)]


# -- what is stored


def unpacked(content: torch.Tensor, constant: layout.Constant) -> torch.Tensor:
    """The slow, plain version: each code from its own bits, as a number."""
    if constant.type.startswith(("f", "b")):
        return content.view(torch.float16).float().reshape(constant.shape)
    width, bits = layout.BITS[constant.type], int.from_bytes(content.numpy().tobytes(), "little")
    codes = [(bits >> width * i) & (2**width - 1) for i in range(math.prod(constant.shape))]
    if constant.type.startswith("i"):
        codes = [code - 2**width if code >= 2 ** (width - 1) else code for code in codes]
    return torch.tensor(codes).float().reshape(constant.shape)


@given(st.sampled_from(SCHEMES), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_constants_hold_the_weight_in_the_bytes_that_are_counted(scheme: Scheme, rows: int, seed: int) -> None:
    cols = 96 if isinstance(scheme.group, int) else 37
    weight = Weight("a.weight", rows, cols, "language", 0, 1, "ff")
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    found = codes_from_weights("a.weight", values, scheme)
    constants = layout.constants(weight, scheme, torch.float16)
    contents = layout.contents(found, weight, scheme, torch.float16)  # type: ignore[arg-type]
    assert [len(content) for content in contents] == [constant.bytes for constant in constants]
    assert 8 * sum(constant.bytes for constant in constants) == FILES["openvino"](scheme, rows, cols)
    codes, scale, *zero = (unpacked(*pair) for pair in zip(contents, constants, strict=True))
    number = ((codes - zero[0] if zero else codes) * scale).reshape(rows, cols)
    assert found is not None
    assert torch.equal(number, found.dequantize())


# -- what is refused


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("internvl", "llava, blip-2, idefics3, smolvlm, qwen2_vl, qwen2_5_vl can be run .* is of type internvl"),
        ("blip2_t5", "only a decoder can be run half by half"),
    ],
)
def test_a_model_that_it_cannot_hold_is_refused_before_the_sweep(
    openvino: Any, name: str, says: str, tmp_path: Path
) -> None:
    folder = saved_vlms.save(name, tmp_path / name)
    with pytest.raises(UserError, match=says):
        exporter.check(str(folder))
    typed = ["sweep", str(folder), "--task", "vqa", "--runtime", "openvino", "--bits", "4", "--method", "rtn"]
    assert cli.main([*typed, "--out", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("verb", ["sweep", "plan"])
def test_without_openvino_a_sentence_says_what_to_install(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    typed = [verb, "embedded:scenes-llava", "--task", "vqa", "--runtime", "openvino", "--bits", "4"]
    assert cli.main([*typed, "--method", "rtn", "--out", str(tmp_path / "r")]) == 2
    assert "pip install 'vlm-sensitivity[openvino]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# -- what it computes


CHANGES = {"vision": rtn(2), "connector": rtn(5), "language": rtn(2, 32)}  # such a plan changes answers


@pytest.fixture(scope="module")
def study(openvino: Any, scenes_llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> Study:
    parts = inspect(scenes_llava, by="part")
    plans = [Plan.of(parts, CHANGES), Plan.uniform(parts, rtn(4, 32, False))]
    return sweep(scenes_llava, parts, plans, ["vqa"], tmp_path_factory.mktemp("runs") / "one", n=40)


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan.of(study.parts, CHANGES)
    return exporting.export(study, plan, tmp_path_factory.mktemp("out") / "ov", "openvino")


def test_the_packed_codes_answer_as_torch_does(study: Study, folder: Path) -> None:
    found = verify(folder)
    assert (found["verdict"], found["examples"]) == ("as measured", 40)
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
    assert 0.4 * header_bytes(study.parts, "openvino") < facts["written"]["headers"]
    assert facts["written"]["headers"] <= header_bytes(study.parts, "openvino")  # what --gb leaves for them
    norm = 2 * 2 * 128  # the norm behind the last vision block, which this model never reads
    assert facts["written"]["bytes"] == size(study.parts, Plan.of(study.parts, CHANGES), "openvino").bytes - norm
    files = [folder / name for xml in exporter.FILES.values() for name in (xml, xml.replace(".xml", ".bin"))]
    assert sum(file.stat().st_size for file in files) == facts["written"]["bytes"] + facts["written"]["headers"]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_graph_computes_with_the_numbers_of_the_codes(openvino: Any, scheme: Scheme, half: torch.dtype) -> None:
    """The decompression of one weight, as OpenVINO itself evaluates it, with scales of both 16-bit types."""
    from openvino import Type, op, opset14

    from sensitivity.formats.openvino.graph import OPTIONS, dequantized

    rows, cols = 8, 96
    weight = Weight("a.weight", rows, cols, "language", 0, 1, "ff")
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(half)
    found = codes_from_weights("a.weight", values, scheme)
    assert found is not None
    stored = layout.constants(weight, scheme, half)
    made = []
    contents = layout.contents(found, weight, scheme, half)  # type: ignore[arg-type]  # OpenVINO owns no copy
    for constant, content in zip(stored, contents, strict=True):
        tensor = openvino.Tensor(content.numpy(), list(constant.shape), getattr(Type, constant.type))
        made.append(op.Constant(tensor))
    x = op.Parameter(Type.f32, openvino.PartialShape([-1, cols]))
    product = opset14.matmul(x, dequantized(stored, made), False, True)
    model = openvino.Model([opset14.result(product)], [x], "one")
    run = openvino.Core().compile_model(model, "CPU", OPTIONS)  # some processors round inputs otherwise
    inputs = torch.randn(5, cols, generator=torch.Generator().manual_seed(1))
    expected = inputs.double() @ found.dequantize().double().T
    np.testing.assert_allclose(run(inputs.numpy())[0], expected.numpy(), rtol=0, atol=3e-5)


def test_a_weight_that_did_not_arrive_is_told(openvino: Any, folder: Path, tmp_path: Path) -> None:
    from sensitivity.formats.openvino.run import check_arrived

    check_arrived(folder)
    for file in folder.glob("openvino_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    xml = tmp_path / exporter.FILES["language"]
    text, names = xml.read_text(), [f"layers.{i}.mlp.up_proj.weight:codes" for i in (0, 1)]
    swapped = text.replace(names[0], "@").replace(names[1], names[0]).replace("@", names[1])
    xml.write_text(swapped)
    with pytest.raises(UserError, match=r"does not read .*up_proj\.weight:codes"):
        check_arrived(tmp_path)


def test_another_shape_with_a_head_of_its_own(openvino: Any, tmp_path: Path) -> None:
    """Embedding and head as components, OPT's positions, a Q-Former: the embedded BLIP-2 on a few examples."""
    vlm = load("embedded:scenes-blip2")
    parts = inspect(vlm, by="part", include=("embedding",) if "embedding" in _kept(vlm) else ())
    plan = Plan.uniform(parts, rtn(2, 32))
    study = sweep(vlm, parts, [plan], ["vqa"], tmp_path / "run", n=20)
    out = exporting.export(study, plan, tmp_path / "out", "openvino", model=vlm)
    assert verify(out)["verdict"] == "as measured"
    headers = json.loads((out / "sensitivity.json").read_bytes())["written"]["headers"]
    assert headers <= header_bytes(parts, "openvino")


def _kept(vlm: VLM) -> set[str]:
    return {kept.reason for kept in inspect(vlm).kept}


def test_an_export_without_weights_read_by_name(openvino: Any, tmp_path: Path) -> None:
    """A folder of a family, by its name alone: the weights are streamed from the file and never loaded."""
    folder = saved_vlms.save("llava", tmp_path / "llava")
    parts = inspect(str(folder), by="part")
    job = Job(str(folder), parts, Plan.uniform(parts, rtn(4)), dtype=torch.float32)
    found = write(job, tmp_path / "out", "openvino")
    assert found["written"]["bytes"] == found["predicted_size"]["bytes"]


def test_graphs_that_are_traced_once_give_the_same_exports(openvino: Any, tmp_path: Path) -> None:
    """Each export reads the kept graph anew: what one replaced in it is whole again for the next."""
    folder = str(saved_vlms.save("qwen2_vl", tmp_path / "model"))
    parts = inspect(folder, by="part")

    def export_hashes(bits: int, name: str) -> dict[str, str]:
        job = Job(folder, parts, Plan.uniform(parts, rtn(bits)), dtype=torch.float32)
        write(job, tmp_path / name, "openvino")
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name).glob("*.bin")}

    plain = {bits: export_hashes(bits, f"plain-{bits}") for bits in (4, 8)}
    with kept(tmp_path / "kept"):
        assert {bits: export_hashes(bits, f"kept-{bits}") for bits in (4, 8)} == plain


FAMILIES = ("smolvlm", "idefics3", "qwen2_vl", "qwen2_5_vl")


@pytest.mark.parametrize("name", few(FAMILIES, ()))
def test_other_families_answer_as_torch_does(openvino: Any, name: str, tmp_path: Path) -> None:
    """Tiles of a picture, and patches of an image of any size with places in a plane, some within windows."""
    vlm = load(str(saved_vlms.save(name, tmp_path / name)))
    parts = inspect(vlm, by="part")
    plan = Plan.uniform(parts, rtn(3))
    study = sweep(vlm, parts, [plan], ["vqa"], tmp_path / "run", n=6)
    out = exporting.export(study, plan, tmp_path / "out", "openvino", model=vlm)
    found = verify(out)
    assert (found["verdict"], found["examples"]) == ("as measured", 6)
    mine, native = (study.examples(one) for one in (plan, study.native))
    assert mine is not None
    assert native is not None
    moved = (mine["nll"] - native["nll"]).abs().max()  # by the plan: it does something
    assert found["largest_nll_difference"] < min(1e-4, moved / 10)  # type: ignore[operator]


@pytest.mark.parametrize("name", few(FAMILIES, ("qwen2_5_vl",)))
def test_halves_in_torch_are_the_whole_model(name: str, tmp_path: Path) -> None:
    """Images of several sizes, so that windows at their edges are smaller, and each prompt has two of them."""
    vlm = load(str(saved_vlms.save(name, tmp_path / name)))
    vlm.model.double()
    halves, draw = TorchHalves(vlm), np.random.default_rng(0)
    for sides in ((16, 16, 32, 20), (40, 24, 12, 48)):
        pictures = [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)) for size in (sides[:2], sides[2:])]
        words = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this"}]
        text = vlm.processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
        inputs = on_device(vlm, vlm.processor(images=[pictures], text=[text], return_tensors="pt"))
        tokens = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=4)[0]
        whole = vlm.model(**inputs).logits[0].float().numpy()
        ids = inputs["input_ids"][0].tolist()
        features = halves.image_features(**halves.image_inputs(inputs))
        halves.forget()
        np.testing.assert_allclose(halves.logits(ids, len(ids), features), whole, atol=1e-6)
        assert halves.generate(ids, features, end_tokens(vlm), 4) == tokens[len(ids) :].tolist()


CALIBRATED = {"gptq": [], "awq": ["--set", "scales=folded"]}


@pytest.mark.parametrize("method", few(tuple(CALIBRATED), ()))
def test_a_recommended_plan_of_a_calibrated_method_answers_as_measured(
    openvino: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantized again from the same statistics; AWQ's factors go into the layers before, some of which are no codes."""
    monkeypatch.setenv("SENSITIVITY_CACHE", str(tmp_path / "cache"))
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["--method", method, "--bits", "3", "--group", "32", "--symmetric", *CALIBRATED[method], "--out", str(run)]
    words += ["--search", "one-at-a-time", "--calibration-n", "8", "--n", "20", "--runtime", "openvino"]
    assert cli.main(["sweep", "embedded:scenes-llava", "--task", "vqa", *words]) == 0
    budget = min(trial.bpw for trial in Study(run).measured()) + 0.01
    words = ["--bpw", f"{budget:.4f}", "--runtime", "openvino", "--top", "1"]
    assert cli.main(["recommend", str(run), *words]) == 0
    assert cli.main(["export", str(run / "plan.json"), "--format", "openvino", "--out", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["verify", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["examples"]) == ("as measured", 20)
    assert found["largest_nll_difference"] < (1e-4 if method == "gptq" else 1e-2)
    schemes = manifest.read(out)["plan"].values()
    assert {one["method"] for one in schemes if one} == {method}
    assert all(schemes)


def test_codebooks_are_refused_with_what_can_be_exported(study: Study, tmp_path: Path) -> None:
    plan = Plan.uniform(study.parts, scheme("squeezellm", 3))
    says = r"OpenVINO cannot hold what squeezellm stores; use --method rtn, or --format fake.*\. \S"
    with pytest.raises(UserError, match=says):
        exporting.export(study, plan, tmp_path / "out", "openvino")
    assert not (tmp_path / "out").exists()


def test_bench_finds_packed_codes_in_memory(folder: Path) -> None:
    """Twelve times fewer bytes of language weights than in float32 cannot be resident by chance."""
    found = bench(folder, n=6, threads=1)
    ours, full = found["export"], found["full_precision"]
    assert ours["memory"]
    assert full["memory"]
    assert found["versions"]["openvino"]
    assert full["memory"]["anonymous"] - ours["memory"]["anonymous"] > 1_000_000


@pytest.mark.slow
def test_a_recommended_plan_is_run_before_it_is_recommended(
    openvino: Any,
    scenes_llava: VLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two layouts, since each is timed by a process of its own, and few examples."""
    monkeypatch.setenv("SENSITIVITY_CACHE", str(tmp_path))
    parts = inspect(scenes_llava, by="part")
    plans = [Plan.uniform(parts, rtn(bits)) for bits in (2, 4)]
    study = sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / "run", n=10)
    asked = ["--symmetric", "--group", "row", "--bits", "2,4", "--n", "6", "--threads", "1", "--json"]
    assert cli.main(["profile", study.parts.model, "--runtime", "openvino", *asked]) == 0
    capsys.readouterr()
    words = ["recommend", str(study.path), "--runtime", "openvino", "--top", "1", "--threads", "1", "--json"]
    assert cli.main([*words, "--bpw", "7", "--ms-per-answer", "100000", "--gb-resident", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"]["bpw"] <= 7
    ran = found["in_runtime"]
    assert ran["same_answers"]
    assert "answers and scores are those that were measured" in ran["words"]
    assert "within 100000" in ran["words"]
    assert 0 < ran["costs"]["ms_per_token"]["low"] <= found["run_time"]["ms_per_token"] * 10
    assert found["provenance"]["asked"]["limits"] == {"ms_per_answer": 100000.0, "gb_resident": 5.0}
    alone = [
        "recommend",
        str(study.path),
        "--runtime",
        "openvino",
        "--threads",
        "1",
        "--bpw",
        "7",
        "--no-run",
        "--json",
    ]
    assert cli.main(alone) == 0  # without a limit, times that are known are told, and nothing is run
    found = json.loads(capsys.readouterr().out)
    assert (found["run_time"]["ms_per_token"] > 0, found["in_runtime"]) == (True, None)
    assert cli.main(["report", str(study.path)]) == 0
    assert 'id="run-time"' in (study.path / "report" / "index.html").read_text(encoding="utf-8")
