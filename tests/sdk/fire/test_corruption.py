"""Damaged folders: right, perhaps after a rebuild, or our error. The full run is in benchmarks/reliability.py."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from dckt.index import Index
from faults import corruption, samples
from faults.pool import run_cases
from faults.truth import Stored, Truth, difference

CASES = 160
OLD = Path(__file__).parents[1] / "data" / "index-v1" / "index"


@pytest.fixture(scope="module")
def base():
    with tempfile.TemporaryDirectory(dir=samples.in_memory()) as base:
        corruption.prepare(Path(base), old=OLD)
        yield Path(base)


def test_no_damage_crashes_hangs_or_answers_wrong(base, tmp_path):
    report = corruption.check(base, range(CASES), seed=1, workers=1, keep=tmp_path / "kept")
    assert report.forbidden == []
    assert sum(report.outcomes.values()) == CASES
    # The damage is real, and not all of it is refused.
    assert report.outcomes["index", corruption.REFUSED] > 5
    assert report.outcomes["index", corruption.REBUILT] > 5
    assert report.outcomes["bundle", corruption.REFUSED] > 30


@pytest.mark.parametrize("case", [0, 1])
def test_what_is_whole_is_right(base, monkeypatch, case):
    monkeypatch.setattr(corruption.damage, "apply", lambda *_: corruption.damage.Damage("none", "nothing"))
    assert corruption.run_case(base, 1, case).outcome == corruption.RIGHT


def test_a_wrong_answer_would_be_told(base, monkeypatch):
    """The judge is judged: the index lies about one item."""
    monkeypatch.setattr(corruption.damage, "apply", lambda *_: corruption.damage.Damage("none", "nothing"))
    search = Index.search
    monkeypatch.setattr(
        Index, "search", lambda self, *args, **rest: [hits[::-1] for hits in search(self, *args, **rest)]
    )
    assert corruption.run_case(base, 1, 0).outcome == corruption.WRONG


def test_every_departure_from_the_truth_is_told(tmp_path):
    with samples.create(tmp_path / "index", kind="exact") as index:
        truth = samples.add(index, Truth({}), "text", samples.items("text", 30, 0))
        queries = samples.queries()
        assert difference(index, truth, queries) is None
        stored = truth.items["text", "t0004"]
        moved = Stored(stored.vector + np.float32(0.01), stored.metadata)
        for other in (
            truth.without("text", ["t0004"]),
            truth.with_items("image", {"t0004": stored}),
            truth.with_items("text", {"t0099": stored}),
            truth.with_items("text", {"t0004": moved}),
            truth.with_items("text", {"t0004": Stored(stored.vector, {})}),
        ):
            assert difference(index, other, queries)


def test_a_crash_a_hang_and_an_exception_are_those_of_their_case():
    def ends(work, cases):
        return {one.case: (one.how, one.value) for one in run_cases(work, cases, workers=1, seconds=1)}

    assert ends(ctypes.string_at, [1]) == {1: ("crash", "signal SIGSEGV")}
    assert ends(os._exit, [3, 4]) == {3: ("crash", "exit code 3"), 4: ("crash", "exit code 4")}
    assert ends(time.sleep, [0, 600]) == {0: ("returned", None), 600: ("hang", "took more than 1 s")}
    found = ends(chr, [65, -1, 66])
    assert (found[65], found[66], found[-1][0]) == (("returned", "A"), ("returned", "B"), "raised")
