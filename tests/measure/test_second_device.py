"""Every path that moves tensors, on a device that is not the host's: a forgotten .to(device) fails here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch
from few import few
from PIL import Image
from second_device import HERE, THERE, SecondDevice, where

from sensitivity.api.sweeping import with_calibration
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.measure.calibrate.calibration import calibration_statistics
from sensitivity.measure.gradients.token_importance import IMPORTANCE, TokenNumbers
from sensitivity.measure.loop import _SharedWork
from sensitivity.measure.passes.token_batches import ANSWER, PROMPT, VISION
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.methods import METHODS
from sensitivity.quantize.presets import PRESETS
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.plan import Plan
from sensitivity.tasks.table import task

pytestmark = [
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
SOME = (
    ("rtn", 3, {}),
    ("gptq", 3, {}),
    ("awq", 4, {"group": 8}),
    ("clip", 3, {}),
    ("nf4", 4, {}),
    ("llm-int8", 8, {}),
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two questions to each of three pictures, one of them for calibration."""
    folder = tmp_path_factory.mktemp("asked")
    draw, lines = np.random.default_rng(0), []
    for number in range(3):
        Image.fromarray(draw.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        for prompt in ("where is the 3?", "how many digits are there?"):
            line = {"image": f"{number}.png", "prompt": prompt, "answers": ["top left"]}
            lines.append(line | {"split": "evaluation" if number < 2 else "calibration"})
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "asked.jsonl")


def rows(
    folder: Path,
    source: str,
    device: str,
    path: str,
    plain: bool,
    methods: Sequence[Any],
    words: bool,
    gpu: bool = False,
) -> list[Any]:
    """Answers and likelihoods of one plan for each method, all on one device; `gpu`: what is called cuda is one."""
    with SecondDevice() if device == "cuda" and not gpu else nullcontext():
        vlm = load(str(folder), device=device, dtype="float32")
        assert gpu or {where(p) for p in vlm.model.parameters()} == {THERE if device == "cuda" else HERE}
        parts = inspect(vlm, "part", ("embedding", "head") if words else ())
        examples = task(source, n=4)
        cache = Cache(folder.parent / f"cache-{device}")  # written, then read by the second round
        for _ in range(1 if plain else 2):
            statistics = calibration_statistics(
                vlm, parts, [source], 2, path=path, against=[examples], cache=cache, gram_bytes=2000
            )
            facts = statistics.facts
            plans = [Plan.uniform(parts, scheme(name, bits, calibration=facts, **more)) for name, bits, more in methods]
            trial = _SharedWork(vlm, parts, [examples], plain, statistics)
            trial.prepare(plans)
            found = [trial.run(plan, 0, trial.ends[-1]) for plan in [Plan.uniform(parts, None), *plans]]
    return found


def alike(there: list[Any], here: list[Any]) -> None:
    """The second device computes what the host does: equal to the last bit, on one thread."""
    assert len(there) == len(here) > 1
    for one, other in zip(there, here, strict=True):
        assert one["example"] == other["example"]
        np.testing.assert_array_equal(np.array(one["nll"], float), np.array(other["nll"], float))


FAMILIES = ("llava", "qwen2_vl", "smolvlm", "blip2_opt", "blip2_t5", "gemma3")
CASES = [f"{name} {path}" for name in FAMILIES for path in ("float", "exposed")]


@pytest.mark.parametrize("case", few(CASES, ["llava float", "llava exposed"]))
def test_a_second_device_gives_the_same_answers(case: str, asked: str, tmp_path: Path) -> None:
    name, path = case.split()
    folder = saved_vlms.save(name, tmp_path / "model")
    plain = path == "exposed"
    methods = SOME if path == "float" else SOME[:2]
    there, here = (rows(folder, asked, device, path, plain, methods, words=True) for device in ("cuda", "cpu"))
    alike(there, here)


EVERY = [*METHODS, *PRESETS]


@pytest.mark.parametrize("method", few(EVERY, ["salq-vlm", "gwq", "repq-vit", "wkv", "qsvd"]))
def test_every_method_takes_what_it_needs_from_its_own_device(method: str, asked: str, tmp_path: Path) -> None:
    folder, found = saved_vlms.save("llava", tmp_path / "model"), []
    widths = METHODS[str(PRESETS.get(method, {"method": method})["method"])].widths
    chosen = scheme(method, min(widths, key=lambda width: abs(width - 3)))
    for device in ("cuda", "cpu"):
        with SecondDevice() if device == "cuda" else nullcontext():
            vlm, examples = load(str(folder), device=device, dtype="float32"), task(asked, n=4)
            parts = inspect(vlm, "part")
            (one,), statistics = with_calibration(vlm, parts, [chosen], [asked], 2, against=[examples], cache_gb=0)
            trial = _SharedWork(vlm, parts, [examples], False, statistics)
            found.append([trial.run(Plan.uniform(parts, one), 0, trial.ends[-1])] * 2)
    alike(*found)


@pytest.mark.parametrize("kind", IMPORTANCE)
def test_weights_of_tokens_are_computed_where_the_tokens_are(kind: str) -> None:
    draws = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for mode in (SecondDevice(), nullcontext()):
        with mode:
            device = "cuda" if isinstance(mode, SecondDevice) else "cpu"
            numbers = {(str(row), "layer"): values.to(device) for row, values in enumerate(draws)}
            modality = torch.tensor([VISION] * 4 + [PROMPT] * 2 + [ANSWER] * 2).to(device)
            found.append(IMPORTANCE[kind][1](TokenNumbers(numbers, dict.fromkeys(numbers, modality))))
    there, here = found
    for key, weights in there.items():
        assert where(weights) == THERE
        np.testing.assert_array_equal(weights.cpu().numpy(), here[key].numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_nearly_the_same_answers(case: str, asked: str, tmp_path: Path) -> None:
    """A sum in another order may round a weight to the neighbor of its code, no more."""
    name, path = case.split()
    folder = saved_vlms.save(name, tmp_path / "model")
    methods = SOME if path == "float" else SOME[:2]
    there = rows(folder, asked, "cuda", path, path == "exposed", methods, words=True, gpu=True)
    here = rows(folder, asked, "cpu", path, path == "exposed", methods, words=True)
    assert len(there) == len(here) > 1
    for one, other in zip(there, here, strict=True):
        np.testing.assert_allclose(np.array(one["nll"], float), np.array(other["nll"], float), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_retrieval_on_a_second_device(tmp_path: Path) -> None:
    folder = saved_vlms.save("blip2_itm", tmp_path / "model")
    there, here = (rows(folder, "retrieval", d, "float", False, SOME[:2], words=False) for d in ("cuda", "cpu"))
    alike(there, here)


def test_float32_is_float32_in_convolutions_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    folder = saved_vlms.save("llava", tmp_path / "model")
    with SecondDevice():
        load(str(folder), device="cuda", dtype="float32")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_what_is_mixed_is_an_error() -> None:
    with SecondDevice():
        here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
        assert (there.device, (there @ there).device, there.cpu().device, here.to(there).device) == (
            THERE,
            THERE,
            HERE,
            THERE,
        )
        assert torch.equal(there + torch.tensor(1.0), there + 1)
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: torch.nn.functional.linear(there, here),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
