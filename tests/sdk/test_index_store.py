"""What an index promises about the disk: whole batches, nothing acknowledged is lost, no damage goes unnoticed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dckt.errors import (
    ConfigError,
    IndexCorruptError,
    IndexFolderError,
    IndexVersionError,
    ItemError,
    ModelMismatchError,
    UnknownItemError,
)
from dckt.index import Hit, Index
from dckt.index.hnsw import HnswGraph

MODEL = "a" * 64


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)


def create(path: Path, kind: str = "auto") -> Index:
    return Index.create(path, model_id=MODEL, representation="fc9", dimension=8, kind=kind, threads=1)


@pytest.fixture
def index(tmp_path):
    with create(tmp_path / "catalog.index") as index:
        yield index


@pytest.fixture
def folder(tmp_path):
    """Of an index with 30 texts and a graph, closed."""
    with create(tmp_path / "catalog.index", kind="hnsw") as index:
        index.add("text", [f"t{row}" for row in range(30)], vectors(30), metadata=[{"row": row} for row in range(30)])
    return tmp_path / "catalog.index"


# --- creating and opening ---


def test_what_is_added_is_there_after_opening_again(tmp_path):
    with create(tmp_path / "i") as index:
        index.add("text", ["a", "b"], vectors(2), metadata=[{"n": 1, "deep": {"list": [1, None, "ä"]}}, {}])
        index.add("image", ["a"], vectors(1, seed=1))
        before = index.search(vectors(3, seed=2), 10)
    with Index.open(tmp_path / "i", model_id=MODEL, representation="fc9") as index:
        assert index.search(vectors(3, seed=2), 10) == before
        assert index.get("a", "text") == Hit("a", 1.0, "text", {"n": 1, "deep": {"list": [1, None, "ä"]}})
        assert list(index.ids("text")) == ["a", "b"]
        assert (index.count("text"), index.count("image"), len(index), index.media) == (2, 1, 3, ["image", "text"])


def test_creating_in_an_empty_folder(tmp_path):
    (tmp_path / "i").mkdir()
    create(tmp_path / "i").close()
    assert [file.name for file in (tmp_path / "i").iterdir()] == ["items.sqlite"]


def test_creating_over_something_is_refused_and_changes_nothing(tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "mine").write_text("mine")
    with pytest.raises(IndexFolderError, match="exists already"):
        create(tmp_path / "i")
    assert [file.name for file in (tmp_path / "i").iterdir()] == ["mine"]


def test_a_failed_creation_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("dckt.index.catalog.ItemStore.create", fail)
    with pytest.raises(IndexFolderError, match="disk is full"):
        create(tmp_path / "i")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"), [({"kind": "faiss"}, "auto, exact, hnsw"), ({"dimension": 0}, "dimension is 0")]
)
def test_settings_that_are_not_offered(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        Index.create(tmp_path / "i", **{"model_id": MODEL, "representation": "fc9", "dimension": 8, **options})


def test_a_missing_folder_says_what_to_run(tmp_path):
    with pytest.raises(IndexFolderError, match="dckt index BUNDLE"):
        Index.open(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_another_model_is_refused_with_both_names_and_both_ways_out(folder):
    with pytest.raises(ModelMismatchError) as caught:
        Index.open(folder, model_id="b" * 64)
    for part in (MODEL, "b" * 64, "the bundle that made it", "dckt index BUNDLE", "--force"):
        assert part in str(caught.value)
    with pytest.raises(ModelMismatchError, match="'probability'"):
        Index.open(folder, model_id=MODEL, representation="probability")


def test_a_renamed_folder_is_the_same_index(folder):
    moved = folder.rename(folder.with_name("moved"))
    with Index.open(moved, model_id=MODEL) as index:
        assert len(index) == 30


# --- batches ---


def test_a_batch_with_one_bad_item_stores_nothing(index):
    bad = vectors(3)
    bad[1] = 0
    for ids, rows, metadata in [
        (["a", "b", "c"], bad, None),
        (["a", "b", "a"], vectors(3), None),
        (["a", "", "c"], vectors(3), None),
        (["a", "b\ud800", "c"], vectors(3), None),
        (["a", 7, "c"], vectors(3), None),
        (["a", "b"], vectors(3), None),
        (["a", "b", "c"], vectors(3), [{}, {"x": float("nan")}, {}]),
        (["a", "b", "c"], vectors(3), [{}, {"x": {1}}, {}]),
        (["a", "b", "c"], vectors(3), [{}, "text", {}]),
        (["a", "b", "c"], vectors(3), [{}]),
        (["a", "b", "c"], np.ones((3, 9)), None),
    ]:
        with pytest.raises(ItemError):
            index.add("text", ids, rows, metadata=metadata)
    assert len(index) == 0
    assert index.info().sequence == 0


def test_duplicates_are_named_and_nothing_is_stored(index):
    index.add("text", ["a", "b"], vectors(2))
    with pytest.raises(ItemError, match=r"2 of 3 text ids are in the index already: 'a', 'b'.*upsert"):
        index.add("text", ["b", "new", "a"], vectors(3, seed=1))
    assert list(index.ids("text")) == ["a", "b"]
    index.add("image", ["a"], vectors(1))  # another medium, another item


def test_more_duplicates_than_sqlite_takes_parameters(index):
    ids = [f"{row}" for row in range(40_000)]
    index.add("text", ids, np.tile(vectors(1), (40_000, 1)))
    with pytest.raises(ItemError, match="40000 of 40000"):
        index.add("text", ids, np.tile(vectors(1), (40_000, 1)))
    assert index.info().media["text"].unique_vectors == 1
    assert [hit.id for hit in index.search(vectors(1), 3)[0]] == ["0", "1", "10"]


def test_upsert_replaces_vector_and_metadata(index):
    index.add("text", ["a", "b"], vectors(2), metadata=[{"v": 1}, {"v": 1}])
    index.add("text", ["a", "c"], vectors(2, seed=1), metadata=[{"v": 2}, {"v": 2}], upsert=True)
    assert index.search(vectors(1, seed=1), 1)[0] == [Hit("a", pytest.approx(1.0), "text", {"v": 2})]
    assert index.get("b", "text").metadata == {"v": 1}
    assert index.info().media["text"].unique_vectors == 3
    index.add("text", ["a"], vectors(1, seed=1), metadata=[{"v": 3}], upsert=True)  # the same vector again
    assert index.search(vectors(1, seed=1), 1)[0][0].metadata == {"v": 3}


def test_an_id_is_data_and_never_sql(index):
    nasty = ["'; DROP TABLE items; --", '"', "%", "a\0b", "\n", "*", "?", ":label", " "]
    index.add("text", nasty, vectors(len(nasty)), metadata=[{"'": '"'}] * len(nasty))
    assert sorted(index.ids("text")) == sorted(nasty)
    for item, row in zip(nasty, vectors(len(nasty)), strict=True):
        assert index.search(row[None], 1)[0][0].id == item
    index.delete("text", nasty)
    assert len(index) == 0


def test_deleting_what_is_not_there_deletes_nothing(index):
    index.add("text", ["a", "b"], vectors(2))
    with pytest.raises(UnknownItemError, match="no text with the id 'x'"):
        index.delete("text", ["a", "x"])
    assert len(index) == 2
    with pytest.raises(UnknownItemError):
        index.get("x", "text")
    with pytest.raises(UnknownItemError):
        index.vector("a", "image")


def test_adding_nothing_changes_nothing(index):
    index.add("text", [], np.zeros((0, 8)))
    assert index.info().sequence == 0
    assert index.search(vectors(2), 5) == [[], []]


@pytest.mark.parametrize("medium", ["", "Image", "../x", "a" * 33, "1"])
def test_a_medium_names_a_file_and_is_checked(index, medium):
    with pytest.raises(ConfigError, match="medium is"):
        index.add(medium, ["a"], vectors(1))


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one(index, k):
    with pytest.raises(ConfigError, match=f"k is {k}"):
        index.search(vectors(1), k)


def test_metadata_can_be_left_out(index):
    index.add("text", ["a"], vectors(1), metadata=[{"v": 1}])
    assert index.search(vectors(1), 1, metadata=False)[0][0].metadata == {}
    assert index.search(vectors(1), 1)[0][0].metadata == {"v": 1}


def test_hits_are_plain_values(index):
    index.add("text", ["a"], vectors(1), metadata=[{"v": 1}])
    first, second = (index.search(vectors(1), 1)[0][0] for _ in range(2))
    assert pickle.loads(pickle.dumps(first)) == first
    first.metadata["v"] = 2
    assert second.metadata == {"v": 1}
    assert index.search(np.repeat(vectors(1), 2, axis=0), 1)[0][0].metadata == {"v": 1}


# --- durability ---

_WRITER = """
import sys
import numpy as np
from dckt.index import Index

