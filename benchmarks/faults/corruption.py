"""Damaged index folders and bundles: each opens right, perhaps after a rebuild, or raises our error."""

from __future__ import annotations

import logging
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dckt.errors import DcktError
from dckt.index import Index
from faults import damage, samples
from faults.pool import Finished, run_cases
from faults.samples import State
from faults.truth import difference

RIGHT = "right"
REBUILT = "right after a rebuild"
OLDER = "right for an older commit, or for the file put there"
REFUSED = "our error"
WRONG = "silently wrong"
OTHER = "another exception"
FORBIDDEN = (WRONG, OTHER, "crash", "hang")
OUTCOMES = (RIGHT, REBUILT, OLDER, REFUSED, *FORBIDDEN)

_STATES = "states.pickle"
_BUNDLES = ("one.dckt", "two.dckt")


@dataclass(frozen=True)
class Verdict:
    """What became of one damaged folder.

    Attributes:
        outcome: one of :data:`OUTCOMES`.
        kind: of the damage.
        detail: what was damaged, and what was said.
    """

    outcome: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """How many cases had which outcome: by subject (index or bundle), and by kind of damage; the forbidden ones."""

    outcomes: Counter[tuple[str, str]]
    kinds: Counter[tuple[str, str]]
    forbidden: list[tuple[int, Verdict]]


def prepare(base: Path, *, old: Path | None = None) -> None:
    """Makes the whole folders that are copied and damaged, below ``base``.

    Args:
        base: a folder.
        old: an index in an older format, with vectors of the same width and of the same model; copied.
    """
    states = samples.index_states(base)
    if old:
        states.append(samples.old_state(base, old))
    samples.save(base / _STATES, states)
    for seed, name in enumerate(_BUNDLES):
        samples.tiny_bundle(base / name, seed)


def check(base: Path, cases: Iterable[int], *, seed: int, workers: int, keep: Path | None = None) -> Report:
    """Runs cases on what :func:`prepare` made: even numbers damage an index, odd ones a bundle.

    Args:
        base: of :func:`prepare`.
        cases: their numbers; a number, the seed and the versions of the packages decide all of a case.
        seed: of the whole run.
        workers: child processes.
        keep: folder for an archive of each damaged folder whose outcome is forbidden.
    """
    report = Report(Counter(), Counter(), [])
    for finished in run_cases(partial(run_case, base, seed), cases, workers=workers, seconds=30.0):
        verdict = _verdict(base, seed, finished)
        subject = "bundle" if finished.case % 2 else "index"
        report.outcomes[subject, verdict.outcome] += 1
        report.kinds[verdict.kind, verdict.outcome] += 1
        if verdict.outcome in FORBIDDEN:
            report.forbidden.append((finished.case, verdict))
            if keep:
                archive(base, seed, finished.case, keep)
    return report


def run_case(base: Path, seed: int, case: int) -> Verdict:
    """One case, in this process."""
    with damaged(base, seed, case) as (folder, what, state):
        judge = partial(_judge_index, folder, state) if state else partial(_judge_bundle, folder)
        with _warnings() as warned:
            try:
                found = judge()
            except DcktError as error:
                return Verdict(REFUSED, what.kind, f"{what.detail}: {type(error).__name__}: {error}")
            except Exception as error:  # noqa: BLE001 - this is what is looked for
                return Verdict(OTHER, what.kind, f"{what.detail}: {type(error).__name__}: {error}")
        if isinstance(found, str):
            return Verdict(WRONG, what.kind, f"{what.detail}: {found}")
        if found and not what.stale:
            return Verdict(WRONG, what.kind, f"{what.detail}: answers as an older commit, or as another index")
        return Verdict(OLDER if found else REBUILT if warned else RIGHT, what.kind, what.detail)


