"""Nothing that we did not write is deleted or replaced: in code, in made-up trees, and as a user would type it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import planted
import pytest
import readme
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sensitivity.analysis.reporting.figure_files import LIST
from sensitivity.formats.writing import manifest
from sensitivity.formats.writing.unfinished import remove_unfinished, staging_folder
from sensitivity.measure.calibrate.cache import Cache
from sensitivity.spec import files
from sensitivity.spec.errors import UserError
from sensitivity.spec.files import MARK, UNFINISHED, check_may_write, discard, overwrite
from sensitivity.study.storage import expected

# -- the one place that deletes ------------------------------------------------------------------------------------

DELETES = {"rmtree", "unlink", "remove", "rmdir", "removedirs", "rename", "renames", "move", "truncate"}
MODULES = {"os", "shutil"}
SOURCES = [
    path
    for folder in ("sensitivity", "experiments", "tests", "notebooks")
    for path in sorted((readme.ROOT / folder).rglob("*.py"))
]
SHIPPED = [path for path in SOURCES if path.relative_to(readme.ROOT).parts[0] != "tests"]
# what is left outside `files`, each with its reason
ALLOWED = {
    ("sensitivity/spec/files.py", "*"): "the one place",
    ("sensitivity/formats/halved/tracing.py", "rename"): "a folder that it has just made, to its name",
    ("sensitivity/formats/writing/unfinished.py", "rmdir"): "empty folders that it has just made",
    (
        "sensitivity/study/importing/imported_study.py",
        "rename",
    ): "a study that it has just made, to a name that is free",
    ("sensitivity/study/storage/journal.py", "truncate"): "the torn last line of a study's own journal",
}


def deletions(path: Path) -> Iterator[str]:
    """The names of calls that delete, move or cut a file; those of lists, strings and tables are something else."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, whose = node.func.attr, node.func.value
        of_module = isinstance(whose, ast.Name) and whose.id in MODULES
        of_path = name in {"unlink", "rmtree", "rmdir"} or (name in {"rename", "truncate"} and not node.keywords)
        of_path |= name == "replace" and len(node.args) == 1 and not node.keywords  # a string's takes two
        if of_path or (of_module and name in DELETES | {"replace"}):
            yield name


def test_the_walk_sees_deletions(tmp_path: Path) -> None:
    lines = ["os.remove(a)", "shutil.rmtree(a)", "a.unlink()", "a.rename(b)", "a.replace(b)", "os.replace(a, b)"]
    others = ["rows.remove(a)", "text.replace('a', 'b')", "frame.rename(columns=c)", "replace(one, two)"]
    (tmp_path / "code.py").write_text("\n".join([*lines, *others]))
    assert len(list(deletions(tmp_path / "code.py"))) == len(lines)


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "tests" not in p.relative_to(readme.ROOT).parts], ids=lambda p: p.name
)
def test_nothing_else_deletes(path: Path) -> None:
    name = path.relative_to(readme.ROOT).as_posix()
    if (name, "*") in ALLOWED:
        return
    assert [one for one in deletions(path) if (name, one) not in ALLOWED] == []


def test_what_is_allowed_is_there() -> None:
    for name, one in ALLOWED:
        assert one == "*" or one in set(deletions(readme.ROOT / name))


# what a manifest must hold to be read
SIZE = {"bits": 64.0, "bytes": 8, "bpw": 4.0, "bpw_codes": 4.0, "megabytes": 8e-6}
FACTS = {
    "key": "0" * 16, "plan": {"vision": None}, "model": "made-up", "by": "part", "format": "plan", "dtype": "float32",
    "runtime": "plan", "runs": False, "trial": {}, "size": SIZE, "predicted_size": SIZE,
}  # fmt: skip

# -- a made-up tree ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "out", ".out.1.2.unfinished", ".out.1.2.unfinished.old", "home", "study"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: "/".join(names))
KINDS = st.sampled_from(["file", "folder", "link", "export", "export and a file", "marked", "manifest"])


