"""Several processes, one index: a search sees what others wrote, writers take turns, and a killed one harms nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dckt.errors import IndexFolderError
from dckt.index import Index

WIDTH = 16
ROWS = np.random.default_rng(0).normal(size=(4000, WIDTH)).astype(np.float32)

_COMMON = """
import json, sys
import numpy as np
from dckt.index import Index
ROWS = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
"""
# Answers each line with what a search finds, until its input ends.
_READER = (
    _COMMON
    + """
with Index.open(sys.argv[1], threads=1) as index:
    print("ready", flush=True)
    for line in sys.stdin:
        row, k, where = json.loads(line)
        hits = index.search(ROWS[row : row + 1], k, where=where)[0]
        print(json.dumps([len(index), [hit.id for hit in hits]]), flush=True)
"""
)
_WRITER = (
    _COMMON
    + """
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Index.open(path, threads=1) as index:
    for start in range(first, last, 20):
        ids = [f"t{row:04d}" for row in range(start, start + 20)]
        index.add("text", ids, ROWS[start : start + 20], metadata=[{"by": first}] * 20)
        index.delete("text", ids[:5])
        index.add("text", ids[:2], ROWS[start : start + 2], metadata=[{"by": -first}] * 2)
"""
)


def create(folder: Path, rows: int, kind: str = "hnsw") -> Index:
    index = Index.create(folder, model_id="m", representation="p", dimension=WIDTH, kind=kind, threads=1)
    index.add("text", [f"t{row:04d}" for row in range(rows)], ROWS[:rows], metadata=[{"n": row} for row in range(rows)])
    return index


class Reader:
    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline() == "ready\n"

    def search(self, row: int, k: int, where: object = None) -> tuple[int, list[str]]:
        self._process.stdin.write(json.dumps([row, k, where]) + "\n")
        self._process.stdin.flush()
        count, ids = json.loads(self._process.stdout.readline())
        return count, ids

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_the_next_search_of_another_process_sees_every_change(tmp_path, kind):
    with create(tmp_path / "i", 300, kind) as index, Reader(tmp_path / "i") as reader:
        assert reader.search(299, 1) == (300, ["t0299"])
        index.add("text", ["new"], ROWS[300:301], metadata=[{"n": "new"}])
        assert reader.search(300, 1) == (301, ["new"])
        assert reader.search(300, 5, {"n": "new"}) == (301, ["new"])
        index.add("text", ["new"], ROWS[301:302], metadata=[{"n": "newer"}], upsert=True)
        assert reader.search(301, 1) == (301, ["new"])
        assert reader.search(300, 5, {"n": "new"}) == (301, [])
        index.delete("text", ["new"])
        assert reader.search(301, 1)[1] != ["new"]
        index.add("image", ["picture"], ROWS[400:401])
        assert reader.search(400, 1) == (301, ["picture"])
        index.compact()
        index.add("text", ["last"], ROWS[500:501])
        assert reader.search(500, 1) == (302, ["last"])
        for row in range(0, 300, 23):
            assert reader.search(row, 3)[1] == [hit.id for hit in index.search(ROWS[row : row + 1], 3)[0]]


def test_two_writers_take_turns_and_readers_see_both(tmp_path):
    create(tmp_path / "i", 300).close()
    with Reader(tmp_path / "i") as reader:
        writers = [
            subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "i"), str(first), str(first + 400)])
            for first in (1000, 2000)
        ]
        while any(writer.poll() is None for writer in writers):
            assert reader.search(7, 1)[1] == ["t0007"]
        assert [writer.returncode for writer in writers] == [0, 0]
        count, ids = reader.search(1001, 1, {"by": -1000})
        assert (count, ids) == (300 + 2 * 20 * 17, ["t1001"])
    with Index.open(tmp_path / "i") as index:
        index.verify()
        kept = [row for first in (1000, 2000) for row in range(first, first + 400) if row % 20 < 2 or row % 20 >= 5]
        assert sorted(index.ids("text")) == [f"t{row:04d}" for row in [*range(300), *kept]]
        assert [hits[0].id for hits in index.search(ROWS[kept], 1)] == [f"t{row:04d}" for row in kept]
        assert index.count(where={"by": {"in": [1000, 2000]}}) == 2 * 20 * 15


def test_another_process_keeps_its_files_while_an_index_is_compacted(tmp_path):
    with create(tmp_path / "i", 1000) as index, Reader(tmp_path / "i") as reader:
        reader.search(5, 1)
        index.delete("text", [f"t{row:04d}" for row in range(0, 600, 2)])
        for _ in range(3):
            index.compact()
            assert reader.search(701, 1) == (700, ["t0701"])
            assert reader.search(701, 1000)[0] == 700


# --- folders that cannot be written ---

_AS_NOBODY = (
    _COMMON
    + """
import os
from dckt.errors import DcktError
os.setgid(65534)
os.setuid(65534)
try:
    with Index.open(sys.argv[1], threads=1) as index:
        print(json.dumps([[hit.id for hit in index.search(ROWS[5:6], 3)[0]], index.info().media["text"].in_graph]))
        index.add("text", ["new"], ROWS[:1])
except DcktError as error:
    print(json.dumps(str(error)))
"""
)


@pytest.fixture
def readable():
    """An index that others may read and not write; the test's process is root, which may do anything."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "i")
        with create(folder, 300) as index:
            expected = [hit.id for hit in index.search(ROWS[5:6], 3)[0]]
        for path in (Path(name), folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield folder, expected


def as_nobody(folder: Path) -> list[object]:
    done = subprocess.run([sys.executable, "-c", _AS_NOBODY, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_folder_that_cannot_be_written_can_be_searched(readable):
    folder, expected = readable
    before = sorted(folder.rglob("*"))
    found, refused = as_nobody(folder)
    assert found == [expected, 300]
    assert "may not be written" in refused
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused_while_its_log_holds_something(readable):
    folder, _ = readable
    with Index.open(folder) as index:
        index.add("text", ["in the log"], ROWS[3000:3001])
        (folder / "items.sqlite-shm").chmod(0o600)
        (answer,) = as_nobody(folder)
        assert "items.sqlite" in answer


def test_what_was_opened_for_searching_only_notices_a_change(tmp_path, monkeypatch):
    create(tmp_path / "i", 300).close()
    monkeypatch.setattr("dckt.index.store._connect", lambda path: ("immutable", _immutable(path)))
    with Index.open(tmp_path / "i") as index:
        monkeypatch.undo()
        assert index.search(ROWS[5:6], 1)[0][0].id == "t0005"
        with Index.open(tmp_path / "i") as other:
            other.add("text", ["new"], ROWS[300:301])
        with pytest.raises(IndexFolderError, match="was changed since; open it again"):
            index.search(ROWS[5:6], 1)


def _immutable(path):
    from dckt.index.schema import connect

    return connect(path, mode="immutable")
