"""Every public name has an example, and the examples run one after the other as the Python reference shows them."""

from __future__ import annotations

import doctest
import inspect
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import readme

import sensitivity
from sensitivity.formats import verification
from sensitivity.formats.writing import manifest


def examples(name: str) -> doctest.DocTest | None:
    """The examples in a docstring, which may use what those before it have made."""
    thing = getattr(sensitivity, name)
    text = inspect.getdoc(thing) or ""
    found = doctest.DocTestParser().get_doctest(text, {}, name, inspect.getsourcefile(thing), None)
    return found if found.examples else None


def test_the_reference_shows_every_public_name_once() -> None:
    assert sorted(readme.PUBLIC) == sensitivity.__all__


def in_this_process(folder: Path, facts: manifest.Manifest, device: str, runtime: str) -> pd.DataFrame:
    """What `verify` asks a fresh process, of which tests/formats/test_verify.py has one: the same answers, sooner."""
    target = Path("rows.parquet")
    verification.rerun(str(folder), str(target), facts["dtype"], facts["trial"], device, runtime)
    return pd.read_parquet(target)


def test_every_example_says_what_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verification, "_in_fresh_process", in_this_process)
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in readme.PUBLIC:
        found = examples(name)
        assert found is not None, f"{name} has no example"
        found.globs = names
        said: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            outcome = runner.run(found, out=said.append, clear_globs=False)
        assert outcome.failed == 0, "".join(said)