def plant(root: Path, entries: dict[str, str]) -> None:
    for name, kind in entries.items():
        place = root / name
        if any(parent.is_file() or parent.is_symlink() for parent in [place, *place.parents] if parent != root):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            continue
        if kind == "file":
            place.write_text(name)
        elif kind == "link":
            place.symlink_to(root / "home", target_is_directory=True)
        else:
            place.mkdir()
            (place / "text").write_text("text")
            if kind.startswith("export"):
                manifest.write(place, FACTS, {})
            if kind == "manifest":
                (place / manifest.MANIFEST).write_text("{}")
            if kind == "marked":
                (place / UNFINISHED).write_text(MARK)
            if kind == "export and a file":
                (place / "mine").write_text("mine")


def seen(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else "folder"
        if path.is_dir()
        else path.read_text()
        for path in sorted(root.rglob("*"))
    }


def is_export(folder: Path) -> bool:
    """What the tree planted as an export and nothing more; said here without asking the code under test."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and {path.name for path in folder.iterdir()} == {"text", manifest.MANIFEST}
        and json.loads((folder / manifest.MANIFEST).read_text()).get("written_by") == MARK
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.dictionaries(PATHS, KINDS, max_size=8), target=PATHS, force=st.booleans(), fails=st.booleans())
@example(entries={"out": "export"}, target="out", force=True, fails=False)
@example(entries={"out/text": "file"}, target="out", force=True, fails=False)
@example(entries={"out": "export", "out/study": "folder"}, target="out", force=True, fails=False)
@example(entries={".out.1.2.unfinished.old": "folder"}, target="out", force=True, fails=False)
@example(entries={".out.1.2.unfinished": "link"}, target="out", force=True, fails=True)
@example(entries={".out.1.2.unfinished": "export"}, target=".out.1.2.unfinished", force=True, fails=True)
def test_nothing_outside_the_target_changes(
    entries: dict[str, str], target: str, force: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export into any place of any tree: what changes is the target, if it was ours, and what killed ones left."""
    with tempfile.TemporaryDirectory() as space:
        root = Path(space).resolve()
        plant(root, entries)
        monkeypatch.setenv("HOME", str(root / "home"))
        out, before = root / target, seen(root)
        if os.path.realpath(out) != str(out) and not out.is_symlink():
            out = Path(os.path.realpath(out))  # a link on the way leads to where it leads
        may = is_export(out)
        free = not out.exists() and not out.is_symlink()
        left = {  # what an export that was killed left beside the target
            str(path.relative_to(root))
            for path in out.parent.glob(".out.1.2.unfinished*")
            if not path.is_symlink()
            and path.is_dir()
            and (is_export(path) or ((path / UNFINISHED).is_file() and (path / UNFINISHED).read_text() == MARK))
        }
        try:
            check_may_write(out, force, manifest.why_foreign, [root / "study"])
            with staging_folder(out) as folder:
                (folder / "text").write_text("new")
                if fails:
                    raise KeyboardInterrupt
                manifest.write(folder, FACTS, {})
            done = True
        except (UserError, KeyboardInterrupt):
            done = False
        after = seen(root)
        gone = {name for name in before if before[name] != after.get(name)}
        told = str(out.relative_to(root))
        inside = {name for name in gone if name == told or name.startswith(f"{told}/")}
        others = {n for n in gone - inside if not any(n == one or n.startswith(f"{one}/") for one in left)}
        assert others == set()
        assert not inside or (may and force and done)
        if done:
            assert free or (may and force)
            assert {path.name for path in out.iterdir()} == {"text", manifest.MANIFEST}
        extra = {name for name in after if name not in before}
        allowed = {told, *(str(parent.relative_to(root)) for parent in out.parents if root in parent.parents)}
        back = {f"{Path(told).parent / 'out'}".removeprefix("./")}  # an export that was moved away and put back
        assert all(name in allowed or name.startswith((f"{told}/", *back)) for name in extra)
        if not done:
            assert extra == {name for name in extra if name.startswith(tuple(back))}


# -- targets that are never written to -----------------------------------------------------------------------------


def exported(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "text").write_text("text")
    manifest.write(folder, FACTS, {})
    return folder


