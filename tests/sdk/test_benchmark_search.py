"""The yardstick itself: what benchmarks/search.py counts as found, as fast and as an effort that is enough."""

from __future__ import annotations

import threading
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from searching.data import SATURATION, half_identical, one_hot, saturated, soft
from searching.measure import Spread, Times, Truth, smallest_effort, storm, take_turns
from searching.peers import Peer, missing_packages
from searching.table import Table, verdict

EAST, NORTH, NORTH_EAST = (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)
ITEMS = np.array([EAST, NORTH, EAST, NORTH_EAST, EAST], np.float32)
QUERIES = np.array([EAST, NORTH], np.float32)


def truth(k: int) -> Truth:
    return Truth.of(ITEMS, QUERIES, [k])[k]


def test_the_floor_is_the_similarity_of_the_kth_best() -> None:
    floors = {k: of.floors.tolist() for k, of in Truth.of(ITEMS, QUERIES, (1, 2, 4, 9)).items()}
    assert floors[1] == pytest.approx([1, 1])
    assert floors[2] == pytest.approx([1, 0.8])
    assert floors[4] == pytest.approx([0.6, 0])
    assert floors[9] == pytest.approx([0, 0])  # all five


@pytest.mark.parametrize("found", [(0, 2), (2, 4), (4, 0)])
def test_any_of_equal_items_is_right(found: tuple[int, int]) -> None:
    assert truth(2).recall([found, (1, 3)]) == 1


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ((0, 3), 1),  # too far
        ((0,), 1),  # one is missing
        ((), 0),
        ((0, 0), 1),  # given twice
        ((0, -1), 1),  # what faiss fills up with
        ((0, 5), 1),  # no item
        ((3, 1, 0, 2), 0),  # only the first two count
    ],
)
def test_recall_counts_what_is_right(found: tuple[int, ...], right: int) -> None:
    assert truth(2).recall([found, (1, 3)]) == (right + 2) / 4


def test_more_than_there_are_is_all_of_them() -> None:
    assert truth(9).recall([range(5), range(5)]) == 1
    assert truth(9).recall([range(5), range(4)]) == 0.9


def test_what_lies_within_the_tolerance_is_as_good() -> None:
    items = np.array([EAST, (1 - 3e-7, 0), (1 - 1e-5, 0)], np.float32)
    best = Truth.of(items, np.array([EAST], np.float32), [1])[1]
    assert [best.recall([[row]]) for row in range(3)] == [1, 1, 0]
    assert best.recall([[1]], tolerance=1e-8) == 0


def test_recall_wants_an_answer_for_each_query() -> None:
    with pytest.raises(ValueError, match="1 answers for 2 queries"):
        truth(1).recall([[0]])


def test_ratios_are_taken_turn_by_turn() -> None:
    base = Times(np.array([[1.0, 1.0, 9.0], [10.0, 10.0, 10.0], [2.0, 2.0, 2.0]]))
    other = Times(np.array([[2.0, 2.0, 2.0], [20.0, 20.0, 90.0], [8.0, 8.0, 8.0]]))
    assert other.times(base) == Spread(2, 2, 3)  # 2, 2 and 4: a turn that was slow for both is no outlier
    assert other.over(base) == Spread(6, 3.5, 8)  # 1, 10 and 6
    assert base.median == 2
    assert other.p99 > 80


def test_spread_of_one_value_is_that_value() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]).show("{:.0f}") == "3 (2–4)"


def test_contenders_take_turns_and_answer_the_same_calls() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda number, name=name: calls.append((name, number)) for name in ("one", "other")}
    times = take_turns(contenders, 5, turns=2, block=3)
    assert [times[name].turns.shape for name in contenders] == [(2, 3), (2, 3)]
    assert [times[name].cpu.turns.shape for name in contenders] == [(2, 3), (2, 3)]
    blocks = [[0, 0, 1, 2], [3, 3, 4, 0], [1, 1, 2, 3]]  # the first call of a turn is made twice
    assert calls == [(name, number) for block in blocks for name in contenders for number in block]


@pytest.mark.parametrize(
    ("recalls", "expected"),
    [
        ({8: 0.5, 16: 0.991, 32: 1.0}, (16, 0.991)),
        ({8: 0.5, 16: 0.9, 32: 0.9005}, (16, 0.9)),  # none reaches it: the least that is nearly the best
        ({8: 0.2}, (8, 0.2)),
    ],
)
def test_smallest_effort(recalls: dict[int, float], expected: tuple[int, float]) -> None:
    assert smallest_effort(recalls.__getitem__, list(recalls), 0.99) == expected


def test_an_effort_that_is_enough_ends_the_search() -> None:
    tried: list[int] = []

    def recall(effort: int) -> float:
        tried.append(effort)
        return 1.0

    assert smallest_effort(recall, [8, 16], 0.99) == (8, 1.0)
    assert tried == [8]


def test_a_query_that_a_library_fails_on_has_no_answer() -> None:
    efforts: list[int] = []

    def search(queries: np.ndarray, k: int) -> list[list[int]]:
        if queries[0, 0]:
            raise RuntimeError("Cannot return the results in a contiguous 2D array")
        return [[1, 3][:k]]

    peer = Peer("library", search, lambda found: found, efforts.append)
    answers = peer.answers(QUERIES, 2, 64)
    assert answers == [(), [1, 3]]
    assert truth(2).recall(answers) == 0.5
    assert efforts == [64]


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "faiss-cpu":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr("searching.peers.version", version)
    assert missing_packages(["usearch"]) == []
    assert missing_packages(["faiss", "usearch", "faiss"]) == ["faiss-cpu"]


def test_sets_are_what_they_are_called() -> None:
    assert len(np.unique(soft(2000, 10, 10).items, axis=0)) == 2000
    hot = one_hot(1000, 10)
    assert len(np.unique(hot.items, axis=0)) == 10
    assert (np.diff(hot.items.argmax(axis=1)) >= 0).all()
    for first in (True, False):
        items = half_identical(1000, 10, first=first).items
        same = (items == items[0]).all(axis=1)
        assert 500 <= same.sum() <= 501
        assert same[:500].all() == first
    for classes in SATURATION:
        data = saturated(2000, 10, classes)
        assert len(np.unique(data.items, axis=0)) < 1000
        assert data.queries.shape == (10, classes)
        assert np.linalg.norm(data.items, axis=1) == pytest.approx(1, abs=1e-6)


def test_a_table_shows_texts_and_hands_out_numbers() -> None:
    table = Table(
        "name", "Title", rows=[{"who": "a", "time": ("1.2", 1.234)}, {"who": "b", "goal": verdict(False, "< 1")}]
    )
    assert table.markdown().splitlines()[2:] == [
        "| who | time | goal |",
        "|---|---|---|",
        "| a | 1.2 |  |",
        "| b |  | < 1: MISSED |",
    ]
    assert table.json()["rows"] == [{"who": "a", "time": 1.234}, {"who": "b", "goal": "< 1: MISSED"}]


def test_a_storm_calls_from_threads_at_once_and_raises_what_they_raise() -> None:
    numbers, lock, together = [], threading.Lock(), threading.Barrier(3, timeout=60)

    def call(number: int) -> None:
        together.wait()  # returns only when three threads call at the same time
        with lock:
            numbers.append(number)

    _, each = storm(call, 3, 2)
    assert sorted(numbers) == list(range(6))
    assert each.shape == (6,)
    assert (each > 0).all()
    with pytest.raises(ZeroDivisionError):
        storm(lambda number: 1 / 0, 2, 1)
