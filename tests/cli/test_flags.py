"""Every flag of every verb, as the parser itself lists them, with every kind of value that means nothing."""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest

import sensitivity
from sensitivity.cli import main as cli
from sensitivity.spec.components import PARTS
from sensitivity.spec.plan import Scheme

MODEL = "embedded:scenes-llava"
LINES = {  # a command of each verb with which nothing is wrong
    "inspect": f"{MODEL}",
    "sweep": f"{MODEL} --n 4 --bits 2,4,8 --out new",
    "plan": f"{MODEL} --n 4 --bits 2,4,8 --bpw 14 --out new",
    "explain": f"{MODEL} --bits 2,4,8 --out new",
    "speculate": f"{MODEL} --n 4 --activation-bits 4,8",
    "profile": f"{MODEL} --runtime openvino",
    "rank": "study",
    "recommend": "study --bpw 6",
    "legalize": "study --runtime gptq --bpw 8",
    "export": "study --bpw 6 --out new",
    "verify": "export",
    "bench": "export --task vqa",
    "report": "study",
    "import": "table.csv --part a=vision --part b=language --score s --out new",
    "demo": "--out new",
    "methods": "",
    "failures": "study",
    "table": "study --out new.csv",
    "compare": "study study",
    "watch": "study",
    "atlas": "add study --atlas atlas.parquet",
}
FITTING = {  # a value of each flag with which nothing is wrong: what is refused below is the value and not the flag
    "model": MODEL, "study": "study", "source": "study", "folder": "export", "table": "table.csv",
    "--by": "part", "--bits": "2,4", "--method": "rtn", "--group": "32", "--set": "damp=0.05", "--backend": "own",
    "--task": "vqa", "--search": "random", "--allow": "vision=4,native", "--tie": "vision,language",
    "--runtime": "gptq", "--trials": "20", "--out": "other", "--n": "9", "--seed": "7", "--calibration": "vqa,caption",
    "--calibration-n": "16", "--path": "exposed", "--cache-gb": "0", "--until": "error<0.5%", "--memory-gb": "0.5",
    "--threads": "1", "--include": "head", "--activation-bits": "8,16", "--activation-scale": "token",
    "--cache-bits": "4,16", "--cache-group": "16",
    "--workers": "1", "--executor": "local", "--device": "cpu", "--dtype": "fp32", "--storage": "sqlite:///team.db",
    "--near": "0.5", "--bootstraps": "10", "--bpw": "6", "--gb": "0.5", "--weight": "vqa=2", "--floor": "vqa=95%",
    "--top": "1", "a": "study", "b": "study", "--plan": "a79dde72", "--every": "1",
    "--share": "shared", "--failures": "3", "action": "add", "--atlas": "atlas.parquet", "--attributions": "why",
    "--ms-per-token": "1e6", "--ms-per-answer": "1e6", "--gb-resident": "1",
    "--minutes": "5", "--prior": "earlier", "--scores": "gram,fisher", "--check": "4", "--draft": "5",
    "--model": MODEL, "--format": "fake", "--part": "c=connector", "--switch": "on=connector",
    "--kinds": "x=ff", "--numel": "vision=1_000", "--kind": "k", "--score": "s", "--total": "1000000000",
}  # fmt: skip
OWN = {  # where a verb means something else by a flag
    ("import", "--bits"): "b", ("legalize", "--out"): "other.json", ("failures", "--kind"): "count",
    ("failures", "--out"): "other.html", ("failures", "--part"): "vision",
    ("compare", "--out"): "other.html", ("table", "--out"): "other.parquet",
    ("bench", "--runtime"): "transformers", ("profile", "--runtime"): "openvino",
    ("demo", "--runtime"): "openvino",
    ("explain", "source"): MODEL, ("explain", "--path"): "float", ("explain", "--plan"): "1",
    ("plan", "--path"): "float", ("speculate", "--activation-bits"): "2,8",
}  # fmt: skip
GPTQ = ("--set", "--backend", "--calibration", "--calibration-n", "--path", "--cache-gb")
FEW = " --calibration-n 4"  # or each command that is right would collect statistics of 128 examples
BESIDE = {  # what a flag needs beside it, where it means nothing alone
    **{("inspect", flag): "--method gptq" for flag in GPTQ},
    **{(verb, flag): f"--method gptq{'' if flag == '--calibration-n' else FEW}"
       for verb in ("sweep", "speculate") for flag in GPTQ},
    **{("recommend", f"--{name}"): "--runtime openvino" for name in ("ms-per-token", "ms-per-answer", "gb-resident")},
    ("sweep", "--prior"): "--search frontier", ("sweep", "--scores"): f"--search frontier{FEW}",
    ("sweep", "--activation-scale"): "--activation-bits 8", ("sweep", "--cache-group"): "--cache-bits 4",
    **{(verb, "--biases"): "--method rtn" for verb in ("plan", "explain", "atlas")},
    ("export", "--path"): "--format fake", ("export", "--model"): "--format fake",
    ("legalize", "--force"): "--out other.json",
    ("explain", "--failures"): "--plan 1",
    **{("failures", flag): "--causes" for flag in ("--model", "--device", "--dtype")},
    ("import", "--bits"): "--switch on=connector", ("import", "--switch"): "--bits b",
    ("import", "--kind"): "--switch on=connector --bits b --kinds x=ff",
    ("import", "--kinds"): "--switch on=connector --bits b --kind k",
}  # fmt: skip
INSTEAD = {  # what must be left out for it
    **{("import", flag): ("--part",) for flag in ("--bits", "--switch", "--kind", "--kinds")},
    **{(verb, "--gb"): ("--bpw",) for verb in ("recommend", "plan")},
    ("table", "--share"): ("--out",),
}
PREDICT = ("--bpw", "--attributions", "--task", "--by", "--bits", "--method", "--group", "--no-symmetric", "--biases",
           "--set", "--backend")  # fmt: skip
