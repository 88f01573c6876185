"""Every kind of page that the package writes, each with everything in it that it can show."""

from __future__ import annotations

import json
from pathlib import Path

import answered
import numpy as np
import planted
from answered import FOUR, NATIVE, TWO
from PIL import Image

from sensitivity.analysis.allocate.budget import solve
from sensitivity.analysis.comparing.sides import side
from sensitivity.analysis.comparing.versus import compare_sides
from sensitivity.analysis.failures.gallery import galleries
from sensitivity.analysis.recommending.judging import judge, unmeasured
from sensitivity.analysis.recommending.recommendation import Recommendation
from sensitivity.analysis.reporting import comparison_page, failures_page
from sensitivity.analysis.reporting.page import report
from sensitivity.spec.plan import Plan
from sensitivity.spec.runtimes.layer_times import LayerTimes
from sensitivity.study import exports
from sensitivity.study.storage import layer_times
from sensitivity.study.study import Study
from sensitivity.tasks.examples.types import Example
from sensitivity.tasks.table import task

# a page by its name -> the template that it is made of
TEMPLATES = {
    "report": "report.html",
    "failures": "failures.html",
    "two plans": "comparison.html",
    "two studies": "comparison.html",
}
LONG = "Supercalifragilistic" * 8  # a word wider than a phone


def given(plan: Plan, example: Example) -> str:
    """The fewer bits, the more answers are wrong, as if by a planted law."""
    if plan.is_native:
        return example.answers[0]
    share = planted.product(np.array([list(plan.bits().values())], dtype=float))[0]
    return example.answers[0] if int(example.id.split("-")[2]) % 20 < 20 * share else f"wrong{LONG}"


def pages(folder: Path) -> dict[str, Path]:
    """The pages by their names, written as the verbs write them."""
    first, second = (study(folder / name, n) for name, n in (("a", 40), ("b", 30)))
    made = {name: folder / f"{name}.html" for name in TEMPLATES if name != "report"}
    failures_page.write(made["failures"], "planted", galleries(first, [("What breaks first", TWO)], 60))
    for name, keys in (("two plans", (f":{FOUR.key[:8]}", f":{TWO.key[:8]}")), ("two studies", ("", ""))):
        a, b = (side(f"{of.path}{key}") for of, key in zip((first, second), keys, strict=True))
        comparison_page.write(made[name], a, b, compare_sides(a, b))
    return {"report": report(first, first.path / "report", recommended(first), bootstraps=2), **made}


def study(path: Path, n: int) -> Study:
    """Two tasks, with boxes, a kind and words of any length, times of a runtime, an export, and explanations."""
    sources = ["ground", own(path.with_name(f"own-{path.name}"))]
    plans = [NATIVE, FOUR, *(planted.plan(planted.PARTS, row) for row in planted.grid((2, 16))[:-1])]
    made = answered.study(path, [task(name, n=n) for name in sources], given, sources, n=n, plans=plans)
    times(made)
    for name, split in (("ground", "evaluation"), ("vqa", "calibration")):
        answered.explain(made, TWO, name == "ground", [one.id for one in task(name, split, n=n).examples])
    exports.write_note(path, path / "export", {
        "format": "fake", "plan": TWO.describe(), "bpw": 2.5, "bytes": 1000, "written": True,
        "path_gain": {"path": "exposed", "ground": {"mean": 0.1, "low": 0.0, "high": 0.2, "n": n}},
    })  # fmt: skip
    return made


def own(folder: Path) -> str:
    """Questions of a user about photographs, with words that are wider than a phone."""
    folder.mkdir()
    lines = []
    for number in range(20):
        noise = np.random.default_rng(number).integers(0, 255, (40, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((800, 160)).save(folder / f"{number}.jpg")
        words = {"prompt": LONG, "answers": [f"right{LONG}"], "kind": ("short", f"kind{LONG}")[number % 2]}
        lines.append({"image": f"{number}.jpg", "split": "evaluation", "id": f"x-0-{number}", **words})
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "own.jsonl")


def times(made: Study) -> None:
    """Times of a planted runtime, in which narrower layers are faster."""
    parts = made.parts
    layouts = {"native": 9.0, "symmetric 4 row": 3.0, "symmetric 2 row": 2.0}
    at_once = {weight.name: 16 for weight in parts.weights if weight.part != "language"}
    layers = {
        (1, weight.cols, layout, tokens): ms
        for weight in parts.weights
        for layout, ms in layouts.items()
        for tokens in ((30, 1) if weight.part == "language" else (16,))
    }
    memory = {(half, layout): -1.5 for half in ("image", "language") for layout in layouts if layout != "native"}
    tokens, rest = {"image": 16, "prompt": 30, "answer": 5}, {"image": 2.0, "prompt": 3.0, "token": 0.25}
    machine = {"processor": "one", "instructions": ["avx2"]}
    layer_times.save(
        made.path,
        LayerTimes("openvino", machine, 1, {"openvino": "1"}, "ground", at_once, tokens, rest, 5e4, memory, layers),
    )


def recommended(made: Study) -> list[Recommendation]:
    """The recommendation for one budget with a runner-up and the best uniform plan, and for another without."""
    candidates = solve(made, bpw=6.0, top=2)
    frames = {trial.key: rows for trial in made.trials() if (rows := made.examples(trial.plan)) is not None}
    rival = next(one for one in solve(made, bpw=6.0, top=9) if one.plan.is_uniform or one is not candidates[0])
    return [judge(made, candidates, rival, frames), unmeasured(made, solve(made, bpw=4.0))]
