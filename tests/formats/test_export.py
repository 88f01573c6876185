"""Exports: what is written gives back what was measured, weighs what was promised, and is whole or not there."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import small_vlms
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sensitivity.formats.checkpoints.awq import ORDER, _words
from sensitivity.formats.checkpoints.gptq import PLANES, pack_planes, packed_layout
from sensitivity.formats.table import FORMATS, write
from sensitivity.formats.writing import job as job_module
from sensitivity.formats.writing import manifest, stream
from sensitivity.formats.writing.calibrated_codes import codes as codes_of
from sensitivity.formats.writing.job import Job, codes_from_weights
from sensitivity.formats.writing.packing import SMALLEST_BUFFER, pack, reused_buffer, unpack
from sensitivity.formats.writing.source import _reader, open_checkpoint
from sensitivity.formats.writing.unfinished import remove_unfinished, staging_folder
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.install.plan_in_model import quantized
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solvers.nearest import quantize_rtn as rtn_of
from sensitivity.spec.components import ComponentMap, Weight
from sensitivity.spec.errors import NoSpace, UserError
from sensitivity.spec.files import begin_folder
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.plan_file import read
from sensitivity.spec.runtimes.headers import header_bytes
from sensitivity.spec.runtimes.table import RUNTIMES
from sensitivity.spec.schema import schema_of as schema_of
from sensitivity.spec.sizes import component_bits, size
from sensitivity.study.study import Study

EMBEDDED = "embedded:scenes-llava"


def rtn(bits: int, group: int | str = "row", symmetric: bool = True, method: str = "rtn", **more: Any) -> Scheme:
    return Scheme(method, bits, group, symmetric, tuple(more.items()))


@pytest.fixture(scope="module")
def parts() -> ComponentMap:
    return inspect(EMBEDDED, by="part")


def job(parts: ComponentMap, choice: dict[str, Scheme | None], default: Scheme | None = None, **more: Any) -> Job:
    return Job(parts.model, parts, Plan.of(parts, choice, default), **{"dtype": torch.float32, **more})


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sensitivity.json").read_bytes())
    return found


# -- packing


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packed_codes_come_back(bits: int, cols: int, rows: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.shape == (rows, -(-cols * bits // 32))
    assert torch.equal(unpack(words, bits, cols), codes)
    whole = [sum(int(code) << i * bits for i, code in enumerate(row)) for row in codes]  # the slow, plain version
    assert [int.from_bytes(row.numpy().tobytes(), "little") for row in words] == whole


def test_many_codes_are_packed_in_pieces_by_threads() -> None:
    codes = torch.randint(8, (600, 1024), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3), 3, 1024), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_that_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(2**bits, (5, 77), dtype=torch.uint8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits))


@pytest.mark.parametrize("group", ["tensor", "row", 32, 40])  # of 72 columns: 32 and 40 leave a shorter last group
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_the_plain_formula_bit_for_bit(group: int | str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for cols in (72, 80, 96):  # groups that divide the rows take another way
        weight = torch.randn(24, cols, generator=draw).to(dtype)
        weight[3] = 0
        for bits, symmetric in itertools.product((1, 3, 4, 8), (True, False)):
            found = rtn_of(weight, rtn(bits, group, symmetric))
            scale, zero = found.spread(found.scale), found.spread(found.zero)
            plain = torch.round(weight.float() / scale + zero).clamp(0, 2**bits - 1)
            assert torch.equal(found.codes, plain.to(torch.uint8))
            assert torch.equal(found.dequantize(), (plain - zero) * scale)


@pytest.mark.parametrize("bits", PLANES)
def test_planes_hold_the_low_pieces_first(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 64), dtype=torch.uint8)
    words = pack_planes(codes, bits, planar=True).reshape(3, 2, bits)
    found, offset, at = torch.zeros(3, 2, 32, dtype=torch.uint8), 0, 0
    for width in PLANES[bits]:
        piece = unpack(words[:, :, at : at + width].reshape(6, width), width, 32).reshape(3, 2, 32)
        found, offset, at = found | piece << offset, offset + width, at + width
    assert torch.equal(found.reshape(3, 64), codes)


def test_awq_words_hold_eight_rows_in_the_order_of_its_kernels() -> None:
    codes = torch.randint(16, (4, 16), dtype=torch.uint8)
    again = unpack(_words(codes), 4, 16).reshape(4, 2, 8)
    assert torch.equal(again, codes.reshape(4, 2, 8)[:, :, list(ORDER)])


@pytest.mark.parametrize(("kind", "bits"), [("gptq", 3), ("gptq", 4), ("gptq_v2", 2), ("gptq_p", 5), ("gptq_p", 7)])
def test_gptq_tensors_give_the_values_back(kind: str, bits: int) -> None:
    values, weight = torch.randn(64, 96), Weight("a.weight", 64, 96, "language", 0, 1, "ff")
    scheme = rtn(bits, 32, kind == "gptq")
    codes = codes_from_weights("a.weight", values, scheme)
    tensors = packed_layout(kind).tensors(codes, weight, scheme)
    for spec, tensor in zip(packed_layout(kind).specs("a.", weight, scheme), tensors, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), spec.key
    if kind == "gptq_p":
        return  # read back with GPTQModel's own kernels: reports/export.md
    qweight, qzeros, scales, g_idx = tensors
    found = unpack(qweight.T.contiguous(), bits, 96).T
    zero = unpack(qzeros, bits, 64).int() + (kind == "gptq")
    assert torch.equal((scales.float()[g_idx] * (found - zero[g_idx])).T, codes.dequantize())


# -- checkpoints of all shapes


def tied_llava() -> nn.Module:
    return small_vlms.llava({"tie_word_embeddings": True, "num_hidden_layers": 3}, tie_word_embeddings=True)


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "llava": small_vlms.llava,  # rows of 16, 24, 40: no group size divides them all
    "tied": tied_llava,
    "blip2": small_vlms.blip2_opt,  # fused qkv
    "qwen2.5": small_vlms.qwen2_5_vl,  # fused qkv, biases, connector inside the vision tower
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / request.param
    SHAPES[request.param]().half().save_pretrained(folder)
    return folder


def test_compressed_tensors_load_through_transformers_as_measured(shape: Path, tmp_path: Path) -> None:
    parts = inspect(str(shape))
    native = parts.names[1]
    plan = {"vision": rtn(3), "connector": rtn(8), "language": rtn(5), "language.end": rtn(2, 8), native: None}
    asked = job(parts, plan)
    write(asked, tmp_path / "out", "compressed-tensors")
    own = load(str(shape), dtype="float32").model
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    found = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path / "out", dtype=torch.float32)
    found.hf_quantizer.compressor.decompress_model(found)
    with quantized(own, parts, asked.plan):
        mine, theirs = dict(own.named_parameters()), dict(found.named_parameters())
        assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
    groups = config["quantization_config"]["config_groups"]
    assert set(groups) == set(parts.names) - {native}
    assert set(config["quantization_config"]["ignore"]) >= {w.module for w in parts[native].weights} | {"lm_head"}


def test_a_format_of_ones_own_must_say_what_it_wrote(
    parts: ComponentMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "fake", lambda job, folder: None)
    with pytest.raises(UserError, match="the function of the format fake returned a NoneType, and no Written"):
        write(job(parts, {}, rtn(4)), tmp_path / "out", "fake")
    assert not list(tmp_path.iterdir())


def test_fake_loads_as_measured_with_any_method(shape: Path, tmp_path: Path) -> None:
    parts = inspect(str(shape), by="part")
    free = rtn(3, "tensor", False, "uniform")
    asked = job(parts, {"vision": free, "language": rtn(4, 64, True, "nf4", double=False)}, rtn(1, biases=True))
    write(asked, tmp_path / "out", "fake")
    own, found = load(str(shape), dtype="float32").model, load(str(tmp_path / "out"), dtype="float32").model
    with quantized(own, parts, asked.plan):
        mine, theirs = dict(own.named_parameters()), dict(found.named_parameters())
        assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("group", ["row", 32])
def test_pieces_of_a_weight_are_quantized_as_the_whole(monkeypatch: pytest.MonkeyPatch, group: int | str) -> None:
    weight = torch.randn(50, 96)
    whole = codes_from_weights("a", weight, rtn(3, group, False))
    monkeypatch.setattr(job_module, "NUMBERS_AT_ONCE", 7 * 96)
    pieces = codes_from_weights("a", weight, rtn(3, group, False))
    for part in ("codes", "scale", "zero", "group"):
        assert torch.equal(torch.as_tensor(getattr(whole, part)), torch.as_tensor(getattr(pieces, part))), part


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_those_of_the_type_that_was_measured(parts: ComponentMap, tmp_path: Path, dtype: str) -> None:
    asked = job(parts, {"vision": rtn(3, 32)}, dtype=getattr(torch, dtype))
    write(asked, tmp_path / "out", "compressed-tensors")
    own, found = load(EMBEDDED, dtype=dtype).model, load(str(tmp_path / "out"), dtype=dtype, quantized=True).model
    with quantized(own, parts, asked.plan):
        name = parts["vision"].weights[0].name
        assert torch.equal(own.get_parameter(name), found.get_parameter(name))


def test_planted_outliers_are_exported_from_memory(tmp_path: Path) -> None:
    vlm = load(EMBEDDED + "-heavy")
    parts = inspect(vlm, by="part")
    asked = Job(vlm, parts, Plan.uniform(parts, rtn(4)), dtype=torch.float32)
    write(asked, tmp_path / "out", "compressed-tensors")
    found = load(str(tmp_path / "out"), dtype="float32", quantized=True).model
    with quantized(vlm.model, parts, asked.plan):
        name = parts["vision"].weights[0].name
        assert torch.equal(vlm.model.get_parameter(name), found.get_parameter(name))


# -- honest weight


WIDE: dict[str, Callable[[], nn.Module]] = {  # rows and columns that every packed format can hold
    "llava": lambda: small_vlms.llava(**LARGER),
    "tied": lambda: small_vlms.llava(tie_word_embeddings=True, **LARGER),
    "blip2": small_vlms.blip2_opt,
    "qwen2.5": small_vlms.qwen2_5_vl,
}
LARGER: dict[str, dict[str, Any]] = {
    "text": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 3},
    "vision": {"hidden_size": 32, "intermediate_size": 64},
}
OF_PACKED = {
    "compressed-tensors": [rtn(5), rtn(3, 32), rtn(4, "tensor", False)],
    "gptq": [rtn(5), rtn(3, 32), rtn(4, 32, False)],
    "auto-round": [rtn(8), rtn(3, 32)],
    "awq": [rtn(4), rtn(4, 32), rtn(4, 32, False)],
}


@pytest.fixture(scope="module", params=WIDE)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / request.param
    with pytest.MonkeyPatch.context() as patch:
        for sizes in (small_vlms.VIT, small_vlms.QFORMER):
            for name in {"hidden_size", "intermediate_size", "encoder_hidden_size"} & set(sizes):
                patch.setitem(sizes, name, 64 if name == "intermediate_size" else 32)
        for name, value in {"word_embed_proj_dim": 64, "hidden_size": 64, "ffn_dim": 96}.items():
            patch.setitem(small_vlms.OPT, name, value)
        if request.param == "qwen2.5":
            for name, value in {**LARGER["text"], "num_attention_heads": 2}.items():
                patch.setitem(small_vlms.LLAMA, name, value)
            patch.setitem(small_vlms.ROPE, "mrope_section", [4, 6, 6])
            small_qwen(folder)
        else:
            WIDE[request.param]().half().save_pretrained(folder)
    return folder


def small_qwen(folder: Path) -> None:
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
    text = {**small_vlms.LLAMA, "rope_parameters": small_vlms.ROPE}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformers.Qwen2_5_VLForConditionalGeneration(config).half().save_pretrained(folder)


@pytest.mark.parametrize("format", OF_PACKED)
def test_predicted_bytes_are_written_bytes(wide: Path, tmp_path: Path, format: str) -> None:
    """Per component, with one that stays native; of one scheme after the other, and mixed where that may be."""
    parts = inspect(str(wide), by="part")
    schemes = OF_PACKED[format]
    mixed = [] if RUNTIMES[format].one_scheme else [dict(zip(("vision", "language"), schemes, strict=False))]
    for choice in [*({"vision": one, "language": one} for one in schemes), *mixed]:
        asked = Job(str(wide), parts, Plan.of(parts, dict(choice)), dtype=torch.float16)
        write(asked, tmp_path / "out", format, force=True)
        found = written(tmp_path / "out")["written"]
        for component in parts.components:
            predicted = component_bits(parts, component.name, asked.plan[component.name], format) / 8
            assert found["components"][component.name] == predicted, component.name
        promised = size(parts, asked.plan, format)
        assert (found["bytes"], found["bpw"]) == (promised.bytes, pytest.approx(promised.bpw))
        assert (tmp_path / "out" / "model.safetensors").stat().st_size == found["bytes"] + found["headers"]
        assert found["headers"] <= header_bytes(parts, format)  # what a budget in GB leaves for them


@pytest.mark.parametrize("format", ["fake", "compressed-tensors"])
def test_a_checkpoint_of_two_widths_weighs_what_was_promised(shape: Path, tmp_path: Path, format: str) -> None:
    """Of norms, biases and the connector in 32 bits, and the rest in 16; and what is exported of that again."""
    folder = Path(shutil.copytree(shape, tmp_path / "two"))
    narrow = inspect(load(str(folder)), by="part")
    wide = {one.name for one in (*narrow.kept, *narrow["connector"].weights) if "embed" not in one.name}
    tensors = {
        one.key: one.read().float() if one.parameter in wide else one.read()
        for one in open_checkpoint(str(folder)).tensors
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    parts = inspect(load(str(folder)), by="part")
    assert set(parts.other_bits) == wide
    asked = job(parts, {"vision": rtn(8), "language": rtn(4, biases=True) if format == "fake" else rtn(4)})
    write(asked, tmp_path / "out", format)
    found = written(tmp_path / "out")
    assert (
        found["written"]["bytes"]
        == found["predicted_size"]["bytes"]
        == size(parts, asked.plan, asked.stored_as(format)).bytes
    )
    # a study of an earlier version, which did not know of the second width, is continued
    Study.create(tmp_path / "study", replace(parts, other_bits={}), ["vqa"], {"model": "x"})
    assert Study.create(tmp_path / "study", parts, ["vqa"], {"model": "x"}).parts.other_bits == {}
    assert ComponentMap.from_json(parts.to_json()).other_bits == parts.other_bits
    if format == "fake":  # which stores quantized weights in 32 bits: a plan weighs the same as before
        assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == "float32"
        again = inspect(load(str(tmp_path / "out")), by="part")
        assert size(again, asked.plan).bits == size(parts, asked.plan).bits


def test_numbers_weigh_what_was_promised(parts: ComponentMap, tmp_path: Path) -> None:
    asked = job(parts, {"vision": rtn(3)})  # in float32, from a checkpoint in 16 bits
    write(asked, tmp_path / "out", "fake")
    assert written(tmp_path / "out")["written"]["bytes"] == written(tmp_path / "out")["predicted_size"]["bytes"]


def test_a_row_that_words_do_not_divide_weighs_what_was_promised(shape: Path, tmp_path: Path) -> None:
    parts = inspect(str(shape), by="group.kind")
    first = parts.names[0]
    asked = Job(str(shape), parts, Plan.of(parts, {first: None}, rtn(3)), dtype=torch.float16)
    write(asked, tmp_path / "out", "compressed-tensors")
    found = written(tmp_path / "out")["written"]
    for name in parts.names:
        predicted = component_bits(parts, name, asked.plan[name], "compressed-tensors") / 8
        assert found["components"][name] == predicted, name
    assert found["bytes"] == size(parts, asked.plan, "compressed-tensors").bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_weighs_what_was_promised(parts: ComponentMap, tmp_path: Path, bits: int) -> None:
    asked = job(parts, {}, rtn(bits))
    write(asked, tmp_path / "out", "compressed-tensors")
    for component in parts.components:
        planned = component_bits(parts, component.name, asked.plan[component.name]) / 8
        assert written(tmp_path / "out")["written"]["components"][component.name] == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "fake"])
def test_layers_made_at_once_are_the_same_file(parts: ComponentMap, tmp_path: Path, format: str) -> None:
    asked = job(parts, {"vision": rtn(3, 32), "language": rtn(4)})
    threads, hashes = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            write(asked, tmp_path / str(count), format)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        hashes.append(written(tmp_path / str(count))["files"]["model.safetensors"]["sha256"])
    assert hashes[0] == hashes[1]


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = small_vlms.llava().half()
    folder = tmp_path / "model"
    parameters = dict(model.named_parameters())
    name = next(name for name in parameters if name.endswith("mlp.down_proj.weight"))
    parameters[name].data[-1, -1] = float("nan")
    model.save_pretrained(folder)
    parts = inspect(str(folder), by="part")
    with pytest.raises(UserError, match=f"{re.escape(name)} holds NaN or infinite values"):
        write(Job(str(folder), parts, Plan.uniform(parts, rtn(4))), tmp_path / "out", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_shards_are_read_as_one_model(parts: ComponentMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.write, "__defaults__", (400_000, 1))
    write(job(parts, {"vision": rtn(4)}), tmp_path / "out", "compressed-tensors")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert len(files) > 5
    assert set(index["weight_map"].values()) == {file.name for file in files}
    load(str(tmp_path / "out"), dtype="float32", quantized=True)
    assert manifest.damaged_files(tmp_path / "out", manifest.read(tmp_path / "out")) == []


# -- the other formats


LEGAL: dict[str, tuple[dict[str, Scheme | None], Scheme]] = {
    "plan": ({}, rtn(3)),
    "fake": ({}, rtn(3)),
    "compressed-tensors": ({"connector": None}, rtn(3)),
    "gptq": ({"connector": None, "vision": rtn(3, 32)}, rtn(6, 32, False)),
    "awq": ({"connector": None}, rtn(4, 32, False)),
    "auto-round": ({"connector": None, "vision": rtn(8, 32)}, rtn(4, 32)),
    "llm-compressor": ({"connector": None, "vision": rtn(8, "row", False, "gptq")}, rtn(4, 32)),
    "bnb": ({"connector": None}, rtn(4, 64, True, "nf4", double=True)),
    "torchao": ({"connector": None, "vision": rtn(3, 32, False)}, rtn(4)),
    "modelopt": ({"connector": None, "vision": rtn(8)}, rtn(4, 64)),
    "llama.cpp": ({"connector": None, "vision": rtn(8)}, rtn(5)),
    "mlx": ({"connector": None, "vision": rtn(8, 64, False)}, rtn(4, 32, False)),
    "openvino": ({"connector": None, "vision": rtn(8, 32)}, rtn(3, 32, False)),
    "onnx": ({"connector": None, "vision": rtn(8, 32)}, rtn(3, 32, False)),
    "gguf": ({"connector": None, "vision": rtn(8, 32)}, rtn(3, 32, False)),
}
ABSENT = {name for name in ("openvino", "onnx") if importlib.util.find_spec(name) is None}  # large, and not in CI
HERE = [name for name in LEGAL if name not in ABSENT]


@pytest.fixture(scope="module")
def exports(parts: ComponentMap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name in HERE:
        write(job(parts, *LEGAL[name]), folder / name, name)
    return folder


def test_every_format_is_tried_here_and_has_rules() -> None:
    assert set(LEGAL) == set(FORMATS)
    assert set(FORMATS) <= set(RUNTIMES)


@pytest.mark.parametrize("name", HERE)
def test_every_export_has_a_card_and_a_manifest_and_no_pickle(exports: Path, name: str) -> None:
    folder = exports / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Plan", "## Size", "## Scores", "## How to load it", "## License"):
        assert heading in card
    assert "| vision |" in card
    assert manifest.damaged_files(folder, manifest.read(folder)) == []
    graphs = {file.with_suffix(".bin") for file in folder.glob("*.xml")}  # the numbers of OpenVINO's graphs
    assert not [file for file in {*folder.rglob("*")} - graphs if file.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_the_license_of_the_base_model_is_carried_along(shape: Path, tmp_path: Path) -> None:
    model = shutil.copytree(shape, tmp_path / "model")
    parts = inspect(str(model), by="part")
    write(Job(str(model), parts, Plan.of(parts, {"language": rtn(4)})), tmp_path / "silent", "compressed-tensors")
    assert "names no license" in (tmp_path / "silent" / "README.md").read_text(encoding="utf-8")
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    (model / "LICENSE").write_text("Do as you like.")
    write(Job(str(model), parts, Plan.of(parts, {"language": rtn(4)})), tmp_path / "out", "compressed-tensors")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: model\n---\n")
    assert "apache-2.0, as the base model" in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like."


def test_plan_json_obeys_its_schema_and_comes_back(exports: Path, parts: ComponentMap) -> None:
    document = json.loads((exports / "plan" / "plan.json").read_bytes())
    wanted = schema_of("plan")
    jsonschema.validate(document, wanted)
    assert read(exports / "plan" / "plan.json")[1] == job(parts, *LEGAL["plan"]).plan
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "plan": {"vision": {"method": "rtn", "bits": 99}}}, wanted)


def test_gptq_names_what_differs_and_what_stays(exports: Path) -> None:
    config = json.loads((exports / "gptq" / "quantize_config.json").read_bytes())
    assert (config["bits"], config["sym"], config["checkpoint_format"]) == (3, True, "gptq_p")
    assert config["dynamic"]["+:^model\\.language_model\\.layers\\.0\\.mlp\\.up_proj$"]["bits"] == 6
    assert config["dynamic"]["-:^model\\.multi_modal_projector\\.linear_1$"] == {}


def test_auto_round_names_blocks_and_exceptions(exports: Path) -> None:
    config = json.loads((exports / "auto-round" / "config.json").read_bytes())["quantization_config"]
    assert config["block_name_to_quantize"].startswith("model.vision_tower.encoder.layers,")
    assert config["extra_config"]["model.language_model.layers.3.mlp.up_proj"]["bits"] == 4
    assert config["extra_config"]["model.multi_modal_projector.linear_1"]["bits"] == 16


def test_llm_compressor_has_a_modifier_per_method(exports: Path) -> None:
    recipe = json.loads((exports / "llm-compressor" / "recipe.yaml").read_bytes())["quant_stage"]["quant_modifiers"]
    assert {name: list(one["config_groups"]) for name, one in recipe.items()} == {
        "GPTQModifier": ["vision"],
        "QuantizationModifier": ["language"],
    }


def test_bnb_skips_whole_paths_and_refuses_a_mixture(exports: Path, parts: ComponentMap, tmp_path: Path) -> None:
    config = json.loads((exports / "bnb" / "quantization_config.json").read_bytes())
    assert config["load_in_4bit"] is True
    assert "model.multi_modal_projector.linear_1" in config["llm_int8_skip_modules"]
    assert "lm_head" in config["llm_int8_skip_modules"]
    eight = rtn(8, "row", True, "llm-int8", threshold=6.0)
    with pytest.raises(UserError, match=r"2 schemes .* bitsandbytes takes one for all"):
        write(job(parts, {"vision": eight}, rtn(4, 64, True, "nf4", double=False)), tmp_path / "out", "bnb")


def test_llama_cpp_names_every_tensor_in_two_files(exports: Path) -> None:
    language = (exports / "llama.cpp" / "language.tensor-types.txt").read_text().split()
    vision = (exports / "llama.cpp" / "mmproj.tensor-types.txt").read_text().split()
    assert "^blk\\.3\\.ffn_down\\.weight$=q5_0" in language
    assert "^v\\.blk\\.0\\.attn_q\\.weight$=q8_0" in vision
    assert "^mm\\.1\\.weight$=f16" in vision
    assert len(language) == 28
    assert len(vision) == 38


def test_mlx_and_torchao_have_an_entry_for_every_module(exports: Path) -> None:
    mlx = json.loads((exports / "mlx" / "quantization.json").read_bytes())["quantization"]
    assert mlx["language_model.model.layers.0.mlp.up_proj"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert mlx["multi_modal_projector.linear_1"] is False
    torchao = json.loads((exports / "torchao" / "quantization_config.json").read_bytes())["quant_type"]["default"]
    weights = torchao["_data"]["fqn_to_config"]
    assert weights["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]["_data"]["weight_dtype"]["_data"] == "int3"
    assert weights["model.multi_modal_projector.linear_1.weight"] is None


def test_modelopt_names_an_algorithm_per_module(exports: Path) -> None:
    layers = json.loads((exports / "modelopt" / "hf_quant_config.json").read_bytes())["quantization"][
        "quantized_layers"
    ]
    assert layers["model.vision_tower.encoder.layers.0.mlp.fc1"] == {"quant_algo": "W8A16"}
    assert layers["model.language_model.layers.0.mlp.up_proj"]["group_size"] == 64


# -- whole or not at all


def test_what_is_there_stays_without_force(parts: ComponentMap, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for force in (False, True):  # without it, --force is not advised, since it would be refused
        with pytest.raises(UserError, match="out is not replaced: it is not an export"):
            write(job(parts, {}, rtn(4)), tmp_path / "out", "compressed-tensors", force=force)
        assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    write(job(parts, {}, rtn(4)), tmp_path / "ours", "compressed-tensors")
    with pytest.raises(UserError, match="already there; choose another --out or add --force"):
        write(job(parts, {}, rtn(4)), tmp_path / "ours", "compressed-tensors")


def test_an_interruption_leaves_nothing_that_looks_finished(parts: ComponentMap, tmp_path: Path) -> None:
    calls = []

    def stops(name: str, weight: torch.Tensor, scheme: Scheme) -> Any:
        calls.append(name)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return codes_from_weights(name, weight, scheme)

    with pytest.raises(KeyboardInterrupt):
        write(job(parts, {}, rtn(4), codes=stops), tmp_path / "out", "compressed-tensors")
    assert list(tmp_path.iterdir()) == []
    write(job(parts, {}, rtn(4)), tmp_path / "out", "compressed-tensors")
    before = written(tmp_path / "out")["files"]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        write(job(parts, {}, rtn(3), codes=stops), tmp_path / "out", "compressed-tensors", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert written(tmp_path / "out")["files"] == before


def test_a_killed_export_leaves_nothing_that_looks_finished(parts: ComponentMap, tmp_path: Path) -> None:
    calls = []

    def dies(name: str, weight: torch.Tensor, scheme: Scheme) -> Any:
        calls.append(name)
        if len(calls) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return codes_from_weights(name, weight, scheme)

    asked = job(parts, {}, rtn(4), codes=dies)
    write(job(parts, {}, rtn(3)), tmp_path / "old", "compressed-tensors")
    for name in ("new", "old"):
        if (child := os.fork()) == 0:
            write(asked, tmp_path / name, "compressed-tensors", force=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert manifest.damaged_files(tmp_path / "old", manifest.read(tmp_path / "old")) == []
    (left,) = (path for path in tmp_path.iterdir() if path.name != "old")  # the second one cleared what the first left
    assert left.name.startswith(".old.")
    assert not (left / manifest.MANIFEST).exists()
    write(job(parts, {}, rtn(4)), tmp_path / "new", "compressed-tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_only_what_a_dead_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".mine.1.2").mkdir()
    with staging_folder(tmp_path / "out") as living:
        (living / "file").write_text("being written")
        assert remove_unfinished(tmp_path) == []
        dead = tmp_path / ".other.99999.1.unfinished"
        for folder in (dead, tmp_path / ".there.99999.1.unfinished.old", tmp_path / ".back.99999.1.unfinished.old"):
            begin_folder(folder)
        (tmp_path / "there").mkdir()
        assert remove_unfinished(tmp_path) == [dead, tmp_path / ".there.99999.1.unfinished.old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.1.2", "back", "out", "there"]
    assert (tmp_path / "out" / "file").exists()


def test_a_full_disk_is_one_sentence(parts: ComponentMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream._Stream, "put", full)
    with pytest.raises(NoSpace, match=r"no space is left for .*out; free some space$"):
        write(job(parts, {}, rtn(4)), tmp_path / "out", "fake")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["cut", "changed", "gone", "added"])
def test_damage_is_found(exports: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exports / "compressed-tensors", folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    if what == "cut":
        file.write_bytes(content[:-100])
    elif what == "changed":
        content[-5] ^= 1
        file.write_bytes(content)
    elif what == "gone":
        (folder / "config.json").unlink()
    else:
        (folder / "model-extra.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (found,) = manifest.damaged_files(folder, manifest.read(folder))
    says = {"cut": "bytes instead of", "changed": "was changed", "gone": "is missing", "added": "was added"}
    assert says[what] in found


# -- refusals


def test_codes_off_the_integer_grid_are_refused_with_a_way_out(parts: ComponentMap, tmp_path: Path) -> None:
    for free in (rtn(4, "tensor", False, "uniform"), rtn(4, 64, True, "nf4", double=False)):
        with pytest.raises(UserError, match=f"what {free.method} stores; use --method rtn, or --format fake"):
            write(job(parts, {}, free), tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_calibrated_methods_ask_for_their_codes(parts: ComponentMap, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gptq needs its calibration data again"):
        write(job(parts, {}, rtn(4, method="gptq")), tmp_path / "out", "compressed-tensors")
    calls: list[str] = []

    def codes(name: str, weight: torch.Tensor, scheme: Scheme) -> Any:
        calls.append(name)
        return codes_from_weights(name, weight, rtn(4))

    write(job(parts, {}, rtn(4, method="gptq"), codes=codes), tmp_path / "out", "compressed-tensors")
    assert set(calls) == {weight.name for weight in parts.weights}


@pytest.mark.parametrize("path", ["float", "exposed"])
def test_calibrated_codes_are_those_that_were_measured(tmp_path: Path, path: str) -> None:
    vlm = load(EMBEDDED)
    parts = inspect(vlm, by="part")
    statistics = calibration_statistics(vlm, parts, ["vqa"], n=4, path=path)
    chosen = scheme("gptq", 3, calibration=statistics.facts)
    plan = Plan.of(parts, {"vision": chosen, "connector": None, "language": rtn(4)})
    if path == "exposed":
        plan = Plan.of(parts, {"vision": rtn(2), "connector": chosen}, None)  # what follows a coarse tower
    before = {name: parameter.data.clone() for name, parameter in vlm.model.named_parameters()}
    with codes_of(vlm, parts, plan, statistics) as found_again:
        asked = Job(vlm, parts, plan, dtype=torch.float32, codes=found_again.codes)
        write(asked, tmp_path / "out", "compressed-tensors")
    assert all(torch.equal(before[name], parameter) for name, parameter in vlm.model.named_parameters())
    found = dict(load(str(tmp_path / "out"), dtype="float32", quantized=True).model.named_parameters())
    with quantized(vlm.model, parts, plan, statistics=statistics):
        assert not [name for name, p in vlm.model.named_parameters() if not torch.equal(p, found[name])]


def test_the_exposed_path_visits_each_block_about_once() -> None:
    """The codes of beginning again for each block, for a fraction of the calls of its layers."""
    vlm = load(EMBEDDED)
    parts = inspect(vlm, by="part")
    called: Counter[str] = Counter()
    for weight in parts.weights:
        hear: Any = lambda *_, name=weight.name: called.update([name])  # noqa: E731
        vlm.model.get_submodule(weight.module).register_forward_pre_hook(hear)
    calls, found = {}, {}
    for way in ("again", "onwards"):
        statistics = calibration_statistics(vlm, parts, ["vqa"], n=1, path="exposed")
        if way == "again":
            anew = functools.partial(lambda gather, weights, done=None: gather(weights), statistics.gather)
            statistics = replace(statistics, gather=anew)
        plan = Plan.uniform(parts, scheme("gptq", 3, calibration=statistics.facts))
        called.clear()
        with codes_of(vlm, parts, plan, statistics) as again:
            asked = Job(vlm, parts, plan, dtype=torch.float32)
            stored = {tensor.parameter: tensor for tensor in asked.source.tensors}
            found[way] = [again.codes(name, stored[name].read(), plan.schemes[0][1]).codes for name in asked.weights]
        calls[way] = dict(called)
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
    first = parts.weights[0].name
    blocks = len(parts.regroup("block").components)
    assert calls["again"][first] >= blocks
    inside = [weight.name for weight in parts.weights if weight.block is not None]
    assert max(calls["onwards"][name] for name in inside) <= 3  # looked at, studied, and once more when it is final
    assert sum(calls["onwards"].values()) < sum(calls["again"].values()) / 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_inputs_are_folded_into_the_layer_before(tmp_path: Path, symmetric: bool) -> None:
    """A packed file answers as the measured weights do; without the folding it would be nowhere near."""
    vlm = load(EMBEDDED)
    parts = inspect(vlm, by="part")
    statistics = calibration_statistics(vlm, parts, ["vqa"], n=4)
    chosen = scheme("awq", 4, group=32, symmetric=symmetric, scales="folded", calibration=statistics.facts)
    plan, ids = Plan.of(parts, {"connector": None}, chosen), torch.randint(5, 160, (1, 48))
    ids[0, :36] = 4
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 48, 48)}
    with torch.inference_mode(), quantized(vlm.model, parts, plan, statistics=statistics):
        measured = vlm.model(**inputs).logits
    before = {name: parameter.data.clone() for name, parameter in vlm.model.named_parameters()}
    format = "compressed-tensors" if symmetric else "awq"
    with codes_of(vlm, parts, plan, statistics, folding=True) as found:
        asked = Job(vlm, parts, plan, dtype=torch.float32, codes=found.codes, changed=found.changed)
        write(asked, tmp_path / "out", format, notes=lambda: found.notes)
    assert all(torch.equal(before[name], parameter) for name, parameter in vlm.model.named_parameters())
    assert len(found.folded) > 20
    assert found.unscaled == {"vision": {"fc2"}}  # behind a GELU
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"The scales of {len(found.folded)} inputs are folded" in card
    assert "such as a GELU, were measured and written without scales: vision: fc2" in card
    if not symmetric:
        return  # the layout is tried above, and read by transformers in reports/export.md
    model = load(str(tmp_path / "out"), dtype="float32", quantized=True).model
    with torch.inference_mode():
        answer = model(**inputs).logits
        for name, parameter in model.named_parameters():  # as if nothing had taken the scales over
            if name in found.changed:
                parameter.data = before[name]
        astray = model(**inputs).logits
    assert (answer - measured).abs().max() < 0.02 * measured.abs().max()
    assert (astray - measured).abs().max() > 10 * (answer - measured).abs().max()


@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "gptq"])
def test_scales_without_a_place_are_refused_with_ways_out(parts: ComponentMap, tmp_path: Path, format: str) -> None:
    stored = scheme("awq", 4, group=32, symmetric=True)
    says = "no place for the factor per input channel that awq stores; sweep with --set scales=folded, .* --format fake"
    with pytest.raises(UserError, match=f"vision .*{says}"):
        write(job(parts, {}, stored), tmp_path / "out", format)


def test_an_unknown_format_is_told_the_known_ones(parts: ComponentMap, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown format 'ggml'; choose from plan, fake, compressed-tensors"):
        write(job(parts, {}), tmp_path / "out", "ggml")


def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    first = reused_buffer(SMALLEST_BUFFER)
    where, look = first.data_ptr(), first.view(torch.int32).reshape(4, -1)[1:]
    del first
    second = reused_buffer(SMALLEST_BUFFER)
    assert second.data_ptr() != where
    del look
    third = reused_buffer(SMALLEST_BUFFER)
    assert third.data_ptr() == where
    assert len({tensor.data_ptr() for tensor in (second, third, reused_buffer(SMALLEST_BUFFER))}) == 3


def test_a_tensor_is_read_wherever_it_begins_and_not_beyond_the_end(tmp_path: Path) -> None:
    values = torch.randn(5000).half()
    file = tmp_path / "odd"
    file.write_bytes(b"\0" * 4099 + values.numpy().tobytes())
    for start, skipped in ((4099, 0), (4101, 1), (8099, 2000)):
        found = _reader(file, start, 2 * (5000 - skipped), torch.float16, (5000 - skipped,))()
        assert torch.equal(found, values[skipped:])
    with pytest.raises(UserError, match="odd ends early; fetch it again"):
        _reader(file, 8099, 10_000, torch.float16, (5000,))()


def test_a_source_is_the_checkpoint_under_the_names_of_parameters(shape: Path) -> None:
    source, model = open_checkpoint(str(shape)), load(str(shape), dtype="float16").model
    parameters = dict(model.named_parameters())
    found = {tensor.parameter: tensor for tensor in source.tensors}
    assert set(found) == set(parameters)
    assert all(torch.equal(found[name].read(), parameters[name]) for name in parameters)
