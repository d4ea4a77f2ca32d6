"""A writer is killed at a random moment, again and again; what it acknowledged is there, and nothing is half there."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from dckt.index import Index
from faults import samples
from faults.pool import run_cases
from faults.truth import Stored, Truth, difference

KILLS_IN_A_FOLDER = 5
_DONE = b"."  # what a writer tells for each operation
_TEXTS = 60  # about how many items of a medium there are at any time


@dataclass(frozen=True)
class Operation:
    """One change: what it is called, how to make it, and the truth after it."""

    name: str
    run: Callable[[Index], object]
    after: Truth


@dataclass(frozen=True)
class Killed:
    """One kill.

    Attributes:
        during: the operation that was not acknowledged, or ``open`` where none was.
        acknowledged: how many operations were.
        kept: whether the one that was not acknowledged is there.
        wrong: what is wrong, or None.
    """

    during: str
    acknowledged: int
    kept: bool
    wrong: str | None


def change(random: Random, truth: Truth) -> Operation:
    """A change that fits what there is: additions, replacements and deletions of 1 to 40 items, and compaction."""
    medium = random.choice(("text", "image"))
    there = truth.ids(medium)
    names = ("add", "upsert", "delete", "compact")
    name = random.choices(names, (4, 3, 6 if len(there) > _TEXTS else 2, 1))[0]
    size = random.choice((1, 7, 40))
    if name == "delete" and there:
        gone = random.sample(there, min(size, len(there)))
        return Operation(name, partial(Index.delete, medium=medium, ids=gone), truth.without(medium, gone))
    if name == "compact":
        return Operation(name, Index.compact, truth)
    new = samples.items(medium, size, random.randrange(10**6), first=random.choice((0, 50)))
    if name == "upsert":
        return Operation(name, partial(_add, medium=medium, new=new, upsert=True), truth.with_items(medium, new))
    start = 1 + max((int(item[1:]) for item in there), default=0)
    fresh = {f"{medium[0]}{start + place:04d}": stored for place, stored in enumerate(new.values())}
    return Operation("add", partial(_add, medium=medium, new=fresh), truth.with_items(medium, fresh))


def operations(seed: str, truth: Truth) -> Iterator[Operation]:
    """An endless row of changes that a seed decides, from a truth on."""
    random = Random(seed)
    while True:
        operation = change(random, truth)
        truth = operation.after
        yield operation


def _add(index: Index, *, medium: str, new: dict[str, Stored], upsert: bool = False) -> None:
    samples.add(index, Truth({}), medium, new, upsert=upsert)


def check(cases: Iterable[int], *, seed: int, workers: int, base: Path | None = None) -> list[tuple[int, Killed]]:
    """Several kills in one folder a case; gives every kill with the number of its case.

    Args:
        cases: their numbers; each is :data:`KILLS_IN_A_FOLDER` kills.
        seed: of the whole run. The moments are the clock's and cannot be repeated.
        workers: child processes, each with a writer of its own.
        base: where the folders are made.
    """
    found = []
    for finished in run_cases(partial(run_case, seed, base), cases, workers=workers, seconds=120.0):
        if finished.how == "returned":
            found += [(finished.case, killed) for killed in finished.value]
        else:
            found.append((finished.case, Killed("reopening", 0, False, f"{finished.how}: {finished.value}")))
    return found


def run_case(seed: int, base: Path | None, case: int) -> list[Killed]:
    """Kills the writers of one folder, in this process, which may have no threads."""
    random = Random(f"{seed}/{case}")
    kills: list[Killed] = []
    with tempfile.TemporaryDirectory(dir=base) as scratch:
        folder = Path(scratch, "index")
        samples.create(folder, kind=("hnsw", "hnsw", "exact")[case % 3]).close()
        truth = Truth({})
        for number in range(KILLS_IN_A_FOLDER):
            script = f"{seed}/{case}/{number}"
            acknowledged = _killed_writer(folder, script, truth, random)
            row = operations(script, truth)
            done = [next(row) for _ in range(acknowledged)]
            coming = next(row)
            before = done[-1].after if done else truth
            with Index.open(folder, threads=1) as index:
                wrong = difference(index, before, samples.queries(2))
                kept = wrong is not None
                if kept and (others := difference(index, coming.after, samples.queries(2))) is None:
                    wrong = None
                elif kept:
                    wrong = f"after {acknowledged} operations: {wrong}; after the next, {coming.name}: {others}"
            during = coming.name if acknowledged else "open or the first"
            kills.append(Killed(during, acknowledged, kept, wrong))
            if wrong:
                break
            truth = coming.after if kept else before
    return kills


def _killed_writer(folder: Path, script: str, truth: Truth, random: Random) -> int:
    """Forks a writer and kills it; how many operations it acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            os.close(reading)
            _write(folder, script, truth, writing)
        os._exit(1)  # only after an error: the row of operations has no end
    os.close(writing)
    told = b""
    for _ in range(random.choice((0, 1, 1, 5, 20))):
        told += os.read(reading, 1)
    time.sleep(random.uniform(0, random.choice((0.002, 0.01, 0.1))))
    os.kill(child, signal.SIGKILL)
    # What was written before the kill and not read yet was acknowledged too.
    while more := os.read(reading, 65536):
        told += more
    os.close(reading)
    os.waitpid(child, 0)
    done = len(told) - len(told.lstrip(_DONE))
    if told[done:]:
        raise AssertionError(f"the writer failed after {done} operations: {told[done:].decode()}")
    return done


def _write(folder: Path, script: str, truth: Truth, pipe: int) -> None:
    try:
        with Index.open(folder, threads=1) as index:
            for operation in operations(script, truth):
                operation.run(index)
                os.write(pipe, _DONE)
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())
        raise
