"""The traps of hnswlib 0.8.0, H1 to H15: what it does by itself, where that can be shown without harm, and our guard.

Only through the index's own interface, so that the guards may move. The graph's inner workings have their tests in
test_index_hnsw.py.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import hnswlib
import numpy as np
import pytest

from dckt.errors import ItemError
from dckt.index import Index
from faults import samples
from faults.damage import files_of
from faults.truth import Truth, difference, wrong_hits

WIDTH = samples.WIDTH
COUNT = 400


def raw(rows: int = 50, *, space: str = "ip", capacity: int | None = None, **options) -> hnswlib.Index:
    index = hnswlib.Index(space=space, dim=WIDTH)
    index.init_index(max_elements=capacity or rows, **options)
    index.add_items(np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32), np.arange(rows))
    return index


def filled(folder: Path, count: int = COUNT, seed: int = 0) -> tuple[Index, Truth]:
    index = samples.create(folder, kind="hnsw")
    return index, samples.add(index, Truth({}), "text", samples.items("text", count, seed))


@pytest.fixture
def index(tmp_path):
    index, _ = filled(tmp_path / "index")
    with index:
        assert index.info().media["text"].search == "hnsw"
        yield index


@pytest.fixture
def truth():
    return Truth({}).with_items("text", samples.items("text", COUNT, 0))


def caches(folder: Path) -> list[Path]:
    """The files that are not the truth: all but SQLite's."""
    return [
        file for file in files_of(folder) if "-wal" not in file.name and "-shm" not in file.name and not is_sqlite(file)
    ]


def is_sqlite(file: Path) -> bool:
    return file.read_bytes()[:15] == b"SQLite format 3"


def test_h1_a_wrong_width_is_refused(index):
    """Guard: shapes are compared before hnswlib is called."""
    labels, _ = raw().knn_query(np.ones((2, 4 * WIDTH), np.float32), k=1)
    assert labels.shape == (2, 1), "hnswlib answers queries of any width"
    for shape in ((2, 4 * WIDTH), (2, WIDTH - 1), (WIDTH,), (1, 2, WIDTH)):
        with pytest.raises(ItemError, match=f"{WIDTH}"):
            index.search(np.ones(shape, np.float32))
        with pytest.raises(ItemError):
            index.add("text", ["new"], np.ones(shape, np.float32))
    assert index.count() == COUNT


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_h2_numbers_that_are_not_finite_are_refused(index, truth, bad):
    """Guard: vectors are checked to be finite, and the row is named."""
    rows = np.ones((3, WIDTH), np.float32)
    rows[1, 2] = bad
    if np.isnan(bad):
        _, distances = raw().knn_query(rows[1:2], k=3)
        assert np.isnan(distances).all(), "hnswlib answers with distances that are no numbers"
    with pytest.raises(ItemError, match="query 1"):
        index.search(rows)
    with pytest.raises(ItemError, match="second"):
        index.add("text", ["first", "second", "third"], rows)
    assert difference(index, truth, samples.queries()) is None


def test_h3_a_query_without_direction_is_refused(index):
    """Guard: a zero vector is refused; hnswlib finds everything equally far from it."""
    zero = np.zeros((1, WIDTH), np.float32)
    _, distances = raw(space="cosine").knn_query(zero, k=20)
    assert (distances == 1).all(), "hnswlib says that all are as near"
    with pytest.raises(ItemError, match="no direction"):
        index.search(zero)
    with pytest.raises(ItemError, match="no direction"):
        index.add("text", ["zero"], zero)


def lies(save: Callable) -> Callable:
    """A save as on a full disk: hnswlib says nothing, and half of the file is there."""

    def half(self, path):
        save(self, path)
        file = Path(path)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return half


