"""Workers on a Ray cluster: actors that take plans from the study's queue; lost ones are replaced."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sensitivity.cli.processes import workers
from sensitivity.spec.errors import Notice, UserError, reason
from sensitivity.spec.fields import quoted

if TYPE_CHECKING:
    from sensitivity.measure.loop import Step
    from sensitivity.study.owner import Owner
    from sensitivity.study.study import Study

LIVES = 3  # how many actors per worker may be lost before the sweep fails
PAUSE = 0.5  # seconds between two looks at the queue


def sweep_on_ray(args: argparse.Namespace, show: Callable[[Iterator[Step], Study], None]) -> Study:
    """Start the actors, and show the progress of the study until its queue is empty."""
    ray = _ray()
    share = {"num_gpus": 1} if args.device.startswith("cuda") else {"num_cpus": max(1, _cores(ray) // args.workers)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray prints lost workers there; a Notice reports them
            actors = _Actors(ray, args, share)
            study = actors.study()
            show(actors.watch(study), study)
        return study
    finally:
        ray.shutdown()


def check() -> None:
    """Raise an error if Ray is not installed."""
    if find_spec("ray") is None:
        raise UserError("--executor ray needs Ray: pip install 'vlm-sensitivity[ray]'")


def _ray() -> ModuleType:
    """Ray, connected to the cluster of RAY_ADDRESS or started on this machine."""
    check()
    import ray

    # the default of Ray 2.60: an actor without a GPU keeps CUDA_VISIBLE_DEVICES as it is; some earlier versions print a
    # warning unless this is set
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # join a running cluster only if RAY_ADDRESS names it, never one that Ray happens to find
    where = os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    try:
        ray.init(where, include_dashboard=False, **quiet)
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS is {quoted(where)} ({reason(error)}); unset it to run on this machine") from error
    return ray


def _cores(ray: ModuleType) -> int:
    return int(ray.cluster_resources().get("CPU", 1))


class _Actors:
    """The actors and their pending results; an actor that dies is replaced, and its plans are released."""

    def __init__(self, ray: ModuleType, args: argparse.Namespace, share: dict[str, int]) -> None:
        self.ray, self.args, self.out = ray, args, Path(args.out)
        self.worker = ray.remote(max_restarts=0, **share)(RayWorker)
        self.lives = LIVES * args.workers
        self.at_work: dict[object, tuple[object, object]] = {}  # Ray's reference to the result -> (actor, its identity)
        self.lost: list[Owner] = []
        for _ in range(args.workers):
            self._start()

    def _start(self) -> None:
        actor = self.worker.remote()
        # asked now, since a dead actor cannot answer; the queue has its plans under this identity
        identity = actor.identity.remote()
        self.at_work[actor.run.remote(list(self.args.argv), str(Path.cwd()))] = (actor, identity)

    def replace_lost(self, seconds: float = PAUSE) -> None:
        """Wait a moment, replace lost actors, and raise the error of one that failed."""
        from ray.exceptions import RayActorError

        ended, _ = self.ray.wait(list(self.at_work), timeout=seconds)
        for promise in ended:
            actor, identity = self.at_work.pop(promise)
            try:
                if error := self.ray.get(promise):
                    raise UserError(error)
            except RayActorError:
                with contextlib.suppress(RayActorError):  # it died before it could answer, so it ran nothing
                    self.lost.append(self.ray.get(identity))
                self.lives -= 1
                warnings.warn("a worker was lost; the other workers run its plans", Notice, stacklevel=2)
                if self.lives < 0:
                    raise UserError("too many workers were lost; Ray's logs say why") from None
                self._start()
            del actor

    def study(self) -> Study:
        """The study, as soon as an actor has created it."""
        from sensitivity.study.study import Study

        while self.at_work:
            self.replace_lost()
            with contextlib.suppress(UserError):
                return Study(self.out)
        return Study(self.out)

    def watch(self, study: Study) -> Iterator[Step]:
        """Steps, made from what the actors stored since the last look at the study."""
        from sensitivity.measure.loop import Step

        before = 0
        while True:
            # not in replace_lost(): when the first actors are lost, the study may not exist yet
            for identity in self.lost:
                study.release_lost(identity)
            self.lost.clear()
            measured = study.measured()
            if measured:
                latest = max(measured, key=lambda trial: str(trial.time))
                images = latest.images or 0
                done, left = study.progress(images)
                if done != before:
                    new, before = done - before, done
                    scores = {task: score["mean"] for task, score in latest.scores.items()}
                    seconds, finished = latest.seconds or 0.0, latest.state.is_finished()
                    yield Step(latest.plan, scores, seconds, finished, done, left, images, max(new, 1))
            if not self.at_work:
                return
            self.replace_lost()


class RayWorker:
    """A Ray actor that runs the same command as a worker process does."""

    def identity(self) -> Owner:
        """The identity under which the queue knows this actor's process."""
        from sensitivity.study.owner import this_process

        return this_process()

    def run(self, argv: list[str], folder: str) -> str | None:
        """Run the command; returns the error that ended it, or None."""
        os.chdir(folder)
        os.environ[workers.CHILD] = "1"
        output, argv_before = io.StringIO(), sys.argv
        sys.argv = ["sensitivity", *argv, "--json"]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            try:
                # in the actor's own process, not a child's: the queue's identity and Ray's GPU are this process's
                runpy.run_module("sensitivity", run_name="__main__")
                status: object = 0
            except SystemExit as end:
                status = end.code
            finally:
                sys.argv = argv_before
        return str(json.loads(output.getvalue())["error"]) if status else None
