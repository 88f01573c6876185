"""What is left after 200 signals at random moments, a stopped database, a full disk, little memory and stale locks.

python -m experiments.benchmarks.killed [--signals 200] [--seed 0] writes reports/killed.md

Each command is `sensitivity.cli.main.main`, forked from a process that has imported the libraries already, so that the
random moments fall into the work and not into the imports. What it leaves is compared with what the same commands
left undisturbed: tables number by number, answers example by example, files byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiments.benchmarks.cut_off import machine
from experiments.small.disturbed import SIGNALS, SWEEP, WHOLE, Command, Found, Undisturbed, leftovers, same_study
from sensitivity.spec.files import discard

ROOT = Path(__file__).parents[2]
SHARES = {"import": 0.2, "launchers": 0.35, "export": 0.15, "workers": 0.1, "recommend": 0.1, "report": 0.1}


class Hits:
    """Signals still to be sent to a place; each goes to a process that lives, at a moment drawn from its work."""

    def __init__(self, found: Found, count: int, seed: int) -> None:
        self.found, self.draw = found, random.Random(seed)
        self.left = [SIGNALS[i % 3] for i in range(count)]
        self.draw.shuffle(self.left)

    def hit(self, commands: list[Command], seconds: float, anyone: bool = False) -> bool:
        """Wait and send the next signal to one of them, or to any process of their groups; False: all had ended."""
        until = time.monotonic() + self.draw.uniform(0, seconds)
        while time.monotonic() < until and not all(one.ended() for one in commands):
            time.sleep(0.005)
        command = self.draw.choice(commands)
        if not command.ended():
            who = self.draw.choice(command.members() or [command.pid]) if anyone else command.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(who, self.left[-1])
                name = self.left.pop().name
                self.found.sent[name] = self.found.sent.get(name, 0) + 1
                return True
        return False


def sweeps(plain: Undisturbed, folder: Path, found: Found, hits: Hits, count: int, *words: str) -> None:
    """`count` launchers on one study; whoever is gone is started again, until no signals are left."""
    for number in itertools.count():
        out = folder / f"study{number}"
        launch = lambda out=out: Command(folder, *SWEEP.split(), str(out), *words)  # noqa: E731
        every = commands = [launch() for _ in range(count)]
        seconds = plain.seconds["sweep"] / count  # so that several are hit before a study is complete
        while hits.left and hits.hit(commands, seconds, anyone=True):
            time.sleep(0.05)
            commands = [launch() if one.ended() else one for one in commands]
            every = [*every, *(one for one in commands if one not in every)]
        for one in every:
            one.wait()
        orphans = [pid for one in every for pid in one.members()]
        until = time.monotonic() + 10
        while orphans and time.monotonic() < until:
            orphans = [pid for one in every for pid in one.members()]
        found.check(not orphans, f"{out}: processes {orphans} work on without their launcher")
        last = launch()
        found.check(last.wait() == 0, f"{out}: {last.said()}")
        same_study(found, out, plain.bare)
        discard(out, ours=True)
        if not hits.left:
            return


def writer(name: str, plain: Undisturbed, folder: Path, found: Found, hits: Hits) -> None:
    """A command that writes one thing: whole or absent after each signal, and right when it was left alone."""
    right = plain.study if name == "recommend" else plain.folder / name
    for number in itertools.count():
        out = folder / f"again{number}"
        if name == "recommend":
            shutil.copytree(plain.bare, out)
        killed = True
        while killed and hits.left:
            command = Command(folder, *plain.words(name, out))
            killed = hits.hit([command], plain.seconds[name])
            command.wait()
            WHOLE[name](found, out, right, False)
        if name == "import" and out.exists():  # killed when all was done: whole, as was just checked
            discard(out, ours=True)
        command = Command(folder, *plain.words(name, out))
        found.check(command.wait() == 0, f"{out}: {command.said()}")
        WHOLE[name](found, out, right, True)
        if name == "export":  # the next export into a folder clears what killed ones left there
            found.check(not (some := leftovers(folder)), f"{out}: {some} were left beside it")
        discard(out, ours=True)
        if not hits.left:
            return


def signals(
    plain: Undisturbed, count: int, seed: int, shares: Mapping[str, float] = SHARES
) -> Iterator[dict[str, Found]]:
    """Every place with its share of the signals, one after the other."""
    for number, (name, share) in enumerate(shares.items()):
        found = Found()
        hits = Hits(found, round(count * share), seed + number)
        with tempfile.TemporaryDirectory() as folder:
            if name == "workers":
                sweeps(plain, Path(folder), found, hits, 1, "--workers", "2")
            elif name == "launchers":
                sweeps(plain, Path(folder), found, hits, 2)
            else:
                writer(name, plain, Path(folder), found, hits)
        print(name, found, flush=True)
        yield {name: found}


HEAD = """# Killed, cut off, full

`python -m experiments.benchmarks.killed --signals {count} --seed {seed}`: {minutes:.0f} minutes on
{cores} cores that other programs used as well. Undisturbed, the commands take {seconds} (embedded model, 9 plans, 20
examples).
Every comparison is with what the same commands left undisturbed: tables number by number, answers example by example,
files byte by byte (dates and paths apart). A comparison is made at the end of each study or file, and after each
signal for what has to be whole or absent.

| place | what was done to it | compared | differences |
|---|---|---|---|
"""


def write(plain: Undisturbed, found: dict[str, Found], count: int, seed: int, minutes: float) -> Path:
    seconds = ", ".join(f"{name} {taken:.0f} s" for name, taken in plain.seconds.items())
    text = HEAD.format(count=count, seed=seed, minutes=minutes, cores=os.cpu_count(), seconds=seconds)
    for name, one in found.items():
        sent = ", ".join(f"{number} {what}" for what, number in sorted(one.sent.items()))
        text += f"| {name} | {sent} | {one.rounds} | {len(one.wrong) or 'none'} |\n"
    total = sum(one.sent.get(name.name, 0) for one in found.values() for name in SIGNALS)
    text += f"\n{total} signals in all.\n" + "".join(f"\n* {what}" for one in found.values() for what in one.wrong)
    target = ROOT / "reports" / "killed.md"
    target.write_text(text.rstrip() + "\n")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plain, found = Undisturbed(Path(folder)), {}
        # written after each place: the next one may end this process too
        for more in itertools.chain(machine(plain, args.seed), signals(plain, args.signals, args.seed)):
            found |= more
            report = write(plain, found, args.signals, args.seed, (time.monotonic() - began) / 60)
        print(report)
