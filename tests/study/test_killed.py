"""Three signals at random moments, and stale locks; all 200 are in experiments/benchmarks/killed.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# in a process of its own, which forks: a test's process has threads
SHORT = """
import json, sys, tempfile
from pathlib import Path
from experiments.benchmarks import cut_off, killed
from experiments.small.disturbed import Undisturbed
with tempfile.TemporaryDirectory() as folder:
    plain = Undisturbed(Path(folder), {"launchers"})
    found = dict(*killed.signals(plain, 3, 0, {"launchers": 1}))
    found |= dict(*cut_off.machine(plain, 0, ["stale locks (Optuna issue 5921)"]))
print(json.dumps({name: vars(one) for name, one in found.items()}))
"""


@pytest.mark.slow  # quick ones: a worker is killed in tests/cli/test_cli.py, a launcher in tests/study/test_workers.py
def test_whatever_was_killed_the_answers_are_those_of_an_undisturbed_run() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: one["wrong"] for name, one in found.items()} == {name: [] for name in found}
    assert all(one["rounds"] for one in found.values())
    signals = sum(number for one in found.values() for what, number in one["sent"].items() if what.startswith("SIG"))
    assert signals == 3
