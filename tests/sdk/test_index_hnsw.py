"""The traps of hnswlib 0.8.0, each by its number, and the promises of a measured graph."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from pathlib import Path

import hnswlib
import numpy as np
import pytest

from dckt.errors import ConfigError, ItemError
from dckt.index import Index, graph, hnsw
from dckt.index.hnsw import EFFORTS, HnswGraph
from dckt.index.manifest import GraphReport, SegmentError, checksum_of
from dckt.index.records import Change
from dckt.index.schema import Head
from dckt.index.segment import Segment, candidates, read_segment, write_segment
from dckt.index.shelf import Shelf
from dckt.index.source import RowSource
from dckt.index.vectors import normalised

WIDTH = 16


def unit(rows: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width))
    return normalised(values, dimension=width, names=["row"] * rows)


def graph_of(vectors: np.ndarray, threads: int | None = 1) -> HnswGraph:
    graph = HnswGraph(vectors.shape[1])
    order = graph.shuffled(len(vectors))
    graph.add(order, vectors[order], threads=threads)
    return graph


def shelf_of(vectors: np.ndarray, kind: str = "hnsw") -> Shelf:
    one = Shelf(vectors.shape[1], kind, Head(0, "a"))
    change = Change(
        added=[(row + 1, f"t{row:05d}", "{}") for row in range(len(vectors))],
        vectors={row + 1: vector for row, vector in enumerate(vectors)},
        items=len(vectors),
    )
    assert one.apply(change, HEAD)
    return one


def index_of(folder: Path, vectors: np.ndarray, kind: str = "hnsw") -> Index:
    index = Index.create(folder, model_id="m", representation="fc9", dimension=vectors.shape[1], kind=kind, threads=1)
    index.add("text", [f"t{row:05d}" for row in range(len(vectors))], vectors)
    return index


def search_state(index: Index) -> tuple[str, int]:
    about = index.info().media["text"]
    return about.search, about.in_graph


HEAD = Head(7, "token")
REPORT = GraphReport(graph="g", count=300, effort=64, recall=1.0, accepted=True, seconds=0.0, strays=())


def write(folder: Path, vectors: np.ndarray) -> Path:
    return write_segment(
        folder,
        index_id="i",
        medium="text",
        dimension=WIDTH,
        head=HEAD,
        total=0,
        source=RowSource(shelf_of(vectors), drop_unused=False),
        graph=graph_of(vectors),
        report=REPORT,
    )[0]


@pytest.fixture
def segment(tmp_path):
    """A segment with a graph over 300 vectors."""
    return write(tmp_path, unit(300))


def read(path: Path, **changes) -> Segment:
    return read_segment(path, **{"index_id": "i", "medium": "text", "dimension": WIDTH, **changes})


# --- H1 to H3: arguments ---


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_h1_a_wrong_width_never_reaches_hnswlib(tmp_path, width):
    graph = graph_of(unit(50))
    with pytest.raises(ItemError, match=rf"expected float32 \(N, {WIDTH}\)"):
        graph.add(np.array([90]), unit(1, width))
    assert len(graph) == 50
    with index_of(tmp_path / "i", unit(200)) as index, pytest.raises(ItemError, match=rf"expected \(N, {WIDTH}\)"):
        index.search(unit(3, width))


def test_h1_a_wrong_dtype_never_reaches_hnswlib():
    with pytest.raises(ItemError, match="float64"):
        graph_of(unit(50)).add(np.arange(50, 53), unit(3).astype(np.float64))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_h2_numbers_that_are_not_finite_are_refused_with_their_row(tmp_path, bad):
    graph = graph_of(unit(50))
    vectors = unit(3)
    vectors[1, 4] = bad
    with pytest.raises(ItemError, match=r"rows \[1\]"):
        graph.add(np.arange(90, 93), vectors)
    assert len(graph) == 50
    with index_of(tmp_path / "i", unit(200)) as index:
        for queries in (vectors, vectors[1:2]):
            with pytest.raises(ItemError, match=r"query \d.*not finite"):
                index.search(queries)


def test_h3_a_zero_query_is_refused(tmp_path):
    with index_of(tmp_path / "i", unit(200)) as index:
        for queries in (np.stack([np.ones(WIDTH), np.zeros(WIDTH)]), np.zeros((1, WIDTH))):
            with pytest.raises(ItemError, match=r"query \d.*no direction"):
                index.search(queries)


# --- H4 to H7: files ---


def test_h4_a_save_into_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"missing"):
        graph_of(unit(50)).save(tmp_path / "missing" / "graph")


def test_h4_a_save_on_a_full_disk_is_an_error():
    with pytest.raises(OSError, match=r"0 of .* bytes were written"):
        graph_of(unit(50)).save(Path("/dev/full"))


def test_h4_a_failed_save_leaves_the_segment_that_was_there(segment, monkeypatch):
    before = {file.name: file.read_bytes() for file in segment.iterdir()}

    def save_half(graph, path):
        path.write_bytes(b"half")
        _full_disk()

    monkeypatch.setattr(HnswGraph, "save", save_half)
    with pytest.raises(OSError, match="disk is full"):
        write(segment.parent, unit(9))
    assert list(segment.parent.iterdir()) == [segment]
    assert {file.name: file.read_bytes() for file in segment.iterdir()} == before


def test_h4_an_index_works_on_when_its_graph_cannot_be_saved(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(HnswGraph, "save", lambda graph, path: _full_disk())
    with index_of(tmp_path / "i", unit(200)) as index:
        assert "was not saved" in caplog.text
        assert index.search(unit(1), 1)[0][0].id == "t00000"
    assert not list((tmp_path / "i").rglob("*hnsw*"))


def _full_disk():
    raise OSError("the disk is full")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"dimension": WIDTH + 1}, "dimension"), ({"index_id": "other"}, "index_id"), ({"medium": "image"}, "medium")],
)
def test_h5_a_graph_of_another_shape_or_index_is_not_loaded(segment, change, said):
    with pytest.raises(SegmentError, match=said):
        read(segment, **change)


@pytest.mark.parametrize("setting", ["SPACE", "M", "EF_CONSTRUCTION", "SEGMENT_VERSION"])
def test_h5_a_graph_of_other_settings_is_not_loaded(segment, monkeypatch, setting):
    monkeypatch.setattr("dckt.index.manifest." + setting, "other")
    with pytest.raises(SegmentError, match="other"):
        read(segment)


def test_h5_a_graph_of_another_size_is_not_loaded(segment):
    with pytest.raises(OSError, match="300 vectors, expected 301"):
        HnswGraph.load(segment / "graph.hnsw", dimension=WIDTH, count=301)


@pytest.mark.parametrize("name", ["graph.hnsw", "labels.npy", "vectors.npy", "items.npy", "ids.bin", "metadata.bin"])
def test_h6_no_flipped_bit_is_believed(segment, monkeypatch, name):
    if name == "graph.hnsw":
        monkeypatch.setattr(HnswGraph, "load", lambda *_, **__: pytest.fail("hnswlib was given a damaged file"))
    file = segment / name
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 60).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(SegmentError, match="not the one that was written"):
            read(segment).verify()


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_h6_no_truncated_file_reaches_hnswlib(segment, monkeypatch, size):
    monkeypatch.setattr(HnswGraph, "load", lambda *_, **__: pytest.fail("hnswlib was given a damaged file"))
    file = segment / "graph.hnsw"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SegmentError):
        read(segment)


@pytest.mark.parametrize("name", ["graph.hnsw", "vectors.npy", "ids.bin", "manifest.json"])
def test_h6_a_missing_file_is_noticed(segment, name):
    (segment / name).unlink()
    with pytest.raises(SegmentError, match="cannot be read"):
        read(segment)


def test_h6_no_flipped_bit_of_the_manifest_is_believed(segment):
    file = segment / "manifest.json"
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 500).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        if damaged.split() == whole.split():  # one white space for another
            continue
        file.write_bytes(damaged)
        with pytest.raises(SegmentError):
            read(segment)


def test_a_segment_holds_what_it_was_written_from(segment):
    found = read(segment)
    assert (found.head, found.report) == (HEAD, REPORT)
    np.testing.assert_array_equal(found.labels, np.arange(1, 301))
    np.testing.assert_array_equal(found.vectors, unit(300))
    assert [found.entries(row, 5) for row in (0, 299)] == [[("t00000", b"{}")], [("t00299", b"{}")]]
    with pytest.raises(ValueError, match="read-only"):
        found.vectors[0, 0] = 1


def test_h7_settings_and_rows_survive(segment):
    graph = read(segment).graph
    assert graph._index.ef == 1
    assert len(graph) == 300
    graph.add(np.array([301, 300]), unit(2, seed=9))
    assert graph.nearest(unit(2, seed=9), 32)[0][:, 0].tolist() == [301, 300]


def test_h7_effort_is_what_a_search_asks_for():
    vectors = unit(3000, 64)
    graph, queries = graph_of(vectors, threads=None), unit(100, 64, seed=1)
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]

    def recall(effort: int) -> float:
        pages = graph.nearest(queries, effort)[0]
        return np.mean([np.isin(t, page[:10]).mean() for t, page in zip(true, pages, strict=True)])

    assert recall(16) < recall(64) < recall(1024)
    assert recall(1024) >= 0.999


# --- H8 to H11: counts and labels ---


@pytest.mark.parametrize("count", [1, 3, 63, 65])
def test_h8_a_page_is_never_larger_than_the_graph(count):
    rows, distances = graph_of(unit(count)).nearest(unit(2), 64)
    assert rows.shape == distances.shape == (2, min(count, 64))


def test_h8_an_empty_graph_and_an_empty_batch():
    assert HnswGraph(WIDTH).nearest(unit(2), 64)[0].shape == (2, 0)
    assert graph_of(unit(3)).nearest(unit(0), 64)[0].shape == (0, 3)


def test_h8_what_the_graph_cannot_reach_is_answered_exactly(tmp_path, monkeypatch):
    vectors = unit(300)
    with index_of(tmp_path / "i", vectors) as index:
        assert search_state(index) == ("hnsw", 300)
        expected = index.search(vectors[:5], 7)
        asked = []

        def unreachable(*_, **__):
            asked.append(True)
            raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")

        monkeypatch.setattr(
            index._shelves["text"].graph, "_index", _Replaced(index._shelves["text"].graph._index, unreachable)
        )
        assert index.search(vectors[:5], 7) == expected
        assert asked


class _Replaced:
    """hnswlib's index with another knn_query; its own attributes cannot be replaced."""

    def __init__(self, index, knn_query):
        self._index, self.knn_query = index, knn_query

    def __getattr__(self, name):
        return getattr(self._index, name)


