"""GGUF holds the codes exactly: read back by another reader, and computed with by llama.cpp itself."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import saved_vlms
import small_vlms as small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sensitivity.api import exporting
from sensitivity.api.sweeping import sweep
from sensitivity.cli import main as cli
from sensitivity.formats.gguf import exporter
from sensitivity.formats.gguf.blocks import packed
from sensitivity.formats.gguf.model import GGUFModel
from sensitivity.formats.gguf.names import QWEN, TEXT_BLOCK, placed
from sensitivity.formats.gguf.run import check_arrived
from sensitivity.formats.table import write
from sensitivity.formats.timing.side_by_side import bench
from sensitivity.formats.verification import verify
from sensitivity.formats.writing.job import Job, codes_from_weights
from sensitivity.measure.generate.batches import batches_by_image, prompt_text
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.spec.runtimes.headers import header_bytes
from sensitivity.spec.sizes import size
from sensitivity.spec.stored_bits import FILES, gguf_type
from sensitivity.study.study import Study
from sensitivity.tasks.examples.images import open_image
from sensitivity.tasks.table import task

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")


def rtn(bits: int, group: int | str = "row", symmetric: bool = True) -> Scheme:
    return Scheme("rtn", bits, group, symmetric)


SCHEMES = [rtn(2, 32), rtn(3), rtn(4, 64), rtn(4, "tensor"), rtn(5, 32), rtn(6), rtn(7, 96), rtn(8, 32)]
SCHEMES += [rtn(2, 32, False), rtn(3, 96, False), rtn(4, "row", False), rtn(6, 32, False), rtn(7, "tensor", False)]


def numbers(content: Tensor, type: str, shape: tuple[int, ...]) -> Tensor:
    """What the package gguf reads."""
    kind = gguf.GGMLQuantizationType[type.upper()]
    return torch.from_numpy(gguf.dequantize(content.numpy(), kind)).reshape(shape)


# -- what is stored


@given(st.sampled_from(SCHEMES), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_blocks_hold_the_weight_in_the_bytes_that_are_counted(scheme: Scheme, rows: int, seed: int) -> None:
    cols = 192
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    found: Any = codes_from_weights("a.weight", values, scheme)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    content = packed("a.weight", found, gguf_type(scheme), order)
    assert 8 * len(content) == FILES["gguf"](scheme, rows, cols)
    assert torch.equal(numbers(content, gguf_type(scheme), (rows, cols)), found.dequantize()[order])


def test_scales_that_16_bits_do_not_hold_are_refused() -> None:
    found: Any = codes_from_weights("a.weight", torch.randn(4, 64), rtn(4, 32))
    with pytest.raises(UserError, match=r"a\.weight has scales that 16-bit floats do not hold"):
        packed("a.weight", replace(found, scale=found.scale * 1.0001), "q4_0")
    with pytest.raises(UserError, match=r"has codes from -9 to [0-7], and Q4_0 holds -8 to 7"):
        packed("a.weight", replace(found, zero=found.zero + 1, codes=found.codes.clamp(max=14)), "q4_0")


def wide_qwen(name: str) -> saved_vlms.Made:
    made = saved_vlms.BUILDERS[name]()
    config = made.model.config
    ids = {f"{name}_token_id" for name in ("image", "video", "vision_start", "vision_end")}
    rope = {**small.ROPE, "mrope_section": [4, 6, 6]}
    # llama.cpp 2026.10 leaves out this epsilon: small numbers would be divided by other ones
    text = {**saved_vlms.TEXT, "rope_parameters": rope, "rms_norm_eps": 1e-12}
    vision = {"depth": 3, "num_heads": 2}
    if name == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 4}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
        # images of 140 pixels and more have several windows
        size = {"shortest_edge": 140 * 140, "longest_edge": 160 * 160}
        made = replace(made, pictures=saved_vlms.Qwen2VLImageProcessorPil(patch_size=14, size=size))
    wide = type(config)(text_config=text, vision_config=vision, **{one: getattr(config, one) for one in ids})
    return replace(made, model=type(made.model)(wide))


def llava_with_siglip() -> saved_vlms.Made:
    made, siglip = saved_vlms.llava(), {**small.VIT, "vision_use_head": False, "hidden_act": "gelu_pytorch_tanh"}
    config = saved_vlms.T.LlavaConfig(
        vision_config=saved_vlms.T.SiglipVisionConfig(**siglip),
        text_config=saved_vlms.T.Qwen2Config(**saved_vlms.TEXT),
        vision_feature_select_strategy="full", image_token_index=made.tokenizer.image_token_id,
    )  # fmt: skip
    settings = {**made.settings, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return replace(made, model=saved_vlms.T.LlavaForConditionalGeneration(config), settings=settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models like those of other tests, but with rows that 32 divides."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            for wide, sizes in ((saved_vlms.TEXT, (64, 96)), (small.VIT, (32, 64))):
                patch.setitem(wide, "hidden_size", sizes[0])
                patch.setitem(wide, "intermediate_size", sizes[1])
                patch.setitem(wide, "num_hidden_layers", 2)
            patch.setitem(saved_vlms.TEXT, "head_dim", 32)
            if name in QWEN or name == "llava_with_siglip":
                made = wide_qwen(name) if name in QWEN else llava_with_siglip()
                patch.setitem(saved_vlms.BUILDERS, name, lambda: made)
            return saved_vlms.save(name, tmp_path_factory.mktemp("models") / name)

    def once(name: str) -> Path:
        if name not in folders:
            folders[name] = make(name)
        return folders[name]

    return once


MIXED = {"vision": rtn(4, 32), "connector": rtn(8), "language": rtn(4, 32)}
FAMILIES = ("llava", "llava_with_siglip", "smolvlm", "idefics3", *QWEN)


def exported(source: Path, out: Path, schemes: dict[str, Scheme | None]) -> tuple[ComponentMap, Any]:
    """An export, and beside it a checkpoint with the same numbers, which transformers loads."""
    parts = inspect(str(source), by="part")
    plan = Plan.of(parts, {name: schemes.get(name) for name in parts.names})
    for format in ("gguf", "fake"):
        facts = write(Job(str(source), parts, plan, dtype=torch.float32), out / format, format)
        if format == "gguf":
            written = facts
    return parts, written


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_read_back_as_it_is_measured(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    parts, facts = exported(saved(name), tmp_path, MIXED)
    vlm = load(str(tmp_path / "fake"), dtype="float32")
    found = {
        one.name: numbers(torch.from_numpy(np.array(one.data)), one.tensor_type.name, tuple(one.shape[::-1].tolist()))
        for file in exporter.FILES.values()
        for one in gguf.GGUFReader(tmp_path / "gguf" / file).tensors
    }
    for parameter, values in vlm.model.named_parameters():
        _, places = placed(vlm.model.config, parameter, tuple(values.shape))
        for place in places:
            assert torch.equal(found.pop(place.name), place.of(values.detach())), parameter
    assert not found
    assert facts["written"]["bytes"] == facts["predicted_size"]["bytes"]
    assert facts["written"]["headers"] <= header_bytes(parts, "gguf")
    rows = re.findall(r"\| ([\d,]+) \| ([\d,]+) \|$", (tmp_path / "gguf" / "README.md").read_text(), re.M)
    for column in zip(*rows, strict=True):  # of what each component is predicted to weigh, and weighs
        assert sum(int(cell.replace(",", "")) for cell in column) == facts["written"]["bytes"]
    files = [tmp_path / "gguf" / file for file in exporter.FILES.values()]
    assert sum(f.stat().st_size for f in files) == facts["written"]["bytes"] + facts["written"]["headers"]


def test_what_is_left_out_is_not_predicted_before_an_export_either(tmp_path: Path) -> None:
    """LLaVA never reads the norm behind its tower."""
    parts = inspect("embedded:scenes-llava", by="part")
    plan = Plan.uniform(parts, rtn(4, 32))
    study = Study.create(tmp_path / "study", parts, ["vqa"], {"model": "embedded:scenes-llava"})
    exporting.export(study, plan, tmp_path / "gguf", "gguf", note=False)
    facts = json.loads((tmp_path / "gguf" / "sensitivity.json").read_text())
    assert "post_layernorm" in (tmp_path / "gguf" / "README.md").read_text()
    assert size(parts, plan, "gguf").bytes == facts["predicted_size"]["bytes"] == facts["written"]["bytes"]


@pytest.mark.parametrize("name", ["llava", "llava_with_siglip"])
def test_blocks_that_are_never_read_are_not_predicted_before_an_export(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Those behind the layer whose output the projector takes; a budget counts what a file holds."""
    parts, facts = exported(saved(name), tmp_path, MIXED)
    plan = Plan.of(parts, MIXED)
    assert any("layers.1." in one for one in parts.unread)
    assert not any("layers.0." in one for one in parts.unread)
    assert size(parts, plan, "gguf").bytes == facts["predicted_size"]["bytes"] == facts["written"]["bytes"]
    assert size(parts, plan).bytes > size(ComponentMap.from_json(parts.to_json()), plan, "gguf").bytes
    # a study of an earlier version, which did not know of them, is continued
    about = (["vqa"], {"model": "x"})
    Study.create(tmp_path / "study", replace(parts, unread=()), *about)
    assert Study.create(tmp_path / "study", parts, *about).parts.unread == ()