def refused(out: Path, keep: list[Path] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_may_write(out, True, manifest.why_foreign, keep or [])
    return str(caught.value)


def test_places_that_are_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = exported(tmp_path / "there" / "work")
    home = exported(tmp_path / "people" / "me")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for out in (Path(), Path(""), Path("."), work, work.parent):
        assert "the working folder" in refused(out)
    assert "is a home folder or holds one" in refused(home)
    assert "is a home folder or holds one" in refused(home.parent)
    assert refused(Path("/"))
    assert "holds this package or lies in it" in refused(files.PACKAGE / "models")
    assert "holds this package or lies in it" in refused(files.PACKAGE.parent)
    mounts = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines()]
    assert all("where a file system is mounted" in refused(mount) for mount in mounts if mount == Path("/proc"))
    out = exported(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    assert "is a link" in refused(tmp_path / "link")
    exported(out / "study")
    assert "study, which is being read" in refused(out, [out / "study"])
    assert "study, which is being read" in refused(out / "study", [out / "study"])


def test_only_an_export_and_nothing_more_is_replaced(tmp_path: Path) -> None:
    out = exported(tmp_path / "out")
    check_may_write(out, True, manifest.why_foreign)
    with pytest.raises(UserError, match="out is already there; choose another --out or add --force"):
        check_may_write(out, False, manifest.why_foreign)
    (out / "mine").mkdir()
    (out / "mine" / "letter.txt").write_text("dear")
    assert "it also holds mine/letter.txt, which no export wrote; choose another --out" in refused(out)
    (tmp_path / "file").write_text("text")
    assert "it is a file, not a folder" in refused(tmp_path / "file")
    (tmp_path / "other").mkdir()
    check_may_write(tmp_path / "other", False, manifest.why_foreign)  # an empty folder is as good as none
    (tmp_path / "other" / "file").write_text("text")
    assert "it is not an export (it has no sensitivity.json of ours)" in refused(tmp_path / "other")
    with pytest.raises(UserError, match="it is not an export"):  # nor is --force advised, which would be refused
        check_may_write(tmp_path / "other", False, manifest.why_foreign)
    (tmp_path / "other" / manifest.MANIFEST).write_text(json.dumps({**FACTS, "files": {}}))
    assert "its sensitivity.json lacks the mark of an export" in refused(tmp_path / "other")


def replaced_while(out: Path, name: str | None) -> None:
    with staging_folder(out) as folder:
        (folder / "text").write_text("new")
        if name is None:
            shutil.rmtree(out)
            out.write_text("a letter")
        else:
            (out / name).write_text("dear")


def test_what_appears_while_an_export_is_written_stays(tmp_path: Path) -> None:
    out = exported(tmp_path / "out")
    for name, why in (("letter.txt", "it also holds letter.txt"), (None, "has appeared meanwhile")):
        with pytest.raises(UserError, match=why):
            replaced_while(out, name)
        assert (out.read_text() == "a letter") if name is None else ((out / "letter.txt").read_text() == "dear")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_merely_looks_unfinished_stays(tmp_path: Path) -> None:
    for name in (".a.1.2.unfinished", ".b.1.2.unfinished.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter").write_text("dear")
    assert remove_unfinished(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.1.2.unfinished", ".b.1.2.unfinished.old"]


def test_links_are_never_followed_to_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / UNFINISHED).write_text(MARK)
    (tmp_path / ".out.1.2.unfinished").symlink_to(tmp_path / "mine")
    assert remove_unfinished(tmp_path) == []
    assert not discard(tmp_path / ".out.1.2.unfinished", ours=True)
    assert (tmp_path / "mine" / UNFINISHED).exists()


# -- documents, caches and reports ---------------------------------------------------------------------------------


def test_a_document_replaces_an_earlier_one_alone(tmp_path: Path) -> None:
    overwrite(tmp_path / "new" / "report.md", "# What a sweep costs\n\n1 s\n")
    overwrite(tmp_path / "new" / "report.md", "# What a sweep costs\n\n2 s\n")
    assert (tmp_path / "new" / "report.md").read_text().endswith("2 s\n")
    for text in ("# Letters\n", "# What a sweep costs us\n", ""):
        (tmp_path / "letters.md").write_text(text)
        with pytest.raises(
            UserError, match=r"letters\.md is another file: it does not begin with '# What a sweep costs'"
        ):
            overwrite(tmp_path / "letters.md", "# What a sweep costs\n")
        assert (tmp_path / "letters.md").read_text() == text
    with pytest.raises(UserError, match="new is a folder; name a file"):
        overwrite(tmp_path / "new", "# What a sweep costs\n")


def test_a_cache_leaves_other_tensors_alone(tmp_path: Path) -> None:
    """SENSITIVITY_CACHE may name a folder where models lie."""
    save_file({"w": torch.zeros(300)}, tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(300)}, tmp_path / f"{'0' * 32}.safetensors", metadata={"about": "another"})
    cache, device = Cache(tmp_path, limit_gb=2e-6), torch.device("cpu")
    for number in range(4):
        cache.store({"number": number}, {"w": torch.full((200,), float(number))}, device)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert {"model.safetensors", f"{'0' * 32}.safetensors"} < set(kept)
    assert len(kept) == 3
    assert cache.load({"number": 3}, device) is not None


