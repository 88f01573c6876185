"""Times and memory of an export beside full precision: planted times, planted memory, and every refusal."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_vlms
import torch

from sensitivity.cli import main as cli
from sensitivity.formats.halved.model import HalvedModel
from sensitivity.formats.table import write
from sensitivity.formats.timing import timed_process
from sensitivity.formats.timing.intervals import FEWEST, interval, times, times_faster
from sensitivity.formats.timing.memory import memory_now
from sensitivity.formats.timing.side_by_side import bench
from sensitivity.formats.timing.timed_process import NEW_TOKENS, Asked, Round, TimedModel, TimedStage, answered
from sensitivity.formats.writing.job import Job
from sensitivity.formats.writing.manifest import why_foreign
from sensitivity.models.discovery import inspect
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme

MODEL = "embedded:scenes-llava"
RTN = Scheme("rtn", 4, "row", True)


# -- medians, intervals, ratios


@pytest.mark.parametrize("n", range(FEWEST, 40))
def test_the_median_lies_in_its_interval_with_at_least_95_percent(n: int) -> None:
    found = interval([float(i) for i in range(n)])
    below = int(found["low"])
    assert found["high"] == n - 1 - below
    outside = 2 * sum(math.comb(n, k) for k in range(below + 1)) / 2**n
    assert outside <= 0.05
    tighter = outside + 2 * math.comb(n, below + 1) / 2**n
    assert tighter > 0.05  # no narrower one would do


def test_fewer_rounds_would_give_no_interval() -> None:
    assert 2 / 2 ** (FEWEST - 1) > 0.05


def planted(image: float, prompt: float, new: float) -> Round:
    return Round(TimedStage(image, image / 2, 2), TimedStage(prompt, prompt / 2, 50), TimedStage(new, new / 2, 10), 16)


def test_times_are_per_image_and_token_and_ratios_of_the_same_round() -> None:
    slow, quick = [planted(2 * k, 8 * k, 3 * k) for k in (1, 50, 3)], [planted(k, 2 * k, 3 * k) for k in (1, 50, 3)]
    found = times(slow)
    assert found["ms per image"]["median"] == pytest.approx(1e3 * 6 / 2)
    assert found["CPU ms per prompt token"]["median"] == pytest.approx(1e3 * 12 / 50)
    assert found["tokens per second"]["median"] == pytest.approx(10 / 9)
    ratios = times_faster(quick, slow)  # a round that was slow for both changes no ratio
    assert [ratios[f"ms per {name}"]["low"] for name in ("image", "prompt token", "new token")] == [2, 4, 1]
    assert ratios["ms per image"]["high"] == 2


class Sleeping(HalvedModel):
    """A model that takes known times."""

    def image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None) -> np.ndarray:
        time.sleep(0.05)
        return np.zeros((32, 4))

    def forget(self) -> None:
        self.read = 0

    def logits(self, ids: Sequence[int], keep: int, features: Any = None) -> np.ndarray:
        time.sleep(0.1 if self.read == 0 else 0.02)
        self.read += len(ids)
        return np.eye(1, 8)


def test_the_stages_of_an_answer_are_told_apart() -> None:
    found = answered(Sleeping(), {"input_ids": torch.arange(20)[None], "pixel_values": torch.zeros(2, 3, 4, 4)})
    counts = [one.count for one in (found.image, found.prompt, found.new)]
    assert (counts, found.image_tokens) == ([2, 20, NEW_TOKENS], 16)
    for stage, least in ((found.image, 0.05), (found.prompt, 0.1), (found.new, 0.02 * NEW_TOKENS)):
        assert least <= stage.wall < least + 0.1
        assert stage.cpu < least / 2  # who sleeps computes nothing


# -- memory


def test_anonymous_and_mapped_memory_are_counted_apart(tmp_path: Path) -> None:
    if memory_now() is None:
        pytest.skip("needs Linux")
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(30 << 20))
    program = f"""