def test_a_tensor_that_was_swapped_is_told(saved: Callable[[str], Path], tmp_path: Path) -> None:
    exported(saved("smolvlm"), tmp_path, MIXED)
    check_arrived(tmp_path / "gguf")
    file = tmp_path / "gguf" / exporter.FILES["language"]
    content = file.read_bytes()
    for old, new in ((0, 9), (1, 0), (9, 1)):
        content = content.replace(b"blk.%d.ffn_up" % old, b"blk.%d.ffn_up" % new)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"does not hold blk\.[01]\.ffn_up\.weight"):
        check_arrived(tmp_path / "gguf")


def test_a_tensor_that_nobody_wrote_is_told(saved: Callable[[str], Path], tmp_path: Path) -> None:
    exported(saved("smolvlm"), tmp_path, MIXED)
    file = tmp_path / "gguf" / exporter.STORED
    stored = json.loads(file.read_text())
    del stored[exporter.FILES["language"]]["output_norm.weight"]
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"does not hold output_norm\.weight as written"):
        check_arrived(tmp_path / "gguf")


# -- what is refused


def test_a_parameter_without_a_name_is_refused_before_the_sweep(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(saved("smolvlm"))
    monkeypatch.delitem(TEXT_BLOCK, "mlp.up_proj")
    with pytest.raises(UserError, match=r"llama\.cpp has no name for model\.text_model\.layers\.0\.mlp\.up_proj"):
        exporter.check(source)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen2_5_vl", "has windows of 16 pixels, which llama.cpp does not compute"),
        ("blip2_opt", "types llava, idefics3, smolvlm, qwen2_vl, .* is of type blip-2 with opt"),
    ],
)
def test_a_model_that_it_cannot_hold_is_refused_before_the_sweep(name: str, says: str, tmp_path: Path) -> None:
    folder = saved_vlms.save(name, tmp_path / name)
    with pytest.raises(UserError, match=says):
        exporter.check(str(folder))
    typed = ["sweep", str(folder), "--task", "vqa", "--runtime", "gguf", "--bits", "4", "--method", "rtn"]
    assert cli.main([*typed, "--group", "32", "--out", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vision_feature_layer": [-2, -1]}, "features of several vision layers"),
        ({"vision_feature_select_strategy": "full"}, "features selected as full of clip_vision_model"),
        ({"projector_hidden_act": "relu"}, "relu in its projector"),
        ({"text_config.hidden_act": "gelu"}, "hidden_act gelu in its language model"),
        ({"vision_config.hidden_act": "relu"}, "hidden_act relu in its vision tower"),
        ({"text_config.attention_bias": True}, "biases in its language model"),
        ({"text_config.rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn rotary"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    changes: dict[str, Any], says: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved("llava").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        within, _, name = path.rpartition(".")
        (config[within] if within else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        exporter.check(str(folder))


@pytest.mark.parametrize("verb", ["sweep", "plan"])
def test_without_the_package_a_sentence_says_what_to_install(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    typed = [verb, "embedded:scenes-llava", "--task", "vqa", "--runtime", "gguf", "--bits", "4", "--group", "32"]
    assert cli.main([*typed, "--method", "rtn", "--out", str(tmp_path / "r")]) == 2
    assert "pip install 'vlm-sensitivity[gguf]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# -- what it computes


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    pytest.importorskip("xllamacpp", reason="needs xllamacpp of the extra `gguf` (34 MB), which CI does not install")
    return importlib.import_module("sensitivity.formats.gguf.model")


def inputs(vlm: VLM) -> dict[str, Tensor]:
    """An example with its image, as tensors."""
    asked = task("vqa", n=40, seed=0)
    (batch,) = batches_by_image(vlm, replace(asked, examples=asked.examples[:1]), plain=True)
    return batch.inputs


@torch.inference_mode()
def expected(vlm: VLM, given: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The image features and logits of transformers."""
    of_image = {name: given[name] for name in given if name.startswith(("pixel", "image"))}
    found = vlm.model.get_image_features(**of_image, return_dict=True).pooler_output
    features = found if isinstance(found, Tensor) else torch.cat(list(found))
    return features.reshape(-1, features.shape[-1]).numpy(), vlm.model(**given).logits[0].numpy()


@pytest.mark.parametrize("name", ["llava", "llava_with_siglip", "smolvlm", *QWEN])
def test_full_precision_computes_as_torch_does(
    llama_cpp: Any, name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    exported(saved(name), tmp_path, {})
    vlm, model = load(str(tmp_path / "fake"), dtype="float32"), llama_cpp.GGUFModel(tmp_path / "gguf", 1)
    given = inputs(vlm)
    features, logits = expected(vlm, given)
    ids = given["input_ids"][0].tolist()
    read = model.image_features(**model.image_inputs(given))
    np.testing.assert_allclose(model.logits(ids, len(ids), features), logits, rtol=0, atol=2e-6)
    if name == "llava":  # the defect that the export names
        assert np.abs(read - features).max() > 0.05 * np.abs(features).max()
    else:  # llama.cpp's GELU is a table of 16 bits
        np.testing.assert_allclose(read, features, rtol=0, atol=1e-3 * np.abs(features).max())


def test_positions_of_an_image_in_space_matter(llama_cpp: Any, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The test above can fail: with positions one after the other, numbers differ by more than it allows."""
    exported(saved("qwen2_vl"), tmp_path, {})
    vlm, model = load(str(tmp_path / "fake"), dtype="float32"), llama_cpp.GGUFModel(tmp_path / "gguf", 1)
    given = inputs(vlm)
    features, logits = expected(vlm, given)
    ids = given["input_ids"][0].tolist()
    model.image_features(**model.image_inputs(given))
    model.grids = [(1, rows * cols) for rows, cols in model.grids]
    assert np.abs(model.logits(ids, len(ids), features) - logits).max() > 1e-5


def to_8_bits(inputs: Tensor) -> Tensor:
    """The inputs of a layer as llama.cpp rounds them, in its type Q8_0."""
    groups = inputs.reshape(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, (groups / scale).round(), 0)
    return (codes * scale.half().float()).reshape(inputs.shape)


@pytest.mark.parametrize("language", [rtn(2, 32), rtn(4, 32), rtn(3, 32, False)], ids=str)
def test_the_packed_codes_compute_as_torch_does_with_inputs_of_8_bits(
    llama_cpp: Any, language: Scheme, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """All that differs from what was measured is that llama.cpp rounds what a layer reads."""
    exported(saved("llava"), tmp_path, {"language": language})
    vlm, model = load(str(tmp_path / "fake"), dtype="float32"), llama_cpp.GGUFModel(tmp_path / "gguf", 1)
    ids = list(range(10, 40))
    found = model.logits(ids, len(ids))
    with torch.inference_mode():
        measured = vlm.model(input_ids=torch.tensor([ids])).logits[0].numpy()
        for name, layer in vlm.model.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                layer.register_forward_pre_hook(lambda _, given: (to_8_bits(given[0]),))
        rounded = vlm.model(input_ids=torch.tensor([ids])).logits[0].numpy()
    far = np.abs(found - measured).max()
    assert np.median(np.abs(found - rounded)) < 1e-3 * far  # a few inputs lie between two codes, and go elsewhere
    assert 0 < far < 0.05 * np.abs(measured).max()


def test_llama_cpp_holds_every_tensor_as_written(llama_cpp: Any, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """What llama.cpp writes of the model that it has loaded."""
    exported(saved("smolvlm"), tmp_path, MIXED)
    lib, language = llama_cpp.xllamacpp_library(), str(tmp_path / "gguf" / exporter.FILES["language"])
    params = lib.llama_model_default_params()
    params.use_extra_bufts = False  # with it, codes may be laid out anew, so that llama.cpp computes faster
    model = lib.llama_model_load_from_file(language.encode(), params)
    assert model
    lib.llama_model_save_to_file(model, str(tmp_path / "again.gguf").encode())
    lib.llama_model_free(model)
    again, ours = (
        {one.name: one.data.tobytes() for one in gguf.GGUFReader(file).tensors}
        for file in (tmp_path / "again.gguf", tmp_path / "gguf" / exporter.FILES["language"])
    )
    assert again == ours


def test_the_patches_of_a_clip_tower_are_right_where_positions_are(
    llama_cpp: Any, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """With rows of positions in the order of the defect, all features but the first, which it drops, are right."""
    exported(saved("llava"), tmp_path, {})
    file = tmp_path / "gguf" / exporter.FILES["vision"]
    (table,) = (one for one in gguf.GGUFReader(file).tensors if one.name == "v.position_embd.weight")
    content = bytearray(file.read_bytes())
    rolled = np.roll(np.array(table.data), -1, axis=0).tobytes()
    content[table.data_offset : table.data_offset + len(rolled)] = rolled
    file.write_bytes(content)
    vlm, model = load(str(tmp_path / "fake"), dtype="float32"), llama_cpp.GGUFModel(tmp_path / "gguf", 1)
    given = inputs(vlm)
    features, _ = expected(vlm, given)
    read = model.image_features(**model.image_inputs(given))
    np.testing.assert_allclose(read[:-1], features[1:], rtol=0, atol=1e-3 * np.abs(features).max())


def test_a_cache_that_cannot_grow_is_freed_once() -> None:
    """Freeing it again when the model is deleted would end the process."""
    freed: list[int] = []
    refuses = {"llama_context_default_params": SimpleNamespace, "llama_init_from_model": lambda *_: None}
    model = GGUFModel.__new__(GGUFModel)
    model.lib = cast(Any, SimpleNamespace(llama_free=freed.append, **refuses))
    model.folder, model.threads, model.language = Path("out"), 0, 0
    model.context, model.read, model.room, model.ahead = 7, 0, 1024, 256
    with pytest.raises(UserError, match="cannot open"):
        model._make_room(2000)
    model.__del__()
    assert freed == [7]


# -- the whole way


CHANGES = {"vision": rtn(2), "connector": rtn(5), "language": rtn(2, 32)}  # such a plan changes answers


@pytest.fixture(scope="module")
def study(scenes_llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> Study:
    parts = inspect(scenes_llava, by="part")
    return sweep(scenes_llava, parts, [Plan.of(parts, CHANGES)], ["vqa"], tmp_path_factory.mktemp("runs") / "one", n=40)


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporting.export(study, Plan.of(study.parts, CHANGES), tmp_path_factory.mktemp("out") / "g", "gguf")


def test_the_packed_codes_answer_as_torch_does(llama_cpp: Any, study: Study, folder: Path) -> None:
    found: Any = verify(folder)
    mine, native = (study.examples(plan) for plan in (Plan.of(study.parts, CHANGES), study.native))
    assert mine is not None
    assert native is not None
    moved = (mine["nll"] - native["nll"]).abs().max()
    assert moved > 1  # a plan that changes nothing proves nothing
    assert found["examples"] == 40
    assert found["largest_nll_difference"] < moved / 50  # inputs are rounded to 8 bits
    assert found["answers_that_differ"] <= 6
    assert "the image half was computed in transformers" in found["words"]


def test_the_lines_of_the_card_answer(llama_cpp: Any, study: Study, folder: Path, scenes_llava: VLM) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    example = task("vqa", n=40, seed=0).examples[0]
    space = {"FOLDER": str(folder), "image": open_image(example.image), "prompt": prompt_text(scenes_llava, example)}
    assert lines is not None
    exec(lines[1], space)
    given = space["processor"].decode(space["tokens"], skip_special_tokens=True)
    measured = study.examples(Plan.of(study.parts, CHANGES))
    assert measured is not None
    expected = measured.set_index("example").loc[example.id, "answer"]
    assert given.strip().startswith(expected.rstrip("…").strip())
    assert "ggml-org/llama.cpp#25814" in card
    assert "Left out, since the model never reads them: model.vision_tower." in card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
def test_images_and_language_run_in_llama_cpp(
    llama_cpp: Any, name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Random weights have no answers that are sure of themselves, so that inputs of 8 bits change some of them."""
    source = str(saved(name))
    parts = inspect(source, by="part")
    plan = Plan.of(parts, {"vision": rtn(4, 32), "language": rtn(8, 32)})
    study = sweep(load(source, dtype="float32"), parts, [plan], ["vqa"], tmp_path / "run", n=20)
    out = exporting.export(study, plan, tmp_path / "out", "gguf")
    found: Any = verify(out)
    assert found["examples"] == 20
    assert found["answers_that_differ"] <= 6
    assert found["largest_nll_difference"] < 0.05
    assert "in transformers" not in found["words"]


@pytest.mark.slow
def test_bench_finds_packed_codes_in_memory(llama_cpp: Any, folder: Path) -> None:
    found = bench(folder, n=6, threads=1)
    assert found["versions"]["xllamacpp"]
    ours, full = found["export"]["memory"], found["full_precision"]["memory"]
    assert ours
    assert full
    assert full["peak"] - ours["peak"] > 2_000_000
