"""The traps of hnswlib 0.8.0, each by its number, and the promises of a measured graph."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import hnswlib
import numpy as np
import pytest

from dckt.errors import ConfigError, ItemError
from dckt.index import Index, hnsw, shelf
from dckt.index.hnsw import PAGE, HnswGraph
from dckt.index.snapshot import GraphReport, SnapshotError, read_snapshot, write_snapshot
from dckt.index.vectors import normalised

WIDTH = 16


def unit(rows: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width))
    return normalised(values, dimension=width, names=["row"] * rows)


def graph_of(vectors: np.ndarray, first: int = 0, threads: int | None = 1) -> HnswGraph:
    graph = HnswGraph(vectors.shape[1])
    graph.add(np.arange(first, first + len(vectors)), vectors, threads=threads)
    return graph


def index_of(folder: Path, vectors: np.ndarray, kind: str = "hnsw") -> Index:
    index = Index.create(folder, model_id="m", representation="fc9", dimension=vectors.shape[1], kind=kind, threads=1)
    index.add("text", [f"t{row:05d}" for row in range(len(vectors))], vectors)
    return index


def search_state(index: Index) -> tuple[str, int]:
    about = index.info().media["text"]
    return about.search, about.in_graph


REPORT = GraphReport(count=300, ef=512, recall=1.0, accepted=True, seconds=0.0)


@pytest.fixture
def snapshot(tmp_path):
    """A folder with the snapshot of a graph over 300 vectors."""
    write_snapshot(tmp_path, index_id="i", medium="text", dimension=WIDTH, report=REPORT, graph=graph_of(unit(300)))
    return tmp_path


def read(folder: Path, **changes):
    return read_snapshot(folder, **{"index_id": "i", "medium": "text", "dimension": WIDTH, **changes})


# --- H1 to H3: arguments ---


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_h1_a_wrong_width_never_reaches_hnswlib(width):
    graph = graph_of(unit(50))
    with pytest.raises(ItemError, match=rf"expected float32 \(N, {WIDTH}\)"):
        graph.nearest(unit(3, width))
    with pytest.raises(ItemError, match=rf"expected float32 \(N, {WIDTH}\)"):
        graph.add(np.array([90]), unit(1, width))
    assert len(graph) == 50


def test_h1_a_wrong_dtype_never_reaches_hnswlib():
    with pytest.raises(ItemError, match="float64"):
        graph_of(unit(50)).nearest(unit(3).astype(np.float64))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_h2_numbers_that_are_not_finite_are_refused_with_their_row(bad):
    graph = graph_of(unit(50))
    vectors = unit(3)
    vectors[1, 4] = bad
    with pytest.raises(ItemError, match=r"rows \[1\]"):
        graph.nearest(vectors)
    with pytest.raises(ItemError, match=r"rows \[1\]"):
        graph.add(np.arange(90, 93), vectors)
    assert len(graph) == 50


def test_h3_a_zero_query_is_refused(tmp_path):
    with index_of(tmp_path / "i", unit(200)) as index, pytest.raises(ItemError, match=r"query 1.*no direction"):
        index.search(np.stack([np.ones(WIDTH), np.zeros(WIDTH)]))


# --- H4 to H7: files ---


def test_h4_a_save_into_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"missing"):
        graph_of(unit(50)).save(tmp_path / "missing" / "graph")


def test_h4_a_save_on_a_full_disk_is_an_error():
    with pytest.raises(OSError, match=r"0 of .* bytes were written"):
        graph_of(unit(50)).save(Path("/dev/full"))


def test_h4_a_failed_save_leaves_the_snapshot_that_was_there(snapshot, monkeypatch):
    before = {file.name: file.read_bytes() for file in snapshot.iterdir()}

    def save_half(index, path):
        Path(path).write_bytes(b"half")

    monkeypatch.setattr(HnswGraph, "save", lambda graph, path: (save_half(graph, path), _full_disk()))
    with pytest.raises(OSError, match="disk is full"):
        write_snapshot(snapshot, index_id="i", medium="text", dimension=WIDTH, report=REPORT, graph=graph_of(unit(9)))
    assert {file.name: file.read_bytes() for file in snapshot.iterdir()} == before


def test_h4_an_index_works_on_when_its_graph_cannot_be_saved(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(HnswGraph, "save", lambda graph, path: _full_disk())
    with index_of(tmp_path / "i", unit(200)) as index:
        assert "was not saved" in caplog.text
        assert index.search(unit(1), 1)[0][0].id == "t00000"
    assert not list((tmp_path / "i").glob("*hnsw*"))


def _full_disk():
    raise OSError("the disk is full")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"dimension": WIDTH + 1}, "dimension"), ({"index_id": "other"}, "index_id"), ({"medium": "image"}, None)],
)
def test_h5_a_graph_of_another_shape_or_index_is_not_loaded(snapshot, change, said):
    if said is None:
        assert read(snapshot, **change) is None
    else:
        with pytest.raises(SnapshotError, match=said):
            read(snapshot, **change)


@pytest.mark.parametrize("setting", ["SPACE", "M", "EF_CONSTRUCTION", "PAGE"])
def test_h5_a_graph_of_other_settings_is_not_loaded(snapshot, monkeypatch, setting):
    monkeypatch.setattr("dckt.index.snapshot." + setting, "other")
    with pytest.raises(SnapshotError):
        read(snapshot)


def test_h6_no_flipped_bit_reaches_hnswlib(snapshot, monkeypatch):
    monkeypatch.setattr(HnswGraph, "load", lambda *_, **__: pytest.fail("hnswlib was given a damaged file"))
    file = snapshot / "graph.text.hnsw"
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 200).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(SnapshotError, match="not the one that was written"):
            read(snapshot)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_h6_no_truncated_file_reaches_hnswlib(snapshot, monkeypatch, size):
    monkeypatch.setattr(HnswGraph, "load", lambda *_, **__: pytest.fail("hnswlib was given a damaged file"))
    file = snapshot / "graph.text.hnsw"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SnapshotError):
        read(snapshot)


def test_h6_no_flipped_bit_of_the_description_is_believed(snapshot):
    file = snapshot / "graph.text.json"
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 500).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        if damaged.split() == whole.split():  # one white space for another
            continue
        file.write_bytes(damaged)
        with pytest.raises(SnapshotError):
            read(snapshot)


def test_h7_ef_and_labels_survive(snapshot):
    report, graph = read(snapshot)
    assert report == REPORT
    assert graph.ef == 512
    assert graph._index.ef == 512
    np.testing.assert_array_equal(graph.labels, np.arange(300))
    graph.add(np.array([1000, 700]), unit(2, seed=9))
    assert graph.nearest(unit(2, seed=9))[:, 0].tolist() == [1000, 700]


def test_h7_ef_is_in_force_and_not_only_remembered():
    vectors = unit(3000, 64)
    graph, queries = graph_of(vectors, threads=None), unit(100, 64, seed=1)
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]

    def recall() -> float:
        return np.mean([np.isin(t, page[:10]).mean() for t, page in zip(true, graph.nearest(queries), strict=True)])

    graph.ef = PAGE
    narrow = recall()
    graph.ef = 2048
    assert recall() > narrow


# --- H8 to H11: counts and labels ---


@pytest.mark.parametrize("count", [1, 3, PAGE - 1, PAGE + 1])
def test_h8_a_page_is_never_larger_than_the_graph(count):
    assert graph_of(unit(count)).nearest(unit(2)).shape == (2, min(count, PAGE))


def test_h8_an_empty_graph_and_an_empty_batch():
    assert HnswGraph(WIDTH).nearest(unit(2)).shape == (2, 0)
    assert graph_of(unit(3)).nearest(unit(0)).shape == (0, 3)


def test_h8_what_the_graph_cannot_reach_is_answered_exactly(tmp_path, monkeypatch):
    vectors = unit(300)
    with index_of(tmp_path / "i", vectors) as index:
        assert search_state(index) == ("hnsw", 300)
        expected = index.search(vectors[:5], 7)

        def unreachable(*_, **__):
            raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")

        monkeypatch.setattr(
            index._shelves["text"].graph, "_index", _Replaced(index._shelves["text"].graph._index, unreachable)
        )
        assert index.search(vectors[:5], 7) == expected


class _Replaced:
    """hnswlib's index with another knn_query; its own attributes cannot be replaced."""

    def __init__(self, index, knn_query):
        self._index, self.knn_query = index, knn_query

    def __getattr__(self, name):
        return getattr(self._index, name)