@pytest.mark.parametrize("k", [1, 10, 11, 128, 299, 300, 301, 10**6])
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


@pytest.mark.parametrize("rows", [[60, 60], [-1, 60], [60]])
def test_h9_a_batch_is_added_whole_or_not_at_all(rows):
    graph = graph_of(unit(50))
    with pytest.raises(ItemError, match="expected 2 rows"):
        graph.add(np.array(rows), unit(2, seed=3))
    assert len(graph) == 50
    assert graph._index.element_count == 50


def test_h9_a_row_that_is_there_is_not_silently_replaced():
    graph = graph_of(unit(50))
    with pytest.raises(ItemError, match="in the graph already"):
        graph.add(np.array([49, 50]), unit(2, seed=3))


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
        assert index._shelves["text"].unused_share() <= graph.UNUSED_LIMIT
        index.delete("text", [f"t{row:05d}" for row in range(150, 390)])
        assert index.search(vectors[395:396], 3)[0][0].id == "t00395"
        assert index._shelves["text"].rows == 10
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


def test_h12_growing_and_searching_exclude_each_other(tmp_path):
    vectors = unit(900)
    with index_of(tmp_path / "i", vectors[:300]) as index:
        graph = index._shelves["text"].graph
        watched = graph._index = _Watched(graph._index)
        done = threading.Event()

        def search():
            while not done.is_set():
                index.search(vectors[:2], 5)

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        for start in range(300, 900, 100):
            rows = range(start, start + 100)
            index.add("text", [f"t{row:05d}" for row in rows], vectors[start : start + 100])
        done.set()
        for thread in threads:
            thread.join()
        assert len(graph) > 300
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

    def save_index(self, path):
        self._index.save_index(path)

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
    first, second = (candidates(tmp_path / name, "text")[0] / "graph.hnsw" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_h13_threads_reach_hnswlib(monkeypatch, threads):
    given = []
    real = HnswGraph.add
    monkeypatch.setattr(
        HnswGraph, "add", lambda self, *args, threads: (given.append(threads), real(self, *args, threads=threads))
    )
    shelf_of(unit(20)).build_graph(threads)
    assert set(given) == {threads}


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


def test_h15_the_one_ef_of_hnswlib_is_never_changed(tmp_path):
    vectors = unit(3000, 48)
    with index_of(tmp_path / "i", vectors) as index:
        graph = index._shelves["text"].graph
        for k in (1, 10, 50, 400):
            index.search(vectors[:3], k)
        index.tune(0.9)
        index.search(vectors[:3], 10)
        assert graph._index.ef == 1


# --- recall is measured ---


def test_a_sorted_collection_is_inserted_shuffled(monkeypatch):
    centres = unit(40)
    vectors = np.repeat(centres, 50, axis=0) + 0.01 * unit(2000, seed=1)
    vectors = normalised(vectors, dimension=WIDTH, names=["row"] * 2000)
    inserted = []
    real = HnswGraph.add
    monkeypatch.setattr(
        HnswGraph,
        "add",
        lambda self, rows, *args, **kw: (inserted.extend(rows.tolist()), real(self, rows, *args, **kw)),
    )
    graph, report = shelf_of(vectors).build_graph(1)
    assert sorted(inserted) == list(range(2000))
    assert inserted != sorted(inserted)
    assert graph is not None
    assert report.recall >= 0.99


def test_efforts_rise_by_a_sixteenth():
    assert (EFFORTS[:3], EFFORTS[-1]) == ((16, 17, 18), 1993)
    assert all(old < new <= max(old + 1, old * 17 / 16) for old, new in itertools.pairwise(EFFORTS))


@pytest.mark.parametrize("missed", [0.1, 0.5])
def test_effort_is_the_least_whose_recall_is_above_the_target_by_its_error(monkeypatch, missed):
    graph, count = graph_of(unit(400)), 1000

    def recalls(queries, floors, effort, *_):
        """One query in so many misses a share of its neighbours: recall 1 - .36 / effort."""
        shares = np.ones(count)
        shares[: round(count * 0.36 / effort / missed)] -= missed
        return shares

    monkeypatch.setattr(graph, "recalls", recalls)
    effort, recall = graph.tune(unit(5), np.zeros(5), np.ones(400, bool))
    assert recall == recalls(None, None, effort).mean()
    bounds = {
        each: shares.mean() - 1.645 * shares.std() / count**0.5
        for each in EFFORTS
        if len(shares := recalls(None, None, each))
    }
    assert effort == min(each for each, bound in bounds.items() if bound >= 0.99)
    assert recall > 0.99


def test_effort_ends_at_what_looks_at_all_vectors(monkeypatch):
    graph = graph_of(unit(100))
    monkeypatch.setattr(graph, "recalls", lambda *_: np.full(5, 0.5))
    assert graph.tune(unit(5), np.zeros(5), np.ones(100, bool)) == (103, 0.5)


def test_a_measured_graph_keeps_its_promise_to_vectors_that_it_never_saw():
    vectors = unit(4500)
    graph, report = shelf_of(vectors[:4000]).build_graph(1)
    used, queries = np.ones(4000, bool), vectors[4000:]
    floors = hnsw.tenth_best([vectors[:4000]], used, queries)
    assert graph.recalls(queries, floors, report.effort, used).mean() >= 0.99
    # A third less of it would not do.
    assert graph.recalls(queries, floors, 2 * report.effort // 3, used).mean() < 0.99


def test_recall_counts_what_exact_search_finds():
    vectors = unit(400)
    graph, queries = graph_of(vectors), unit(20, seed=5)
    used = np.ones(400, bool)
    naive = [np.sort(vectors @ query)[-10] for query in queries]
    for parts in ([vectors], [vectors[:150], vectors[150:]]):
        np.testing.assert_allclose(hnsw.tenth_best(parts, used, queries), naive, atol=1e-6)
    floors = hnsw.tenth_best([vectors], used, queries)
    assert graph.recalls(queries, floors, 256, used).tolist() == [1.0] * 20
    # When only the far half counts, its neighbours are what should be found.
    far = (vectors @ queries[0]) <= 0
    floors = hnsw.tenth_best([vectors], far, queries[:1])
    np.testing.assert_allclose(floors, [np.sort((vectors @ queries[0])[far])[-10]], atol=1e-6)
    assert graph.recalls(queries[:1], floors, 16, far) < 0.5 < graph.recalls(queries[:1], floors, 400, far)
    # A graph over other vectors does not hold what is near.
    other = graph_of(-vectors[:50])
    assert other.recalls(queries, hnsw.tenth_best([vectors], used, queries), 50, used[:50]).max() < 0.5


@pytest.mark.parametrize("count", [1, 5, 10, 11])
def test_floors_of_few_vectors(count):
    vectors, queries = unit(count), unit(3, seed=1)
    floors = hnsw.tenth_best([vectors], np.ones(count, bool), queries)
    np.testing.assert_allclose(floors, np.sort(queries @ vectors.T, axis=1)[:, max(0, count - 10)], atol=1e-6)


def test_a_graph_that_misses_its_target_is_not_used_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(HnswGraph, "recalls", lambda *_: np.full(5, 0.75))
    vectors = unit(300)
    with index_of(tmp_path / "i", vectors) as index:
        about = index.info().media["text"]
        assert (about.search, about.in_graph, about.ef, about.recall_at_10) == ("exact", 0, None, 0.75)
        assert [found[0].id for found in index.search(vectors[:3], 1)] == ["t00000", "t00001", "t00002"]
    assert not list((tmp_path / "i").rglob("*.hnsw"))
    # The refusal is remembered: opening does not build again, until the collection has doubled.
    monkeypatch.setattr(HnswGraph, "tune", lambda *_: pytest.fail("was built again"))
    with Index.open(tmp_path / "i") as index:
        assert index.info().media["text"].recall_at_10 == 0.75
        index.add("text", ["one more"], unit(1, seed=8))
    monkeypatch.undo()
    with Index.open(tmp_path / "i") as index:
        index.add("text", [f"u{row}" for row in range(300)], unit(300, seed=6))
        index.refresh()
        assert index.info().media["text"].search == "hnsw"


def test_a_grown_graph_that_falls_short_is_built_anew(tmp_path, monkeypatch):
    with index_of(tmp_path / "i", unit(300)) as index:
        old = index._shelves["text"].graph
        monkeypatch.setattr(HnswGraph, "recalls", lambda graph, *_: np.full(5, 0.5 if graph is old else 1.0))
        index.add("text", [f"u{row}" for row in range(400)], unit(400, seed=6))
        assert index._shelves["text"].graph is not old
        assert search_state(index) == ("hnsw", 700)


def test_effort_grows_with_the_graph_until_it_is_measured_again(tmp_path):
    vectors = unit(900)
    with index_of(tmp_path / "i", vectors[:400]) as index:
        measured = index.info().media["text"].ef
        index.add("text", [f"u{row}" for row in range(200)], vectors[400:600])
        assert search_state(index) == ("hnsw", 600)
        assert index.info().media["text"].ef == math.ceil(measured * 1.5**0.5) > measured
        index.add("text", [f"v{row}" for row in range(300)], vectors[600:])
        shelf = index._shelves["text"]
        assert shelf.report.count == shelf.covered == 900
        assert index.info().media["text"].ef == shelf.report.effort


def test_what_was_tuned_after_growth_is_used_as_it_was_measured(tmp_path):
    vectors = unit(600)
    with index_of(tmp_path / "i", vectors[:400]) as index:
        index.add("text", [f"u{row}" for row in range(200)], vectors[400:])
        tuned = index.tune(0.9)["text"]
        assert index.info().media["text"].ef == tuned.ef


@pytest.mark.parametrize("known", [0, 1, 5, 6, 7, 9, 20, 60])
def test_the_lowest_effort_that_is_enough_is_found_from_below(monkeypatch, known):
    graph = HnswGraph(4)
    graph._count = 10_000
    wanted = hnsw.EFFORTS[7]
    monkeypatch.setattr(graph, "recalls", lambda queries, floors, effort, *_: np.full(9, float(effort >= wanted)))
    unused = np.zeros((9, 4), np.float32)
    for end in (wanted, 10 * hnsw.EFFORTS[-1]):
        wanted = end
        efforts = [effort for effort in hnsw.EFFORTS if effort >= wanted]
        start = hnsw.EFFORTS[known] if known else None
        expected = max(efforts[0], start or 0) if efforts else hnsw.EFFORTS[-1]
        assert graph.tune(unused, unused[:, 0], np.ones(1, bool), 0.99, start)[0] == expected


def test_floors_are_the_same_by_any_blocks(monkeypatch):
    vectors, queries = unit(500), unit(20, seed=3)
    vectors[200:260] = vectors[7]  # more ties than a block of the best holds
    used = np.arange(500) % 5 > 0
    expected = np.sort(queries @ vectors[used].T, axis=1)[:, -10]
    for block in (3, 64, 1000):
        monkeypatch.setattr(hnsw, "_BLOCK", block)
        np.testing.assert_allclose(hnsw.tenth_best([vectors[:33], vectors[33:]], used, queries), expected, atol=1e-6)


def test_auto_builds_a_graph_behind_the_limit_only(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "exact_limit", lambda width: 250)
    vectors = unit(600)
    with index_of(tmp_path / "i", vectors[:250], kind="auto") as index:
        assert search_state(index) == ("exact", 0)
        index.add("text", ["over"], vectors[250:251])
        assert search_state(index) == ("hnsw", 251)
        index.add("text", [f"u{row}" for row in range(50)], vectors[251:301])
        assert search_state(index) == ("hnsw", 251)  # the others are searched exactly, beside the graph
        assert index.search(vectors[260:261], 1)[0][0].id == "u9"
        index.add("text", [f"v{row}" for row in range(20)], vectors[301:321])
        assert search_state(index) == ("hnsw", 321)


def test_exact_never_builds_a_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "exact_limit", lambda width: 10)
    with index_of(tmp_path / "i", unit(300), kind="exact") as index:
        assert search_state(index) == ("exact", 0)


@pytest.mark.parametrize("width", [8, 200])
def test_the_graph_and_exact_search_agree(tmp_path, width):
    centres = unit(60, width)
    vectors = np.repeat(centres, 40, axis=0) + 0.3 * unit(2400, width, seed=1)
    queries = vectors[::40] + 0.3 * unit(60, width, seed=2)
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


def test_the_manifest_is_readable(segment):
    content = json.loads((segment / "manifest.json").read_text())
    assert content["report"]["count"] == content["rows"] == content["items"] == 300
    assert content["sequence"] == 7
    assert content["space"] == "ip"
    assert hnswlib.__name__ == "hnswlib"


# --- what a graph holds and cannot find ---


def cut_off(graph: HnswGraph, row: int) -> None:
    """Takes away every link to a row, as insertions of close vectors do now and then."""
    state = graph._index.__getstate__()[0]
    count, size, most = (state[key] for key in ("cur_element_count", "size_data_per_element", "max_M0"))
    place = state["label_lookup_external"].tolist().index(row)
    place = int(state["label_lookup_internal"][place])
    assert state["element_levels"][place] == 0
    links = state["data_level0"][: count * size].reshape(count, size)[:, : 4 + 4 * most].view(np.uint32)
    for own in links:
        others = [other for other in own[1 : 1 + own[0]].tolist() if other != place]
        own[0] = len(others)
        own[1 : 1 + len(others)] = others
    graph._index = hnswlib.Index.__new__(hnswlib.Index)
    graph._index.__setstate__((state,))
    graph._index.set_ef(1)


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """An index whose graph has no way to the first of 900 vectors, which 60 of the items share."""
    vectors = np.concatenate([np.repeat(unit(900)[:1], 60, axis=0), unit(900)[1:]])
    real = HnswGraph.add

    def add(graph, *args, **options):
        real(graph, *args, **options)
        if len(graph) == 900:
            cut_off(graph, 0)

    monkeypatch.setattr(HnswGraph, "add", add)
    index_of(tmp_path / "i", vectors).close()
    monkeypatch.undo()
    return tmp_path / "i", vectors


def same(index: Index, vectors: np.ndarray, queries: np.ndarray, k: int) -> bool:
    """Whether single queries and a batch find what an exact index would."""
    expected = []
    for query in normalised(queries, dimension=WIDTH, names=["query"] * len(queries)):
        scores = (vectors.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
        expected.append([f"t{row:05d}" for row in np.lexsort((np.arange(len(vectors)), -scores))[:k]])
    together = [[hit.id for hit in hits] for hits in index.search(queries, k)]
    alone = [[hit.id for hit in index.search(query[None], k)[0]] for query in queries]
    return together == expected and alone == expected


@pytest.mark.parametrize("k", [1, 10, 40, 70])
def test_a_row_that_the_graph_cannot_find_is_found(cut, k):
    path, vectors = cut
    queries = vectors[:12] + 0.05 * unit(12, seed=3)
    with Index.open(path, threads=1) as index:
        shelf = index._shelves["text"]
        assert (search_state(index), shelf.report.strays) == (("hnsw", 900), (0,))
        assert 0 not in shelf.graph.nearest(vectors[:1], 200)[0]
        assert same(index, vectors, queries, k)
        # Beside a row that is not in the graph yet, and with a filter.
        index.add("text", ["t00959"], unit(1, seed=9), metadata=[{"new": True}])
        assert shelf.rows > shelf.covered
        assert same(index, np.concatenate([vectors, unit(1, seed=9)]), queries, k)
        found = index.search(vectors[:1], k, where={"new": {"exists": False}})[0]
        assert [hit.id for hit in found[:60]] == [f"t{row:05d}" for row in range(min(k, 60))]


def test_what_the_graph_cannot_find_is_seen_again_when_it_has_grown(tmp_path, monkeypatch):
    with index_of(tmp_path / "i", unit(900)) as index:
        graph = index._shelves["text"].graph
        assert index._shelves["text"].report.strays == ()
        cut_off(graph, 0)
        index.add("text", [f"u{row}" for row in range(300)], unit(300, seed=4))
        index.refresh()
        assert index._shelves["text"].graph is graph
        assert index._shelves["text"].report.strays == (0,)
        assert [hit.id for hit in index.search(unit(900)[:1], 1)[0]] == ["t00000"]


@pytest.mark.parametrize("strays", [[900], [-1], ["a"], [0.5]])
def test_a_manifest_with_strays_that_cannot_be_is_refused(segment, strays):
    content = json.loads((segment / "manifest.json").read_text())
    del content["checksum"]
    content["report"]["strays"] = strays
    (segment / "manifest.json").write_text(json.dumps({**content, "checksum": checksum_of(content)}))
    with pytest.raises(SegmentError, match="no segment has"):
        read(segment)
