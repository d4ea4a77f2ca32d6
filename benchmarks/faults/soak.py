"""Many threads of several processes add, replace, delete and search one index; every answer is checked afterwards.

Each item belongs to one thread of one process, and an item's vector and metadata follow from its id and its version, so
the notes of all threads together say which version could be found at any moment: one clock counts for all processes.

Shape letters: V versions of items, D width.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from dckt.index import Index
from faults import samples
from faults.truth import TOLERANCE, Stored, Truth, Vector, difference

_CONTEXT = multiprocessing.get_context("spawn")
_MEDIUM = "text"
_K = 10
_SAMPLES_A_SECOND = 4
_NEVER = float("inf")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_QUERIES = 64
_TOGETHER = 256


@dataclass(frozen=True)
class Plan:
    """How hard to try.

    Attributes:
        processes: that open the index.
        threads: of each.
        seconds: how long.
        kind: of the index.
        items: about how many of them a thread keeps in the index.
        pause: seconds that a thread waits after each call, so that a busy machine gets through all of them.
    """

    processes: int = 4
    threads: int = 16
    seconds: float = 60.0
    kind: str = "hnsw"
    items: int = 12
    pause: float = 0.002


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        changes: acknowledged adds, replacements and deletions.
        searches: that were answered.
        errors: what threads or processes raised, and how processes ended.
        ghosts: hits that could not be there at that time, or with another score or metadata, described.
        missed: hits that had to be there and were not.
        expected: hits that had to be there.
        wrong: what differs from exact search afterwards, in a process that opens the index then; or None.
        growth: of each process's resident memory after the first third: bytes an hour, by a straight line.
        memory: bytes at the end, of each process.
    """

    changes: int
    searches: int
    errors: list[str]
    ghosts: list[str]
    missed: int
    expected: int
    wrong: str | None
    growth: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def grew(self, seconds: float) -> bool:
        """Whether the processes grew by more than a twentieth, on average, after the first third of a soak."""
        return sum(self.growth) * seconds * 2 / 3 / 3600 > sum(self.memory) / 20


