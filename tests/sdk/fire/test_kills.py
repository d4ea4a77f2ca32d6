"""Killed writers: what was acknowledged is there, and nothing is half there."""

from __future__ import annotations

from random import Random

import pytest

from dckt.index import Index
from faults import kills, samples
from faults.truth import Truth, difference

CASES = 4


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    found = kills.check(range(CASES), seed=1, workers=1, base=tmp_path)
    assert [(case, killed) for case, killed in found if killed.wrong] == []
    assert len(found) == CASES * kills.KILLS_IN_A_FOLDER
    assert sum(killed.acknowledged for _, killed in found) > CASES


def test_the_row_of_changes_is_the_same_for_writer_and_judge():
    rows = [kills.operations("a seed", Truth({})) for _ in range(2)]
    names = set()
    for _ in range(60):
        one, other = (next(row) for row in rows)
        assert (one.name, one.after.keys) == (other.name, other.after.keys)
        names.add(one.name)
    assert names == {"add", "upsert", "delete", "compact"}


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_changes_do_what_the_truth_says(tmp_path, kind):
    truth = Truth({})
    random = Random(3)
    with samples.create(tmp_path / "index", kind=kind) as index:
        for _ in range(40):
            operation = kills.change(random, truth)
            before, truth = truth, operation.after
            operation.run(index)
            assert difference(index, truth, samples.queries(2), thorough=False) is None
            if operation.name in {"add", "delete"}:
                assert difference(index, before, samples.queries(2), thorough=False), (
                    "half of a change would not be told"
                )
    with Index.open(tmp_path / "index", threads=1) as index:
        assert difference(index, truth, samples.queries()) is None