# -- as a user would type it ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a made-up table: no model is run."""
    from sensitivity.cli import main as cli

    folder = tmp_path_factory.mktemp("typed")
    rows = ["vision,language,score", *(f"{a},{b},{(a + b) / 20}" for a in (3, 4, 8) for b in (3, 4, 8)), "16,16,1"]
    (folder / "table.csv").write_text("\n".join(rows))
    args = ["--part", "vision=vision", "--part", "language=language", "--score", "score"]
    args += ["--numel", "vision=1000", "--numel", "language=3000", "--out", str(folder / "study")]
    assert cli.main(["import", str(folder / "table.csv"), *args]) == 0
    return folder / "study"


FORCED = {
    "legalize": ["legalize", "STUDY", "--runtime", "vllm", "--bpw", "5", "--force", "--out", "OUT"],
    "export": ["export", "STUDY", "--bpw", "5", "--force", "--out", "OUT"],
    "export gptq": ["export", "STUDY", "--bpw", "5", "--format", "gptq", "--force", "--out", "OUT"],
    "report": ["report", "STUDY", "--out", "OUT"],
}


@pytest.mark.parametrize("verb", FORCED)
def test_no_verb_replaces_a_foreign_folder(
    verb: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sensitivity.cli import main as cli

    for name in ("folder", "folder.json"):
        out = tmp_path / name
        (out / "deep").mkdir(parents=True)
        (out / "deep" / "letter").write_text("dear")
        (out / "index.html").write_text("<p>mine</p>")
        words = [{"STUDY": str(study), "OUT": str(out)}.get(word, word) for word in FORCED[verb]]
        assert cli.main(words) != 0
        # a busy machine may take so long that a line says that it is still running
        said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" so far")]
        assert len(said) == 1
        assert said[0].startswith("error: ")
        assert seen(out) == {"deep": "folder", "deep/letter": "dear", "index.html": "<p>mine</p>"}


@pytest.mark.parametrize("verb", FORCED)
def test_no_verb_writes_over_its_study_or_the_working_folder(verb: str, study: Path, tmp_path: Path) -> None:
    from sensitivity.cli import main as cli

    before = seen_bytes(study)
    for out in (study, study.parent, Path("."), Path.home(), Path("/")):
        words = [{"STUDY": str(study), "OUT": str(out)}.get(word, word) for word in FORCED[verb]]
        assert cli.main(words) != 0
    assert seen_bytes(study) == before


def seen_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_report_is_written_again_into_its_own_folder(study: Path, tmp_path: Path) -> None:
    from sensitivity.cli import main as cli

    for _ in range(2):
        assert cli.main(["report", str(study), "--out", str(tmp_path / "page")]) == 0
    for _ in range(2):
        assert cli.main(["report", str(study)]) == 0