OTHER = {  # the line for a flag that is for a study, where that of the verb has a model; or for another action
    ("explain", "--plan"): "study",
    ("explain", "--failures"): "study",
    **{("atlas", flag): f"predict {MODEL} --bits 2,4,8 --atlas atlas.parquet" for flag in PREDICT},
}
KINDS = {
    "empty": "", "blank": "  ", "comma": ",", "unknown": "nope", "negative": "-1", "zero": "0", "fraction": "2.5",
    "huge": "9" * 30, "overflow": "1e999", "nan": "NaN", "infinite": "inf", "null": "null", "object": "{}",
    "far too long": "a" * 5000, "odd unicode": "²\u202e\ud800\x07", "newline": "a\nb", "nul": "a\0b",
}  # fmt: skip
# where one of these is fine, and why: (flag, kind)
FINE = {
    ("--seed", "zero"): "the default",
    ("legalize", "--bpw", "fraction"): "",  # no plan is so small
    ("--cache-gb", "zero"): "keeps no statistics, as its help says",
    ("--memory-gb", "zero"): "shares nothing in memory: slower, the same result",
    ("--cache-gb", "fraction"): "an amount may be a fraction",
    ("--memory-gb", "fraction"): "an amount may be a fraction",
    ("--minutes", "fraction"): "minutes may be a fraction",
    ("--ms-per-token", "fraction"): "milliseconds may be a fraction",
    ("--ms-per-answer", "fraction"): "milliseconds may be a fraction",
    ("--gb-resident", "fraction"): "an amount may be a fraction",
    ("--check", "zero"): "checks nothing",
    ("failures", "--plan", "zero"): "the first trial",
    ("--bpw", "fraction"): "a budget may be a fraction",
    ("--gb", "fraction"): "a budget may be a fraction",
    **{("--share", kind): "a folder may be called that" for kind in KINDS if kind not in (
        "empty", "blank", "far too long", "odd unicode", "newline", "nul")},
    **{("--out", kind): "a file may be called that" for kind in KINDS if kind not in (
        "empty", "blank", "far too long", "odd unicode", "newline", "nul")},
    ("--storage", ""): "",
}  # fmt: skip
ENDING = ("legalize", "failures", "compare", "table")  # they write files of a name that ends in one way
FINE |= {(verb, "--out", kind): "" for verb in ENDING for kind in KINDS}  # type: ignore[misc]
FREE = "others' methods and models may be called anything that can be printed"
FREELY = ("comma", "unknown", "negative", "zero", "fraction", "huge", "overflow", "nan", "infinite", "null", "object")
FINE |= {("import", flag, kind): FREE for flag in ("--method", "--model") for kind in FREELY}  # type: ignore[misc]
PAIRS = {  # what stands before the = of a flag that takes pairs
    "--set": "damp", "--allow": "vision", "--weight": "vqa", "--floor": "vqa", "--numel": "vision", "--part": "c",
    "--switch": "on",
}  # fmt: skip
FINE |= {
    ("--set damp", "zero"): "no damping",
    ("--set damp", "fraction"): "damping may be a fraction",
    ("--weight vqa", "fraction"): "only the ratio of weights counts",
}
NAMED = (  # what people typed, and what must be named in the answer
    ("sweep MODEL --out new --dry-run --device nope", "unknown device 'nope'"),
    ("sweep MODEL --out new --device meta", "it computes nothing"),
    ("sweep MODEL --out new --device cpu:7", "a machine has one cpu"),
    ("sweep MODEL --out new --dry-run --device cpu:7", "a machine has one cpu"),
    ("sweep MODEL --out new --dry-run --dtype int3", "unknown dtype 'int3'"),
    ("sweep MODEL --out new --set method=rtn", "type --method"),
    ("sweep MODEL --out new --set bits=3", "type --bits"),
    ("sweep MODEL --out new --set group=32", "type --group"),
    ("sweep MODEL --out new --method gptq --set damp={}", "finite number"),
    ("sweep MODEL --out new --method gptq --set damp=NaN", "finite number"),
    ("sweep MODEL --out new --method gptq --set damp=1e999", "finite number"),
    ("sweep MODEL --out new --method gptq --set damp=null", "finite number"),
    ("sweep MODEL --out new --method gptq --set damp=11", "damp of gptq is a number from 0 to 10, not 11"),
    ("sweep MODEL --out new --method gptq --set damp=true", "damp of gptq is a number from 0 to 10, not True"),
    ("sweep MODEL --out new --method awq --set exponents=2.5", "exponents of awq is a whole number from 1 to 1,000"),
    ("sweep MODEL --out new --method gptq --set damp=1 --set damp=2", "--set names 'damp' twice"),
    ("sweep MODEL --out new --seed -1", "--seed takes a whole number from 0 to 2,147,483,647, not '-1'"),
    ("sweep MODEL --out new --task ,", "--task takes a name or a path"),
    ("sweep MODEL --out new --task vqa,", "--task takes a name or a path"),
    ("sweep MODEL --out new --n 99999999999999999999999", "from 1 to 1,000,000"),
    ("sweep MODEL --out new --method gptq --calibration-n 99999999999999999999999", "from 1 to 1,000,000"),
    ("rank study --bootstraps 99999999999999999999999", "from 2 to 10,000"),
    ("sweep MODEL --out new --group 1000000000000", "from 1 to 1,000,000"),
    ("sweep MODEL --out new --runtime ''", "--runtime takes a name"),
    ("sweep MODEL --out new --path nope", "unknown calibration path 'nope'"),
    ("sweep MODEL --out new --path exposed", "--path would do nothing with --method rtn"),
    ("sweep MODEL --out new --activation-bits 9", "whole numbers of bits from 2 to 8, or 16, such as 4,8,16"),
    ("sweep MODEL --out new --cache-bits 1", "whole numbers of bits from 2 to 8, or 16, such as 4,8,16"),
    ("sweep MODEL --out new --activation-scale token", "would do nothing without --activation-bits below 16"),
    ("sweep MODEL --out new --cache-group 16", "would do nothing without --cache-bits below 16"),
    ("sweep MODEL --out new --cache-bits 4 --set cache_group=8", "type --cache-group"),
    ("sweep MODEL --out new --method keep --bits 16", "keep leaves weights as they are; name --activation-bits or"),
    ("sweep MODEL --out new --method llm-int8 --bits 8 --activation-bits 8", "llm-int8 rounds activations by itself"),
    ("sweep MODEL --out new --calibration nope", "unknown task 'nope'"),
    ("sweep MODEL --out new --calibration vqa", "--calibration would do nothing with --method rtn"),
    ("sweep MODEL --out new --dry-run --calibration-n 5", "--calibration-n would do nothing with --method rtn"),
    ("sweep MODEL --out new --method gptq --task vqa,caption --calibration-n 1", "each needs at least one"),
    ("sweep MODEL --out new --method gptq --task vqa,caption --calibration-n 1 --dry-run",
     "each needs at least one"),
    ("sweep MODEL --out new --plain --memory-gb 1", "--memory-gb would do nothing with --plain"),
    ("sweep MODEL --out new --storage sqlite:///no/such/folder.db", "no such folder"),
    ("sweep MODEL --out new --storage sqlite:///no/such/folder.db --dry-run", "no such folder"),
    ("sweep MODEL --out new --storage sqlite:///:memory:", "would be lost"),
    ("sweep MODEL --out new --storage sqlite:///table.csv", "cannot open the storage"),
    ("sweep MODEL --out new --storage nosuchdb://me:secret@host/x --dry-run", "cannot open the storage nosuchdb://me@"),
    ("sweep MODEL --out new --task lmms-eval:", "lmms-eval needs the name of a task; type lmms-eval:TASK"),
    ("sweep MODEL --out new --task vlmeval:", "vlmeval needs the name of a task; type vlmeval:TASK"),
    ("sweep MODEL --out new --task retrieval", "cannot search"),
    ("sweep MODEL --out new --task retrieval --dry-run", "cannot search"),
    ("sweep MODEL --out new --until 1e999h", "is none of"),
    ("sweep MODEL --out new --until 99999999999999h", "at most 1,000,000"),
    ("sweep MODEL --out new --workers 0", "from 1 to 1,000"),
    ("sweep MODEL --out ''", "--out takes a name or a path"),
    ("sweep MODEL --out .", "--out takes a folder of its own"),
    ("sweep MODEL --out ..", "--out takes a folder of its own"),
    ("sweep MODEL --out /", "--out takes a folder of its own"),
    ("sweep MODEL --out HOME", "--out takes a folder of its own"),
    ("sweep MODEL --out PACKAGE/models/new", "--out takes a folder outside this package"),
    ("report study --out PACKAGE", "--out takes a folder outside this package"),
    ("sweep MODEL --out table.csv", "--out takes a folder, and 'table.csv' is a file"),
    ("sweep MODEL --out export", "export holds no study, and other files (README.md); choose a new folder as --out"),
    ("sweep MODEL --out export --dry-run", "export holds no study, and other files"),
    ("plan MODEL --out export", "export holds no study, and other files (README.md); choose a new folder as --out"),
    ("plan MODEL --out export --dry-run", "export holds no study, and other files"),
    ("sweep MODEL --out table.csv/new", "is a file, not a folder"),
    ("legalize study --runtime gptq --bpw 8 --out study", "--out takes a file, and 'study' is a folder"),
    ("legalize study --runtime gptq --bpw 8 --force", "--force would do nothing without --out"),
    (f"sweep MODEL --out {'n' * 250}", "200 between slashes"),
    ("recommend study --bpw 5 --gb 1", "--bpw would do nothing beside --gb"),
    ("recommend study --no-run --dtype fp16", "--dtype would do nothing with --no-run"),
    ("recommend study --bpw 4,x", "bits per weight above 0 and at most 64"),
    ("recommend study --floor vqa=101%", "above 0 and at most 1"),
    ("rank study --near 1", "--near takes a share between 0 and 1, such as 0.9"),
    ("compare study export:1", "is neither a study nor STUDY:KEY"),
    ("recommend study --weight vqa=1 --weight vqa=2", "--weight names 'vqa' twice"),
    ("import table.csv --part a=vision --bits b --score s --out new", "--bits would do nothing without --switch"),
    ("import table.csv --part a=vision --score s --kinds A=ff --out new", "--kinds would do nothing without --kind"),
    ("import table.csv --part a=vision --score s --numel vision=0 --out new", "from 1 to 1,000,000,000,000,000"),
    ("sweep MODEL", "still needed: --out"),
    ("sweep MODEL --out new --calib vqa", "unrecognized words: --calib vqa"),
    ("swep MODEL", "VERB is one of 'inspect', 'methods', 'plan', 'sweep'"),
    ("", "still needed: VERB"),
    ("plan MODEL --out new --bpw 1", "no plan fits 1.00 bpw"),
    ("plan MODEL --out new --bpw 6 --gb 1", "--bpw would do nothing beside --gb"),
    ("plan MODEL --out new --path exposed", "scores of single components need the float path"),
    ("plan MODEL --out new --minutes 0", "--minutes takes minutes above 0"),
    ("plan MODEL --out new --trials 1", "from 2 to 100"),
    ("plan MODEL --out new --task retrieval", "cannot search"),
    ("explain MODEL --bits 4", "still needed: --out"),
    ("explain MODEL --out new --plan 1", "--plan would do nothing with a model"),
    ("explain MODEL --out new --scores grams", "unknown score 'grams'"),
    ("explain MODEL --out new --scores gram,fisher --task retrieval", "no answers in words to take a loss of"),
    ("explain study", "still needed: --plan, the number or key of a plan; `sensitivity table study --out plans.csv`"),
    ("explain study --plan 999", "study has no measured plan '999'; plans by number and key: 0 "),
    ("explain study --plan 1 --task caption", "study has not measured caption; choose from vqa"),
    ("explain nowhere --plan 1", "no study at nowhere"),
    ("explain why --plan 1", "no study at why"),
    ("explain why", "why is neither a study nor a model"),
    ("explain study --plan 1 --bits 4", "--bits would do nothing with a study"),
    ("speculate MODEL --activation-bits 16", "--activation-bits takes a whole number from 2 to 8, not '16'"),
    ("speculate MODEL --draft 0", "--draft takes a whole number from 1 to 64, not '0'"),
    ("speculate MODEL --task retrieval", "retrieval has no answers to draft"),
    ("speculate MODEL --method llm-int8 --bits 8", "llm-int8 rounds activations by itself"),
    ("speculate MODEL --calibration vqa", "--calibration would do nothing with --method rtn"),
    ("bench export --n 5", "--n takes a whole number from 6 to 10,000"),
    ("bench export --task vqa --runtime gptq", "unknown runtime 'gptq'; choose from openvino, onnx, onnx-int8, gguf"),
    ("bench study --task vqa", "study is not an export: it has no sensitivity.json"),
    ("profile MODEL", "still needed: --runtime"),
    ("recommend study --ms-per-token 5", "--ms-per-token is about a runtime on this machine; name it too"),
    ("recommend study --ms-per-token 0 --runtime openvino", "--ms-per-token takes milliseconds above 0"),
    ("explain study --plan 1 --failures 3 --calibration-n 5", "--calibration-n would do nothing with --failures"),
    ("explain MODEL --out new --failures 3", "--failures would do nothing with a model"),
    ("failures study --device cpu", "--device would do nothing without --causes"),
    ("failures study --part visoin", "unknown part 'visoin'"),
    ("table study", "still needed: either --out, for a table, or --share"),
    ("table study --out new.csv --share new", "still needed: either --out, for a table, or --share"),
    ("table study --share export", "is already there; choose another --share"),
    ("table study --share export --force", "is no file of a shared study"),
    ("atlas remove study", "takes add or predict, not 'remove'"),
    ("atlas add study --bpw 4", "--bpw would do nothing with add: it is about predictions"),
    ("atlas add study --to table.csv", "an atlas is a file such as runs/atlas.parquet, not table.csv"),
    ("atlas predict MODEL --atlas table.csv", "table.csv is no atlas, or was cut short"),
    ("atlas add study --set damp=1", "--set would do nothing with add: it is about predictions"),
    ("atlas add study --no-symmetric", "--symmetric would do nothing with add: it is about predictions"),
    ("explain study --plan 1 --set damp=1", "--set would do nothing with a study, of which one plan is explained"),
    ("atlas add nowhere", "no study at nowhere"),
    ("atlas predict MODEL", "no atlas at runs/atlas.parquet; `sensitivity atlas add STUDY --to runs/atlas.parquet`"),
    ("atlas predict MODEL --atlas atlas.parquet --task caption", "unknown task of atlas.parquet 'caption'"),
    ("atlas predict MODEL --atlas atlas.parquet --bpw 1", "no plan fits 1.00 bpw"),
    ("atlas predict MODEL --atlas atlas.parquet --attributions export", "has no score called gram"),
    ("rank study --json=1", "ignored explicit argument"),
)  # fmt: skip