def vector(item: str, version: int) -> Vector:
    """(WIDTH,) of an item in a version; every fourth item has one of ten vectors, which others have too."""
    seed = [int(item[1:], 16), version]
    if seed[0] % 4 == 0:
        seed = [0, (seed[0] // 4 + version) % 10]
    return np.random.default_rng(seed).normal(size=samples.WIDTH).astype(np.float32)


def run(plan: Plan, *, seed: int, base: Path | None = None) -> Report:
    """Soaks an index and checks all that was answered."""
    with tempfile.TemporaryDirectory(dir=base) as scratch:
        folder = Path(scratch)
        samples.create(folder / "index", kind=plan.kind).close()
        start = _CONTEXT.Barrier(plan.processes)
        processes = [
            _CONTEXT.Process(target=_process, args=(folder, number, plan, seed, start))
            for number in range(plan.processes)
        ]
        for process in processes:
            process.start()
        ended = []
        for number, process in enumerate(processes):
            process.join(120 + 3 * plan.seconds)
            if process.exitcode != 0:
                ended.append(f"process {number} ended with {process.exitcode}")
                process.kill()
        notes = [note for file in sorted(folder.glob("*.jsonl")) for note in _notes(file)]
        return _report(folder / "index", notes, ended)


def growth_of_turnover(folder: Path, kind: str, *, width: int = 512, count: int = 20, turns: int = 120) -> int:
    """Bytes by which a process of its own grew while vectors came, were replaced, and went.

    Args:
        folder: of the index; must not exist.
        kind: of the index.
        width: D.
        count: items of a turn. In all ``2 * turns * count * width`` numbers come and go.
        turns: that are measured, after as many as a quarter of them.
    """
    with ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        return pool.submit(_turnover, folder, kind, width, count, turns).result()


# --- in a process ---


def _turnover(folder: Path, kind: str, width: int, count: int, turns: int) -> int:
    generator = np.random.default_rng(0)
    ids = [f"new {place}" for place in range(count)]
    with samples.create(folder, kind=kind, dimension=width) as index:
        index.add(_MEDIUM, [f"kept {place}" for place in range(100)], generator.normal(size=(100, width)))
        before = 0
        for turn in range(turns // 4 + turns):
            if turn == turns // 4:
                before = _resident()
            index.add(_MEDIUM, ids, generator.normal(size=(count, width)))
            index.add(_MEDIUM, ids, generator.normal(size=(count, width)), upsert=True)
            index.search(generator.normal(size=(2, width)), _K)
            index.delete(_MEDIUM, ids)
        return _resident() - before


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


def _process(folder: Path, number: int, plan: Plan, seed: int, start: Barrier) -> None:
    with Index.open(folder / "index", threads=1) as index:
        start.wait()
        end = time.monotonic() + plan.seconds
        threads = [
            threading.Thread(target=_thread, args=(index, folder, f"{number:x}{thread:02x}", plan, seed, end))
            for thread in range(plan.threads)
        ]
        for thread in threads:
            thread.start()
        with (folder / f"memory{number}.jsonl").open("w", encoding="utf-8") as log:
            while any(thread.is_alive() for thread in threads):
                time.sleep(1 / _SAMPLES_A_SECOND)
                _write(log, {"memory": _resident(), "at": time.monotonic(), "process": number})
        for thread in threads:
            thread.join()


def _thread(index: Index, folder: Path, name: str, plan: Plan, seed: int, end: float) -> None:
    # Notes go to a file, line by line: what a process remembers of itself must not look like the index growing.
    with (folder / f"thread{name}.jsonl").open("w", encoding="utf-8") as log:
        try:
            _work(index, log, name, plan, Random(f"{seed}/{name}"), end)
        except BaseException as error:  # noqa: BLE001 - this is what is looked for
            where = " < ".join(
                f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[::-1]
            )
            _write(log, {"error": f"{type(error).__name__}: {error} (in {where})"})


def _work(index: Index, log: TextIO, name: str, plan: Plan, random: Random, end: float) -> None:
    questions = samples.queries(_QUERIES, seed=3)
    live: dict[str, int] = {}
    used = 0
    while time.monotonic() < end:
        what = random.random()
        began = time.monotonic()
        if what < 0.7:
            question = random.randrange(_QUERIES)
            hits = index.search(questions[question][None], _K)[0]
            found = [(hit.id, hit.score, hit.metadata.get("version")) for hit in hits]
            _write(log, {"by": name, "search": question, "began": began, "ended": time.monotonic(), "hits": found})
        elif what < 0.8 and live:
            gone = random.sample(sorted(live), min(len(live), random.choice((1, 3))))
            index.delete(_MEDIUM, gone)
            ended = time.monotonic()
            for item in gone:
                _write(log, {"item": item, "version": None, "began": began, "ended": ended})
                del live[item]
        elif what < 0.88 and live:
            changed = random.sample(sorted(live), min(len(live), random.choice((1, 3))))
            _add(index, log, {item: live[item] + 1 for item in changed}, live, began, upsert=True)
        elif len(live) < plan.items:
            # Ids come again after they were deleted, in a later version.
            new = {
                f"t{name}{(used + place) % (4 * plan.items):04x}": used + place
                for place in range(random.choice((1, 5)))
            }
            used += len(new)
            _add(index, log, {item: 1000 + v for item, v in new.items() if item not in live}, live, began, upsert=False)
        time.sleep(plan.pause)


def _add(
    index: Index, log: TextIO, versions: Mapping[str, int], live: dict[str, int], began: float, *, upsert: bool
) -> None:
    if not versions:
        return
    index.add(
        _MEDIUM,
        list(versions),
        np.stack([vector(item, version) for item, version in versions.items()]),
        metadata=[{"version": version} for version in versions.values()],
        upsert=upsert,
    )
    ended = time.monotonic()
    live.update(versions)
    for item, version in versions.items():
        _write(log, {"item": item, "version": version, "began": began, "ended": ended})


def _write(log: TextIO, note: Mapping[str, Any]) -> None:
    log.write(json.dumps(note) + "\n")


def _notes(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


# --- afterwards ---


@dataclass(frozen=True)
class _Lives:
    """Every version of every item: when it could be found, and when it had to be. All arrays are (V,) but one."""

    places: Mapping[tuple[str, int], int]
    matrix: NDArray[np.float64]  # (V, D), of length 1
    first: NDArray[np.float64]  # from here on it could be found: its adding began
    certain: NDArray[np.float64]  # from here on it had to be: its adding was acknowledged
    leaving: NDArray[np.float64]  # until here it had to be: its end began
    last: NDArray[np.float64]  # until here it could be


def _lives(notes: Sequence[Mapping[str, Any]]) -> _Lives:
    by_item: dict[str, list[Mapping[str, Any]]] = {}
    for note in notes:
        if "item" in note:
            by_item.setdefault(note["item"], []).append(note)
    rows = []
    for item, events in by_item.items():
        # All events of an item are notes of one thread, in their order.
        for event, after in zip(events, [*events[1:], None], strict=True):
            if event["version"] is not None:
                left = (after["began"], after["ended"]) if after else (_NEVER, _NEVER)
                rows.append((item, event["version"], event["began"], event["ended"], *left))
    matrix = np.array([vector(item, version) for item, version, *_ in rows], dtype=np.float64)
    times = np.array([row[2:] for row in rows]).T
    return _Lives(
        {(item, version): place for place, (item, version, *_) in enumerate(rows)},
        matrix / np.linalg.norm(matrix, axis=1, keepdims=True),
        *times,
    )


def _report(folder: Path, notes: Sequence[Mapping[str, Any]], ended: Sequence[str]) -> Report:
    lives = _lives(notes)
    questions = samples.queries(_QUERIES, seed=3).astype(np.float64)
    scores = lives.matrix @ (questions / np.linalg.norm(questions, axis=1, keepdims=True)).T
    searches = [note for note in notes if "search" in note]
    ghosts, expected, missed = _judged(searches, lives, scores)
    now = {
        item: Stored(vector(item, version), {"version": version})
        for (item, version), place in lives.places.items()
        if lives.last[place] == _NEVER
    }
    with Index.open(folder, threads=1) as index:
        wrong = difference(index, Truth({}).with_items(_MEDIUM, now), samples.queries(4))
    growth, memory = _growth(notes)
    return Report(
        changes=sum("item" in note for note in notes),
        searches=len(searches),
        errors=[*ended, *(note["error"] for note in notes if "error" in note)],
        ghosts=ghosts,
        missed=missed,
        expected=expected,
        wrong=wrong,
        growth=growth,
        memory=memory,
    )


def _judged(
    searches: Sequence[Mapping[str, Any]], lives: _Lives, scores: NDArray[np.float64]
) -> tuple[list[str], int, int]:
    """What could not be found and was, how many versions had to be found, and how many of them were not.

    Args:
        searches: notes of answers.
        lives: of all V versions.
        scores: (V, questions) of every version for every question.
    """
    ghosts: list[str] = []
    expected = missed = 0
    ordered = sorted(searches, key=lambda note: float(note["began"]))
    for start in range(0, len(ordered), _TOGETHER):
        block = ordered[start : start + _TOGETHER]
        # Of all the versions that there ever were, few lived then.
        alive = np.flatnonzero((lives.certain < block[-1]["began"]) & (lives.leaving > block[0]["began"]))
        for note in block:
            own = scores[:, note["search"]]
            ghosts += _ghosts(note, lives, own)
            must, without = _must(note, lives, alive, own)
            expected += must
            missed += without
    return ghosts, expected, missed


def _ghosts(note: Mapping[str, Any], lives: _Lives, scores: NDArray[np.float64]) -> Iterator[str]:
    hits = note["hits"]
    if len({item for item, *_ in hits}) < len(hits):
        yield f"an item occurs twice: {hits}"
    order = [(-score, item) for item, score, _ in hits]
    if order != sorted(order):
        yield f"hits are not in order: {hits}"
    for item, score, version in hits:
        place = lives.places.get((item, version))
        if place is None:
            yield f"{item} in version {version}, which never was"
        elif abs(scores[place] - score) > TOLERANCE:
            yield f"{item} in version {version} scores {score}, expected {scores[place]}"
        elif lives.first[place] > note["ended"] or lives.last[place] < note["began"]:
            late = max(lives.first[place] - note["ended"], note["began"] - lives.last[place])
            yield f"thread {note['by']}: {item} in version {version}, which was not there, by {late:.6f} s"


def _must(
    note: Mapping[str, Any], lives: _Lives, alive: NDArray[np.int64], scores: NDArray[np.float64]
) -> tuple[int, int]:
    """How many versions had to be among the hits, and how many of those are not; of those that may have lived then."""
    certain = alive[(lives.certain[alive] < note["began"]) & (lives.leaving[alive] > note["ended"])]
    hits = note["hits"]
    floor = hits[-1][1] + TOLERANCE if len(hits) == _K else -2.0
    found = {lives.places.get((item, version)) for item, _, version in hits}
    must = certain[scores[certain] > floor].tolist()
    return len(must), len(set(must) - found)


def _growth(notes: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    growth, memory = [], []
    for number in sorted({note["process"] for note in notes if "memory" in note}):
        taken = np.array([(note["at"], note["memory"]) for note in notes if note.get("process") == number])
        settled = taken[len(taken) // 3 :]
        growth.append(float(np.polyfit(settled[:, 0] - settled[0, 0], settled[:, 1], 1)[0]) * 3600)
        memory.append(float(taken[-1, 1]))
    return growth, memory