@pytest.mark.parametrize("name", ["plan.json", "plan.md", "plan-6bpw.json", "plan-6bpw.md"])
def test_a_recommendation_replaces_no_file_of_other_origin(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sensitivity.cli import main as cli

    path = planted.study(tmp_path / "study", {"vqa": planted.product}, levels=(2, 4, 8, 16)).path
    recommend = ["recommend", str(path), "--bpw", "5,6"]
    (path / name).write_text('{"dear": "diary"}')
    before = seen_bytes(path)
    assert cli.main(recommend) == 2
    assert f"{name} is not replaced: it is not a " in capsys.readouterr().err
    assert seen_bytes(path) == before
    (path / name).unlink()
    (tmp_path / "mine").write_text("dear diary")
    (path / name).symlink_to(tmp_path / "mine")
    assert cli.main(recommend) == 2
    (path / name).unlink()
    for _ in range(2):  # what an earlier run wrote is replaced
        assert cli.main(recommend) == 0


@pytest.mark.parametrize("name", ["index.html", "vqa-pareto.csv"])
def test_a_report_replaces_no_file_of_other_origin(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sensitivity.cli import main as cli

    path = planted.study(tmp_path / "study", {"vqa": planted.product}, levels=(4, 16)).path
    (path / "report").mkdir()
    (path / "report" / name).write_text("dear diary")
    assert cli.main(["report", str(path)]) == 2
    assert "report is not replaced: it holds other things than an earlier report" in capsys.readouterr().err
    assert seen_bytes(path / "report") == {name: b"dear diary"}


@pytest.mark.usefixtures("few_trees", "undrawn")
def test_a_report_replaces_the_figures_of_an_earlier_one_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sensitivity.cli import main as cli

    path = planted.study(tmp_path / "study", {"vqa": planted.product}, levels=(4, 16)).path
    page, figure = path / "report", path / "report" / "vqa-pareto.csv"
    for _ in range(2):
        assert cli.main(["report", str(path)]) == 0
    ours = seen_bytes(page)
    (page / "notes.txt").write_text("beside it")
    assert cli.main(["report", str(path)]) == 0
    figure.write_text("dear diary")
    before = seen_bytes(page)
    assert cli.main(["report", str(path)]) == 2
    said = f"{figure} is not replaced: it is not as an earlier report wrote it; move it away, or choose another --out"
    assert said in capsys.readouterr().err
    assert seen_bytes(page) == before
    # one of a figure that the earlier report did not have
    listing = json.loads(LIST.search(ours["index.html"])[1])  # type: ignore[index]
    assert set(listing) == {*ours} - {"index.html"}
    listing.pop(figure.name)
    shorter = b"<!-- files: " + json.dumps(listing).encode() + b" -->"
    (page / "index.html").write_bytes(LIST.sub(lambda _: shorter, ours["index.html"]))
    assert cli.main(["report", str(path)]) == 2
    assert figure.read_text() == "dear diary"
    figure.unlink()
    assert cli.main(["report", str(path)]) == 0
    assert set(seen_bytes(page)) == {*ours, "notes.txt"}


def test_a_study_keeps_files_with_the_names_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "expected.json").write_text("[]")
    with pytest.raises(
        UserError, match=r"expected\.json is not replaced: `sensitivity` did not write it; move it away"
    ):
        expected.save(tmp_path, {}, "weight")
    assert (tmp_path / "expected.json").read_text() == "[]"


def test_a_plan_replaces_a_plan_alone(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sensitivity.cli import main as cli

    export = ["export", str(study), "--bpw", "5", "--out", str(tmp_path / "plan.json")]
    assert cli.main(export) == 0
    assert cli.main(export) != 0
    assert cli.main([*export, "--force"]) == 0
    (tmp_path / "plan.json").write_text('{"dear": "diary"}')
    capsys.readouterr()
    assert cli.main([*export, "--force"]) != 0
    assert "plan.json is not replaced: it is not a plan that `sensitivity` wrote" in capsys.readouterr().err
    assert (tmp_path / "plan.json").read_text() == '{"dear": "diary"}'
    legalize = ["legalize", str(study), "--runtime", "vllm", "--bpw", "5", "--out", str(tmp_path / "folder")]
    assert cli.main(legalize) != 0
    assert "--out takes a file, such as" in capsys.readouterr().err