class Accepted(Exception):
    """All checks were passed: from here on the work would begin."""


@dataclass(frozen=True)
class Case:
    verb: str
    flag: str
    kind: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.verb} {self.flag} {self.kind}"

    @property
    def why(self) -> str | None:
        """Why this is fine; None where it is not."""
        return FINE.get((self.verb, self.flag, self.kind), FINE.get((self.flag, self.kind)))  # type: ignore[call-overload,no-any-return]


@cache
def verbs() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action.choices for action in cli.parser_of(cli.VERBS)._actions if isinstance(action.choices, dict))
    return dict(found)


def flags() -> Iterator[tuple[str, argparse.Action, str]]:
    """Verb, flag and its longest spelling."""
    for verb, parser in verbs().items():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                yield verb, action, action.option_strings[-1] if action.option_strings else action.dest


def command(verb: str, flag: str, value: str | None, action: argparse.Action) -> tuple[str, ...]:
    """The fitting command of a verb, but with this value for one flag."""
    words = [*OTHER.get((verb, flag), LINES[verb]).split(), *BESIDE.get((verb, flag), "").split()]
    if not action.option_strings:
        place = [one.dest for one in verbs()[verb]._actions if not one.option_strings].index(action.dest)
        words[place] = value if value is not None else words[place]
        return ("--", *words) if (value or "").startswith("-") else tuple(words)
    for other in INSTEAD.get((verb, flag), ()):
        while other in words:
            del words[words.index(other) : words.index(other) + 2]
    if flag in words and (not isinstance(action, argparse._AppendAction) or flag == "--score"):
        place = words.index(flag)
        del words[place : place + 2]
    return (*words, flag) if value is None else (*words, f"{flag}={value}")


