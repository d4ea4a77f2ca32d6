"""Many threads and processes on one index: no error, no wrong answer, no growth. The full run takes a minute."""

from __future__ import annotations

import numpy as np
import pytest

from faults import soak


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_threads_and_processes_change_and_search_one_index(tmp_path, kind):
    report = soak.run(soak.Plan(processes=2, threads=4, seconds=4, kind=kind), seed=1, base=tmp_path)
    assert report.errors == []
    assert report.ghosts == []
    assert report.wrong is None
    # Not none, on a machine however busy.
    assert report.searches > 10
    assert report.changes > 5
    assert report.expected > 10
    # A graph may miss one neighbour in a hundred; exact search none.
    assert report.missed <= (0.01 * report.expected if kind == "hnsw" else 0)


def test_what_could_not_be_there_is_told():
    """The judge is judged: notes of a thread that lies."""
    item, gone = {"item": "t00000001", "version": 1}, {"item": "t00000001", "version": None}
    notes = [{**item, "began": 1.0, "ended": 2.0}, {**gone, "began": 5.0, "ended": 6.0}]
    lives = soak._lives(notes)
    score = float(lives.matrix[0] @ lives.matrix[0])

    def judged(began: float, ended: float, hits) -> tuple[list[str], int, int]:
        note = {"by": "x", "search": 0, "began": began, "ended": ended, "hits": hits}
        return soak._judged([note], lives, np.array([[score]]))

    hit = ["t00000001", score, 1]
    assert judged(3, 4, [hit]) == ([], 1, 0)
    assert judged(1.5, 1.6, [hit]) == ([], 0, 0)  # it may be there already
    assert judged(3, 4, []) == ([], 1, 1)  # it had to be there
    assert judged(5.5, 5.6, []) == ([], 0, 0)  # it may be gone
    for began, ended, hits in ((0.1, 0.9, [hit]), (6.1, 7, [hit]), (3, 4, [["t00000001", 0.1, 1]]), (3, 4, [hit, hit])):
        assert judged(began, ended, hits)[0]


def test_answers_are_judged_alike_one_by_one_and_together():
    """Versions that lived when a block of answers began are looked at, not all that there ever were."""
    notes = [
        {"item": f"t{number % 7:08d}", "version": number, "began": number, "ended": number + 0.5}
        for number in range(2000)
    ]
    lives = soak._lives(notes)
    scores = np.random.default_rng(0).uniform(-1, 1, (len(lives.matrix), 1))
    answers = [
        {"by": "x", "search": 0, "began": at, "ended": at + 0.3, "hits": []} for at in np.arange(0.0, 2000.0, 2.7)
    ]
    together = soak._judged(answers[::-1], lives, scores)
    apart = [soak._judged([answer], lives, scores) for answer in answers]
    assert together == ([], sum(must for _, must, _ in apart), sum(missed for _, _, missed in apart))
    assert together[1] > 1000


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_changes_that_leave_nothing_behind_take_no_memory(tmp_path, kind):
    # The vectors that came and went are 9.8 MB.
    assert soak.growth_of_turnover(tmp_path / "index", kind) < 4 * 2**20