@contextmanager
def damaged(base: Path, seed: int, case: int) -> Iterator[tuple[Path, damage.Damage, State | None]]:
    """The folder of a case, as it is before it is opened, and the state that was damaged; None for a bundle."""
    random = Random(f"{seed}/{case}")
    with tempfile.TemporaryDirectory(dir=base) as scratch:
        folder = Path(scratch, "folder")
        if case % 2:
            source, donors, state = base / _BUNDLES[0], [base / _BUNDLES[1]], None
            kinds = damage.COMMON
        else:
            states = _states(base)
            state = random.choice(states)
            source, donors = base / state.name, [base / other.name for other in states if other is not state]
            # Nothing in format 1 can tell that a row is gone.
            kinds = damage.OLD_INDEX if state.name == samples.OLD else damage.INDEX
        shutil.copytree(source, folder)
        yield folder, damage.apply(folder, random, donors, kinds), state


def _judge_index(folder: Path, state: State) -> str | int:
    """What is wrong; or else which truth it answers by, 0 for the newest of the state."""
    answers = samples.queries(3)
    with Index.open(folder, model_id=samples.MODEL, threads=1) as index:
        # The newest commit first, then older ones of the same folder, then those of every other folder.
        others = (truth for other in _states(folder.parents[1]) for truth in other.truths)
        truths = [*state.truths, *others]
        wrong = difference(index, truths[0], answers)
        place = 0
        if wrong:
            place = next((n for n, truth in enumerate(truths) if n and not difference(index, truth, answers)), 0)
            if not place:
                return wrong
        truth = truths[place]
        # An index that opens can be written to, and can be opened again.
        truth = samples.add(index, truth, "text", samples.items("text", 3, 7, first=900))
        truth = samples.delete(index, truth, "text", ["t0901"])
        if wrong := difference(index, truth, answers, thorough=False):
            return f"after writing: {wrong}"
    with Index.open(folder, model_id=samples.MODEL, threads=1) as index:
        if wrong := difference(index, truth, answers, thorough=False):
            return f"opened again: {wrong}"
    return place


def _judge_bundle(folder: Path) -> str | int:
    base = folder.parents[1]
    found = _encoded(folder)
    for place, name in enumerate(_BUNDLES):
        expected = _expected(base / name)
        if all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True)):
            return place
    return "its vectors are others"


def _encoded(folder: Path) -> list[Any]:
    from dckt.bundle import Bundle
    from dckt.preprocessing import image_batch, token_batch
    from dckt.runtime.choice import open_encoders

    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    pictures = np.random.default_rng(5).integers(0, 256, (3, 9, 7, 3), np.uint8)
    tokens = [bundle.vocabulary.encode(text, manifest.text) for text in ("a red bag", "blue")]
    encoders = open_encoders(bundle, device="cpu", threads=1)
    batches: dict[str, NDArray[Any]] = {
        "image": image_batch(list(pictures), manifest.image),
        "text": token_batch(tokens),
    }
    try:
        return [encoders[medium].run(batch) for medium, batch in batches.items()]
    finally:
        for encoder in encoders.values():
            encoder.close()


@lru_cache
def _expected(folder: Path) -> list[Any]:
    return _encoded(folder)


@lru_cache
def _states(base: Path) -> Sequence[State]:
    states: list[State] = samples.load(base / _STATES)
    return states


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What dckt warns of, such as a graph that is built again."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dckt")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _verdict(base: Path, seed: int, finished: Finished) -> Verdict:
    if finished.how == "returned" and isinstance(finished.value, Verdict):
        return finished.value
    with damaged(base, seed, finished.case) as (_, what, _):
        outcome = OTHER if finished.how == "raised" else finished.how
        return Verdict(outcome, what.kind, f"{what.detail}: {finished.value}")


def archive(base: Path, seed: int, case: int, keep: Path) -> None:
    """Keeps the damaged folder of a case as ``case-SEED-NUMBER.tar.gz``."""
    keep.mkdir(parents=True, exist_ok=True)
    with damaged(base, seed, case) as (folder, _, _), tarfile.open(keep / f"case-{seed}-{case}.tar.gz", "w:gz") as file:
        file.add(folder, "folder")