def cases() -> Iterator[Case]:
    for verb, action, flag in flags():
        if action.nargs == 0:
            switched = command(verb, flag, None, action)
            yield Case(verb, flag, "a value", command(verb, flag, "yes", action))
            yield Case(verb, flag, "twice", (*switched, flag))
            continue
        assert flag in FITTING, f"{flag} is new: give it a fitting value"
        fitting = OWN.get((verb, flag), FITTING[flag])
        words = command(verb, flag, fitting, action)
        yield Case(verb, flag, "fitting", words)
        if action.option_strings:
            yield Case(verb, flag, "without a value", command(verb, flag, None, action))
            yield Case(verb, flag, "twice", (*words, f"{flag}={fitting}"))
        for kind, value in KINDS.items():
            yield Case(verb, flag, kind, command(verb, flag, value, action))
            if flag in PAIRS:
                yield Case(verb, f"{flag} {PAIRS[flag]}", kind, command(verb, flag, f"{PAIRS[flag]}={value}", action))


CASES = list(cases())
SAME = {(verb, flag): (flag, action.help) for verb, action, flag in flags()}  # what says that two flags are one


def first_of_each() -> Iterator[Any]:
    """All cases; a value that means nothing is slow where an earlier verb has the same flag with the same help."""
    seen = set()
    for case in CASES:
        key = (SAME[case.verb, case.flag.split()[0]], case.flag, case.kind)
        again = case.kind in KINDS and key in seen
        seen.add(key)
        yield pytest.param(case, marks=pytest.mark.slow) if again else case


