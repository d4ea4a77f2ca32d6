"""A third medium, whose items are rows of numbers: encoded, stored, found, and what is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dckt.batching import Batching
from dckt.bundle import Bundle, with_calibration
from dckt.calibration import calibrate
from dckt.collect import Collection, collect_pairs, media_of_corpus
from dckt.commands.doctor import probes
from dckt.errors import ConfigError, CorpusError, ItemError
from dckt.features import read_one
from dckt.searcher import Searcher

SOUNDS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
ROWS, IDS = np.array(list(SOUNDS.values())), list(SOUNDS)


@pytest.fixture
def searcher(audio_bundle, tmp_path):
    with Searcher.create(audio_bundle, tmp_path / "i", device="cpu", threads=1) as searcher:
        yield searcher


@pytest.fixture
def filled(searcher, colour_images):
    searcher.add_images([colour_images[name] for name in IDS], ids=IDS)
    searcher.add_texts([f"a {name} bag" for name in IDS], ids=IDS)
    searcher.add_features(ROWS, ids=IDS, medium="audio", metadata=[{"colour": name} for name in IDS])
    return searcher


@pytest.fixture
def corpus(tmp_path, colour_images):
    """Four pairs, with a sound each."""
    root = tmp_path / "corpus"
    (root / "vectors").mkdir(parents=True)
    rows = []
    for place, name in enumerate(IDS):
        shutil.copy(colour_images[name], root / f"{name}.png")
        split = "test" if place % 2 else "train"
        rows.append({"id": name, "image": f"{name}.png", "text": f"a {name} bag", "label": name, "split": split})
    (root / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    np.save(root / "vectors/audio.npy", ROWS)
    return root


# --- searching ---


@pytest.mark.parametrize("name", IDS)
def test_every_medium_finds_the_others(filled, colour_images, name):
    row = ROWS[IDS.index(name)]
    for medium in ("image", "text"):
        assert filled.search(features=row, medium="audio", k=1, media=medium)[0].id == name
    for query in ({"image": colour_images[name]}, {"text": name}):
        hit = filled.search(**query, k=1, media="audio")[0]
        assert (hit.id, hit.medium, hit.metadata) == (name, "audio", {"colour": name})
    result = filled.search(features=row, medium="audio")
    assert result.query_medium == "audio"
    assert list(result.timings) == ["check", "encode", "search"]
    assert {hit.medium for hit in result} == {"image", "text"}  # every medium but the query's own
    assert {hit.medium for hit in filled.search(text=name)} == {"image", "audio"}


def test_several_at_once_and_every_form_give_the_same(filled):
    one = [filled.search(features=row, medium="audio") for row in ROWS]
    for form in (ROWS, ROWS.astype(np.float32), ROWS.tolist(), ROWS.astype(int)):
        assert list(filled.search_batch(features=form, medium="audio", batch_size=3)) == one
    assert filled.search_batch(features=ROWS[:0], medium="audio") == ()


def test_concurrent_callers_share_a_call(audio_bundle, tmp_path):
    batching = Batching(max_batch=8, max_wait=0.05)
    with Searcher.create(audio_bundle, tmp_path / "b", device="cpu", batching=batching) as searcher:
        searcher.add_texts(IDS, ids=IDS)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda row: searcher.search(features=row, medium="audio", k=1)[0].id, [*ROWS] * 4))
    assert found == IDS * 4


def test_a_medium_without_items_can_be_asked_for(searcher):
    assert list(searcher.search(text="red", media="audio")) == []


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"features": ROWS[0]}, "features and their medium go together"),
        ({"medium": "audio"}, "features and their medium go together"),
        ({"text": "red", "medium": "audio"}, "features and their medium go together"),
        ({"text": "red", "features": ROWS[0], "medium": "audio"}, "one of them"),
        ({"features": ROWS[0], "medium": "touch"}, "medium is 'touch'; .* takes features of: audio"),
        ({"features": ROWS[0], "medium": "image"}, "medium is 'image'; .* takes features of: audio"),
    ],
)
def test_queries_that_contradict_themselves(filled, query, says):
    with pytest.raises(ConfigError, match=says):
        filled.search(**query)


@pytest.mark.parametrize(
    "row", [ROWS, ROWS[0, :2], [1, 2], ["a", "b", "c"], "red", [1, np.nan, 0], [1, 1e300, 0], [[1], [2, 3]], None]
)
def test_features_that_are_no_features(filled, row):
    with pytest.raises((ItemError, ConfigError), match=r"rows of 3 numbers|not finite|go together"):
        filled.search(features=row, medium="audio")


def test_a_model_without_such_a_medium_says_so(tiny_bundle, tmp_path):
    with Searcher.create(tiny_bundle, tmp_path / "i", device="cpu") as searcher:
        with pytest.raises(ConfigError, match="takes features of: no medium"):
            searcher.search(features=ROWS[0], medium="audio")
        with pytest.raises(ConfigError, match="takes features of: no medium"):
            searcher.add_features(ROWS, ids=IDS, medium="audio")


# --- adding ---


def test_what_is_there_already_is_not_encoded_again(filled, monkeypatch):
    assert filled.add_features(ROWS[:2], ids=IDS[:2], medium="audio", upsert=True).added == 2  # other metadata
    again = filled.add_features(ROWS[:2], ids=IDS[:2], medium="audio", upsert=True)
    assert (again.added, again.unchanged) == (0, 2)
    changed = filled.add_features(ROWS[[2, 1]], ids=IDS[:2], medium="audio", upsert=True)
    assert (changed.added, changed.unchanged) == (1, 1)
    assert filled.search(text="blue", media="audio", k=2)[0].id in ("blue", "red")
    with pytest.raises(ItemError, match="audio ids are in the index already"):
        filled.add_features(ROWS[:1], ids=IDS[:1], medium="audio")


def test_rows_that_are_not_finite(searcher):
    rows = ROWS.copy()
    rows[1, 2] = np.nan
    with pytest.raises(ItemError, match="audio 'green': the features hold a number that is not finite"):
        searcher.add_features(rows, ids=IDS, medium="audio")
    assert len(searcher) == 0
    report = searcher.add_features(rows, ids=IDS, medium="audio", on_error="skip")
    assert (report.added, [failure.id for failure in report.failed]) == (3, ["green"])
    assert "not finite" in report.failed[0].error
    collected = searcher.add_features(rows[1:2], ids=["other"], medium="audio", on_error="collect")
    assert isinstance(collected.failed[0].error, ItemError)
    assert searcher.count("audio") == 3


@pytest.mark.parametrize("rows", [ROWS[0], ROWS[:, :2], [["a"] * 3] * 4, [[1], [2, 3]], np.zeros((4, 3, 1))])
def test_arrays_that_are_refused(searcher, rows):
    with pytest.raises(ItemError, match="expected rows of 3 numbers"):
        searcher.add_features(rows, ids=IDS, medium="audio", on_error="skip")


def test_ids_and_metadata_must_fit(searcher):
    for options in ({"ids": IDS[:3]}, {"ids": IDS, "metadata": [{}]}):
        with pytest.raises(ItemError, match="one id for each"):
            searcher.add_features(ROWS, medium="audio", **options)


# --- corpora ---


def test_a_corpus_is_collected_with_its_vectors(searcher, corpus):
    assert media_of_corpus(corpus) == media_of_corpus(corpus / "pairs.jsonl") == ["audio"]
    assert collect_pairs(corpus).features == {}
    collection = collect_pairs(corpus, split="test", media=["audio"])
    assert len(collection) == 6
    assert [(item.id, item.source.tolist()) for item in collection.features["audio"]] == [
        (name, list(SOUNDS[name])) for name in ("green", "white")
    ]
    assert collection.features["audio"][0].metadata["label"] == "green"
    both = collection + Collection(features={"audio": collection.features["audio"][:1]})
    assert len(both.features["audio"]) == 3
    reports = searcher.add_collection(collection)
    assert {medium: report.added for medium, report in reports.items()} == {"text": 2, "image": 2, "audio": 2}
    assert searcher.search(text="green", media="audio", k=1)[0].id == "green"


def test_vectors_of_a_corpus_that_are_refused(searcher, corpus):
    file = corpus / "vectors/audio.npy"
    np.save(file, ROWS[:3])
    with pytest.raises(CorpusError, match=r"shape \(3, 3\); expected a NumPy array of 4 rows .* pairs\.jsonl"):
        collect_pairs(corpus, media=["audio"])
    np.save(file, ROWS[:, :2])
    with pytest.raises(ItemError, match="expected rows of 3 numbers"):
        searcher.add_collection(collect_pairs(corpus, media=["audio"]))
    assert len(searcher) == 0
    rows = ROWS.copy()
    rows[3] = np.inf
    np.save(file, rows)
    with pytest.raises(CorpusError, match="1 entries cannot be used") as caught:
        collect_pairs(corpus, media=["audio"])
    assert caught.value.mistakes == (
        "vectors/audio.npy, row 3 from 0, pair 'white': holds a number that is not finite",
    )
    collection = collect_pairs(corpus, media=["audio"], on_error="skip")
    assert (len(collection.texts), len(collection.features["audio"]), len(collection.skipped)) == (4, 3, 1)
    assert collect_pairs(corpus, split="train", media=["audio"]).skipped == ()  # that pair is of the other split
    file.unlink()
    with pytest.raises(CorpusError, match="there is no such file"):
        collect_pairs(corpus, media=["audio"])


# --- the commands, and what else knows the media of a bundle ---


def test_the_commands(run, audio_bundle, corpus, tmp_path):
    index = tmp_path / "c.index"
    code, out, err = run("index", audio_bundle, index, "--pairs", corpus)
    assert code == 0, err
    assert "4 audio (4 different vectors" in out + err
    np.save(tmp_path / "red.npy", ROWS[0])
    code, out, err = run("search", audio_bundle, index, tmp_path / "red.npy", "--features", "audio", "-k", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["query_medium"] == "audio"
    assert {(hit["id"], hit["medium"]) for hit in found["hits"]} == {("red", "image"), ("red", "text")}
    code, out, _ = run("search", audio_bundle, index, "red", "--text", "--media", "audio", "-k", 1, "--json")
    assert json.loads(out)["hits"][0]["id"] == "red"
    page = tmp_path / "page.html"
    assert run("search", audio_bundle, index, tmp_path / "red.npy", "--features", "audio", "--html", page)[0] == 0
    assert "red.npy" in page.read_text()
    code, _, err = run("search", audio_bundle, index, "red", "--text", "--features", "audio")
    assert (code, "--text and --features" in err) == (2, True)
    np.save(tmp_path / "rows.npy", ROWS)
    code, _, err = run("search", audio_bundle, index, tmp_path / "rows.npy", "--features", "audio")
    assert (code, "one dimension" in err) == (2, True)


def test_a_bundle_of_two_media_passes_over_the_vectors(run, tiny_bundle, corpus, tmp_path):
    code, out, err = run("index", tiny_bundle, tmp_path / "c.index", "--pairs", corpus)
    assert code == 0
    assert "audio" not in out + err


def test_calibration_covers_every_direction(run, audio_bundle, corpus, tmp_path):
    copy = shutil.copytree(audio_bundle, tmp_path / "copy.dckt")
    assert run("calibrate", copy, "--pairs", corpus, "--split", "all")[0] == 0
    found = Bundle.open(copy).manifest.calibration
    assert {"audio_to_image", "text_to_audio"} < set(found.thresholds)
    assert set(found.ranking["fc9"]) == {
        *("image_to_text", "image_to_audio", "text_to_image", "text_to_audio", "audio_to_image", "audio_to_text")
    }
    with Searcher.create(copy, tmp_path / "i", device="cpu") as searcher:
        searcher.add_features(ROWS, ids=IDS, medium="audio")
        hits = searcher.search(text="red", media="audio", min_score="calibrated")
        assert [hit.id for hit in hits] == ["red"]


def test_a_calibration_without_the_medium_is_said(audio_bundle, tmp_path):
    copy = shutil.copytree(audio_bundle, tmp_path / "copy.dckt")
    vectors = {"probability": {medium: np.eye(4) for medium in ("image", "text")}}
    with_calibration(Bundle.open(copy), calibrate(vectors, IDS, representation="probability", pairs={}))
    with (
        Searcher.create(copy, tmp_path / "i", device="cpu") as searcher,
        pytest.raises(ConfigError, match="not calibrated for text_to_audio"),
    ):
        searcher.search(text="red", media="audio", min_score="calibrated")


def test_the_doctor_runs_every_medium(audio_bundle):
    assert probes.variant(str(audio_bundle), "onnxruntime-fp32")["runs_on"] == ["onnxruntime-fp32 on CPU"]


def test_one_item_of_a_file(tmp_path):
    np.save(tmp_path / "one.npy", ROWS[0])
    np.testing.assert_array_equal(read_one(tmp_path / "one.npy"), ROWS[0])
    np.save(tmp_path / "words.npy", np.array(["a"]))
    for name, says in (("words.npy", "array of <U1"), ("missing.npy", "no such file")):
        with pytest.raises(CorpusError, match=says):
            read_one(tmp_path / name)
