"""On a GPU alone: memory that really runs out, and the kernels of bitsandbytes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sensitivity.api.sweeping import sweep
from sensitivity.measure.evaluation import evaluate
from sensitivity.measure.install.bitsandbytes_modules import with_bitsandbytes
from sensitivity.measure.install.plan_in_model import prepare, quantized
from sensitivity.measure.memory.weight_codes import WeightCodes
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.errors import Notice
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.tasks.table import task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def there() -> VLM:
    return load("embedded:scenes-llava", device="cuda", dtype="float32")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What is allocated now, and 160 MB more."""
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 160e6) / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def scores(vlm: VLM, out: Path) -> list[float]:
    parts = inspect(vlm, by="part")
    plan = Plan.uniform(parts, scheme("rtn", 3))
    frame = sweep(vlm, parts, [plan], ["vqa"], out, n=300).examples(plan)
    assert frame is not None
    return [float(one) for one in frame.set_index("example").sort_index()["score"]]


def test_batches_that_do_not_fit_are_halved(there: VLM, little_memory: None, tmp_path: Path) -> None:
    with pytest.warns(Notice, match="out of memory on cuda.*halved"):
        few = scores(there, tmp_path / "few")
    torch.cuda.set_per_process_memory_fraction(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert few == scores(there, tmp_path / "all")


def test_codes_leave_the_gpu_before_an_example_fails(there: VLM, tmp_path: Path) -> None:
    """What plans share fills the memory: after both are given up, the answers are those of enough memory."""
    parts, asked = inspect(there, by="part"), task("vqa", n=20)
    codes, plan = WeightCodes(beside=there.model), Plan.uniform(parts, scheme("rtn", 3))
    prepare(there.model, parts, [plan], codes)
    assert codes.bytes_there == codes.bytes > 0
    with quantized(there.model, parts, plan, codes):
        before = evaluate(there, asked, plain=True)
    assert codes.release()
    assert codes.bytes_there == 0
    with quantized(there.model, parts, plan, codes):
        assert evaluate(there, asked, plain=True)["nll"] == before["nll"]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_lose_nothing_in_tf32(kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(4000, 1100, generator=draw).to(kind).cuda()
    exact = tokens.double().T @ tokens.double()
    found = {}
    for name, given in (("tf32", tokens), ("float32", tokens.float())):
        curvature = Curvature(1100, "cuda")
        curvature.add(given)
        found[name] = float((curvature.gram - exact).abs().max() / exact.abs().max())
    assert found["tf32"] < max(3 * found["float32"], 1e-5)


@pytest.mark.parametrize(
    "chosen", [scheme("nf4", 4), scheme("fp4", 4), scheme("llm-int8", 8, outliers="call")], ids=str
)
def test_bitsandbytes_computes_what_was_simulated(there: VLM, chosen: Scheme) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
        parts, asked = inspect(there, by="part"), task("vqa", n=200)
        plan = Plan.uniform(parts, chosen)
        with quantized(there.model, parts, plan):
            ours = evaluate(there, asked, plain=True)
        with with_bitsandbytes(there.model, parts, plan):
            theirs = evaluate(there, asked, plain=True)
    off = (torch.tensor(ours["nll"]) - torch.tensor(theirs["nll"])).abs()
    assert float(off.mean()) < 0.02