@pytest.mark.parametrize("k", [1, PAGE, PAGE + 1, 299, 300, 301, 10**6])
def test_h8_any_k_gives_that_many_or_all(tmp_path, k):
    with index_of(tmp_path / "i", unit(300)) as index:
        hits = index.search(unit(1, seed=4), k)[0]
        assert len(hits) == min(k, 300)
        assert len({hit.id for hit in hits}) == len(hits)


def test_h9_adding_past_the_capacity_grows():
    graph = graph_of(unit(10))
    graph.add(np.arange(10, 5000), unit(4990, seed=2))
    assert len(graph) == 5000
    assert graph._index.element_count == 5000


@pytest.mark.parametrize("labels", [[50, 49], [60, 60], [-1, 60], [60]])
def test_h9_a_batch_is_added_whole_or_not_at_all(labels):
    graph = graph_of(unit(50))
    with pytest.raises(ItemError, match="expected 2 labels"):
        graph.add(np.array(labels), unit(2, seed=3))
    assert len(graph) == 50
    assert graph._index.element_count == 50


def test_h10_what_is_deleted_is_not_counted_and_not_found(tmp_path):
    vectors = unit(300)
    with index_of(tmp_path / "i", vectors) as index:
        gone = [f"t{row:05d}" for row in range(0, 100, 2)]
        index.delete("text", gone)
        assert len(index) == 250
        about = index.info().media["text"]
        assert (about.unique_vectors, about.in_graph) == (250, 250)
        for k in (10, 250, 10**6):
            hits = index.search(vectors[:1], k)[0]
            assert len(hits) == min(k, 250)
            assert not {hit.id for hit in hits} & set(gone)