def test_there_are_many_cases() -> None:
    assert len(CASES) + len(NAMED) > 1000
    assert len({(case.verb, case.flag) for case in CASES}) > 90


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study, an export and a table in it."""
    place = tmp_path_factory.mktemp("flags") / "here"
    (place.parent / "home").mkdir()
    place.mkdir()
    (place / "table.csv").write_text(
        "a,b,c,s,k,on\n" + "".join(f"{i},{j},8,0.{i}{j},x,1\n" for i in (2, 4) for j in (3, 8))
    )
    (place / "why").mkdir()
    scores = [{"component": name, "scheme": Scheme("rtn", 4).to_json(), "score": 0.1} for name in PARTS]
    content = {"title": "attributions", "version": 1, "scores": {"gram": {"values": scores}}}
    (place / "why" / "attributions.json").write_text(json.dumps(content))
    os.chdir(place)
    try:
        assert cli.main(f"sweep {MODEL} --bits 2,4,8 --n 6 --out study".split()) == 0
        shutil.copytree("study", "earlier")
        assert cli.main(["export", "study", "--bpw", "6", "--format", "fake", "--out", "export"]) == 0
        assert cli.main(["atlas", "add", "study", "--to", "atlas.parquet"]) == 0
    finally:
        os.chdir("/")
    return place


@cache
def import_all() -> None:
    """Import every module: one that is first imported while others are replaced would keep what it took from them."""
    for found in pkgutil.walk_packages(sensitivity.__path__, "sensitivity."):
        if not found.name.endswith("__main__"):
            import_module(found.name)


@pytest.fixture
def there(place: Path, scenes_llava: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything is real until the work would begin; and the model is loaded already."""
    import_all()
    from sensitivity.models.loading import load

    def stop(*_: object, **__: object) -> NoReturn:
        raise Accepted

    def loaded(name: str, **how: Any) -> Any:
        return scenes_llava if name == MODEL else load(name, **how)

    for module in ("models.loading", "api.exporting"):
        monkeypatch.setattr(import_module(f"sensitivity.{module}"), "load", loaded)
    for module, name in (
        ("api.sweeping", "begin_sweep"),
        ("measure.forecast.forecast", "forecast_sweep"),
        ("api.recommending", "begin_recommendation"),
        ("api.scoring", "scored"),
        ("api.explaining", "explain_plan"),
        ("measure.speculation", "acceptance"),
        ("api.finding_causes", "begin_causes"),
        ("analysis.reporting.page", "report"),
        ("analysis.importance.estimators", "cross_validated"),
        ("api.exporting", "write"),
        ("api.exporting", "_on_path"),
        ("formats.verification", "_in_fresh_process"),
        ("formats.timing.side_by_side", "in_turn"),
        ("formats.timing.profile", "check_runs_here"),
        ("formats.timing.kept_times", "load_kept_times"),
        ("study.importing.imported_study", "component_map"),
        ("study.sharing.table_file", "write"),
        ("study.sharing.folder", "write"),
        ("cli.verbs.demo", "_run_line"),
    ):
        monkeypatch.setattr(import_module(f"sensitivity.{module}"), name, stop)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place.parent / "home"))
    monkeypatch.setenv("SENSITIVITY_CACHE", str(place.parent / "home" / "cache"))
    return place


