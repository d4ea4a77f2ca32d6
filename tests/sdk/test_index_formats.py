"""Every format that was ever written opens, and answers as it did: committed indexes of each, with their answers."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from dckt.errors import IndexCorruptError
from dckt.index import Index

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