def test_h10_a_vector_is_found_until_its_last_item_is_deleted(tmp_path):
    vectors = unit(300)
    with index_of(tmp_path / "i", vectors) as index:
        index.add("text", ["copy"], vectors[:1])
        assert index.info().media["text"].unique_vectors == 300
        index.delete("text", ["t00000"])
        assert index.search(vectors[:1], 1)[0][0].id == "copy"
        index.delete("text", ["copy"])
        assert index.search(vectors[:1], 1)[0][0].score < 0.999
        assert index.info().media["text"].unique_vectors == 299


def test_h11_a_deleted_id_can_be_added_again(tmp_path):
    vectors = unit(300)
    with index_of(tmp_path / "i", vectors) as index:
        for _ in range(3):
            index.delete("text", ["t00007"])
            index.add("text", ["t00007"], vectors[7:8])
            assert index.search(vectors[7:8], 1)[0][0].id == "t00007"
        assert len(index) == 300


def test_many_deletions_build_the_graph_anew(tmp_path):
    vectors = unit(400)
    with index_of(tmp_path / "i", vectors) as index:
        index.delete("text", [f"t{row:05d}" for row in range(150)])
        assert len(index._shelves["text"].graph) <= 400
        assert index._shelves["text"].unused_share() <= shelf.UNUSED_LIMIT
        index.delete("text", [f"t{row:05d}" for row in range(150, 390)])
        assert index.search(vectors[395:396], 3)[0][0].id == "t00395"
        assert len(index._shelves["text"].labels) == 10
    with Index.open(tmp_path / "i") as index:
        assert len(index.search(vectors[:1], 50)[0]) == 10


# --- H12 to H15: threads, determinism, filters, ef ---


def test_h12_adding_growing_deleting_and_searching_at_once(tmp_path):
    vectors = unit(3000)
    errors: list[BaseException] = []
    done = threading.Event()

    def watch(work):
        def run():
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        return threading.Thread(target=run)

    with index_of(tmp_path / "i", vectors[:500]) as index:

        def search():
            place = 0
            while not done.is_set():
                place = (place + 37) % 400
                hits = index.search(vectors[place : place + 3], 10)
                assert [found[0].id for found in hits] == [f"t{row:05d}" for row in range(place, place + 3)]
                assert all(len(found) == 10 for found in hits)

        def write():
            for start in range(500, 3000, 250):
                rows = range(start, start + 250)
                index.add("text", [f"t{row:05d}" for row in rows], vectors[start : start + 250])
                index.delete("text", [f"t{row:05d}" for row in rows[::5]])

        searching = [watch(search) for _ in range(3)]
        writing = watch(write)
        for thread in [*searching, writing]:
            thread.start()
        writing.join()
        done.set()
        for thread in searching:
            thread.join()
        assert not errors
        assert len(index) == 2500
        assert search_state(index)[0] == "hnsw"