@pytest.mark.parametrize("kept", ["half", "nothing"])
def test_h4_a_save_that_failed_silently_is_noticed(tmp_path, truth, monkeypatch, caplog, kept):
    """Guard: what was saved is measured and read back before it replaces anything."""
    raw().save_index(str(tmp_path / "missing" / "graph"))
    assert not (tmp_path / "missing").exists(), "hnswlib says nothing when it cannot save"
    save = hnswlib.Index.save_index
    monkeypatch.setattr(hnswlib.Index, "save_index", lies(save) if kept == "half" else lambda self, path: None)
    with filled(tmp_path / "index")[0] as index:
        assert difference(index, truth, samples.queries()) is None
    assert "not saved" in caplog.text
    monkeypatch.undo()
    with Index.open(tmp_path / "index", threads=1) as index:
        assert difference(index, truth, samples.queries()) is None
        assert index.info().media["text"].search == "hnsw"


def test_h5_a_graph_of_another_shape_or_index_is_not_used(tmp_path, truth):
    """Guard: the description names index, width and settings; hnswlib loads any graph as of any width."""
    raw().save_index(str(tmp_path / "graph"))
    other = hnswlib.Index(space="l2", dim=WIDTH // 2)
    other.load_index(str(tmp_path / "graph"))
    assert other.element_count == 50, "hnswlib loads a graph of another width and space"
    filled(tmp_path / "index")[0].close()
    filled(tmp_path / "same width", seed=1)[0].close()
    wide = samples.create(tmp_path / "wide", kind="hnsw", dimension=2 * WIDTH)
    with wide:
        wide.add("text", [str(row) for row in range(COUNT)], np.random.default_rng(3).normal(size=(COUNT, 2 * WIDTH)))
    for donor in ("same width", "wide"):
        others = {file.name: file for file in caches(tmp_path / donor)}
        folder = shutil.copytree(tmp_path / "index", tmp_path / f"index with graph of {donor}")
        for file in caches(folder):
            shutil.copyfile(others[file.name], file)
        with Index.open(folder, threads=1) as index:
            assert difference(index, truth, samples.queries()) is None


def test_h6_a_flipped_bit_never_reaches_hnswlib(tmp_path, truth):
    """Guard: checksums are compared before hnswlib sees a byte."""
    raw().save_index(str(tmp_path / "graph"))
    content = bytearray((tmp_path / "graph").read_bytes())
    vector = raw().get_items([7])[0]
    place = content.index(np.array(vector, np.float32).tobytes())
    content[place + 3] ^= 0x10
    (tmp_path / "graph").write_bytes(content)
    damaged = hnswlib.Index(space="ip", dim=WIDTH)
    damaged.load_index(str(tmp_path / "graph"))
    assert not np.array_equal(damaged.get_items([7])[0], vector), "hnswlib loads what was damaged"
    filled(tmp_path / "index")[0].close()
    random = Random(0)
    for file in caches(tmp_path / "index"):
        for turn in range(4):
            folder = shutil.copytree(tmp_path / "index", tmp_path / f"{file.parent.name} {file.name} {turn}")
            changed = bytearray(file.read_bytes())
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
            (folder / file.relative_to(tmp_path / "index")).write_bytes(changed)
            with Index.open(folder, threads=1) as index:
                assert difference(index, truth, samples.queries(2), thorough=False) is None


def test_h7_a_graph_that_was_read_answers_as_before(tmp_path, monkeypatch):
    """Guard: the effort is kept with the graph and in force again after loading, and labels are always ours."""
    one = raw()
    one.set_ef(200)
    one.save_index(str(tmp_path / "graph"))
    again = hnswlib.Index(space="ip", dim=WIDTH)
    again.load_index(str(tmp_path / "graph"))
    assert (one.ef, again.ef) == (200, 10), "hnswlib forgets ef"
    effort = []
    knn_query = hnswlib.Index.knn_query

    def noted(self, data, k=1, *arguments, **options):
        effort.append((self.ef, k))
        return knn_query(self, data, k, *arguments, **options)

    monkeypatch.setattr(hnswlib.Index, "knn_query", noted)
    index, _ = filled(tmp_path / "index")
    queries = samples.queries(20)
    with index:
        before = index.search(queries)
        expected = set(effort[-1:])
        info = index.info().media["text"]
    effort.clear()
    with Index.open(tmp_path / "index", threads=1) as index:
        assert index.info().media["text"] == info
        assert index.search(queries) == before
        assert set(effort) == expected
        assert all(max(pair) > 10 for pair in expected)
        index.add("text", ["later"], samples.queries(1, seed=8))
        assert index.search(samples.queries(1, seed=8), 1)[0][0].id == "later"


@pytest.mark.parametrize("k", [1, 128, 129, COUNT - 1, COUNT, 10**9])
def test_h8_any_k_gives_that_many_or_all(index, truth, k):
    """Guard: k is clamped to what is there, and what the graph cannot reach is answered exactly.

    hnswlib raises, and its result buffers leak, so that is not shown.
    """
    index.delete("text", truth.ids("text")[:50])
    left = truth.without("text", truth.ids("text")[:50])
    for query in samples.queries(3):
        hits = index.search(query[None], k)[0]
        assert wrong_hits(hits, left, query, k, lambda *_: True, exact=k >= len(left)) is None


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_h8_a_small_graph_is_never_asked_for_more_than_it_holds(tmp_path, count):
    """Guard: as above; a graph holds each vector once, so it has fewer than there are items."""
    index, truth = filled(tmp_path / "index", count)
    with index:
        assert index.info().media["text"].in_graph <= count
        for query in samples.queries(3):
            assert wrong_hits(index.search(query[None], 10)[0], truth, query, 10, lambda *_: True) is None


def test_h9_a_batch_past_the_capacity_is_stored_whole(tmp_path, truth):
    """Guard: room is made before a batch is added, and a batch is one transaction."""
    small = raw(5, capacity=5)
    with pytest.raises(RuntimeError):
        small.add_items(np.ones((8, WIDTH), np.float32), np.arange(4, 12))
    assert small.element_count > 0
    index, _ = filled(tmp_path / "index", 3)
    with index:
        more = {item: stored for item, stored in truth.items.items() if item[1] > "t0002"}
        rows = {item: stored for (_, item), stored in more.items()}
        whole = samples.add(index, Truth({}).with_items("text", samples.items("text", 3, 0)), "text", rows)
        assert difference(index, whole, samples.queries()) is None
        with pytest.raises(ItemError):
            samples.add(index, whole, "text", {"new": rows["t0003"], "t0003": rows["t0003"]})
        assert difference(index, whole, samples.queries()) is None


def test_h10_what_was_deleted_does_not_count(index, truth):
    """Guard: items are counted by us."""
    one = raw()
    one.mark_deleted(7)
    assert (one.element_count, 7 in one.get_ids_list()) == (50, True), "hnswlib counts and lists what was deleted"
    gone = truth.ids("text")[::2]
    index.delete("text", gone)
    assert (index.count(), len(list(index.ids("text")))) == (COUNT - len(gone), COUNT - len(gone))
    assert difference(index, truth.without("text", gone), samples.queries()) is None


def test_h11_a_deleted_id_can_be_added_again(index, truth):
    """Guard: hnswlib's own deletion is never used; an id is not a label."""
    one = raw(allow_replace_deleted=True)
    one.mark_deleted(7)
    with pytest.raises(RuntimeError):
        one.add_items(np.ones((1, WIDTH), np.float32), np.array([7]))
    for seed in (5, 6):
        index.delete("text", ["t0007"])
        truth = samples.add(index, truth.without("text", ["t0007"]), "text", samples.items("text", 1, seed, first=7))
        assert difference(index, truth, samples.queries()) is None


class Watched:
    """Notes what other calls run on a graph of hnswlib while it is searched or changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: dict[int, list[str]] = {}
        self.calls: list[tuple[str, bool]] = []  # name, and whether a filter was given
        self.collisions: set[str] = set()
        self._lock = threading.Lock()
        for name in ("knn_query", "add_items", "resize_index", "set_ef"):
            monkeypatch.setattr(hnswlib.Index, name, self._watch(name, getattr(hnswlib.Index, name)))

    def _watch(self, name: str, call: Callable) -> Callable:
        def watched(graph, *arguments, **options):
            with self._lock:
                beside = self.running.setdefault(id(graph), [])
                self.calls.append((name, options.get("filter") is not None))
                if beside and {name, *beside} != {"knn_query"}:
                    self.collisions.add(f"{name} beside {sorted(set(beside))}")
                beside.append(name)
            try:
                time.sleep(0.001)  # so that what may overlap does
                return call(graph, *arguments, **options)
            finally:
                with self._lock:
                    beside.remove(name)

        return watched

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)


def beside_searches(index: Index, work: Callable[[], object]) -> None:
    """Does the work while four threads search."""
    done = threading.Event()
    errors: list[BaseException] = []

    def search():
        try:
            while not done.is_set():
                assert len(index.search(samples.queries(2), 10)[1]) == 10
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors


def test_h12_searching_and_growing_exclude_each_other(tmp_path, monkeypatch):
    """Guard: a readers-writer lock. hnswlib crashes when it is resized during a search, so that is not shown."""
    watched = Watched(monkeypatch)
    index, truth = filled(tmp_path / "index")
    with index:

        def grow():
            nonlocal truth
            for first in range(1000, 2500, 300):
                truth = samples.add(index, truth, "text", samples.items("text", 300, 2, first=first))
                gone = truth.ids("text")[::7]
                truth = samples.delete(index, truth, "text", gone)

        beside_searches(index, grow)
        index.compact()
        assert difference(index, truth, samples.queries()) is None
    assert watched.count("knn_query") > 20
    assert watched.count("add_items") > 1
    assert watched.collisions == set()


def test_h13_one_thread_makes_the_same_graph(tmp_path):
    """Guard: the seed is fixed, the order of insertion is ours, and threads= reaches hnswlib."""
    written = []
    for name in ("a", "b"):
        index, _ = filled(tmp_path / name)
        with index:
            mark = index.meta.index_id.encode()
        contents = [file.read_bytes() for file in caches(tmp_path / name)]
        written.append(sorted(content for content in contents if mark not in content))
    assert written[0] == written[1] != []


def test_h14_a_filter_is_never_called_back(index, truth, monkeypatch):
    """Guard: SQLite answers filters; hnswlib would call Python for each candidate, and find fewer than k."""
    watched = Watched(monkeypatch)
    for where in ({"price": {"lt": 2}}, {"price": {"lt": 38}}, {"shop": "A"}, {"tags.row": 7}):
        accepts = {
            "price": lambda about, where=where: about["price"] < where["price"]["lt"],
            "shop": lambda about: about["shop"] == "A",
            "tags.row": lambda about: about["tags"]["row"] == 7,
        }[next(iter(where))]
        for query in samples.queries(5):
            hits = index.search(query[None], 10, where=where)[0]
            assert (
                wrong_hits(hits, truth, query, 10, lambda _, about, accepts=accepts: accepts(about), exact=False)
                is None
            )
    assert not any(given for _, given in watched.calls)


def test_h15_ef_changes_only_while_nothing_searches(index, truth, monkeypatch):
    """Guard: ef is one value for all threads of a graph, so it is never changed beside a search."""
    one = raw()
    one.set_ef(77)
    assert one.ef == 77, "hnswlib has one ef for all"
    watched = Watched(monkeypatch)
    beside_searches(index, lambda: (index.tune(0.5), index.tune(0.999)))
    assert watched.count("knn_query") > 4
    assert watched.collisions == set()
    assert difference(index, truth, samples.queries()) is None
