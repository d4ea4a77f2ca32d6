"""What went wrong in an index under faults, each case small: stale and foreign rows, races, failures after a commit."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from dckt.errors import ConfigError, IndexCorruptError, IndexFolderError, ItemError, UnknownItemError
from dckt.index import Index, graph, segment, shelf, upkeep
from dckt.index.builder import Builder
from dckt.index.hnsw import HnswGraph
from dckt.index.locks import ReadersWriterLock
from dckt.index.manifest import SegmentError, checksum_of
from dckt.index.segment import read_segment
from dckt.index.shelf import Shelf

WIDTH = 8


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def create(path: Path, kind: str = "hnsw", count: int = 30, seed: int = 0, **options) -> Index:
    index = Index.create(path, model_id="m", representation="p", dimension=WIDTH, kind=kind, threads=1, **options)
    more = {"second": np.ones((count, 3))} if "second" in options else {}
    index.add(
        "text", [f"t{row:02d}" for row in range(count)], vectors(count, seed), metadata=[{"v": 1}] * count, **more
    )
    return index


def ids(index: Index, query: np.ndarray, k: int = 5, **options) -> list[str]:
    return [hit.id for hit in index.search(query, k, **options)[0]]


def rows_of(folder: Path, table: str) -> list[tuple]:
    with closing(sqlite3.connect(folder / "items.sqlite")) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


def put_back(folder: Path, table: str, rows: list[tuple]) -> None:
    """What a lost page write does: these rows are those of then."""
    with closing(sqlite3.connect(folder / "items.sqlite")) as connection, connection:
        connection.execute(f"DELETE FROM {table}")
        connection.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)


# --- rows that are not the newest, or not of this index ---


@pytest.mark.parametrize("table", ["items", "seconds", "media", "commits", "sqlite_sequence"])
@pytest.mark.parametrize("large", [False, True])
def test_rows_as_they_were_before_are_noticed(tmp_path, monkeypatch, table, large):
    with create(tmp_path / "i", second=("fc9", 3)) as index:
        index.compact()
    (segment_then,) = (tmp_path / "i").glob("segment.text.*")
    shutil.copytree(segment_then, tmp_path / segment_then.name)
    before = rows_of(tmp_path / "i", table)
    with Index.open(tmp_path / "i") as index:
        # The vector stays, so the row of then fits to everything but the total.
        index.add("text", ["t05"], vectors(30)[5:6], metadata=[{"v": 2}], second=np.eye(3)[:1], upsert=True)
        index.add("text", ["new"], vectors(1, 8), second=np.eye(3)[:1])
        index.delete("text", ["new"])
    put_back(tmp_path / "i", table, before)
    # What came after this segment is replayed.
    shutil.rmtree(next((tmp_path / "i").glob("segment.text.*")))
    shutil.copytree(tmp_path / segment_then.name, segment_then)
    if large:
        monkeypatch.setattr("dckt.index.store.CHECKED_BYTES", 0)
    if large and table == "seconds":  # are read one by one
        with Index.open(tmp_path / "i") as index, pytest.raises(IndexCorruptError, match="'t05'"):
            index.second("text", ["t05"])
        return
    with pytest.raises(IndexCorruptError):
        Index.open(tmp_path / "i")


def test_a_label_that_a_segment_knows_is_not_given_again(tmp_path, monkeypatch):
    with create(tmp_path / "i") as index:
        index.delete("text", ["t29"])
        index.compact()
    monkeypatch.setattr("dckt.index.store.CHECKED_BYTES", 0)
    with closing(sqlite3.connect(tmp_path / "i" / "items.sqlite")) as connection, connection:
        connection.execute("UPDATE sqlite_sequence SET seq = 20")
    with pytest.raises(IndexCorruptError, match="for a second time"):
        Index.open(tmp_path / "i")


@pytest.mark.parametrize("table", ["items", "vectors", "removals", "seconds", "media", "commits"])
def test_rows_of_another_index_with_the_same_history_are_noticed(tmp_path, table):
    for name, seed in (("one", 0), ("two", 1)):
        with create(tmp_path / name, seed=seed, second=("fc9", 3)) as index:
            index.delete("text", ["t03"])
    put_back(tmp_path / "one", table, rows_of(tmp_path / "two", table))
    with pytest.raises(IndexCorruptError):
        Index.open(tmp_path / "one")


@pytest.mark.parametrize("name", ["items.sqlite", "items.sqlite-wal"])
def test_the_log_of_another_index_makes_no_mixture(tmp_path, name):
    answers = []
    for number in range(2):
        with create(tmp_path / f"work{number}", count=200, seed=number) as index:
            index.compact()
            index.add("text", ["t150", "more"], vectors(2, 10 + number), upsert=True)
            shutil.copytree(tmp_path / f"work{number}", tmp_path / f"live{number}")
            answers.append([ids(index, row[None], 300) for row in vectors(5, 7)])
    shutil.copyfile(tmp_path / "live1" / name, tmp_path / "live0" / name)
    with suppress(IndexCorruptError), Index.open(tmp_path / "live0") as index:
        assert [ids(index, row[None], 300) for row in vectors(5, 7)] in answers


def test_old_rows_are_checked_before_they_become_new_ones(tmp_path):
    old = Path(__file__).parent / "data" / "index-v1" / "index"
    path = Path(shutil.copytree(old, tmp_path / "i"))
    with closing(sqlite3.connect(path / "items.sqlite")) as connection, connection:
        connection.execute("UPDATE items SET metadata = '{}' WHERE id = (SELECT min(id) FROM items)")
    with pytest.raises(IndexCorruptError, match="altered"):
        Index.open(path)


# --- other threads and processes ---


def test_a_search_waits_for_what_another_thread_takes_in(tmp_path, monkeypatch):
    with create(tmp_path / "i", "exact") as first, Index.open(tmp_path / "i") as second:
        second.search(vectors(1), 1)
        first.add("text", ["new"], vectors(1, 5))
        started, go = threading.Event(), threading.Event()
        catch_up = second._catch_up

        def slowly(head):
            started.set()
            go.wait()
            return catch_up(head)

        monkeypatch.setattr(second, "_catch_up", slowly)
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.extend(ids(second, vectors(1, 5), 1))) for _ in range(2)]
        threads[0].start()
        started.wait()
        threads[1].start()
        threads[1].join(0.3)  # would be done by now, with what was there before
        go.set()
        for thread in threads:
            thread.join()
        assert found == ["new", "new"]


def test_a_graph_is_built_while_changes_of_others_come_in(tmp_path, monkeypatch):
    with create(tmp_path / "i") as first, Index.open(tmp_path / "i", threads=1) as second:
        measured = Shelf.measured

        def meanwhile(self, *arguments, **options):
            monkeypatch.undo()
            second.add("text", ["other 1", "other 2"], vectors(2, 3))
            assert ids(first, vectors(2, 3)[1:], 1) == ["other 2"]
            return measured(self, *arguments, **options)

        monkeypatch.setattr(Shelf, "measured", meanwhile)
        first.add("text", [f"n{row}" for row in range(400)], vectors(400, 4))
        assert ids(first, vectors(2, 3)[:1], 1) == ["other 1"]
        assert first.info().media["text"].search == "hnsw"
        first.verify()


def test_a_segment_that_another_process_removes_at_once_was_saved_all_the_same(tmp_path, monkeypatch, caplog):
    write = upkeep.write_segment

    def removed_at_once(folder, **options):
        path, mapped = write(folder, **options)
        shutil.rmtree(path)
        return path, mapped

    monkeypatch.setattr(upkeep, "write_segment", removed_at_once)
    with create(tmp_path / "i", count=300) as index:
        assert caplog.text == ""
        assert index._shelves["text"].changed_share() == 0
        assert ids(index, vectors(300)[7:8], 1) == ["t07"]


def test_two_that_replace_each_others_segments_leave_the_newest(tmp_path, caplog):
    with create(tmp_path / "i") as first, Index.open(tmp_path / "i", threads=1) as second:
        for turn in range(4):
            for index in (first, second):
                name = f"{turn}{index is first}"
                index.add("text", [name], vectors(1, 100 + 2 * turn + (index is first)))
                index.compact()
        (path,) = (tmp_path / "i").glob("segment.text.*")
        assert int(path.name.split(".")[2]) == second.info().sequence
    assert caplog.text == ""


def test_a_segment_of_another_history_does_not_stay_because_its_number_is_higher(tmp_path):
    create(tmp_path / "i").close()
    (path,) = (tmp_path / "i").glob("segment.text.*")
    foreign = path.with_name("segment.text.99.abc")
    create(tmp_path / "other").close()
    shutil.copytree(next((tmp_path / "other").glob("segment.text.*")), foreign)
    with Index.open(tmp_path / "i", threads=1) as index:
        index.add("text", ["new"], vectors(1, 5))
        index.compact()
    (kept,) = (tmp_path / "i").glob("segment.text.*")
    assert kept != foreign


def test_a_medium_that_another_process_emptied_and_compacted_is_empty(tmp_path):
    with create(tmp_path / "i") as first, Index.open(tmp_path / "i") as second:
        first.add("image", ["a", "b"], vectors(2, 5))
        assert ids(second, vectors(2, 5)[:1], 1) == ["a"]
        first.delete("image", ["a", "b"])
        first.compact()
        assert second.search(vectors(1), 5, media=["image"]) == [[]]
        assert (second.count("image"), second.media) == (0, ["text"])
        first.add("image", ["c"], vectors(1, 6))
        assert ids(second, vectors(1, 6), 5, media=["image"]) == ["c"]


def test_a_filter_is_answered_by_one_state_while_sqlite_is_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_FILTER_READS", 0)  # asks SQLite at once
    with create(tmp_path / "i") as first, Index.open(tmp_path / "i") as second:
        before = second.search(vectors(1), 30, where={"v": 1})
        first.add("text", [f"t{row:02d}" for row in range(20)], vectors(20, 6), metadata=[{"v": 2}] * 20, upsert=True)
        first.delete("text", ["t29"])
        with monkeypatch.context() as patch:
            patch.setattr(second._store, "version", lambda: second._seen)  # the search began just before
            assert second.search(vectors(1), 30, where={"v": 1}) == before
            assert second.search(vectors(1), 30, where={"v": 2}) == [[]]
        assert len(second.search(vectors(1), 30, where={"v": 1})[0]) == 9
        assert {hit.metadata["v"] for hit in second.search(vectors(1), 30, where={"v": 2})[0]} == {2}


def test_what_a_filter_allows_is_found_again_after_compacting(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_FILTER_READS", 0)
    with create(tmp_path / "i") as index:
        index.delete("text", [f"t{row:02d}" for row in range(7)])
        before = index.search(vectors(1), 30, where={"v": 1})
        index.compact()
        assert index.search(vectors(1), 30, where={"v": 1}) == before


# --- what is done in the background ---


def damage_vectors(folder: Path) -> Path:
    """Flips a bit of a vector in the segment."""
    (path,) = folder.glob("segment.text.*/vectors.npy")
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    return path.parent


@pytest.mark.parametrize("first", ["search", "add", "compact", "tune", "refresh"])
def test_damaged_vectors_are_noticed_before_they_are_used(tmp_path, caplog, first):
    with create(tmp_path / "i", count=200) as index:
        index.compact()
        before = index.search(vectors(5, 7), 200)
    damaged = damage_vectors(tmp_path / "i")
    with Index.open(tmp_path / "i", threads=1) as index:
        if first == "add":
            index.add("text", ["new"], vectors(1, 9))
            index.delete("text", ["new"])
        elif first != "search":
            getattr(index, first)()
        assert index.search(vectors(5, 7), 200) == before
        assert "vectors.npy is not the one that was written" in caplog.text
        index.refresh()
        assert not damaged.exists()
        assert index.info().media["text"].search == "hnsw"
    caplog.clear()
    with Index.open(tmp_path / "i", threads=1) as index:
        assert index.search(vectors(5, 7), 200) == before
    assert caplog.text == ""


def test_a_search_waits_until_the_vectors_are_verified(tmp_path, monkeypatch):
    create(tmp_path / "i", count=200).close()
    go = threading.Event()
    sha256 = segment._sha256

    def slowly(path, start):
        if path.name == segment.VECTORS:
            assert go.wait(60)
        return sha256(path, start)

    monkeypatch.setattr(segment, "_sha256", slowly)
    with Index.open(tmp_path / "i", threads=1) as index:
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.extend(ids(index, vectors(200)[7:8], 1)))
        thread.start()
        thread.join(0.3)  # would be done by now
        assert not found
        go.set()
        thread.join()
        assert found == ["t07"]


def test_damaged_vectors_of_damaged_rows_are_our_error(tmp_path, monkeypatch):
    create(tmp_path / "i", count=200).close()
    damage_vectors(tmp_path / "i")
    with closing(sqlite3.connect(tmp_path / "i" / "items.sqlite")) as connection, connection:
        connection.execute("UPDATE vectors SET vector = zeroblob(32) WHERE label = 3")
    monkeypatch.setattr("dckt.index.store.CHECKED_BYTES", 0)
    with Index.open(tmp_path / "i", threads=1) as index:
        for _ in range(2):
            with pytest.raises(IndexCorruptError, match="label 3"):
                index.search(vectors(1))


def test_batches_are_searched_while_the_graph_takes_them_in(tmp_path):
    rows, names = vectors(3000, 4), [f"n{row:04d}" for row in range(3000)]

    def found(index: Index, count: int) -> float:
        places = range(1, count, 7)
        return sum(ids(index, rows[row : row + 1], 1) == [names[row]] for row in places) / len(places)

    options = {"model_id": "m", "representation": "p", "dimension": WIDTH, "kind": "hnsw"}
    with Index.create(tmp_path / "i", threads=2, **options) as index:
        for start in range(0, len(rows), 300):
            index.add("text", names[start : start + 300], rows[start : start + 300])
            assert found(index, start + 300) > 0.97
        index.delete("text", ["n0000"])
        index.refresh()
        medium = index.info().media["text"]
        assert (medium.search, medium.items) == ("hnsw", 2999)
        assert medium.items - medium.in_graph <= graph.TAIL_WORK // (WIDTH + 45)
        index.verify()
    with Index.open(tmp_path / "i", threads=2) as index:
        assert index.info().media["text"].search == "hnsw"
        assert found(index, len(rows)) > 0.97


def test_a_change_does_not_wait_for_the_graph_but_the_next_one_does(tmp_path, monkeypatch):
    with Index.create(
        tmp_path / "i", model_id="m", representation="p", dimension=WIDTH, kind="hnsw", threads=2
    ) as index:
        go, started = threading.Event(), threading.Event()
        add = HnswGraph.add

        def slowly(*arguments, **options):
            started.set()
            assert go.wait(60)
            return add(*arguments, **options)

        monkeypatch.setattr(HnswGraph, "add", slowly)
        index.add("text", ["a", "b", "c"], vectors(3))
        started.wait()
        assert ids(index, vectors(3)[1:2], 1) == ["b"]
        thread = threading.Thread(target=index.add, args=("text", ["d"], vectors(1, 5)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert ids(index, vectors(1, 5), 1) == ["d"]  # is there already
        go.set()
        thread.join()
        index.refresh()
        assert index.info().media["text"].in_graph == 4


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_must_not_be_hidden_reaches_whoever_comes_next(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with Index.create(
        tmp_path / "i", model_id="m", representation="p", dimension=WIDTH, kind="hnsw", threads=2
    ) as index:
        with monkeypatch.context() as patch:
            patch.setattr(HnswGraph, "add", fail)
            index.add("text", ["a", "b", "c"], vectors(3))
            with pytest.raises(error):
                index.refresh()
        assert ids(index, vectors(3)[1:2], 1) == ["b"]
        index.add("text", [f"n{row}" for row in range(40)], vectors(40, 5))
        assert index.count() == 43


def test_an_index_that_is_closed_lets_its_files_go_whatever_its_builder_says(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    index = Index.create(tmp_path / "i", model_id="m", representation="p", dimension=WIDTH, kind="hnsw", threads=2)
    monkeypatch.setattr(HnswGraph, "add", fail)
    index.add("text", ["a", "b", "c"], vectors(3))
    with pytest.raises(MemoryError):
        index.close()
    with pytest.raises(IndexFolderError, match="closed"):
        index.get("a", "text")


def test_an_index_that_is_changed_and_closed_while_the_interpreter_ends(tmp_path):
    code = """
