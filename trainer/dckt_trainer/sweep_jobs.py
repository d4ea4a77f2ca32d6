"""The runs of a sweep: one after another in this process, or several side by side in processes of their own.

The first run of a group pretrains, and the others of the group take its pretraining over.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from dckt_trainer.config import load_config
from dckt_trainer.data.corpus import OnBadPair
from dckt_trainer.progress import Reporter
from dckt_trainer.runs import Run, open_run
from dckt_trainer.train import resume, train

POLL_SECONDS = 0.2
GRACE_SECONDS = 20.0
Poll: TypeAlias = Callable[[], str | None]  # None while the run goes on, then "" or why it failed


@dataclass(frozen=True)
class Options:
    """How runs are made, which decides nothing that the table shows; see :func:`dckt_trainer.train.train`."""

    device: str = "auto"
    cache: Path | None = None
    on_bad_pair: OnBadPair = "raise"


@dataclass(frozen=True)
class Job:
    """One run. Jobs of one group agree in all that pretraining depends on."""

    path: Path
    log: Path
    source: str | None
    target: str
    preset: str
    changes: tuple[str, ...]
    group: Hashable = field(hash=False)

    @property
    def run(self) -> Run | None:
        """The run, where it is complete."""
        run = open_run(self.path) if (self.path / "run.json").exists() else None
        return run if run and run.complete else None


Start: TypeAlias = Callable[[Job, Path | None], Poll]


def run_jobs(
    jobs: Sequence[Job], options: Options, processes: int, *, keep_models: bool, reporter: Reporter
) -> dict[Path, str]:
    """Runs what is not complete.

    Args:
        jobs: of one group the first that is run pretrains.
        options: see :class:`Options`.
        processes: so many at a time; 1 is this process.
        keep_models: models and checkpoints of complete runs stay.
        reporter: told how far the work is.

    Returns:
        Why runs failed, in a line, by run folder.
    """
    waiting = [job for job in jobs if job.run is None]
    bases = {job.group: job.path for job in reversed(jobs) if job.run and job.run.checkpoints.exists()}
    failures: dict[Path, str] = {}
    running: dict[Job, Poll] = {}
    total, begun = len(waiting), 0
    reporter.say(f"{len(jobs)} runs, {len(jobs) - total} of them complete")
    with _starter(options, processes, reporter) as start:
        while waiting or running:
            while len(running) < processes and (job := _next(waiting, running, bases)):
                waiting.remove(job)
                begun += 1
                reporter.say(f"run {begun} of {total}: {job.path.name}")
                if not (job.path / "run.json").exists():  # a kill may leave a folder that is no run yet
                    _delete(job.path)
                running[job] = start(job, bases.get(job.group))
            for job, poll in list(running.items()):
                failure = poll()
                if failure is None:
                    continue
                del running[job]
                if failure:
                    failures[job.path] = failure
                    reporter.say(f"{job.path.name} failed: {failure}")
                    continue
                if processes > 1:
                    reporter.say(f"{job.path.name} is complete")
                bases.setdefault(job.group, job.path)
                if not keep_models:
                    _prune(jobs, bases)
            if running:
                time.sleep(POLL_SECONDS)
    if not keep_models:
        _prune(jobs, bases)
    return failures


def _next(waiting: Sequence[Job], running: Mapping[Job, Poll], bases: Mapping[Hashable, Path]) -> Job | None:
    """The first job that need not wait for another one's pretraining."""
    pretraining = [job.group for job in running]
    return next((job for job in waiting if job.group in bases or job.group not in pretraining), None)


def _prune(jobs: Sequence[Job], bases: Mapping[Hashable, Path]) -> None:
    """Deletes models of complete runs, and checkpoints that no other run of their group will ask for."""
    groups = defaultdict(list)
    for job in jobs:
        groups[job.group].append(job)
    for group, members in groups.items():
        done = all(job.run for job in members)
        for job in members:
            if job.run:
                shared = job.path == bases.get(group) and not done
                for name in ("source", "target", *(() if shared else ("checkpoints",))):
                    _delete(job.path / name)


def _delete(folder: Path) -> None:
    """Deletes a folder; a kill leaves nothing under its name, or all."""
    aside = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(aside, ignore_errors=True)  # from a kill
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _starter(options: Options, processes: int, reporter: Reporter) -> Iterator[Start]:
    """A function that starts a job. When the block is left early, processes that still run are ended."""
    if processes == 1:
        yield lambda job, base: _run_here(job, base, options, reporter)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    children: list[subprocess.Popen[bytes]] = []

    def start(job: Job, base: Path | None) -> Poll:
        job.log.parent.mkdir(exist_ok=True)
        with job.log.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "dckt_trainer", *_arguments(job, base, options)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        children.append(child)
        return lambda: _ended(child, job.log)

    try:
        yield start
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)  # not SIGTERM: Python then cleans up on its way out
        for child in children:
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _run_here(job: Job, base: Path | None, options: Options, reporter: Reporter) -> Poll:
    failure = ""
    job.log.unlink(missing_ok=True)  # of an earlier try
    try:
        if (job.path / "run.json").exists():
            resume(job.path, device=options.device, cache=options.cache, reporter=reporter)
        else:
            train(
                job.source,
                job.target,
                job.path,
                load_config(job.preset, job.changes),
                **dataclasses.asdict(options),
                pretrained_from=base,
                reporter=reporter,
            )
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the runs that follow
        job.log.parent.mkdir(exist_ok=True)
        job.log.write_text(traceback.format_exc(), encoding="utf-8")
        failure = f"{str(error).partition(chr(10))[0] or type(error).__name__} ({job.log})"
    return lambda: failure


def _arguments(job: Job, base: Path | None, options: Options) -> list[str]:
    """What `dckt-train` is told for a job."""
    how = ["--device", options.device, *(["--cache", str(options.cache)] if options.cache else [])]
    if (job.path / "run.json").exists():
        return ["--resume", str(job.path), *how]
    return [
        *(["--source", job.source] if job.source else []),
        *["--target", job.target, "--out", str(job.path), "--preset", job.preset],
        *[word for change in job.changes for word in ("--set", change)],
        *(["--pretrained-from", str(base)] if base else []),
        *["--on-bad-pair", options.on_bad_pair, *how],
    ]


def _ended(child: subprocess.Popen[bytes], log: Path) -> str | None:
    code = child.poll()
    if not code:
        return None if code is None else ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was printed"])[-1] + f" (exit code {code}, {log})"
