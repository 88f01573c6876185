"""Several methods in one search: which schemes there are, which plans, and what is refused."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest

from sensitivity.analysis.search.plan_lists import plans
from sensitivity.analysis.search.search_space import SearchSpace
from sensitivity.cli.main import main
from sensitivity.quantize.scheme_settings import schemes_of
from sensitivity.spec.errors import UserError
from sensitivity.study.study import Study

MODEL = "embedded:scenes-llava"


def test_each_method_has_the_widths_and_settings_that_it_takes() -> None:
    found = schemes_of(["gptq", "awq", "nf4"], [1, 4], damp=0.1, group=32)
    assert [str(one) for one in found] == ["gptq:1", "gptq:4", "awq:4", "nf4:4"]
    assert found[0]["damp"] == 0.1
    assert found[2].get("damp") is None
    assert [one.group for one in found] == [32, 32, 32, 64]
    assert schemes_of(["gptq"], [4]) == [schemes_of(["gptq", "nf4"], [4])[0]]


@pytest.mark.parametrize(
    ("methods", "bits", "how", "message"),
    [
        (["gptq", "gtpq"], [4], {}, "unknown method 'gtpq'.*did you mean gptq"),
        (["gptq", "nf4"], [3], {}, "nf4 takes none of the widths 3; leave it out of --method"),
        (["gptq", "nf4"], [4], {"dmap": 1}, "unknown setting of gptq and nf4 'dmap'.*did you mean damp"),
        (["gptq"], [9], {}, "gptq takes 1 to 8 bits, not 9"),
    ],
)
def test_what_fits_none_is_refused(methods: list[str], bits: list[int], how: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schemes_of(methods, bits, **how)


def test_every_search_mixes_methods_across_parts() -> None:
    parts, schemes = planted.parts(), schemes_of(["gptq", "nf4"], [3, 4])
    for how in ("grid", "random"):
        found = plans(parts, schemes, how, trials=60)
        assert not callable(found)
        methods = [{one.method for _, one in plan.schemes if one} for plan in found]
        assert {"gptq", "nf4"} in methods
    # what samplers choose from: native and every scheme of both methods, for each part
    assert all(len(options) == 4 for options in SearchSpace.of(parts, schemes).joint.choices)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "study"
    words = f"sweep {MODEL} --bits 4 --method rtn,nf4 --search frontier --trials 6 --n 8 --out {study}"
    assert main(words.split()) == 0, capsys.readouterr().err
    measured = [trial.plan for trial in Study(study).trials()]
    assert len(measured) == 6
    assert {one.method for plan in measured for _, one in plan.schemes if one} == {"rtn", "nf4"}
    assert main(f"sweep {MODEL} --bits 3 --method rtn,nf4 --out {study} --dry-run".split()) != 0
    assert "nf4 takes none of the widths 3" in capsys.readouterr().err
