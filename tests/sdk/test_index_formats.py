"""Every format that was ever written opens, and answers as it did: committed indexes of each, with their answers."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import hnswlib
import numpy as np
import pytest

from dckt.errors import IndexCorruptError
from dckt.index import Index
from dckt.index.graphfile import read_state

DATA = Path(__file__).parent / "data"


@pytest.fixture(params=[1, 2])
def written(request, tmp_path):
    """A copy of an index of each format, and what it held."""
    source = DATA / f"index-v{request.param}"
    copy = Path(shutil.copytree(source / "index", tmp_path / "index"))
    return copy, json.loads((source / "expected.json").read_text())


def check(path: Path, expected: dict) -> None:
    with Index.open(path, model_id=expected["model_id"], representation=expected["representation"]) as index:
        about = index.info()
        assert (about.format_version, about.sequence, about.kind) == (2, expected["sequence"], expected["kind"])
        assert (index.meta.index_id, index.meta.created) == (expected["index_id"], expected["created"])
        assert index.media == sorted(expected["media"])
        for medium, items in expected["items"].items():
            counts = {"items": about.media[medium].items, "unique_vectors": about.media[medium].unique_vectors}
            assert counts == expected["media"][medium]
            assert list(index.ids(medium)) == sorted(items)
            for item, stored in items.items():
                assert index.get(item, medium).metadata == stored["metadata"]
                assert index.vector(item, medium).tobytes().hex() == stored["vector"]
            contents = {item: stored["content"] for item, stored in items.items() if stored.get("content")}
            assert index.contents(medium, list(items)) == contents
            if about.second:
                seconds = index.second(medium, list(items))
                assert {item: row.tobytes().hex() for item, row in seconds.items()} == {
                    item: stored["second"] for item, stored in items.items()
                }
        for answer in expected["answers"]:
            found = index.search(expected["queries"], answer["k"], media=answer["media"])
            assert [[[hit.id, hit.medium, hit.score] for hit in hits] for hits in found] == answer["hits"]
        index.verify()


def test_it_answers_as_it_did(written):
    path, expected = written
    for _ in range(2):
        check(path, expected)


def test_it_can_be_changed(written):
    path, expected = written
    with Index.open(path) as index:
        rows = index.search(expected["queries"], 1, media=["text"])
        second = {"second": [[1.0, 2.0, 3.0]]} if index.meta.second else {}
        index.add("text", ["a new one"], [expected["queries"][0]], contents=["hash"], **second)
        index.delete("text", [rows[1][0].id])
    with Index.open(path) as index:
        assert index.search(expected["queries"][:1], 1)[0][0].id == "a new one"
        assert index.contents("text", ["a new one"]) == {"a new one": "hash"}
        assert rows[1][0].id not in set(index.ids("text"))
        index.verify()


def test_its_caches_are_not_needed(written):
    path, expected = written
    for file in path.iterdir():
        if file.name != "items.sqlite":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    check(path, expected)


def test_format_1_is_upgraded_whole_or_not_at_all(tmp_path, monkeypatch):
    path = Path(shutil.copytree(DATA / "index-v1" / "index", tmp_path / "index"))
    monkeypatch.setattr("dckt.index.schema._LOG", "CREATE TABLE media (medium TEXT, items INTEGER); CREATE NONSENSE")
    before = dump(path)
    with pytest.raises(IndexCorruptError, match="NONSENSE"):
        Index.open(path)
    assert dump(path) == before
    monkeypatch.undo()
    with Index.open(path):
        pass
    assert dump(path) != before
    assert not list(path.glob("graph.*"))


def dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path / "items.sqlite")
    lines = list(connection.iterdump())
    connection.close()
    return lines


# --- the file of a graph ---


def saved_graph(path: Path, count: int) -> np.ndarray:
    rows = np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)
    graph = hnswlib.Index(space="ip", dim=8)
    graph.init_index(max_elements=count + 3, M=16, ef_construction=50, random_seed=0)
    graph.add_items(rows, np.random.default_rng(0).permutation(count), num_threads=1)
    graph.save_index(str(path))
    return rows


@pytest.mark.parametrize("count", [1, 2, 17, 300, 5000])
def test_a_graph_is_read_as_hnswlib_reads_it(tmp_path, count):
    rows = saved_graph(tmp_path / "one", count)
    ours = hnswlib.Index.__new__(hnswlib.Index)
    ours.__setstate__((read_state(tmp_path / "one", space="ip", dimension=8, seed=0),))
    theirs = hnswlib.Index(space="ip", dim=8)
    theirs.load_index(str(tmp_path / "one"))
    for graph in (ours, theirs):
        graph.set_ef(50)
    k = min(10, count)
    for found, expected in zip(ours.knn_query(rows, k), theirs.knn_query(rows, k), strict=True):
        assert (found == expected).all()
    ours.save_index(str(tmp_path / "two"))
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    ours.resize_index(count + 100)
    ours.add_items(np.roll(rows, 1, axis=1)[:100], np.arange(count, count + min(count, 100)), num_threads=1)
    assert ours.element_count == count + min(count, 100)


def test_a_file_that_is_no_whole_graph_is_refused(tmp_path):
    saved_graph(tmp_path / "whole", 300)
    whole = (tmp_path / "whole").read_bytes()
    damaged = [whole[:size] for size in (0, 1, 95, 96, 1000, len(whole) - 4, len(whole) - 1)]
    damaged += [whole + bytes(4), whole[96:], bytes(len(whole)), b"\xff" * len(whole)]
    for content in damaged:
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(ValueError, match=r"fit|short|empty"):
            read_state(tmp_path / "damaged", space="ip", dimension=8, seed=0)
    with pytest.raises(ValueError, match="header"):
        read_state(tmp_path / "whole", space="ip", dimension=16, seed=0)