import atexit, sys
import numpy as np
from dckt.index import Index

index = Index.create(sys.argv[1], model_id="m", representation="p", dimension=8, kind="hnsw", threads=int(sys.argv[2]))
rows = np.random.default_rng(0).normal(size=(600, 8))
index.add("text", [f"a{row}" for row in range(300)], rows[:300])

def last():
    index.add("text", [f"b{row}" for row in range(300)], rows[300:])
    index.close()

atexit.register(last)
"""
    for threads in ("1", "2"):
        path = tmp_path / threads
        done = subprocess.run([sys.executable, "-c", code, path, threads], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "Exception ignored" not in done.stderr  # a graph that was under way may be given up, and that be told
        with Index.open(path, threads=1) as index:
            assert (index.count(), index.info().media["text"].in_graph) == (600, 600)


def test_whoever_is_interrupted_while_waiting_cancels_the_work():
    builder = Builder()
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        try:
            while True:
                builder.check()
                ended.wait(0.001)
        finally:
            ended.set()

    class Interrupted(Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    builder.start(work)
    started.wait()
    running, builder._last = builder._last, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        builder.wait()
    builder._last = running
    assert ended.wait(60)
    done: list[int] = []
    builder.run(lambda: done.append(1))  # is not told of what was cancelled
    assert (done, builder.busy) == ([1], False)
    builder.close()


def test_readers_that_waited_for_one_change_go_before_the_next():
    lock = ReadersWriterLock()
    order: list[str] = []
    holding, go = threading.Event(), threading.Event()

    def write(name: str) -> None:
        with lock.exclusive():
            order.append(name)
            if name == "first":
                holding.set()
                assert go.wait(60)

    def read() -> None:
        with lock.shared():
            order.append("reader")

    threads = [threading.Thread(target=write, args=("first",))]
    threads[0].start()
    holding.wait()
    for name in ("second", "third"):
        threads.append(threading.Thread(target=write, args=(name,)))
        threads[-1].start()
        while len(lock._queue) < len(threads) - 1:
            time.sleep(0.001)
    threads.append(threading.Thread(target=read))
    threads[-1].start()
    while not lock._waiting:
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "reader", "second", "third"]
    with lock.exclusive():
        pass
    with lock.shared():
        pass


# --- failures after a commit ---


@pytest.mark.parametrize("kind", ["build", "grow", "measure", "save", "write"])
def test_what_fails_after_a_commit_does_not_reach_the_caller(tmp_path, monkeypatch, caplog, kind):
    def fail(*_, **__):
        raise RuntimeError("hnswlib failed")

    with create(tmp_path / "i", count=200) as index:
        target = {
            "build": (HnswGraph, "add"),
            "grow": (HnswGraph, "add"),
            "measure": (graph, "tenth_best"),
            "save": (HnswGraph, "save"),
            "write": (upkeep, "write_segment"),
        }[kind]
        if kind == "build":
            index.delete("text", [f"t{row:02d}" for row in range(20)])
        monkeypatch.setattr(*target, fail)
        if kind == "build":
            index.delete("text", [f"t{row:02d}" for row in range(20, 150)])
        for start in range(0, 800, 400):
            index.add("text", [f"n{row}" for row in range(start, start + 400)], vectors(800, 4)[start : start + 400])
        assert "hnswlib failed" in caplog.text
        assert [ids(index, row[None], 1)[0] for row in vectors(800, 4)[::50]] == [
            f"n{row}" for row in range(0, 800, 50)
        ]
        monkeypatch.undo()
        index.compact()
        assert index.count() == (850 if kind == "build" else 1000)
    with Index.open(tmp_path / "i", threads=1) as index:
        index.verify()
        assert ids(index, vectors(800, 4)[777:778], 1) == ["n777"]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_must_not_be_hidden_reaches_the_caller(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with create(tmp_path / "i", count=200) as index:
        monkeypatch.setattr(HnswGraph, "add", fail)
        with pytest.raises(error):
            index.add("text", [f"n{row}" for row in range(400)], vectors(400, 4))
        assert ids(index, vectors(400, 4)[9:10], 1) == ["n9"]


def test_a_change_that_cannot_be_repeated_in_memory_is_read_again(tmp_path, monkeypatch):
    with create(tmp_path / "i") as index:
        monkeypatch.setattr(Shelf, "apply", lambda *_: False)
        index.add("text", ["new"], vectors(1, 5))
        monkeypatch.undo()
        assert ids(index, vectors(1, 5), 1) == ["new"]
        assert index.count() == 31


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_compacting_what_was_emptied(tmp_path, kind):
    with create(tmp_path / "i", kind, count=3) as index:
        index.delete("text", ["t00", "t01", "t02"])
        index.compact()
        assert index.search(vectors(1), 3) == [[]]
        index.tune(0.9)
        index.add("text", ["new"], vectors(1, 5))
        assert ids(index, vectors(1, 5)) == ["new"]
        index.compact()
        index.verify()
    with Index.open(tmp_path / "i") as index:
        assert ids(index, vectors(1, 5)) == ["new"]


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_rows_that_nobody_uses_are_let_go(tmp_path, kind):
    with create(tmp_path / "i", kind) as index, Index.open(tmp_path / "i") as other:
        for turn in range(20):
            index.add("text", ["a", "b", "c", "d"], vectors(4, turn))
            index.add("text", ["a", "b", "c", "d"], vectors(4, 100 + turn), upsert=True)
            index.delete("text", ["a", "b", "c", "d"])
            assert index._shelves["text"].rows < 60
            assert other.search(vectors(1), 1)
            assert other._shelves["text"].rows < 60
        index.delete("text", [f"t{row:02d}" for row in range(30)])
        assert index._shelves["text"].rows == 0


# --- forged manifests ---


def leaves(content, path=()):
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield (*path, key)
        if isinstance(content[key], dict | list):
            yield from leaves(content[key], (*path, key))


def test_a_forged_manifest_is_a_segment_that_cannot_be_used(tmp_path):
    with create(tmp_path / "i") as index:
        names = {"index_id": index.meta.index_id, "medium": "text", "dimension": WIDTH}
        asked = index.vector(next(index.ids("text")), "text")[None]
        expected = index.search(asked, 5)
    (folder,) = (tmp_path / "i").glob("segment.text.*")
    whole = json.loads((folder / "manifest.json").read_text())
    del whole["checksum"]
    refused = 0
    for path in leaves(whole):
        for value in ("gone", None, True, 0, -1, 2**31, 2**63, 1e308, "x", [], {}, {"a": 1}):
            content = json.loads(json.dumps(whole))
            inner = content
            for key in path[:-1]:
                inner = inner[key]
            if value == "gone":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            content["checksum"] = checksum_of(content)
            (folder / "manifest.json").write_text(json.dumps(content))
            try:
                read_segment(folder, **names)
            except SegmentError:
                refused += 1
                continue
            copy = Path(shutil.copytree(tmp_path / "i", tmp_path / "copy"))
            with Index.open(copy) as index:
                assert index.search(asked, 5) == expected, (path, value)
            shutil.rmtree(copy)
    assert refused > 300


# --- arguments ---


@pytest.mark.parametrize(
    "options",
    [
        {"k": None},
        {"k": "3"},
        {"k": 1.5},
        {"k": True},
        {"media": "text"},
        {"media": 3},
        {"media": [3]},
        {"where": 3},
        {"where": "shop"},
        {"min_score": "0.5"},
        {"min_score": True},
        {"min_score": [1]},
    ],
)
def test_arguments_of_a_search_of_wrong_types(tmp_path, options):
    with create(tmp_path / "i") as index, pytest.raises(ConfigError, match=f"{next(iter(options))}|filter"):
        index.search(vectors(1), **options)


@pytest.mark.parametrize("queries", [np.zeros(()), 3.5, None, "text", [[1.0], [1.0, 2.0]], np.zeros((1, 8), "O")])
def test_what_is_no_array_of_vectors(tmp_path, queries):
    with create(tmp_path / "i") as index:
        with pytest.raises(ItemError):
            index.search(queries)
        with pytest.raises(ItemError):
            index.add("text", ["a"], queries)


def test_ids_of_wrong_types(tmp_path):
    with create(tmp_path / "i") as index:
        index.add("text", ["a", "b"], vectors(2, 5))
        for wrong in ("ab", b"ab", None, 3, [3], [["a"]], ["\ud800"]):
            for use in (
                lambda wrong=wrong: index.delete("text", wrong),
                lambda wrong=wrong: index.existing("text", wrong),
                lambda wrong=wrong: index.contents("text", wrong),
                lambda wrong=wrong: index.add("text", wrong, vectors(1)),
            ):
                with pytest.raises(ItemError, match="expected"):
                    use()
        for wrong in (3, ["a"], "\ud800"):
            with pytest.raises(UnknownItemError):
                index.get(wrong, "text")
        for metadata in ("text", {"a": 1}, 3):
            with pytest.raises(ItemError, match="metadata"):
                index.add("text", ["c"], vectors(1), metadata=metadata)
        for contents in ("text", 3):
            with pytest.raises(ItemError, match="contents"):
                index.add("text", ["c"], vectors(1), contents=contents)
        with pytest.raises(ConfigError, match="medium"):
            index.add(3, ["c"], vectors(1))
        assert index.count() == 32