import json, mmap, numpy as np
from sensitivity.formats.timing.memory import begin_peak, memory_now, resident
begin_peak(); before, held = memory_now(), resident()
much = np.ones(80 << 20, np.uint8); del much
kept = np.ones(50 << 20, np.uint8)
mapped = np.memmap({str(file)!r}, np.uint8, "r"); mapped.sum()
after = memory_now()
print(json.dumps([after["peak"] - held] + [after[k] - before[k] for k in ("anonymous", "mapped")]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak, anonymous, mapped = json.loads(done.stdout)
    assert anonymous == pytest.approx(50 << 20, rel=0.05)
    assert mapped == pytest.approx(30 << 20, rel=0.05)
    assert peak == pytest.approx(80 << 20, rel=0.05)


def test_a_peak_is_no_less_than_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of libraries that were dropped meanwhile had been counted before."""
    model = object.__new__(timed_process._Timed)
    model.before, model.held = {"peak": 0, "anonymous": 10, "mapped": 0}, 100
    monkeypatch.setattr(timed_process, "memory_now", lambda: {"peak": 125, "anonymous": 40, "mapped": 2})
    assert model.memory() == {"peak": 32, "anonymous": 30, "mapped": 2}


# -- an export in transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts, out = inspect(MODEL, by="part"), tmp_path_factory.mktemp("out") / "fake"
    write(Job(MODEL, parts, Plan.uniform(parts, RTN), {"model": MODEL}, dtype=torch.float32), out, "fake")
    return out


def test_an_export_is_timed_beside_full_precision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(folder), "--task", "vqa", "--n", "6", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "bench.json").read_bytes())
    assert (found["runtime"], found["n"], found["threads"], found["tokens"]["new"]) == (
        "transformers", 6, 1, NEW_TOKENS,
    )  # fmt: skip
    assert found["machine"]["processor"]
    assert {"torch", "transformers", "threads"} <= set(found["versions"])
    for one in (found["export"], found["full_precision"]):
        for name, span in one["times"].items():
            assert span["n"] == 6, name
            assert 0 < span["least"] <= span["low"] <= span["median"] <= span["high"]
        assert one["memory"]["anonymous"] + one["memory"]["mapped"] > 1 << 20  # 1.4 million weights
        assert one["memory"]["peak"] >= one["memory"]["anonymous"]
    assert found["export"]["bytes"] == sum(
        file.stat().st_size for file in folder.rglob("*") if file.name != "bench.json"
    )
    assert why_foreign(folder) == ""  # a later export may replace it


def test_a_process_that_is_killed_is_told_in_a_sentence() -> None:
    program = "import sys; print('{}', flush=True); sys.stdin.readline(); sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as running:  # type: ignore[call-overload]
        timed = TimedModel(running, "a model")
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a model cannot be timed: its process ended \(was it killed"):
            timed.round(0)


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ("os._exit(3)", r"its process ended \(.*\); it wrote last: b \| c \| no kernel$"),
        ('print(\'{"failed": "OSError: 5"}\', flush=True)', r"OSError: 5; it wrote last: b \| c \| no kernel$"),
        ('print(\'{"error": "no such model"}\', flush=True)', "timed: no such model$"),  # a sentence says it all
    ],
)
def test_what_a_failing_process_wrote_last_is_in_the_message(
    ending: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that fails says why on standard error, behind much else."""
    said = "import os; os.write(2, b'a' * 100_000 + b'\\nb\\nc\\n\\nno kernel\\n')"  # more than a pipe holds
    monkeypatch.setattr(timed_process, "PROGRAM", f"print('{{}}', flush=True); input(); input(); {said}; {ending}")
    asked = Asked("a model", MODEL, "openvino", "float32", 1, "vqa", 1, 0)
    with timed_process.timed_model(asked) as timed, pytest.raises(UserError, match=says):
        timed.round(0)


def test_a_process_that_ends_before_it_is_asked_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_process, "PROGRAM", "import sys; sys.exit('no module named openvino')")
    asked = Asked("a model", MODEL, "openvino", "float32", 1, "vqa", 1, 0)
    says = r"a model cannot be timed: its process ended \(.*\); it wrote last: no module named openvino"
    with pytest.raises(UserError, match=says), timed_process.timed_model(asked):
        pass


# -- what is refused, before anything is loaded


def test_what_cannot_be_timed_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    def refused(says: str, where: Path = folder, **how: Any) -> None:
        with pytest.raises(UserError, match=says):
            bench(where, **{"task": "vqa", **how})

    refused("is not an export: it has no sensitivity.json", tmp_path)
    refused("unknown runtime 'opnvino'.*did you mean openvino", runtime="opnvino")
    refused("of the format fake, which transformers runs and not openvino", runtime="openvino")
    refused("at least 6 rounds, not 5", n=5)
    refused("was never measured; name the task", task=None)
    refused("unknown task 'vqaa'", task="vqaa")
    refused("ranks captions", task="retrieval")
    refused("can be run half by half, .* of type internvl", model=str(saved_vlms.save("internvl", tmp_path / "i")))
    config = tmp_path / "plan"
    parts = inspect(MODEL, by="part")
    write(Job(MODEL, parts, Plan.uniform(parts, RTN), {"model": MODEL}), config, "torchao")
    timed = "openvino, onnx, onnx-int8, gguf and transformers"
    refused(f"of the format torchao, which only its own runtime loads; here {timed}", config)


def test_a_damaged_export_is_not_timed(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not as it was written: config\.json has .*; export again"):
        bench(tmp_path, task="vqa")


def test_the_result_is_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    from sensitivity.cli.verbs.timing import bench as verb

    rounds = [planted(1, 2, 0.004)] * 6
    one = {"bytes": 5_000_000, "memory": {"peak": 9, "anonymous": 8_000_000, "mapped": 0}, "times": times(rounds)}
    found: Any = {
        "runtime": "openvino", "n": 6, "threads": 1, "tokens": {"per_image": 16, "prompt": 50, "new": 10},
        "machine": {"processor": "a processor", "instructions": ["avx2"]},
        "export": one, "full_precision": one | {"bytes": None},
        "times_faster": times_faster(rounds, rounds),
    }  # fmt: skip
    verb.show(found)
    out = capsys.readouterr().out
    assert "16 tokens per image, 50 per prompt, 10 new ones" in out
    assert "memory, anonymous" in out and "8.00 MB" in out  # noqa: PT018
    assert "openvino, 1 thread, 6 rounds" in out
    assert "2,500 (2,500 to 2,500)" in out  # tokens per second
    assert "1 (1 to 1)" in out
    assert "a processor (avx2)" in out