def test_h12_growing_and_searching_exclude_each_other():
    graph = graph_of(unit(300))
    watched = graph._index = _Watched(graph._index)
    done = threading.Event()

    def search():
        while not done.is_set():
            graph.nearest(unit(2))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for start in range(300, 900, 60):
        graph.add(np.arange(start, start + 60), unit(60, seed=start), threads=1)
    done.set()
    for thread in threads:
        thread.join()
    assert watched.searches > 0
    assert not watched.collisions


class _Watched:
    """Notes when hnswlib is changed and searched at the same time."""

    def __init__(self, index):
        self._index = index
        self.changing = False
        self.searches, self.collisions = 0, []

    def knn_query(self, *arguments, **options):
        self.searches += 1
        if self.changing:
            self.collisions.append("search during a change")
        time.sleep(0.001)
        return self._index.knn_query(*arguments, **options)

    def _change(self, call, *arguments, **options):
        self.changing, before = True, self.searches
        time.sleep(0.003)
        call(*arguments, **options)
        if self.searches != before:
            self.collisions.append("search during a change")
        self.changing = False

    def add_items(self, *arguments, **options):
        self._change(self._index.add_items, *arguments, **options)

    def resize_index(self, *arguments):
        self._change(self._index.resize_index, *arguments)

    def __getattr__(self, name):
        return getattr(self._index, name)


def test_h13_one_thread_makes_the_same_graph_byte_for_byte(tmp_path):
    for name in "ab":
        index_of(tmp_path / name, unit(2000)).close()
    first, second = ((tmp_path / name / "graph.text.hnsw").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("threads", [1, 2])
def test_h13_threads_reach_hnswlib(monkeypatch, threads):
    given = []
    real = HnswGraph.add
    monkeypatch.setattr(
        HnswGraph, "add", lambda self, *args, threads: (given.append(threads), real(self, *args, threads=threads))
    )
    from dckt.index.shelf import Shelf
    from dckt.index.store import Change

    vectors = unit(20)
    one = Shelf(WIDTH, "hnsw")
    one.apply(Change(sequence=1, added=[(r, str(r)) for r in range(20)], vectors=dict(enumerate(vectors))))
    one.build_graph(threads)
    assert given == [threads]


def test_h13_no_threads_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="threads is 0"):
        Index.create(tmp_path / "i", model_id="m", representation="fc9", dimension=4, threads=0)


def test_h14_one_medium_is_not_starved_by_another(tmp_path):
    with index_of(tmp_path / "i", unit(1000)) as index:
        index.add("image", ["far", "farther"], -unit(2))
        near = unit(1)
        hits = index.search(near, 2, media=["image"])[0]
        assert {hit.id for hit in hits} == {"far", "farther"}
        assert {hit.medium for hit in index.search(near, 5, media=["text"])[0]} == {"text"}
        assert len(index.search(near, 2000)[0]) == 1002


def test_h15_ef_never_falls_below_the_page():
    with pytest.raises(ItemError, match="ef is 10"):
        HnswGraph(WIDTH).ef = 10


# --- recall is measured ---


def test_a_sorted_collection_is_inserted_shuffled():
    centres = unit(40)
    vectors = np.repeat(centres, 50, axis=0) + 0.01 * unit(2000, seed=1)
    vectors = normalised(vectors, dimension=WIDTH, names=["row"] * 2000)
    inserted = []

    graph = HnswGraph(WIDTH)
    real = graph._index
    graph._index = _Adding(real, inserted)
    graph.add(np.arange(2000), vectors, threads=1)
    assert sorted(inserted) == list(range(2000))
    assert inserted != sorted(inserted)
    assert graph.tune(np.arange(2000), vectors) >= 0.99


class _Adding:
    def __init__(self, index, inserted):
        self._index, self._inserted = index, inserted

    def add_items(self, vectors, labels, **options):
        self._inserted.extend(labels.tolist())
        self._index.add_items(vectors, labels, **options)

    def __getattr__(self, name):
        return getattr(self._index, name)


def test_ef_rises_until_the_target_is_reached(monkeypatch):
    vectors = unit(400)
    graph = graph_of(vectors)
    monkeypatch.setattr(graph, "_recall", lambda *_: {256: 0.5, 512: 0.98, 1024: 0.991, 2048: 1.0}[graph.ef])
    assert graph.tune(np.arange(400), vectors) == 0.991
    assert graph.ef == 1024


