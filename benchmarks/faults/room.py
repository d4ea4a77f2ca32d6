"""No room on the disk, and folders that may not be written: our error, nothing lost, and all well afterwards."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from dckt.errors import DcktError
from dckt.index import Index
from faults import mounts, samples
from faults.damage import files_of
from faults.kills import change
from faults.pool import forked, run_cases
from faults.truth import Truth, difference

LIMIT, DISK, READ_ONLY, PERMISSIONS = "file size limit", "full tmpfs", "read-only mount", "no permission"
KINDS = (LIMIT, DISK, READ_ONLY, PERMISSIONS)
_DISK = 3 * 2**20
_ATTEMPTS = 12
Answer = str | None


@dataclass(frozen=True)
class Trial:
    """One case.

    Attributes:
        kind: one of :data:`KINDS`.
        done: changes that went through while there was no room.
        refused: changes, or openings, that raised our error.
        wrong: what is wrong, or None.
        skipped: why the system did not allow the trial, or None.
    """

    kind: str
    done: int = 0
    refused: int = 0
    wrong: str | None = None
    skipped: str | None = None


def check(cases: Iterable[int], *, seed: int, workers: int, base: Path | None = None) -> list[tuple[int, Trial]]:
    """Runs trials; the kinds take turns.

    Args:
        cases: their numbers.
        seed: of the whole run.
        workers: child processes.
        base: where the folders are made; others than its owner must be able to reach it.
    """
    trials = []
    for finished in run_cases(partial(run_case, seed, base), cases, workers=workers, seconds=120.0):
        trial = finished.value
        if finished.how != "returned":
            trial = Trial(KINDS[finished.case % len(KINDS)], wrong=f"{finished.how}: {finished.value}")
        trials.append((finished.case, trial))
    return trials


def run_case(seed: int, base: Path | None, case: int) -> Trial:
    """One trial; call it in a process without threads."""
    random = Random(f"{seed}/{case}")
    kind = KINDS[case % len(KINDS)]
    trials: dict[str, Callable[[Path, Random], Trial]] = {
        LIMIT: _limit,
        READ_ONLY: _read_only,
        PERMISSIONS: _permissions,
    }
    with tempfile.TemporaryDirectory(dir=base) as scratch:
        Path(scratch).chmod(0o755)
        folder = Path(scratch, "index")
        if kind == DISK:  # its mounts go with its process
            return forked(partial(_disk, folder, random))
        return trials[kind](folder, random)


# --- no room ---


def _limit(folder: Path, random: Random) -> Trial:
    """A limit on the size of every file; the process then ends without closing anything."""
    truth = _filled(folder, random)
    largest = max(file.stat().st_size for file in files_of(folder))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    room = random.choice((0, 4096, largest // 2, largest, largest + random.randrange(200_000)))

    def work() -> tuple[Truth, int, int, Answer]:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
        opened = None
        if random.random() < 0.7:
            opened = Index.open(folder, threads=1)
        limit((room, hard))
        return _without_room(folder, opened, random, truth, lambda: limit((hard, hard)))

    left, done, refused, wrong = forked(work)
    return Trial(LIMIT, done, refused, wrong or _opened(folder, left))


def _disk(folder: Path, random: Random) -> Trial:
    """A small filesystem with a ballast in it."""
    folder.parent.mkdir(exist_ok=True)
    try:
        mounts.enter_namespace()
        mounts.mount_small(folder.parent, _DISK)
    except OSError as error:
        return Trial(DISK, skipped=str(error))
    truth = _filled(folder, random)
    ballast = folder.parent / "ballast"
    opened = Index.open(folder, threads=1) if random.random() < 0.7 else None
    statistics = os.statvfs(folder)
    free = statistics.f_bavail * statistics.f_frsize
    keep = random.choice((0, 4096, 40_000, random.randrange(300_000)))
    ballast.write_bytes(bytes(max(0, free - keep)))
    left, done, refused, wrong = _without_room(folder, opened, random, truth, ballast.unlink)
    return Trial(DISK, done, refused, wrong or _opened(folder, left))


def _without_room(
    folder: Path, index: Index | None, random: Random, truth: Truth, make_room: Callable[[], object]
) -> tuple[Truth, int, int, Answer]:
    """Changes until several were refused, then again with room; what is there now, and what was wrong."""
    done = refused = 0
    if index is None:
        try:
            index = Index.open(folder, threads=1)
        except DcktError:
            make_room()
            return truth, 0, 1, None
    for _ in range(_ATTEMPTS):
        operation = change(random, truth)
        try:
            operation.run(index)
        except DcktError:
            refused += 1
        else:
            truth = operation.after
            done += 1
        if wrong := difference(index, truth, samples.queries(2), thorough=False):
            return truth, done, refused, f"without room, after {operation.name}: {wrong}"
    make_room()
    for _ in range(3):
        operation = change(random, truth)
        operation.run(index)
        truth = operation.after
    wrong = difference(index, truth, samples.queries(2))
    return truth, done, refused, wrong and f"with room again: {wrong}"


# --- not to be written ---


def _read_only(folder: Path, random: Random) -> Trial:
    """A folder on a filesystem that is mounted read-only."""
    truth = _filled(folder, random)

    def work() -> Trial:
        try:
            mounts.enter_namespace()
            mounts.mount_read_only(folder.parent)
        except OSError as error:
            return Trial(READ_ONLY, skipped=str(error))
        return _not_writable(READ_ONLY, folder, truth)

    trial = forked(work)
    return trial if trial.wrong or trial.skipped else _again(trial, folder, truth)


def _permissions(folder: Path, random: Random) -> Trial:
    """A folder and files without permission to write, as another user than root."""
    truth = _filled(folder, random)
    for path in (folder, *files_of(folder)):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work() -> Trial:
        if os.getuid() == 0:
            mounts.become_nobody()
        return _not_writable(PERMISSIONS, folder, truth)

    trial = forked(work)
    for path in (folder, *files_of(folder)):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return trial if trial.wrong or trial.skipped else _again(trial, folder, truth)


def _not_writable(kind: str, folder: Path, truth: Truth) -> Trial:
    """It opens and answers right, or is refused; a change is refused. Nothing in the folder changes."""
    before = {file: file.read_bytes() for file in files_of(folder)}
    refused, wrong = 0, None
    try:
        with Index.open(folder, threads=1) as index:
            wrong = difference(index, truth, samples.queries(2))
            try:
                samples.add(index, truth, "text", samples.items("text", 2, 1, first=5000))
                wrong = wrong or "an add went through"
            except DcktError:
                refused += 1
    except DcktError:
        refused += 1
    if {file: file.read_bytes() for file in files_of(folder)} != before:
        wrong = wrong or "the folder changed"
    return Trial(kind, 0, refused, wrong)


def _again(trial: Trial, folder: Path, truth: Truth) -> Trial:
    return Trial(trial.kind, trial.done, trial.refused, _opened(folder, truth))


# --- both ---


def _filled(folder: Path, random: Random) -> Truth:
    """An index with some history, closed or as a process left it that was killed."""
    truth = Truth({})
    with samples.create(folder, kind=random.choice(("hnsw", "exact"))) as index:
        for _ in range(6):
            operation = change(random, truth)
            operation.run(index)
            truth = operation.after
        left = folder.with_name("left")
        shutil.copytree(folder, left)
    if random.random() < 0.5:
        shutil.rmtree(folder)
        left.rename(folder)
    return truth


def _opened(folder: Path, truth: Truth) -> Answer:
    """With room, and written to once more."""
    with Index.open(folder, threads=1) as index:
        if wrong := difference(index, truth, samples.queries(2)):
            return f"opened with room: {wrong}"
        truth = samples.add(index, truth, "text", samples.items("text", 2, 1, first=8000))
        wrong = difference(index, truth, samples.queries(2), thorough=False)
        return wrong and f"added with room: {wrong}"