def run(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[int | None, str, str]:
    """Status, standard output and error; None where the work would have begun."""
    capsys.readouterr()
    status: int | None = cli.main(words)
    out, err = capsys.readouterr()
    if "unexpected Accepted" in err:
        return None, out, err
    return status, out, err


def everything(place: Path) -> dict[str, int]:
    found, folders = {}, [str(place.parent)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                found[entry.path] = entry.stat(follow_symlinks=False).st_size
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return found


def refused(words: tuple[str, ...], there: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence, after all that must hold of it."""
    before, began = everything(there), time.process_time()
    status, out, err = run((*words[:1], "--json", *words[1:]), capsys)
    assert time.process_time() - began < 5
    assert status == 2, f"{status} {err}"
    assert "Traceback" not in err
    assert "Errno" not in err
    *notes, last = (json.loads(line) for line in err.splitlines())  # every line is an object
    assert all(set(note) == {"note"} for note in notes)
    assert json.loads(out) == last
    assert set(last) == {"error", "exit"}
    assert last["exit"] == 2
    assert len(last["error"]) < 1200
    assert last["error"].isprintable()
    assert everything(there) == before
    return str(last["error"])


REPEATED = {"--tie", "--until"}  # each says one thing more


@pytest.mark.parametrize("case", list(first_of_each()), ids=str)
def test_a_value_that_means_nothing_is_refused_in_a_sentence(
    case: Case, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (case.verb, *case.words)
    switch = not any(word.startswith(f"{case.flag}=") for word in words)
    fine = case.kind == "fitting" or case.why or (case.kind == "twice" and (switch or case.flag in REPEATED))
    if not fine:
        refused(words, there, capsys)
        return
    status, _, err = run(words, capsys)
    assert status in (None, 0), err


@pytest.mark.parametrize(("line", "sentence"), NAMED, ids=[line[:60] for line, _ in NAMED])
def test_what_people_typed_is_answered_with_what_to_type(
    line: str, sentence: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line.replace("MODEL", MODEL).replace("HOME", str(there.parent / "home"))
    words = line.replace("PACKAGE", str(Path(cli.__file__).parents[1])).split()
    words = ["" if word == "''" else word for word in words]
    assert sentence in refused(tuple(words), there, capsys)


@pytest.mark.parametrize("verb", ["sweep", "plan"])
def test_a_study_may_begin_beside_scores_of_its_components(
    verb: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for left in ("journal.log.lock", "queue.lock", "sweep.log"):  # by a killed process, and by the shell
        (there / "why" / left).touch()
    status, _, err = run((*f"{verb} {MODEL} --n 4 --bits 2,4,8 --out why".split(),), capsys)
    assert status is None, err  # the work would begin


DRY = f"sweep {MODEL} --n 4 --bits 4 --out new --dry-run"


@pytest.mark.parametrize(
    "more", ["--dtype fp32", "--dtype bf16", "--dtype fp16", "--dtype float32", "--method gptq", "--method paper-awq"]
)
def test_a_dry_run_takes_what_the_help_spells(more: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(there)
    status, _, err = run(tuple(f"{DRY} {more}".split()), capsys)
    assert status is None, err  # the forecast would begin
    assert everything(there) == before