def test_recall_counts_what_exact_search_finds():
    vectors = unit(400)
    graph, queries = graph_of(vectors), unit(20, seed=5)
    floors = hnsw.tenth_best(vectors, queries)
    naive = [np.sort(vectors @ query)[-10] for query in queries]
    np.testing.assert_allclose(floors, naive, atol=1e-6)
    assert graph._recall(np.arange(400), vectors, queries, floors) == 1.0
    # With the labels shifted by one the graph finds wrong vectors.
    assert graph._recall(np.arange(400), np.roll(vectors, 1, axis=0), queries, floors) < 0.5


def test_a_graph_that_misses_its_target_is_not_used_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(HnswGraph, "_recall", lambda *_: 0.75)
    vectors = unit(300)
    with index_of(tmp_path / "i", vectors) as index:
        about = index.info().media["text"]
        assert (about.search, about.in_graph, about.ef, about.recall_at_10) == ("exact", 0, None, 0.75)
        assert [found[0].id for found in index.search(vectors[:3], 1)] == ["t00000", "t00001", "t00002"]
    assert not list((tmp_path / "i").glob("*.hnsw"))
    # The refusal is remembered: opening does not build again, until the collection has doubled.
    monkeypatch.setattr(HnswGraph, "tune", lambda *_: pytest.fail("was built again"))
    with Index.open(tmp_path / "i") as index:
        assert index.info().media["text"].recall_at_10 == 0.75
        index.add("text", ["one more"], unit(1, seed=8))
    monkeypatch.undo()
    with Index.open(tmp_path / "i") as index:
        index.add("text", [f"u{row}" for row in range(300)], unit(300, seed=6))
        assert index.info().media["text"].search == "hnsw"


def test_a_grown_graph_that_falls_short_is_built_anew(tmp_path, monkeypatch):
    with index_of(tmp_path / "i", unit(300)) as index:
        old = index._shelves["text"].graph
        monkeypatch.setattr(HnswGraph, "_recall", lambda graph, *_: 0.5 if graph is old else 1.0)
        index.add("text", [f"u{row}" for row in range(200)], unit(200, seed=6))
        assert index._shelves["text"].graph is not old
        assert search_state(index) == ("hnsw", 500)


def test_auto_builds_a_graph_behind_the_limit_only(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "exact_limit", lambda width: 250)
    vectors = unit(600)
    with index_of(tmp_path / "i", vectors[:250], kind="auto") as index:
        assert search_state(index) == ("exact", 0)
        index.add("text", ["over"], vectors[250:251])
        assert search_state(index) == ("hnsw", 251)
        index.add("text", [f"u{row}" for row in range(250)], vectors[251:501])
        assert search_state(index) == ("hnsw", 251)  # the others are searched exactly, beside the graph
        assert index.search(vectors[400:401], 1)[0][0].id == "u149"
        index.add("text", ["over again"], vectors[501:502])
        assert search_state(index) == ("hnsw", 502)


def test_exact_never_builds_a_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "exact_limit", lambda width: 10)
    with index_of(tmp_path / "i", unit(300), kind="exact") as index:
        assert search_state(index) == ("exact", 0)


@pytest.mark.parametrize("width", [8, 200])
def test_the_graph_and_exact_search_agree(tmp_path, width):
    centres = unit(60, width)
    vectors = np.repeat(centres, 40, axis=0) + 0.3 * unit(2400, width, seed=1)
    queries = unit(20, width, seed=2)
    with index_of(tmp_path / "a", vectors, "hnsw") as one, index_of(tmp_path / "b", vectors, "exact") as other:
        assert search_state(one) == ("hnsw", 2400)
        for k in (1, 10, 100, 2400):
            found, expected = one.search(queries, k), other.search(queries, k)
            agreeing = [
                len({hit.id for hit in f} & {hit.id for hit in e}) / k for f, e in zip(found, expected, strict=True)
            ]
            assert np.mean(agreeing) >= 0.99
            scores = {hit.id: hit.score for hit in expected[0]}
            assert all(scores.get(hit.id, hit.score) == hit.score for hit in found[0])


def test_hnswlib_is_imported_in_one_module_only():
    package = Path(hnsw.__file__).parents[1]
    users = {file.name for file in package.rglob("*.py") if "import hnswlib" in file.read_text()}
    assert users == {"hnsw.py"}


def test_the_description_is_readable(snapshot):
    content = json.loads((snapshot / "graph.text.json").read_text())
    assert content["count"] == 300
    assert content["recall"] == 1.0
    assert content["space"] == "ip"
    assert hnswlib.__name__ == "hnswlib"
