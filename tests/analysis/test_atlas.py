"""The atlas: planted models, each left out and predicted from the others; and files that are none."""

from __future__ import annotations

import errno
import json
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import planted
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from few import few

from sensitivity import UserError, add_to_atlas, predict_frontier
from sensitivity.analysis.atlas import atlas_file, predicted_frontier
from sensitivity.analysis.atlas.as_each_model import predictions_by_model
from sensitivity.analysis.atlas.atlas_file import KEY, read
from sensitivity.analysis.atlas.entry import About, Entry, entries_of, loss_of, share_of
from sensitivity.analysis.atlas.predicted_frontier import PredictedFrontier
from sensitivity.analysis.atlas.priors import check_priors, expect_from, schemes_of
from sensitivity.cli import main as cli
from sensitivity.cli.verbs.reading.atlas import _sweep
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import Notice
from sensitivity.spec.plan import Plan, Scheme
from sensitivity.study.storage import paths
from sensitivity.study.storage.expected import read as read_expected
from sensitivity.study.study import Study

SCHEMES = [Scheme("codes", bits) for bits in (2, 3, 4, 6, 8)]
USUAL = np.array([2.0, -0.5, 1.5])  # bits at which each part of the usual model falls to a third
ROWS = planted.grid((2, 3, 4, 8, 16))


def shapes(draw: np.random.Generator) -> ComponentMap:
    return planted.parts(sizes=tuple(int(size) for size in draw.integers(100, 3000, 3)))


def halves(draw: np.random.Generator) -> np.ndarray:
    """A model of the population: models differ as a whole, and their parts on their own."""
    return np.asarray(USUAL + draw.normal(0, 0.7) + draw.normal(0, 0.4, 3))


def entry(name: str, half: Sequence[float], parts: ComponentMap, power: float = 1.0, errors: object = None) -> Entry:
    """What an atlas would have of a model whose damages are known exactly."""
    damages = {
        one: {scheme: float(np.exp(at - scheme.bits)) for scheme in SCHEMES}
        for one, at in zip(parts.names, half, strict=True)
    }
    about = About(model=name, weights=None, task="a", by="linear", methods=["codes"], n=1000, seed=0)
    sizes = {one.name: one.numel for one in parts.components}
    return Entry(about, parts.numel, 40, 1.0, 0.0, power, 0.01, sizes, damages, errors or {})  # type: ignore[arg-type]


def predicted(
    entries: list[Entry], parts: ComponentMap, monkeypatch: pytest.MonkeyPatch, **more: object
) -> PredictedFrontier:
    monkeypatch.setattr(predicted_frontier, "read", lambda file: entries)
    return predict_frontier(parts, SCHEMES, **more)  # type: ignore[arg-type]


def held(found: PredictedFrontier, new: Entry, parts: ComponentMap) -> list[bool]:
    """Whether the interval of each budget holds the true share of its plan."""
    (truth,) = predictions_by_model([new], parts, SCHEMES)
    return [point.low - 1e-9 <= share_of(truth.loss(point.plan)) <= point.high + 1e-9 for point in found.points]