path, kind = sys.argv[1:]
rows = np.random.default_rng(0).normal(size=(100_000, 8))
with Index.open(path) as index:
    start = len(index)
    while True:
        index.add("text", [f"t{row}" for row in range(start, start + 7)], rows[start : start + 7])
        start += 7
        print(start, flush=True)
"""


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path, kind):
    create(tmp_path / "i", kind=kind).close()
    rows = np.random.default_rng(0).normal(size=(100_000, 8))
    acknowledged = 0
    for batches in (1, 13, 30):
        command = [sys.executable, "-c", _WRITER, str(tmp_path / "i"), kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(batches):
                acknowledged = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
            # What was written before the kill and not read yet was acknowledged too.
            acknowledged = max([acknowledged, *map(int, writer.stdout.read().split("\n")[:-1])])
        with Index.open(tmp_path / "i") as index:
            assert len(index) >= acknowledged
            assert len(index) % 7 == 0  # whole batches
            found = index.search(rows[:acknowledged:5], 1)
            assert [hits[0].id for hits in found] == [f"t{row}" for row in range(0, acknowledged, 5)]


def test_every_commit_waits_for_the_disk(index):
    assert index._store._writer.execute("PRAGMA synchronous").fetchone() == (2,)
    assert index._store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_full_disk_stores_nothing_and_says_so(index):
    index.add("text", ["a"], vectors(1))
    pages = index._store._writer.execute("PRAGMA page_count").fetchone()[0]
    index._store._writer.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(IndexFolderError, match="the disk is full; nothing"):
        index.add("text", [f"t{row}" for row in range(500)], vectors(500))
    assert len(index) == 1
    index._store._writer.execute("PRAGMA max_page_count = 100000")
    index.add("text", [f"t{row}" for row in range(500)], vectors(500))
    assert len(index) == 501


def test_a_commit_that_fails_changes_nothing_in_memory(index, monkeypatch):
    def fail():
        raise sqlite3.OperationalError("interrupted")

    index.add("text", ["a"], vectors(1))
    monkeypatch.setattr(index._store, "commit", fail)
    with pytest.raises(IndexFolderError):
        index.add("text", ["b"], vectors(1, seed=1))
    monkeypatch.undo()
    assert [hit.id for hit in index.search(vectors(1), 5)[0]] == ["a"]
    index.add("text", ["b"], vectors(1, seed=1))


def test_a_closed_index_says_so(index):
    index.add("text", ["a"], vectors(1))
    index.close()
    index.close()
    for use in (lambda: index.search(vectors(1)), lambda: index.add("text", ["b"], vectors(1))):
        with pytest.raises(IndexFolderError, match="closed"):
            use()


# --- damage ---


def segment_of(folder: Path) -> Path:
    (path,) = folder.glob("segment.text.*")
    return path


@pytest.mark.parametrize("name", ["graph.hnsw", "vectors.npy", "ids.bin", "metadata.bin", "items.npy", "manifest.json"])
def test_a_damaged_segment_is_built_again(folder, caplog, name):
    with Index.open(folder) as index:
        before = [list(hits) for hits in index.search(vectors(5), 10)]
        assert index.info().media["text"].in_graph == 30
    assert "built again" not in caplog.text
    for damage in (b"rubbish", b"{}", b"", None):
        path = segment_of(folder) / name
        path.write_bytes(damage) if damage is not None else path.unlink()
        caplog.clear()
        with Index.open(folder) as index:
            assert index.search(vectors(5), 10) == before
            assert index.info().media["text"].in_graph == 30
        assert "is built again" in caplog.text
        assert json.loads((segment_of(folder) / "manifest.json").read_text())["rows"] == 30


def test_an_intact_graph_is_not_built_again(folder, monkeypatch):
    monkeypatch.setattr(HnswGraph, "add", lambda *_, **__: pytest.fail("was built again"))
    with Index.open(folder) as index:
        assert index.info().media["text"].search == "hnsw"


def test_a_missing_segment_is_built_again(folder):
    shutil.rmtree(segment_of(folder))
    with Index.open(folder) as index:
        assert index.info().media["text"].in_graph == 30
    assert segment_of(folder).is_dir()


@pytest.mark.parametrize("commits", [1, 2])
def test_a_segment_of_another_copy_is_noticed(folder, tmp_path, caplog, commits):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for path, seed in ((folder, 1), (copy, 2)):
        with Index.open(path) as index:
            for number in range(commits):
                ids = [f"new{row}" for row in range(40 * number, 40 * number + 40)]
                index.add("text", ids, vectors(40, seed=seed + 10 * number))
            index.compact()
    shutil.rmtree(segment_of(folder))
    shutil.copytree(segment_of(copy), folder / segment_of(copy).name)
    with Index.open(folder) as index:
        assert "another history" in caplog.text
        assert index.search(vectors(1, seed=1), 1)[0][0].id == "new0"
        assert index.search(vectors(1, seed=2), 1)[0][0].score < 0.9999


def test_a_segment_older_than_the_items_is_used_and_the_log_is_replayed(folder, tmp_path, monkeypatch, caplog):
    kept = Path(shutil.copytree(segment_of(folder), tmp_path / segment_of(folder).name))
    with Index.open(folder) as index:
        index.add("text", [f"new{row}" for row in range(100)], vectors(100, seed=1), metadata=[{"n": 1}] * 100)
        index.delete("text", ["t0", "t1", "t2", "new7"])
        index.add("text", ["t3", "new8"], vectors(2, seed=2), upsert=True)
        index.add("text", ["t4", "new9"], vectors(6, seed=0)[4:], metadata=[{"v": 2}] * 2, upsert=True)
        expected = [index.search(vectors(20, seed=seed), 140) for seed in (0, 1, 2)]
    shutil.rmtree(segment_of(folder))
    shutil.copytree(kept, folder / kept.name)
    monkeypatch.setattr("dckt.index.store.ItemStore.load", lambda *_: pytest.fail("was read anew"))
    with Index.open(folder) as index:
        assert "built again" not in caplog.text
        assert [index.search(vectors(20, seed=seed), 140) for seed in (0, 1, 2)] == expected
        index.verify()


def test_folders_that_a_killed_process_left_are_removed_by_compact(folder):
    left = folder / ".segment.text.9.abc.1234.partial"
    left.mkdir()
    (left / "vectors.npy").write_bytes(b"half")
    with Index.open(folder) as index:
        index.compact()
        assert left.exists()  # it may be another process's work
        os.utime(left, (0, 0))
        index.compact()
    assert not left.exists()


def test_a_flipped_bit_of_the_items_is_an_error_or_changes_nothing(folder):
    with Index.open(folder) as index:
        before = index.search(vectors(30), 30)
        about = index.meta
    file = folder / "items.sqlite"
    whole = file.read_bytes()
    refused = 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 400).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            with Index.open(folder, model_id=MODEL, representation="fc9") as index:
                assert index.search(vectors(30), 30) == before, f"bit {bit}"
                assert index.meta == about
        except IndexFolderError:
            refused += 1
        for rest in ("-wal", "-shm"):
            Path(f"{file}{rest}").unlink(missing_ok=True)
    assert refused > 30


@pytest.mark.parametrize("size", [1, 100, 4096, 10_000, -4096])
def test_a_truncated_file_is_an_error(folder, size):
    file = folder / "items.sqlite"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(IndexCorruptError, match=r"damaged.*restore it from a copy"):
        Index.open(folder)


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to look like one" * 100])
def test_another_file_under_that_name_is_an_error(folder, content):
    (folder / "items.sqlite").write_bytes(content)
    with pytest.raises(IndexCorruptError):
        Index.open(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("UPDATE vectors SET vector = zeroblob(32) WHERE label = 3", "vector with label 3"),
        ("UPDATE vectors SET vector = x'00' WHERE label = 3", "vector with label 3"),
        ("UPDATE items SET metadata = '{}' WHERE id = 't5'", "'t5'"),
        ("UPDATE items SET label = 7 WHERE id = 't5'", "'t5'"),
        ("UPDATE items SET id = 'other' WHERE id = 't5'", "'other'"),
        ("UPDATE items SET medium = 'image' WHERE id = 't5'", "'t5'"),
        ("DELETE FROM vectors WHERE label = 3", "'t2'"),
        ("DELETE FROM meta WHERE key = 'kind'", "not whole"),
        ("UPDATE meta SET value = 'x' WHERE key = 'dimension'", "not whole"),
        ("UPDATE meta SET value = '9' WHERE key = 'dimension'", "description was altered"),
        ("UPDATE meta SET value = 'other' WHERE key = 'model_id'", "description was altered"),
        ("UPDATE items SET content = 'x' WHERE id = 't5'", "'t5'"),
        ("UPDATE media SET items = 29", "says"),
        ("DELETE FROM media", "says"),
        ("DELETE FROM commits", "no commit"),
        ("INSERT INTO removals VALUES ('text', 1, 't5', 3, 1, 7, 7)", "log says.*'t5'"),
        ("UPDATE meta SET value = 'fast' WHERE key = 'kind'", "no index has"),
        ("UPDATE meta SET value = '0' WHERE key = 'version'", "no index has"),
        ("UPDATE meta SET value = 'other' WHERE key = 'format'", "format"),
        ("DROP TABLE items", "items"),
    ],
)
def test_altered_rows_are_noticed(folder, damage, said):
    with sqlite3.connect(folder / "items.sqlite") as connection:
        connection.execute(damage)
    connection.close()
    with pytest.raises(IndexCorruptError, match=said):
        Index.open(folder)


def test_newer_is_not_damaged(folder):
    with sqlite3.connect(folder / "items.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '3' WHERE key = 'version'")
    connection.close()
    with pytest.raises(IndexVersionError, match="index format 3, this dckt reads up to 2; update dckt"):
        Index.open(folder)


# --- two processes ---


def test_a_second_opener_sees_what_the_first_wrote(folder):
    with Index.open(folder) as first, Index.open(folder) as second:
        first.add("text", ["new"], vectors(1, seed=1))
        assert second.search(vectors(1, seed=1), 1)[0][0].id == "new"
        assert len(second) == 31
        first.delete("text", ["new"])
        assert second.refresh()
        assert not second.refresh()
        assert second.search(vectors(1, seed=1), 1)[0][0].id != "new"


def test_a_writer_takes_in_what_another_wrote(folder):
    with Index.open(folder) as first, Index.open(folder) as second:
        first.add("text", ["new"], vectors(1, seed=1))
        with pytest.raises(ItemError, match="'new'"):
            second.add("text", ["new"], vectors(1, seed=2))
        second.add("text", ["newer"], vectors(1, seed=2))
        assert len(second) == 32
        first.delete("text", ["newer", "t0"])
        assert len(first) == 30
        assert {"newer", "t0"}.isdisjoint(hit.id for hit in second.search(vectors(1), 50)[0])


def test_a_writer_that_waits_too_long_says_so(folder, monkeypatch):
    monkeypatch.setattr("dckt.index.schema.BUSY_SECONDS", 0.05)
    with Index.open(folder) as first, Index.open(folder) as second, first._store.transaction():
        with pytest.raises(IndexFolderError, match="another process is writing"):
            second.add("text", ["new"], vectors(1))
        assert len(second.search(vectors(1), 5)[0]) == 5


def test_threads_that_write_at_once_all_succeed(index):
    def write(number: int) -> None:
        for row in range(10):
            index.add("text", [f"{number}-{row}"], vectors(1, seed=10 * number + row))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(index) == 40
    assert index.info().sequence == 40


def test_info(folder):
    with Index.open(folder) as index:
        about = index.info()
    assert (about.model_id, about.representation, about.dimension, about.kind) == (MODEL, "fc9", 8, "hnsw")
    assert (about.format_version, about.sequence) == (2, 1)
    assert about.bytes > 30 * 8 * 4
    text = about.media["text"]
    assert (text.items, text.unique_vectors, text.search, text.in_graph) == (30, 30, "hnsw", 30)
    assert text.recall_at_10 >= 0.99


# --- what came with format 2 ---


def second_index(path: Path) -> Index:
    return Index.create(path, model_id=MODEL, representation="probability", dimension=8, second=("fc9", 3), threads=1)


def test_second_vectors_are_kept_with_their_items(tmp_path):
    rows = np.random.default_rng(5).normal(size=(4, 3))
    with second_index(tmp_path / "i") as index:
        index.add("text", list("abc"), vectors(3), second=rows[:3])
        index.add("text", ["b"], vectors(1), second=rows[3:], upsert=True)
        index.delete("text", ["c"])
        assert (index.meta.second, index.info().second) == ("fc9", "fc9")
    with Index.open(tmp_path / "i") as index:
        found = index.second("text", ["a", "b", "c", "d"])
        assert sorted(found) == ["a", "b"]
        for item, row in (("a", rows[0]), ("b", rows[3])):
            np.testing.assert_allclose(found[item], row / np.linalg.norm(row), rtol=1e-6)
        index.verify()


def test_second_vectors_come_with_every_item_or_with_none(tmp_path, index):
    with pytest.raises(ItemError, match="keeps no second vectors, and some were given"):
        index.add("text", ["a"], vectors(1), second=np.ones((1, 3)))
    with pytest.raises(ConfigError, match="keeps no second vectors"):
        index.second("text", ["a"])
    with second_index(tmp_path / "i") as other:
        with pytest.raises(ItemError, match=r"'fc9', 3 wide.*none were given"):
            other.add("text", ["a"], vectors(1))
        with pytest.raises(ItemError, match="expected \\(N, 3\\)"):
            other.add("text", ["a"], vectors(1), second=np.ones((1, 4)))
        assert len(other) == 0
    with pytest.raises(ConfigError, match="second is"):
        Index.create(tmp_path / "j", model_id=MODEL, representation="p", dimension=8, second=("fc9", 0))


@pytest.mark.parametrize("damage", ["UPDATE seconds SET vector = zeroblob(12)", "DELETE FROM seconds WHERE id = 'a'"])
def test_altered_second_vectors_are_noticed(tmp_path, damage):
    with second_index(tmp_path / "i") as index:
        index.add("text", list("abc"), vectors(3), second=np.ones((3, 3)))
    with sqlite3.connect(tmp_path / "i" / "items.sqlite") as connection:
        connection.execute(damage)
    connection.close()
    with pytest.raises(IndexCorruptError, match="second vector"):
        Index.open(tmp_path / "i")


def test_contents_are_kept_and_given_back(index):
    index.add("text", ["a", "b", "c"], vectors(3), contents=["hash a", None, "hash c"])
    index.add("text", ["c"], vectors(1, seed=1), upsert=True)
    index.add("text", ["b"], vectors(1, seed=1), contents=["hash b"], upsert=True)
    assert index.contents("text", ["a", "b", "c", "d"]) == {"a": "hash a", "b": "hash b"}
    for bad in (["x"], ["x", 7], "xy", ["x", "\ud800"]):
        with pytest.raises(ItemError, match="contents"):
            index.add("text", ["x", "y"], vectors(2), contents=bad)


def test_items_are_streamed_in_order(index, monkeypatch):
    monkeypatch.setattr("dckt.index.reader._PAGE", 3)
    ids = [f"{row:02d}" for row in range(10)]
    index.add("text", ids, vectors(10), metadata=[{"n": row} for row in range(10)])
    index.add("image", ["z"], vectors(1))
    assert [(item.medium, item.id) for item in index.items()] == [("image", "z"), *(("text", item) for item in ids)]
    assert [item.metadata["n"] for item in index.items("text", {"n": {"ge": 4}})] == [4, 5, 6, 7, 8, 9]
    stream = index.items("text")
    next(stream)
    index.delete("text", ["09"])  # nothing that is open keeps it from being written
    assert len(list(stream)) == 8


def test_hits_below_min_score_are_left_out(index):
    index.add("text", ["a", "b"], np.array([[1.0, 0, 0, 0, 0, 0, 0, 0], [0.6, 0.8, 0, 0, 0, 0, 0, 0]]))
    query = np.eye(8)[:1]
    assert [hit.id for hit in index.search(query, min_score=0.5)[0]] == ["a", "b"]
    assert [hit.id for hit in index.search(query, min_score=index.search(query)[0][1].score)[0]] == ["a", "b"]
    assert [hit.id for hit in index.search(query, min_score=0.7)[0]] == ["a"]
    assert index.search(-query, min_score=0.7) == [[]]
    with pytest.raises(ConfigError, match="min_score is nan"):
        index.search(query, min_score=float("nan"))


def test_compact_drops_what_nothing_uses_while_searches_go_on(tmp_path):
    rows = vectors(3000)
    with create(tmp_path / "i", kind="hnsw") as index:
        ids = [f"t{row:04d}" for row in range(3000)]
        index.add("text", ids, rows)
        index.delete("text", ids[:600])
        before = index.search(rows[-5:], 10)
        size = index.info().bytes
        done, found = threading.Event(), []

        def search():
            while not done.is_set():
                found.append(index.search(rows[-5:], 10) == before)

        thread = threading.Thread(target=search)
        thread.start()
        index.compact()
        done.set()
        thread.join()
        assert found
        assert np.mean(found) >= 0.9  # another graph may miss another neighbour
        assert index.info().bytes < size
        assert index.info().media["text"].in_graph == index._shelves["text"].rows == 2400
        assert index._store._writer.execute("SELECT count(*) FROM removals").fetchone() == (0,)
        index.verify()
    with Index.open(tmp_path / "i") as index:
        assert len(index) == 2400


def test_a_reader_that_the_log_does_not_reach_reads_everything_again(folder):
    with Index.open(folder) as first, Index.open(folder) as second:
        first.add("text", ["new"], vectors(1, seed=1))
        first.delete("text", ["t0"])
        first.compact()
        first.compact()
        assert {"new"} == {hit.id for hit in second.search(vectors(1, seed=1), 1)[0]}
        assert len(second) == 30


def shorten(monkeypatch, kept: int = 60, looked: int = 20) -> None:
    monkeypatch.setattr("dckt.index.upkeep.LOG_KEPT", kept)
    monkeypatch.setattr("dckt.index.upkeep.LOG_LOOKED", looked)


def rows_of(index: Index, table: str) -> int:
    return index._store._writer.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_the_log_does_not_grow_for_ever(tmp_path, monkeypatch):
    shorten(monkeypatch)
    fresh = vectors(400, seed=3)
    with create(tmp_path / "i") as index, Index.open(tmp_path / "i") as near, Index.open(tmp_path / "i") as far:
        for row in range(400):
            index.add("text", [f"t{row % 7}"], fresh[row][None], upsert=True)
            assert near.search(fresh[row][None], 1)[0][0].id == f"t{row % 7}"
        assert max(rows_of(index, "commits"), rows_of(index, "removals")) <= 60 + 20 + 1
        assert rows_of(index, "commits") >= 60
        assert [hit.id for hit in far.search(fresh[-1][None], 1)[0]] == ["t0"]  # reads everything again
        assert len(near) == len(far) == 7
        index.verify()
    with Index.open(tmp_path / "i") as index:
        assert len(index) == 7


def test_one_change_of_many_items_leaves_who_was_up_to_date_its_way_back(tmp_path, monkeypatch):
    shorten(monkeypatch)
    ids = [f"t{row}" for row in range(50)]
    with create(tmp_path / "i") as index:
        index.add("text", ids, vectors(50))
        with Index.open(tmp_path / "i") as other:
            index.delete("text", ids[:40])
            index.add("text", ids, vectors(50, seed=1), upsert=True)
            monkeypatch.setattr("dckt.index.store.ItemStore.load", lambda *_: pytest.fail("was read anew"))
            index.add("text", ["last"], vectors(1, seed=2))
            assert rows_of(index, "removals") >= 10
            assert len(other) == 51


def test_a_segments_way_to_the_present_is_never_forgotten(folder, monkeypatch, caplog):
    shorten(monkeypatch, kept=10, looked=5)
    with Index.open(folder) as index:
        for number in range(60):
            index.add("text", ["t1"], vectors(2)[1:], metadata=[{"n": number}], upsert=True)
        assert rows_of(index, "commits") > 50  # all since the segment was written
    with Index.open(folder) as index:
        assert "built again" not in caplog.text
        assert index.search(vectors(2)[1:], 1)[0][0].metadata == {"n": 59}
        index.compact()
        for number in range(60):
            index.add("text", ["t1"], vectors(2)[1:], metadata=[{"n": number}], upsert=True)
        index.verify()


def test_a_log_that_cannot_be_shortened_costs_no_change(tmp_path, monkeypatch, caplog):
    shorten(monkeypatch)

    def full(*_):
        raise IndexFolderError("the disk is full")

    with create(tmp_path / "i") as index:
        monkeypatch.setattr("dckt.index.store.ItemStore.trim", full)
        for row in range(30):
            index.add("text", [f"t{row}"], vectors(30)[row][None])
        assert len(index) == 30
        assert "its log was not shortened (the disk is full)" in caplog.text


def test_verify_finds_damage_that_opening_a_large_index_does_not(folder, monkeypatch):
    monkeypatch.setattr("dckt.index.store.CHECKED_BYTES", 0)
    with sqlite3.connect(folder / "items.sqlite") as connection:
        connection.execute("UPDATE items SET metadata = '{}' WHERE id = 't5'")
    connection.close()
    with Index.open(folder) as index:
        assert index.search(vectors(6)[5:], 1)[0][0].metadata == {"row": 5}  # from the segment, which is whole
        for use in (index.verify, lambda: index.get("t5", "text"), lambda: list(index.items())):
            with pytest.raises(IndexCorruptError, match="'t5'"):
                use()


def test_tuning_is_stored_and_seen_by_others(folder):
    with Index.open(folder) as first, Index.open(folder) as second:
        first.add("text", [f"n{row}" for row in range(2000)], vectors(2000, seed=3))
        found = first.tune(0.9, queries=vectors(50, seed=4))["text"]
        assert (found.target, found.search, found.queries) == (0.9, "hnsw", 50)
        assert found.recall_at_10 >= 0.9
        assert second.search(vectors(1), 1)
        for index in (first, second):
            about = index.info().media["text"]
            assert (about.ef, about.recall_at_10) == (found.ef, found.recall_at_10) or index is second
        more = first.tune(1.0)["text"]
        assert more.ef >= found.ef
    with Index.open(folder) as index:
        about = index.info().media["text"]
        assert (about.ef, about.recall_at_10, about.search) == (more.ef, more.recall_at_10, more.search)


def test_a_graph_that_cannot_reach_what_is_asked_is_not_used(folder, monkeypatch):
    with Index.open(folder) as index:
        monkeypatch.setattr(HnswGraph, "recalls", lambda _, queries, *__: np.full(len(queries), 0.98))
        found = index.tune(0.99)["text"]
        assert (found.search, found.ef, found.recall_at_10) == ("exact", None, 1.0)
        assert index.info().media["text"].search == "exact"
        assert index.search(vectors(1), 1)[0][0].id == "t0"
        found = index.tune(0.95)["text"]
        assert (found.search, found.recall_at_10) == ("hnsw", pytest.approx(0.98))
    monkeypatch.undo()
    with Index.open(folder) as index:
        assert index.info().media["text"].search == "hnsw"


@pytest.mark.parametrize(("recall", "queries"), [(0, None), (1.1, None), (0.9, np.zeros((0, 8)))])
def test_tuning_for_what_there_is_not(index, recall, queries):
    with pytest.raises(ConfigError):
        index.tune(recall, queries=queries)
