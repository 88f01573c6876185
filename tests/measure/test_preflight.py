"""The preflight: no weights are read, what it counts is what happens, and what it says is near what is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.small import datasets, models
from sensitivity.api.sweeping import grid, one_at_a_time, sweep
from sensitivity.cli.main import main
from sensitivity.measure.forecast.cost_model import COLD_CACHE_FACTOR, CostModel, TaskSample
from sensitivity.measure.forecast.forecast import Forecast, _running, _runs, _stored, forecast_sweep
from sensitivity.measure.forecast.hardware import Hardware
from sensitivity.measure.forecast.rounding import rounding_seconds
from sensitivity.measure.generate import shared_images
from sensitivity.measure.generate.batches import batches_by_image
from sensitivity.measure.install import rounding
from sensitivity.measure.loop import _SharedWork, data_flow_order
from sensitivity.measure.shards import shard_ends
from sensitivity.models.config_only import without_weights
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.models.vlm import VLM
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.spec.components import PARTS
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan
from sensitivity.study import identity
from sensitivity.study.storage import paths
from sensitivity.study.storage.opening import close, open_storage
from sensitivity.study.study import Study
from sensitivity.tasks.table import task


class Counting(Hardware):
    """Counts the floating-point operations of products, as if nothing else took any time."""

    call = 0.0  # type: ignore[assignment]

    def matmul(self, tokens: int, rows: int, cols: int) -> float:
        return 2.0 * tokens * rows * cols

    def attention(self, *_: int) -> float:
        return 0.0

    def elementwise(self, numbers: int) -> float:
        return 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("preflight")
    for name in ("llava", "blip2", "geochat"):
        models.save(name, made / name)
    datasets.gqa(made / "gqa")
    return made


@pytest.mark.parametrize("name", ["llava", "blip2", "geochat"])
def test_products_are_counted_as_a_forward_pass_really_has_them(folder: Path, name: str) -> None:
    asked = task(f"gqa:{folder / 'gqa'}", n=12)
    vlm = load(str(folder / name), dtype="float32")
    empty = without_weights(str(folder / name))
    parts = inspect(empty, by="part")
    counted = CostModel(empty, parts, Counting(torch.device("cpu"), torch.float32))
    once = dataclasses.replace(asked, exact=True, max_new_tokens=1)  # no second reading of wrong answers
    sample = TaskSample.of(empty, once, [12], plain=False)
    products, images = 0, set()
    for number, batch in enumerate(batches_by_image(vlm, asked)):  # large images come in several
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            if batch.prefix:
                layers, positions = shared_images.prefill_images(vlm, batch)
                image = [layer for layer in layers if layer is not None]
                assert len(image) == len(layers)
                images |= {(number, index) for index in range(image[0][0].shape[0])}
                assert len({keys.shape[0] for keys, _ in image}) == 1
                shared_images.drafted_answers(vlm, once, batch, image, positions, None, nullcontext)
            else:
                longer = torch.cat([batch.inputs["input_ids"], torch.tensor(batch.targets)], 1)
                mask = torch.ones_like(longer)
                vlm.model(pixel_values=batch.inputs["pixel_values"], input_ids=longer, attention_mask=mask)
        products += sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert not images or len(images) == sample.images
    expected = sum(shared + own for shared, own in counted.passes(sample).values())
    assert expected == pytest.approx(products * COLD_CACHE_FACTOR, rel=0.15)


@pytest.mark.parametrize("name", ["llava", "blip2", "geochat"])
def test_plans_are_counted_as_replay_really_computes_them(folder: Path, name: str) -> None:
    """All products of a sweep whose plans share beginnings in every part; without sharing there would be far more."""
    asked = dataclasses.replace(task(f"gqa:{folder / 'gqa'}", n=12), exact=True, max_new_tokens=1)
    vlm = load(str(folder / name), dtype="float32")
    parts = inspect(vlm, by="group")
    plans = sorted(one_at_a_time(parts, bits=(8,)), key=data_flow_order)
    trial = _SharedWork(vlm, parts, [asked], growing=False)
    # a feature layer that is not the last spoils one boundary of the vision tower, and no other
    assert trial.prefix_cache
    assert trial.prefix_cache.stages["language"].boundaries == [1, 2]
    assert trial.prefix_cache.stages["vision"].boundaries[:2] == [1, 2]
    with FlopCounterMode(display=False) as counter:
        for plan in plans:
            trial.run(plan, 0, 12)
    products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    counted = CostModel(vlm, parts, Counting(torch.device("cpu"), torch.float32))
    sample = TaskSample.of(vlm, asked, [12], plain=False)
    passes = counted.passes(sample)
    expected = _running(sample, passes, _runs(parts, plans), len(plans)) / COLD_CACHE_FACTOR
    alone = _running(sample, passes, dict.fromkeys(PARTS, len(plans)), len(plans)) / COLD_CACHE_FACTOR
    assert expected == pytest.approx(products, rel=0.06)
    assert alone > 1.07 * products
    assert counted.prefix_cache_bytes(sample) == pytest.approx(trial.prefix_cache._bytes, rel=0.3)


def test_runs_are_counted_as_plans_share_their_beginnings(folder: Path) -> None:
    parts = inspect(str(folder / "llava"), by="part")
    plans = grid(parts, bits=(3, 8))  # full precision and 2 x 2 x 2
    assert _runs(parts, plans) == {"vision": 3, "connector": 5, "language": 9}
    alone = one_at_a_time(parts, bits=(3,))  # full precision, all at 3, and each part alone
    assert _runs(parts, alone) == {"vision": 2, "connector": 4, "language": 5}
    assert _runs(parts, [Plan.uniform(parts, None)]) == {"vision": 1, "connector": 1, "language": 1}


@pytest.mark.usefixtures("briefly_timed")
def test_no_weights_are_needed(tmp_path: Path, folder: Path) -> None:
    models.save("llava", tmp_path / "llava")
    (tmp_path / "llava" / "model.safetensors").unlink()
    vlm = without_weights(str(tmp_path / "llava"))
    parts = inspect(vlm, by="part")
    asked = task(f"gqa:{folder / 'gqa'}", n=20)
    plans = grid(parts, bits=(4,), method="gptq")
    found = forecast_sweep(vlm, parts, plans, [asked], calibration=8, dtype="float32")
    assert found.plans == 2
    assert found.examples == found.images == 20
    assert found.host["weights"] == 4 * parts.numel
    assert found.seconds["calibration"] > 0
    assert found.slowest > sum(found.seconds.values())
    assert found.disk["statistics and weights"] >= 4 * sum(
        {w.shares_input or w.name: w.cols**2 for w in parts.weights}.values()
    )
    assert {row[0] for row in found.rows()} == {"time", "disk", "host memory"}


@pytest.mark.usefixtures("briefly_timed")
def test_hidden_states_take_no_more_than_a_sweep_gives_them(scenes_llava: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = inspect(scenes_llava, by="part")
    monkeypatch.setattr("sensitivity.measure.forecast.forecast.room_beside", lambda device, weights: 1000)
    found = forecast_sweep(scenes_llava, parts, grid(parts, bits=(8,)), [task("vqa", n=4)])
    assert found.host["hidden states"] == 1000


def test_files_are_as_large_as_foreseen(scenes_llava: VLM, tmp_path: Path) -> None:
    """Within 30 %, for one task in one shard, and two tasks in several."""
    parts = inspect(scenes_llava, by="part")
    plans = grid(parts, bits=(8,))
    for names, n in ((["vqa"], 10), (["vqa", "caption"], 12)):
        out = tmp_path / str(n)
        sweep(scenes_llava, parts, plans, names, out, n=n)
        tasks = [task(name, n=n) for name in names]
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        assert sum(_stored(parts, tasks, plans, len(shard_ends(tasks))).values()) == pytest.approx(size, rel=0.3)


def test_a_model_that_cannot_read_examples_is_refused(tmp_path: Path) -> None:
    models.save("llava", tmp_path / "llava")
    for file in tmp_path.glob("llava/*process*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has neither processor_config\.json nor preprocessor_config\.json"):
        without_weights(str(tmp_path / "llava"))


def test_the_probe_measures_each_shape_once_and_more_work_takes_longer(scenes_llava: VLM) -> None:
    probe = Hardware(torch.device("cpu"), torch.float32)
    assert probe.matmul(64, 512, 512) < probe.matmul(1024, 512, 512) < probe.matmul(8192, 512, 512)
    assert probe.matmul(8192, 512, 512) == 8 * probe.matmul(1024, 512, 512)
    weight = inspect(scenes_llava, by="part").weights[0]
    assert probe.quantizing(scheme("gptq", 4), weight) > probe.quantizing(scheme("rtn", 4), weight) > 0
    assert probe.flops > 1e8


@pytest.mark.usefixtures("briefly_timed")
def test_the_command_line_says_it_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sweep",
        "embedded:scenes-llava",
        "--task",
        "vqa",
        "--n",
        "20",
        "--out",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    assert main([*words, "--search", "tpe", "--trials", "6", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["plans"] == 6
    assert found["total"]["seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert set(found) > set(Forecast.__dataclass_fields__)
    assert main([*words, "--bits", "4,8", "--allow", "vision=8", "--json", "--executor", "ray"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"] == 5  # connector and language at two widths, full precision
    assert main([*words, "--bits", "4"]) == 0
    assert "host memory" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("briefly_timed")
def test_what_is_measured_already_is_not_forecast_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"sweep embedded:scenes-llava --n 5 --by part --method rtn --out {tmp_path / 'run'}"

    def forecast(more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(f"{line} {more} --dry-run --json".split()) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert main([*line.split(), "--bits", "8", "--json"]) == 0
    partly = forecast("--bits 4,8")
    assert (partly["measured"], partly["plans"]) == (2, 7)  # of 2 x 2 x 2 plans and full precision
    searched = forecast("--bits 4,8 --search tpe --trials 6")
    assert (searched["measured"], searched["plans"]) == (2, 4)
    wholly = forecast("--bits 8")
    assert (wholly["measured"], wholly["plans"]) == (2, 0)
    assert {name for name, seconds in wholly["seconds"].items() if seconds} == {"loading"}
    assert wholly["disk"]["examples"] == 0
    assert main(f"{line} --bits 8 --dry-run".split()) == 0
    assert "2 of 2 plans are measured already; the forecast is of what is left" in capsys.readouterr().out
    assert main(f"{line.replace('--n 5', '--n 6')} --bits 8 --dry-run".split()) == 2
    assert "holds another study (n: there 5, here 6); choose another --out" in capsys.readouterr().err


def test_what_belongs_to_another_study_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"sweep embedded:scenes-llava --by part --method rtn --bits 8 --out {tmp_path / 'run'}"
    assert main(f"{line} --n 5 --json".split()) == 0
    monkeypatch.setattr("sensitivity.models.loading.load", None)  # an error where it is called
    for other, why in (
        ("--n 6", "n: there 5, here 6"),
        ("--n 5 --seed 1", "seed: there 0, here 1"),
        ("--n 5 --task caption", "tasks: there ['vqa'], here ['caption']"),
    ):
        assert main(f"{line} {other}".split()) == 2
        assert f"holds another study ({why}); choose another --out" in capsys.readouterr().err


def test_a_search_on_other_examples_is_refused_before_it_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"embedded:scenes-llava --by part --method rtn --bits 8 --out {tmp_path / 'run'}"
    assert main(f"sweep {line} --n 5 --json".split()) == 0
    monkeypatch.setattr("sensitivity.api.scoring.scored", None)  # an error where it is called
    assert main(f"plan {line} --n 6 --bpw 9".split()) == 2
    assert "holds another study (n: there 5, here 6" in capsys.readouterr().err


@pytest.mark.usefixtures("briefly_timed")
@pytest.mark.parametrize("method", ["rtn", "gptq"])  # with and without calibration
def test_a_study_that_was_killed_before_its_first_trial_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    study = tmp_path / "run"
    study.mkdir()
    storage = open_storage(study / paths.JOURNAL)
    optuna.create_study(study_name=identity.NAME, storage=storage, directions=["maximize", "minimize"])
    close(storage)
    line = f"embedded:scenes-llava --n 5 --by part --method {method} --calibration-n 4 --bits 8 --out {study}"
    line = line if method == "gptq" else line.replace(" --calibration-n 4", "")
    assert main(["rank", str(study)]) == 2
    assert "was interrupted before its first trial; run the sweep again to go on" in capsys.readouterr().err
    assert main(f"sweep {line} --dry-run --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["plans"] == 2
    assert main(f"sweep {line} --json".split()) == 0
    assert len(Study(study).trials()) == 2


class CountingRounded(Counting):
    """Counts the numbers of one kind that are rounded, as if nothing else took any time."""

    def __init__(self, cached: bool) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self.cached = cached

    def rounding(self, tokens: int, width: int, cached: bool = False) -> float:
        return 1.0 * tokens * width * (cached == self.cached)


def test_the_numbers_that_are_rounded_are_those_that_a_sweep_rounds(
    scenes_llava: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, asked = inspect(scenes_llava, by="part"), task("vqa", n=12)
    rounded = scheme("keep", 16, activations=8, cache=4)
    plans = [Plan.of(parts, {name: rounded}) for name in parts.names] + [Plan.uniform(parts, rounded)]
    counted = {"round_inputs": 0, "round_cached": 0}

    def counting(name: str, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def count(x: torch.Tensor, *more: Any) -> torch.Tensor:
            counted[name] += x.numel()
            return own(x, *more)

        return count

    for name in counted:
        monkeypatch.setattr(rounding, name, counting(name, getattr(rounding, name)))
    sweep(scenes_llava, parts, plans, ["vqa"], tmp_path / "study", n=12)
    sample = TaskSample.of(scenes_llava, asked, shard_ends([asked]), plain=False)
    for name, cached in (("round_inputs", False), ("round_cached", True)):
        hardware = CountingRounded(cached)
        assert rounding_seconds(parts, plans, [sample], hardware, plain=False) == pytest.approx(counted[name], rel=0.15)
        assert rounding_seconds(parts, [Plan.uniform(parts, None)], [sample], hardware, plain=False) == 0