@pytest.mark.parametrize("models", few([4, 2, 8], [4]))
def test_intervals_hold_models_that_were_left_out(models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 planted models that the atlas never saw, about 95 % are within their interval."""
    draw, inside = np.random.default_rng(models), list[bool]()
    for _ in range(60):
        maps = [shapes(draw) for _ in range(models + 1)]
        new, *known = [
            entry(f"m{i}", halves(draw), parts, float(np.exp(draw.normal(0, 0.2)))) for i, parts in enumerate(maps)
        ]
        least = 8 * 400 / maps[0].numel  # of what is kept
        found = predicted(known, maps[0], monkeypatch, bpw=[least + 4.0])
        inside += held(found, new, maps[0])
    assert 0.90 <= np.mean(inside) <= 0.99  # of 60 at .95, that many are held 9 times of 10


def test_models_that_are_alike_give_narrow_intervals_and_others_wide_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    parts = shapes(draw)
    widths = []
    for apart in (0.02, 0.2, 1.0):
        known = [entry(f"m{i}", USUAL + draw.normal(0, apart), parts) for i in range(5)]
        found = predicted(known, parts, monkeypatch)
        widths.append(np.mean([point.high - point.low for point in found.points]))
    assert widths[0] < 0.1 * widths[2]
    assert widths == sorted(widths)


def test_a_larger_budget_keeps_more_and_every_plan_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    parts = shapes(draw)
    found = predicted([entry(f"m{i}", halves(draw), parts) for i in range(4)], parts, monkeypatch)
    assert len(found.points) == predicted_frontier.BUDGETS
    shares = [point.share for point in found.points]
    assert shares == sorted(shares)
    assert all(point.size.bpw <= point.bpw for point in found.points)
    assert all(0 <= point.low <= point.share <= point.high <= 1 for point in found.points)


def test_so_many_measurements_halve_what_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that differ as a whole are known after one plan; those whose parts differ take more."""
    draw = np.random.default_rng(2)
    parts = shapes(draw)
    together = [entry(f"m{i}", USUAL + draw.normal(0, 0.7), parts) for i in range(8)]
    apart = [entry(f"m{i}", USUAL + draw.normal(0, 0.7, 3), parts) for i in range(8)]
    few, more = (predicted(known, parts, monkeypatch).halved_by for known in (together, apart))
    assert few is not None
    assert more is not None
    assert 1 <= few <= more <= 6
    noisy = [replace(one, noise=0.2) for one in together]
    many = predicted(noisy, parts, monkeypatch).halved_by
    assert many is None or many > few


def test_relative_errors_count_as_far_as_they_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    parts = shapes(draw)

    def with_errors(name: str, half: np.ndarray, told: np.ndarray) -> Entry:
        one = entry(name, half, parts)
        return replace(one, errors=entry(name, told, parts).damages)

    own = [halves(draw) for _ in range(6)]
    right = [with_errors(f"m{i}", half, half - 3) for i, half in enumerate(own)]
    wrong = [with_errors(f"m{i}", half, halves(draw)) for i, half in enumerate(own)]
    folder = tmp_path / "why"
    folder.mkdir()
    new = right[0].errors
    rows = [{"component": n, "scheme": s.to_json(), "score": e} for n, row in new.items() for s, e in row.items()]
    content = {"title": "attributions", "version": 1, "scores": {"gram": {"values": rows}}}
    paths.attributions_file(folder).write_text(json.dumps(content))
    plain = predicted(right[1:], parts, monkeypatch, bpw=[5])
    helped = predicted(right[1:], parts, monkeypatch, bpw=[5], attributions=folder)
    misled = predicted(wrong[1:], parts, monkeypatch, bpw=[5], attributions=folder)
    assert helped.trust == 1.0
    assert misled.trust == 0.0
    width = [one.points[0].high - one.points[0].low for one in (plain, helped)]
    assert width[1] < 0.1 * width[0]
    assert all(held(helped, right[0], parts))
    few = predicted(right[1:3], parts, monkeypatch, bpw=[5], attributions=folder)
    assert few.trust == 0.0  # two models do not show whether they help


def planted_study(path: Path, number: int, model: str | None = None, noise: float = 0.005, count: int = 40) -> Study:
    draw = np.random.default_rng(number)
    half, parts = halves(draw), replace(shapes(draw), model=model or f"folder/m{number}")

    def score(bits: np.ndarray) -> np.ndarray:
        return np.asarray(0.8 * np.exp(-sum(planted.damage(bits[:, c], at) for c, at in enumerate(half))))

    return planted.study(path, {"a": score}, noise, components=parts, rows=ROWS[draw.permutation(len(ROWS))[:count]])


def test_studies_go_in_and_a_new_model_comes_out(tmp_path: Path) -> None:
    atlas = tmp_path / "new" / "atlas.parquet"
    studies = [planted_study(tmp_path / f"s{i}", i) for i in range(5)]
    for study in studies[1:]:
        entries = add_to_atlas(study, atlas)
    assert [one.about["model"] for one in entries] == ["m1", "m2", "m3", "m4"]  # and no folder of this machine
    assert [replace(one) for one in read(atlas)] == entries
    found = predict_frontier(studies[0].parts, SCHEMES, atlas, bpw=[5, 7])
    half = halves(np.random.default_rng(0))
    for point in found.points:
        bits = np.array([[16 if one is None else one.bits for _, one in point.plan.schemes]], dtype=float)
        damage = sum(planted.damage(bits[:, c], at) for c, at in enumerate(half))
        assert point.low <= float(np.exp(-damage)[0]) <= point.high
    assert found == predict_frontier(studies[0].parts, SCHEMES, atlas, bpw=[7, 5])


def test_the_order_does_not_matter_and_again_replaces(tmp_path: Path) -> None:
    studies = [planted_study(tmp_path / f"s{i}", i) for i in range(3)]
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file, order in zip(files, (studies, [*studies[::-1], studies[1]]), strict=True):
        for study in order:
            add_to_atlas(study, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(read(files[0])) == 3


def test_of_two_studies_about_the_same_that_with_more_plans_stays(tmp_path: Path) -> None:
    large, small = (planted_study(tmp_path / f"{count}", 1, count=count) for count in (40, 20))
    files = tmp_path / "a.parquet", tmp_path / "b.parquet"
    add_to_atlas(large, files[0])
    with pytest.warns(Notice, match=r"an earlier study of the same .* stays: it has 40 plans, and this one 20"):
        add_to_atlas(small, files[0])
    add_to_atlas(small, files[1])
    with pytest.warns(Notice, match=r"an earlier study of the same .* gives way: it had 20 plans, and this one has 40"):
        (entry,) = add_to_atlas(large, files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert entry.plans == 40


def test_full_precision_is_shown_as_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The surrogate's curve begins elsewhere: it passes between all scores."""
    study = planted_study(tmp_path / "s", 0, noise=0.05)
    native = next(trial.scores["a"]["mean"] for trial in study.measured() if trial.plan.is_native)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["atlas", "add", "s"]) == 0
    assert f" {native:.3f}\n" in capsys.readouterr().out
    (entry,) = read(Path("runs/atlas.parquet"))
    assert entry.full == pytest.approx(native)


def test_a_model_that_was_measured_is_said_to_be_one_of_them(
    tmp_path: Path, atlas: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = planted_study(tmp_path / "own", 3, model="embedded:scenes-llava")
    add_to_atlas(study, atlas)
    line = f"atlas predict embedded:scenes-llava --by part --method rtn --atlas {atlas} --bpw 13"
    assert cli.main(line.split()) == 0
    said = capsys.readouterr().out
    assert "predicted from 3 models (embedded:scenes-llava, m0, m1; a); one of them is this model itself" in said
    assert "nothing of it was measured" not in said
    (alone,) = add_to_atlas(study, tmp_path / "alone.parquet")
    found = predict_frontier(study.parts, SCHEMES, tmp_path / "alone.parquet", bpw=13)
    assert found.measured
    assert found.models == (alone.about["model"],)


def test_one_model_says_nothing_about_how_far_models_differ(tmp_path: Path) -> None:
    study = planted_study(tmp_path / "s", 0)
    add_to_atlas(study, tmp_path / "a.parquet")
    found = predict_frontier(study.parts, SCHEMES, tmp_path / "a.parquet", bpw=5)
    assert (found.points[0].low, found.points[0].high) == (0.0, 1.0)
    assert found.halved_by is None


def test_studies_of_the_method_that_is_asked_for_count_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(5)
    parts = shapes(draw)
    known = [entry(f"m{i}", halves(draw), parts) for i in range(3)]
    worse = replace(  # of the first model, by another method that does ten times the damage
        known[0],
        about={**known[0].about, "methods": ["rtn"]},
        damages={
            name: {replace(scheme, method="rtn"): 10 * damage for scheme, damage in row.items()}
            for name, row in known[0].damages.items()
        },
    )
    alone, both = (predicted(one, parts, monkeypatch, bpw=5) for one in (known, [*known, worse]))
    assert both == alone
    assert alone.other_methods == {}
    stands_in = predicted([worse, *known[1:]], parts, monkeypatch, bpw=5)
    assert stands_in.other_methods == {"m0": ["rtn"]}
    assert stands_in.points[0].share < alone.points[0].share


def test_studies_by_other_components_name_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shapes(np.random.default_rng(6))
    (name, damages), *_ = entry("m", USUAL, parts).damages.items()
    coarse = replace(
        entry("m", USUAL, parts), about={**entry("m", USUAL, parts).about, "by": "part"}, damages={"other": damages}
    )
    with pytest.raises(UserError, match=rf"says anything about {name}; choose --by part, as these studies are, or add"):
        predicted([coarse], parts, monkeypatch, bpw=5)


def test_a_line_names_models_that_were_measured_with_other_methods(
    tmp_path: Path, atlas: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"atlas predict embedded:scenes-llava --by part --method gptq --atlas {atlas} --bpw 13"
    assert cli.main(line.split()) == 0
    assert "m0 was measured with codes, which stands in for gptq here" in capsys.readouterr().out


def test_a_prior_is_of_the_studies_with_the_same_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = planted_study(tmp_path / "new", 5, model="new")
    (known,) = entries_of(planted_study(tmp_path / "old", 6, model="old"))
    other = replace(known, about={**known.about, "methods": ["rtn"]}, damages={
        name: {replace(scheme, method="rtn"): 10 * damage for scheme, damage in row.items()}
        for name, row in known.damages.items()
    })  # fmt: skip
    (tmp_path / "atlas").write_text("")
    found = []
    for entries in ([known], [known, other]):
        monkeypatch.setattr("sensitivity.analysis.atlas.priors.read", lambda file, entries=entries: entries)
        expect_from(study, [tmp_path / "atlas"], schemes_of(study))
        found.append(read_expected(study.path))
    assert found[0] == found[1]


def test_two_studies_of_one_model_are_one_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    parts = shapes(draw)
    known = [entry(f"m{i}", halves(draw), parts) for i in range(3)]
    again = replace(known[0], about={**known[0].about, "task": "b"})
    once, twice = (predicted(one, parts, monkeypatch, bpw=5) for one in (known, [*known, again]))
    assert twice.points == once.points
    assert twice.tasks == ("a", "b")
    assert predicted([*known, again], parts, monkeypatch, bpw=5, task="a") == once


def test_an_atlas_is_a_prior(tmp_path: Path) -> None:
    atlas, new = tmp_path / "a.parquet", planted_study(tmp_path / "new", 9)
    studies = [planted_study(tmp_path / f"s{i}", i) for i in range(2)]
    for study in studies:
        add_to_atlas(study, atlas)
    check_priors([atlas], new.path)
    expect_from(new, [atlas], schemes_of(new))
    by_atlas = read_expected(new.path)
    expect_from(new, [study.path for study in studies], schemes_of(new))
    by_studies = read_expected(new.path)
    assert by_atlas is not None
    assert by_studies is not None
    for name, row in by_atlas.items():
        for scheme, damage in row.items():
            assert damage == pytest.approx(by_studies[name][scheme])


def test_an_atlas_is_a_prior_without_the_study_itself(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone.parquet", tmp_path / "both.parquet"
    own, other = planted_study(tmp_path / "own", 0), planted_study(tmp_path / "other", 1)
    add_to_atlas(own, alone)
    for study in (own, other):
        add_to_atlas(study, both)
    with pytest.raises(UserError, match=r"alone.parquet holds nothing but this study itself, whose measurements count"):
        check_priors([alone], own.path)
    check_priors([both], own.path)
    with pytest.warns(Notice, match=r"both.parquet holds .*own itself, .*: that is left out as a prior"):
        expect_from(own, [both], schemes_of(own))
    by_atlas = read_expected(own.path)
    expect_from(own, [other.path], schemes_of(own))
    by_study = read_expected(own.path)
    assert by_atlas is not None
    assert by_study is not None
    assert [*by_atlas["vision"].values()] == pytest.approx([*by_study["vision"].values()])


def test_those_who_add_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [planted_study(tmp_path / f"s{i}", i) for i in range(3)]
    write = atlas_file._write

    def slowly(file: Path, entries: Sequence[Entry]) -> None:
        time.sleep(0.1)  # the others have read by now, unless they wait
        write(file, entries)

    monkeypatch.setattr(atlas_file, "_write", slowly)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda study: add_to_atlas(study, tmp_path / "a.parquet"), studies))
    assert len(read(tmp_path / "a.parquet")) == 3


def test_a_write_that_fails_leaves_the_atlas_as_it_was(
    tmp_path: Path, atlas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = atlas.read_bytes()

    def full(table: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="no space is left for"):
        add_to_atlas(planted_study(tmp_path / "new", 7), atlas)
    assert atlas.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    file = tmp_path / "atlas.parquet"
    for number in range(2):
        add_to_atlas(planted_study(tmp_path / f"s{number}", number), file)
    return file


def test_what_is_no_atlas_is_said_and_never_replaced(tmp_path: Path, atlas: Path) -> None:
    study, whole = Study(tmp_path / "s0"), pq.read_table(atlas)
    index = json.loads(whole.schema.metadata[KEY])
    text, cut, other = (tmp_path / name for name in ("text.parquet", "cut.parquet", "other.parquet"))
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    text.write_text("mine")
    cut.write_bytes(atlas.read_bytes()[:-100])
    pq.write_table(pa.table({"x": [1]}), other)
    negative, lost, wrong, nothing = (tmp_path / f"{name}.parquet" for name in ("negative", "lost", "wrong", "nothing"))
    bad = whole.set_column(4, "damage", pa.array([-1.0] * len(whole)))
    pq.write_table(bad, negative)
    pq.write_table(whole.replace_schema_metadata({KEY: json.dumps({"version": 9, "studies": []})}), wrong)
    pq.write_table(whole.replace_schema_metadata({KEY: "{"}), nothing)
    pq.write_table(whole.slice(0, 1), lost)
    for file, why in (
        (text, "is no atlas, or was cut short"),
        (cut, "is no atlas, or was cut short"),
        (other, "is no atlas, but another table"),
        (negative, r"'studies\[0\].damages\[0\].damage' is -1.0, and should be a number from 0"),
        (lost, r"'studies\[1\].damages' is"),
        (wrong, "'version' is 9, and should be 1"),
        (nothing, "its JSON is damaged"),
        (folder, "is no atlas, but a folder"),
    ):
        before = file.read_bytes() if file.is_file() else b""
        with pytest.raises(UserError, match=why):
            read(file)
        with pytest.raises(UserError, match=why):
            add_to_atlas(study, file)
        assert before == (file.read_bytes() if file.is_file() else b"")
        assert not file.with_suffix(".kernel-lock").exists()  # what is refused leaves nothing behind
    assert len(index["studies"]) == 2
    if Path("/proc/self").exists():  # whoever asks, no file can be made there
        assert cli.main(["atlas", "add", str(study.path), "--atlas", "/proc/x.parquet"]) == 1
    with pytest.raises(UserError, match=r"an atlas is a file such as runs/atlas\.parquet, not mine\.csv"):
        add_to_atlas(study, "mine.csv")
    with pytest.raises(UserError, match=r"no atlas at .*; `sensitivity atlas add STUDY --to .*` makes one"):
        read(tmp_path / "none.parquet")


def test_what_an_atlas_says_nothing_about_is_said(tmp_path: Path, atlas: Path) -> None:
    parts = planted.parts(("vision", "connector", "language"))
    with pytest.raises(UserError, match=r"unknown task of .* 'b'; choose from a"):
        predict_frontier(parts, SCHEMES, atlas, task="b")
    two = tmp_path / "two.parquet"
    rows = planted.grid((2, 4, 8, 16), 2)
    without = planted.parts(("vision", "language"), (100, 200))
    add_to_atlas(planted.study(tmp_path / "two", {"a": lambda bits: planted.product(np.insert(bits, 1, 16, axis=1))},
                               components=without, rows=rows), two)  # fmt: skip
    with pytest.raises(UserError, match=r"no study of .* says anything about connector; add one of a model with the"):
        predict_frontier(parts, SCHEMES, two)
    with pytest.raises(UserError, match=r"has no score called gram; `sensitivity explain \S+ --by \S+ --scores gram"):
        predict_frontier(parts, SCHEMES, atlas, attributions=tmp_path)
    with pytest.raises(UserError, match=r"no scheme to choose from; name some, such as scheme\('gptq', 4\)"):
        predict_frontier(parts, [], atlas)
    with pytest.raises(UserError, match="a budget must be above 0, not nan"):
        predict_frontier(parts, SCHEMES, atlas, bpw=[4, float("nan")])
    with pytest.raises(UserError, match=r"no plan fits 0\.10 bpw"):
        predict_frontier(parts, SCHEMES, atlas, bpw=0.1)
    nothing = planted.study(tmp_path / "zero", {"a": lambda bits: np.zeros(len(bits))}, rows=ROWS[:10])
    with pytest.raises(UserError, match="full precision scored"):
        add_to_atlas(nothing, atlas)
    with pytest.raises(UserError, match="too few to learn damages from"):
        add_to_atlas(planted.study(tmp_path / "few", {"a": planted.product}, rows=ROWS[:3]), atlas)
    assert len(read(atlas)) == 2


def test_the_command_line_adds_and_predicts(
    tmp_path: Path, atlas: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["atlas", "add", "s0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"atlas": "runs/atlas.parquet", "entries": 1, "models": ["m0"]}
    line = f"atlas predict embedded:scenes-llava --by part --method rtn --atlas {atlas} --bpw 13,14"
    assert cli.main([*line.split(), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["models"] == ["m0", "m1"]
    assert [point["budget_bpw"] for point in facts["frontier"]] == [13, 14]
    assert all(point["size"]["bpw"] <= point["budget_bpw"] for point in facts["frontier"])
    assert Plan.from_json(facts["frontier"][0]["plan"])
    assert cli.main([*line.replace("13,14", "1,13").split(), "--json"]) == 2  # the other budget is answered
    partly = json.loads(capsys.readouterr().out)
    assert partly["frontier"] == facts["frontier"][:1]
    assert partly["error"].startswith("no plan fits 1.00 bpw")
    assert cli.main(line.split()) == 0
    said = capsys.readouterr().out
    assert "predicted from 2 models (m0, m1; a); nothing of it was measured" in said
    command = said.rpartition("would halve these intervals: ")[2].split()
    asked = cli.parser_of(cli.VERBS).parse_args(command[1:])
    assert (asked.model, asked.by, asked.method, asked.bits) == (
        "embedded:scenes-llava",
        "part",
        ("rtn",),
        (2, 3, 4, 6, 8),
    )
    assert (asked.prior, asked.task, str(asked.out)) == ((atlas,), ("a",), "runs/scenes-llava-frontier")
    assert f"measuring {asked.trials - 1} plan" in said


@pytest.mark.parametrize(
    "typed",
    ["", "--group 64 --no-symmetric", "--symmetric --biases --backend gptqmodel --set damp=0.1 --set act_order=true"],
)
def test_the_sweep_that_is_printed_has_the_settings_that_were_typed(typed: str) -> None:
    parser = cli.parser_of(cli.VERBS)
    args = parser.parse_args(f"atlas predict embedded:scenes-llava --method gptq {typed}".split())
    found = SimpleNamespace(halved_by=3, tasks=("vqa",), examples=20)
    command = _sweep(args, found)  # type: ignore[arg-type]
    asked = parser.parse_args(shlex.split(command)[1:])
    names = ("group", "symmetric", "biases", "backend", "set")
    assert [getattr(asked, name) for name in names] == [getattr(args, name) for name in names]
    assert asked.trials == 4


def test_losses_and_shares_are_inverse() -> None:
    for share in (0.01, 0.3, 0.9, 0.999):
        assert share_of(loss_of(share)) == pytest.approx(share)
    assert loss_of(1.1) < loss_of(0.9999) < loss_of(0.5) < loss_of(-1)


def test_a_task_at_which_full_precision_fails_does_not_keep_the_others_out(tmp_path: Path) -> None:
    def nothing(bits: np.ndarray) -> np.ndarray:
        return np.zeros(len(bits))

    both = planted.study(tmp_path / "both", {"vqa": planted.product, "ground": nothing})
    with pytest.warns(Notice, match="full precision scored nothing on ground, .*: left out"):
        assert [entry.about["task"] for entry in entries_of(both)] == ["vqa"]
    with pytest.raises(UserError, match="scored nothing on ground"):
        entries_of(planted.study(tmp_path / "none", {"ground": nothing}))
