"""The searcher on a tiny model that knows colours: what is found, what is stored, what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dckt.batching import Batching
from dckt.bundle import Bundle, with_calibration, write_bundle
from dckt.calibration import Calibration, Threshold
from dckt.collect import Collection, Item
from dckt.errors import (
    BundleCorruptError,
    BundleError,
    ConfigError,
    DcktError,
    ImageError,
    IndexFolderError,
    ItemError,
    ModelMismatchError,
    TextError,
    UnknownItemError,
)
from dckt.finding import Question, find, find_shared
from dckt.index import Index
from dckt.preprocessing import ImageLimits
from dckt.runtime.onnx import OnnxEncoder
from dckt.searcher import AddReport, Searcher


@pytest.fixture
def searcher(tiny_bundle, tmp_path):
    with Searcher.create(tiny_bundle, tmp_path / "i", device="cpu", threads=1) as searcher:
        yield searcher


@pytest.fixture
def filled(searcher, colour_images):
    """Pictures of six colours and a text about each of four."""
    searcher.add_images(list(colour_images.values()), ids=list(colour_images))
    names = ["red", "green", "blue", "white"]
    searcher.add_texts(
        [f"a {name} bag" for name in names], ids=names, metadata=[{"text": f"a {name} bag"} for name in names]
    )
    return searcher


def ids(result) -> list[str]:
    return [hit.id for hit in result]


# --- searching ---


def test_a_picture_finds_its_text_and_a_text_its_picture(filled, colour_images):
    result = filled.search(colour_images["red"], k=1)
    assert (result[0].id, result[0].medium, result[0].metadata) == ("red", "text", {"text": "a red bag"})
    assert result[0].score > 0.99
    assert result.query_medium == "image"
    result = filled.search(text="blue", k=1)
    assert (result[0].id, result[0].medium) == ("blue", "image")
    assert result.query_medium == "text"


def test_every_form_of_a_picture_gives_the_same(filled, colour_images):
    path = colour_images["green"]
    with Image.open(path) as picture:
        forms = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
        results = [filled.search(form) for form in forms]
    assert all(result == results[0] for result in results)
    assert results[0][0].id == "green"


def test_hits_are_similarities_from_high_to_low(filled, colour_images):
    scores = [hit.score for hit in filled.search(colour_images["red"], k=4)]
    assert scores == sorted(scores, reverse=True)
    assert all(-1 <= score <= 1 for score in scores)


@pytest.mark.parametrize(
    ("media", "expected"),
    [
        (None, {"text"}),
        ("image", {"image"}),
        ("text", {"text"}),
        (["image", "text"], {"image", "text"}),
        (("text", "text"), {"text"}),
    ],
)
def test_media(filled, colour_images, media, expected):
    result = filled.search(colour_images["red"], k=100, media=media)
    assert {hit.medium for hit in result} == expected
    assert len(result) == 6 * ("image" in expected) + 4 * ("text" in expected)
    assert set(result.by_medium()) == expected
    assert sum(map(len, result.by_medium().values())) == len(result)


@pytest.mark.parametrize("media", ["audio", ["text", "audio"], []])
def test_an_unknown_medium_is_refused_with_those_that_there_are(filled, media):
    with pytest.raises(ConfigError, match="image, text"):
        filled.search(text="red", media=media)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 10**6])
def test_k(filled, colour_images, k):
    everything = filled.search(colour_images["red"], k=4)
    assert list(filled.search(colour_images["red"], k=k)) == list(everything[:k])


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_one(filled, k):
    for search in (lambda: filled.search(text="red", k=k), lambda: filled.similar("red", "text", k=k)):
        with pytest.raises(ConfigError, match=f"k is {k}"):
            search()


def test_one_query_at_a_time(filled):
    for arguments in ({}, {"image": b"", "text": "red"}):
        with pytest.raises(ConfigError, match="an image or a text"):
            filled.search(**arguments)
    for arguments in ({}, {"images": [], "texts": []}):
        with pytest.raises(ConfigError, match="images or texts"):
            filled.search_batch(**arguments)


@pytest.mark.parametrize("text", ["", "!?", "zebra", "qwerty asdf"])
def test_a_text_without_a_known_word_finds_nothing_in_particular_and_is_refused(filled, text):
    with pytest.raises(TextError):
        filled.search(text=text)


def test_a_query_that_is_no_picture(filled, tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        filled.search(tmp_path / "missing.png")
    with pytest.raises(ImageError):
        filled.search(b"rubbish")
    with pytest.raises(TextError, match="int"):
        filled.search(text=3)


def test_an_empty_index_gives_no_hits(searcher):
    result = searcher.search(text="red")
    assert len(result) == 0
    assert result.by_medium() == {}


def test_a_batch_gives_what_single_queries_give(filled, colour_images):
    paths = list(colour_images.values())
    for size in (1, 4, 100):
        assert filled.search_batch(paths, batch_size=size, k=3) == tuple(filled.search(path, k=3) for path in paths)
    texts = ["red", "a picture of a blue bag", "white white"]
    assert filled.search_batch(texts=texts, k=3) == tuple(filled.search(text=text, k=3) for text in texts)
    assert filled.search_batch([]) == ()
    with pytest.raises(ConfigError, match="batch_size is 0"):
        filled.search_batch(paths, batch_size=0)
    with pytest.raises(ConfigError, match="not a single one"):
        filled.search_batch(texts="red")


def test_the_batch_size_reaches_the_model(filled, colour_images, monkeypatch):
    sizes = []
    real = filled.model.encoders["image"]

    class Counting:
        def run_all(self, batch):
            sizes.append(len(batch))
            return real.run_all(batch)

    monkeypatch.setitem(filled.model.encoders, "image", Counting())
    filled.search_batch(list(colour_images.values()), batch_size=4)
    assert sizes == [4, 2]
    sizes.clear()
    filled.add_images(list(colour_images.values()), batch_size=5)
    assert sizes == [5, 1]


def test_timings_of_every_stage(filled):
    for query, first in (({"text": "red"}, "tokenize"), ({"image": np.zeros((3, 3, 3), np.uint8)}, "decode")):
        timings = filled.search(**query).timings
        assert list(timings) == [first, "encode", "search"]
        assert all(seconds >= 0 for seconds in timings.values())
    assert list(filled.similar("red", "text").timings) == ["search"]


def test_similar_leaves_the_item_itself_out(filled):
    result = filled.similar("red", "text", k=3)
    assert (result[0].id, result[0].medium) == ("red", "image")
    assert ("red", "text") not in {(hit.id, hit.medium) for hit in result}
    assert len(result) == 3
    assert len(filled.similar("red", "text", k=100)) == 9
    assert {hit.medium for hit in filled.similar("red", "text", media="text", k=100)} == {"text"}
    with pytest.raises(UnknownItemError, match="'purple'"):
        filled.similar("purple", "text")


def test_searching_from_many_threads(filled, colour_images):
    expected = {name: filled.search(path) for name, path in colour_images.items()}
    errors = []

    def search():
        try:
            for name, path in colour_images.items():
                assert filled.search(path) == expected[name]
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# --- adding ---


def test_a_picture_is_known_by_its_path_as_given(searcher, colour_images, monkeypatch):
    monkeypatch.chdir(colour_images["red"].parent)
    assert searcher.add_images([Path("red.png"), "./blue.png"]) == AddReport(2)
    assert list(searcher.index.ids("image")) == ["blue.png", "red.png"]
    with pytest.raises(ConfigError, match="bytes, which gives no id"):
        searcher.add_images([b""])


def test_metadata_is_stored(searcher, colour_images):
    searcher.add_images([colour_images["red"]], ids=["r"], metadata=[{"price": 3}])
    assert searcher.search(text="red")[0].metadata == {"price": 3}
    with pytest.raises(ItemError, match=r"'b'.*JSON"):
        searcher.add_images([colour_images["blue"]], ids=["b"], metadata=[{"price": {1}}])


@pytest.fixture
def broken(tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(b"rubbish")
    return file


def test_one_bad_picture_refuses_all(searcher, colour_images, broken):
    images = [*colour_images.values(), broken]
    with pytest.raises(ImageError, match=r"broken.png: is no picture"):
        searcher.add_images(images, batch_size=2)
    assert len(searcher) == 0


def test_bad_pictures_are_skipped_and_reported(searcher, colour_images, broken):
    images = [broken, *colour_images.values()]
    report = searcher.add_images(images, ids=["bad", *colour_images], batch_size=2, on_error="skip")
    assert report.added == len(searcher) == 6
    [(item, reason)] = report.failed
    assert item == "bad"
    assert "is no picture" in reason
    assert searcher.search(text="red", k=1)[0].id == "red"


def test_bad_texts_are_skipped_and_reported(searcher):
    report = searcher.add_texts(["red", "zebra", "!", "blue"], ids=["a", "b", "c", "d"], on_error="skip")
    assert report.added == 2
    assert [item for item, _ in report.failed] == ["b", "c"]
    with pytest.raises(TextError, match="text 'number 2': the model knows none"):
        searcher.add_texts(["white", "zebra"], ids=["number 1", "number 2"])
    assert len(searcher) == 2


def test_a_batch_of_bad_items_only(searcher, broken):
    assert searcher.add_images([broken] * 3, ids=["a", "b", "c"], batch_size=1, on_error="skip").added == 0


def test_vectors_without_direction_are_reported(searcher, colour_images, monkeypatch):
    class Black:
        def run_all(self, batch):
            vectors = np.ones((len(batch), 4), np.float32)
            vectors[np.asarray(batch).reshape(len(batch), -1).max(axis=1) == 0] = 0
            return {"probability": vectors}

    monkeypatch.setitem(searcher.model.encoders, "image", Black())
    images = [colour_images["red"], colour_images["black"]]
    with pytest.raises(ItemError, match=r"image 'black'.*no direction"):
        searcher.add_images(images, ids=["red", "black"])
    report = searcher.add_images(images, ids=["red", "black"], on_error="skip")
    assert (report.added, [item for item, _ in report.failed]) == (1, ["black"])


def test_ids_are_checked_before_anything_is_encoded(filled, colour_images, monkeypatch):
    monkeypatch.setattr(filled.model, "encode", lambda *_: pytest.fail("was encoded"))
    path = colour_images["red"]
    for names, said in [(["red"], "1 of 1 image ids are in the index already"), (["x", "x"], "'x'"), ([""], "empty")]:
        with pytest.raises(ItemError, match=said):
            filled.add_images([path] * len(names), ids=names)
    with pytest.raises(ItemError, match="one id for each"):
        filled.add_images([path], ids=["a", "b"])
    with pytest.raises(ItemError, match="one id for each"):
        filled.add_texts("red", ids=["a", "b", "c"])


def test_an_interrupted_call_can_be_repeated(searcher, colour_images):
    images, names = list(colour_images.values()), list(colour_images)

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise StopError

    with pytest.raises(StopError):
        searcher.add_images(images, ids=names, batch_size=2, on_error="skip", progress=stop)
    assert len(searcher) == 4
    report = searcher.add_images(images, ids=names, batch_size=2, on_error="skip")
    assert (report.added, len(report.failed), len(searcher)) == (2, 4, 6)
    assert "already" in report.failed[0][1]


def test_bad_ids_are_skipped_and_reported(searcher):
    report = searcher.add_texts(["red", "red", "red", "red"], ids=["a", "a", "", "\ud800"], on_error="skip")
    assert report.added == 1
    assert [item for item, _ in report.failed] == ["a", "''", "'\\ud800'"]


def test_upsert(filled, colour_images):
    with pytest.raises(ItemError, match="upsert"):
        filled.add_images([colour_images["blue"]], ids=["red"])
    assert filled.add_images([colour_images["blue"]], ids=["red"], upsert=True) == AddReport(1)
    assert {hit.id for hit in filled.search(text="blue", k=2)} == {"red", "blue"}


def test_progress_tells_of_everything(searcher, colour_images, broken):
    seen = []
    images = [*colour_images.values(), broken]
    searcher.add_images(images, batch_size=3, on_error="skip", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(("option", "value"), [("on_error", "ignore"), ("batch_size", 0)])
def test_options_that_are_not_offered(searcher, option, value):
    with pytest.raises(ConfigError, match=f"{option} is"):
        searcher.add_texts(["red"], ids=["a"], **{option: value})


def test_a_collection_is_stored_whole_or_not_at_all(searcher, colour_images, broken):
    texts = (Item("t", "red", {"n": 1}),)
    pictures = (Item("p", colour_images["red"]), Item("broken", broken))
    with pytest.raises(ImageError):
        searcher.add_collection(Collection(images=pictures, texts=texts))
    assert len(searcher) == 0
    reports = searcher.add_collection(Collection(images=pictures, texts=texts), on_error="skip")
    assert (reports["text"].added, reports["image"].added, len(reports["image"].failed)) == (1, 1, 1)
    assert searcher.search(colour_images["red"])[0].metadata == {"n": 1}


# --- opening ---


def test_open_what_was_created(tiny_bundle, tmp_path, colour_images):
    with Searcher.create(tiny_bundle, tmp_path / "i", kind="hnsw") as searcher:
        searcher.add_images(list(colour_images.values()), ids=list(colour_images))
        expected = searcher.search(text="red")
    with Searcher.open(str(tiny_bundle), str(tmp_path / "i"), threads=1) as searcher:
        assert searcher.search(text="red") == expected
        assert searcher.index.info().kind == "hnsw"
        assert searcher.providers == dict.fromkeys(["image", "text"], "onnxruntime-fp32 on CPU")
    with pytest.raises(DcktError, match="closed"):
        searcher.search(text="red")


@pytest.mark.usefixtures("openvino")
def test_one_index_for_every_variant(bundle_with, tmp_path, colour_images):
    names = ["onnxruntime-fp32", "openvino-fp32", "openvino-int8", "onnxruntime-int8"]
    bundle = bundle_with(names).path
    with Searcher.create(bundle, tmp_path / "i", variant="openvino-fp32", device="cpu", threads=1) as searcher:
        assert searcher.providers == dict.fromkeys(["image", "text"], "openvino-fp32 on CPU")
        searcher.add_images(list(colour_images.values()), ids=list(colour_images))
        searcher.add_texts(["a red bag"], ids=["red"])
    for name in names:
        with Searcher.open(bundle, tmp_path / "i", variant=name, device="cpu", threads=1) as searcher:
            assert set(searcher.providers.values()) == {f"{name} on CPU"}
            assert ids(searcher.search(colour_images["red"])) == ["red"]
            assert ids(searcher.search(text="red", k=1)) == ["red"]
    with Searcher.replacing(bundle, tmp_path / "i", variant="onnxruntime-int8", device="cpu") as searcher:
        assert set(searcher.providers.values()) == {"onnxruntime-int8 on CPU"}


def test_a_variant_that_the_bundle_does_not_have(tiny_bundle, tmp_path):
    Searcher.create(tiny_bundle, tmp_path / "i").close()
    with pytest.raises(BundleError, match="'openvino-bf16' is not in this bundle; it has onnxruntime-fp32"):
        Searcher.open(tiny_bundle, tmp_path / "i", variant="openvino-bf16")


def test_an_index_of_another_model_is_refused(tiny_bundle, tmp_path):
    Searcher.create(tiny_bundle, tmp_path / "i").close()
    other = _bundle(tiny_bundle, tmp_path / "other.dckt", representation="fc9")
    with pytest.raises(ModelMismatchError) as caught:
        Searcher.open(other, tmp_path / "i")
    assert Bundle.open(tiny_bundle).manifest.model_id in str(caught.value)
    assert Bundle.open(other).manifest.model_id in str(caught.value)
    renamed = shutil.copytree(tiny_bundle, tmp_path / "renamed.dckt")
    Searcher.open(renamed, tmp_path / "i").close()


def test_the_representation_of_the_bundle_is_what_is_stored(tiny_bundle, tmp_path):
    other = _bundle(tiny_bundle, tmp_path / "other.dckt", representation="fc9")
    with Searcher.create(other, tmp_path / "i") as searcher:
        assert (searcher.index.meta.representation, searcher.index.dimension) == ("fc9", 6)
        searcher.add_texts(["red"], ids=["a"])
        # fc9 of red is (1, 0, 0) beside its complement (0, 1, 1).
        np.testing.assert_allclose(
            searcher.index.vector("a", "text"), np.array([1, 0, 0, 0, 1, 1]) / np.sqrt(3), atol=1e-6
        )


def test_a_manifest_that_lies_about_the_width(tiny_bundle, tmp_path):
    other = _bundle(tiny_bundle, tmp_path / "other.dckt", representation="fc9", fc9=7)
    with pytest.raises(BundleCorruptError, match="fc9 is 6 wide; the manifest says 7"):
        Searcher.create(other, tmp_path / "i")


def _bundle(bundle: Path, destination: Path, *, representation: str, fc9: int = 6) -> Path:
    """The tiny bundle with another representation."""
    manifest = Bundle.open(bundle).manifest
    write_bundle(
        destination,
        files={name: bundle / name for name in manifest.files},
        image=manifest.image,
        text=manifest.text,
        labels=manifest.labels,
        representation=representation,
        dimensions={"probability": 4, "fc9": fc9},
        produced_by={},
        measured={},
    )
    return destination


@pytest.mark.parametrize(("option", "value"), [("device", "tpu"), ("threads", 0)])
def test_settings_that_are_not_offered(tiny_bundle, tmp_path, option, value):
    Searcher.create(tiny_bundle, tmp_path / "i").close()
    with pytest.raises(ConfigError, match=f"{option} is"):
        Searcher.open(tiny_bundle, tmp_path / "i", **{option: value})


def test_a_missing_index_says_what_to_run(tiny_bundle, tmp_path):
    with pytest.raises(IndexFolderError, match="dckt index BUNDLE"):
        Searcher.open(tiny_bundle, tmp_path / "missing")


def test_replacing_swaps_at_the_end(tiny_bundle, tmp_path):
    path = tmp_path / "i"
    with Searcher.replacing(tiny_bundle, path) as searcher:
        searcher.add_texts(["red"], ids=["old"])
        assert not path.exists()
    with Searcher.replacing(tiny_bundle, path, kind="exact") as searcher:
        searcher.add_texts(["red"], ids=["new"])
        with Searcher.open(tiny_bundle, path) as present:
            assert ids(present.search(text="red", media="text")) == ["old"]
    with Searcher.open(tiny_bundle, path) as present:
        assert ids(present.search(text="red", media="text")) == ["new"]
        assert present.index.info().kind == "exact"
    assert [file.name for file in tmp_path.iterdir() if file.name != "other"] == ["i"]


@pytest.mark.parametrize("error", [TextError("x"), KeyboardInterrupt(), FileNotFoundError("mine")])
def test_replacing_that_fails_changes_nothing(tiny_bundle, tmp_path, error):
    path = tmp_path / "i"
    with Searcher.create(tiny_bundle, path) as searcher:
        searcher.add_texts(["red"], ids=["old"])

    def replace():
        with Searcher.replacing(tiny_bundle, path) as searcher:
            searcher.add_texts(["red"], ids=["new"])
            raise error

    with pytest.raises(type(error)) as caught:
        replace()
    assert caught.value is error
    with Searcher.open(tiny_bundle, path) as present:
        assert ids(present.search(text="red", media="text")) == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["i"]


def test_only_an_index_is_replaced(tiny_bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(IndexFolderError, match="no index"), Searcher.replacing(tiny_bundle, tmp_path / name):
            pytest.fail("was replaced")


def test_the_model_is_warm_when_it_is_opened(tiny_bundle, tmp_path, monkeypatch):
    shapes = []
    real = OnnxEncoder.run_all
    monkeypatch.setattr(OnnxEncoder, "run_all", lambda self, batch: shapes.append(batch.shape) or real(self, batch))
    Searcher.create(tiny_bundle, tmp_path / "i", device="cpu").close()
    assert sorted(shapes) == [(1, 1), (1, 8, 8, 3)]


def test_decoders_are_loaded_when_it_is_opened(tiny_bundle, tmp_path):
    code = (
        "import sys; from dckt import Searcher; "
        "searcher = Searcher.create(sys.argv[1], sys.argv[2], device='cpu'); "
        "sys.exit('PIL.JpegImagePlugin' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tiny_bundle, tmp_path / "i"], check=True)


# --- filters and thresholds ---


@pytest.fixture
def shop(searcher, colour_images):
    """Six pictures in two shops, and a text about each."""
    metadata = [{"shop": "AB"[place % 2], "price": 10 * place} for place in range(6)]
    searcher.add_images(list(colour_images.values()), ids=list(colour_images), metadata=metadata)
    searcher.add_texts([f"a {name} bag" for name in colour_images], ids=list(colour_images), metadata=metadata)
    return searcher


def test_where(shop, colour_images):
    assert set(ids(shop.search(text="red", where={"shop": "A"}))) == {"red", "blue", "black"}
    assert set(ids(shop.search(colour_images["red"], where={"shop": "A", "price": {"lt": 30}}))) == {"red", "blue"}
    [first, second] = shop.search_batch(texts=["red", "blue"], where={"price": {"ge": 20}}, k=1)
    assert (ids(first), ids(second)) != (["red"], ["red"])
    assert ids(second) == ["blue"]
    assert {hit.id for hit in shop.similar("red", "image", where={"shop": "B"})} == {"green", "white", "yellow"}
    assert (shop.count(), shop.count("image"), shop.count("image", {"shop": "A"})) == (12, 6, 3)
    with pytest.raises(ConfigError, match="smaller"):
        shop.search(text="red", where={"price": {"smaller": 3}})


def test_min_score(shop):
    everything = shop.search(text="red", k=6)
    some = shop.search(text="red", k=6, min_score=everything[2].score)
    assert list(some) == list(everything[:3])
    assert list(shop.search(text="red", min_score=1.01)) == []
    assert list(shop.similar("red", "text", min_score=1.01)) == []
    assert list(shop.search_batch(texts=["red"], k=6, min_score=everything[2].score)[0]) == list(some)
    for wrong in (float("nan"), "high"):
        with pytest.raises(ConfigError, match="min_score is"):
            shop.search(text="red", min_score=wrong)


def test_min_score_of_a_bundle_that_is_not_calibrated(shop):
    with pytest.raises(ConfigError, match="not calibrated; run dckt calibrate"):
        shop.search(text="red", min_score="calibrated")


def test_min_score_calibrated(tiny_bundle_copy, tmp_path, colour_images):
    """Each medium has a threshold of its own, and one that drops much takes no place from the other's hits."""
    thresholds = {
        direction: {"best_f1": Threshold(similarity=least, precision=1, recall=1, f1=1, answered=1, mistaken=0)}
        for direction, least in {"text_to_text": 2.0, "text_to_image": 0.5, "image_to_text": -1.0}.items()
    }
    calibration = Calibration(
        representation="probability", pairs={"count": 1}, thresholds=thresholds, ranking={}, candidates=1
    )
    with_calibration(Bundle.open(tiny_bundle_copy), calibration)
    with Searcher.create(tiny_bundle_copy, tmp_path / "i", device="cpu") as searcher:
        searcher.add_images(list(colour_images.values()), ids=list(colour_images))
        searcher.add_texts([f"{name}" for name in colour_images], ids=list(colour_images))
        plain = searcher.search(text="red", k=6)
        fitting = [hit for hit in plain if hit.score >= 0.5]
        assert 0 < len(fitting) < 6
        assert list(searcher.search(text="red", k=6, min_score="calibrated")) == fitting
        assert list(searcher.search(text="red", k=1, media=["image", "text"], min_score="calibrated")) == fitting[:1]
        assert len(searcher.search(colour_images["red"], min_score="calibrated")) == 6
        assert list(searcher.similar("red", "text", media="image", k=6, min_score="calibrated")) == fitting
        with pytest.raises(ConfigError, match=r"not calibrated for image_to_image.*text_to_text, text_to_image"):
            searcher.search(colour_images["red"], media="image", min_score="calibrated")


# --- the second stage ---


@pytest.fixture
def staged(tiny_bundle, tmp_path, colour_images):
    with Searcher.create(tiny_bundle, tmp_path / "staged", second_stage=True, device="cpu", threads=1) as searcher:
        searcher.add_images(list(colour_images.values()), ids=list(colour_images), batch_size=4)
        yield searcher


def _fc9(colour):
    vector = np.array([*colour, *(255 - np.array(colour))], float)
    return vector / np.linalg.norm(vector)


def test_reordering_is_by_the_second_representation(staged, colour_images):
    query = _fc9((85, 0, 0))  # the mean of the words' colours
    expected = {name: float(query @ _fc9(Image.open(path).getpixel((0, 0)))) for name, path in colour_images.items()}
    result = staged.search(text="red black black", k=6, reorder=6)
    assert {hit.id: pytest.approx(hit.score, abs=1e-6) for hit in result} == expected
    assert [hit.score for hit in result] == sorted((hit.score for hit in result), reverse=True)
    assert list(result.timings) == ["tokenize", "encode", "search", "reorder"]


def test_only_the_candidates_are_reordered(staged):
    text = "red black black"
    assert ids(staged.search(text=text, k=3)) == ["red", "black", "yellow"]
    result = staged.search(text=text, k=2, reorder=3)
    assert ids(result) == ["black", "red"]
    assert ids(staged.search(text=text, k=3, reorder=3)) == ["black", "red", "yellow"]
    assert set(ids(staged.search(text=text, k=4, reorder=6))) == {"black", "red", "blue", "green"}
    assert staged.search_batch(texts=["blue", text], k=2, reorder=3)[1] == result
    assert staged.search(text=text, k=5, reorder=10**6)[0] == result[0]


def test_reordering_what_was_not_kept(searcher, staged):
    with pytest.raises(ConfigError, match="second_stage=True"):
        searcher.search(text="red", reorder=10)
    for reorder in (-1, 3):
        with pytest.raises(ConfigError, match=f"reorder is {reorder}, k is 10"):
            staged.search(text="red", reorder=reorder)


def test_a_second_stage_of_an_index_that_is_opened(staged, tiny_bundle, colour_images):
    expected = staged.search(colour_images["red"], media="image", k=3, reorder=6)
    with Searcher.open(tiny_bundle, staged.index.path, device="cpu", threads=1) as searcher:
        assert searcher.search(colour_images["red"], media="image", k=3, reorder=6) == expected


def test_a_bundle_with_one_representation_has_no_second_stage(tiny_bundle, tmp_path):
    manifest = Bundle.open(tiny_bundle).manifest
    write_bundle(
        tmp_path / "one.dckt",
        files={name: tiny_bundle / name for name in manifest.files},
        image=manifest.image,
        text=manifest.text,
        labels=manifest.labels,
        representation="probability",
        dimensions={"probability": 4},
        produced_by={},
        measured={},
    )
    with pytest.raises(ConfigError, match="no representation beside probability"):
        Searcher.create(tmp_path / "one.dckt", tmp_path / "i", second_stage=True)
    assert not (tmp_path / "i").exists()


# --- streams, and what is there already ---


def test_a_stream_is_read_a_few_batches_ahead(searcher, colour_images):
    """And stored batch by batch: what is read and not yet stored never grows."""
    paths = list(colour_images.values())
    farthest = []

    def stream():
        for number in range(60):
            farthest.append(number - len(searcher))
            yield paths[number % 6]

    seen = []
    report = searcher.add_images(
        stream(),
        ids=(f"{number:02}" for number in range(60)),
        metadata=({"n": number} for number in range(60)),
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report == AddReport(60)
    assert max(farthest) <= 3 * 4
    assert seen == [(done, None) for done in range(4, 61, 4)]
    assert searcher.get("17", "image").metadata == {"n": 17}


def test_a_stream_of_paths_names_itself(searcher, colour_images):
    assert searcher.add_images(path for path in colour_images.values()).added == 6
    assert searcher.index.existing("image", [colour_images["red"].as_posix()])


def test_a_stream_with_a_bad_item_keeps_the_batches_before(searcher, colour_images, broken):
    images = [*colour_images.values(), broken, colour_images["red"]]
    names = [*colour_images, "bad", "more"]
    with pytest.raises(ImageError, match="is no picture"):
        searcher.add_images(iter(images), ids=names, batch_size=2)
    assert len(searcher) == 6
    report = searcher.add_images(iter(images), ids=iter(names), batch_size=2, on_error="skip")
    assert report.added == 1
    assert [failure.id for failure in report.failed] == [*colour_images, "bad"]


@pytest.mark.parametrize("ids", [["a"], ["a", "b", "c"]])
def test_a_stream_with_another_number_of_ids(searcher, ids):
    with pytest.raises(ItemError, match="one id for each"):
        searcher.add_texts(iter(["red", "blue"]), ids=ids)
    with pytest.raises(ItemError, match="one id for each"):
        searcher.add_texts(["red", "blue"], ids=iter(ids))
    with pytest.raises(ItemError, match="metadata for each"):
        searcher.add_texts(iter(["red", "blue"]), ids=["a", "b"], metadata=[{}] * len(ids))


def test_an_error_of_the_stream_itself_comes_through(searcher):
    def stream():
        yield "red"
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        searcher.add_texts(stream(), ids=["a", "b"], batch_size=1)


def test_collect_gives_the_errors_themselves(searcher, broken, colour_images):
    report = searcher.add_images(
        [broken, colour_images["red"], colour_images["red"]], ids=["bad", "x", "x"], on_error="collect"
    )
    assert report.added == 1
    assert {failure.id: type(failure.error) for failure in report.failed} == {"bad": ImageError, "x": ItemError}
    assert all(failure.error.__traceback__ is failure.error.__cause__ is None for failure in report.failed)
    skipped = searcher.add_images([broken], ids=["bad"], on_error="skip").failed[0]
    assert skipped == ("bad", str(next(failure.error for failure in report.failed if failure.id == "bad")))


def test_bad_metadata_costs_one_item_only(searcher):
    report = searcher.add_texts(["red", "blue"], ids=["a", "b"], metadata=[{"x": {1}}, {}], on_error="skip")
    assert (report.added, [failure.id for failure in report.failed]) == (1, ["a"])


def test_what_is_unchanged_costs_no_encoding_and_no_write(searcher, colour_images, monkeypatch):
    paths, names = list(colour_images.values()), list(colour_images)
    metadata = [{"price": place} for place in range(6)]
    searcher.add_images(paths, ids=names, metadata=metadata)
    searcher.add_texts(["red", "blue"], ids=["red", "blue"])
    before = searcher.index.info().sequence
    prepared = []
    real = searcher.model.prepare
    monkeypatch.setattr(
        searcher.model, "prepare", lambda medium, source: prepared.append(source) or real(medium, source)
    )
    seen = []
    report = searcher.add_images(
        paths, ids=names, metadata=metadata, upsert=True, batch_size=4, progress=lambda *at: seen.append(at)
    )
    assert report == AddReport(0, unchanged=6)
    assert seen == [(4, 6), (6, 6)]
    contents = (path.read_bytes() for path in paths)
    assert searcher.add_images(contents, ids=names, metadata=metadata, upsert=True) == AddReport(0, unchanged=6)
    assert searcher.add_texts(["red", "blue"], ids=["red", "blue"], upsert=True) == AddReport(0, unchanged=2)
    assert not prepared
    assert searcher.index.info().sequence == before


def test_what_is_changed_is_stored_anew(searcher, colour_images):
    paths = [colour_images[name] for name in ("red", "green", "blue")]
    searcher.add_images(paths, ids=["a", "b", "c"], metadata=[{"n": 1}, {"n": 1}, {"n": 1}])
    paths[1] = colour_images["white"]
    report = searcher.add_images(paths, ids=["a", "b", "c"], metadata=[{"n": 1}, {"n": 1}, {"n": True}], upsert=True)
    assert report == AddReport(2, unchanged=1)
    assert searcher.search(text="white", k=1)[0].id == "b"
    assert searcher.get("c", "image").metadata == {"n": True}
    assert searcher.add_images(paths, ids=["a", "b", "c"], upsert=True) == AddReport(3), "without metadata"


def test_pixels_that_are_unchanged(searcher):
    def pixels(*shape):
        return np.zeros((*shape, 3), np.uint8)

    searcher.add_images([pixels(2, 3)], ids=["a"])
    assert searcher.add_images([Image.fromarray(pixels(2, 3))], ids=["a"], upsert=True).unchanged == 1
    assert searcher.add_images([pixels(3, 2)], ids=["a"], upsert=True).added == 1


# --- the rest ---


def test_ready_vectors(searcher, staged, colour_images):
    vector = searcher.model.encode("image", [searcher.model.prepare("image", colour_images["red"])])["probability"]
    assert searcher.add_vectors(vector, ids=["r"], medium="image", metadata=[{"n": 1}]) == AddReport(1)
    assert searcher.search(text="red")[0].metadata == {"n": 1}
    with pytest.raises(ItemError, match="already"):
        searcher.add_vectors(vector, ids=["r"], medium="image")
    searcher.add_vectors(vector, ids=["r"], medium="image", upsert=True)
    assert searcher.get("r", "image").metadata == {}
    with pytest.raises(ItemError, match="fc9"):
        staged.add_vectors(vector, ids=["r"], medium="image")
    staged.add_vectors(vector, ids=["r"], medium="image", second=np.eye(6)[:1])


def test_delete(shop):
    shop.delete("red", "image")
    assert shop.index.existing("text", ["red"]) == {"red"}
    shop.delete(["red", "blue"])
    assert (shop.count("image"), shop.count("text")) == (4, 4)
    for medium in (None, "image"):
        with pytest.raises(UnknownItemError, match="'red'"):
            shop.delete(["green", "red"], medium)
    assert shop.get("green", "image").metadata == {"shop": "B", "price": 10}
    with pytest.raises(UnknownItemError, match="'red'"):
        shop.get("red", "image")
    shop.compact()
    assert len(shop) == 8


def test_limits_hold_for_queries_and_items(tiny_bundle, tmp_path, colour_images):
    small = ImageLimits(max_bytes=200, max_pixels=100)
    with Searcher.create(tiny_bundle, tmp_path / "i", device="cpu", limits=small) as searcher:
        with pytest.raises(ImageError, match="12 x 10 pixels; expected 1 to 100"):
            searcher.search(colour_images["red"])
        with pytest.raises(ImageError, match="300 bytes; expected at most 200"):
            searcher.search(b"x" * 300)
        report = searcher.add_images([colour_images["red"], np.zeros((10, 10, 3), np.uint8)], ids="ab", on_error="skip")
        assert (report.added, [failure.id for failure in report.failed]) == (1, ["a"])


def test_shared_calls_find_the_same(filled, tiny_bundle, colour_images):
    """From 32 threads, some of whose queries are bad; and closing while they search ends with our error."""
    queries = [{"image": path} for path in colour_images.values()] + [
        {"text": name} for name in ("red", "blue", "zebra")
    ]
    expected = [None if query.get("text") == "zebra" else filled.search(**query) for query in queries]
    batching = Batching(max_batch=8, max_wait=0.001)
    searcher = Searcher.open(tiny_bundle, filled.index.path, device="cpu", threads=1, batching=batching)

    def search(number):
        place = number % len(queries)
        try:
            return searcher.search(**queries[place]) == expected[place]
        except TextError:
            return expected[place] is None

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(search, range(600)))
        last = [pool.submit(search, number) for number in range(600)]
        searcher.close()
        ended = [call.exception(60) for call in last]
    assert all(error is None or (isinstance(error, DcktError) and "closed" in str(error)) for error in ended)


def test_queries_of_one_batch_may_ask_for_different_things(shop, monkeypatch):
    names = ["red", "blue", "green"]
    prepared = [shop.model.prepare("text", name) for name in names]
    vectors = shop.model.encode("text", [prepared[number % 3] for number in range(10)])
    plain = Question(k=2, media=["image"], where=None, floors=None, reorder=0)
    other = replace(plain, where={"shop": "A"})
    questions = [plain, replace(plain), other, replace(plain, k=4), other, replace(plain, media=["image", "text"])]
    # 1 equals True, and is another filter. The last one's is a mistake, which is nobody else's.
    questions += [replace(plain, where={"price": 1}), replace(plain, where={"price": True}), plain]
    questions.append(replace(plain, where={"price": {"smaller": 3}}))
    asked = []
    real = Index.search

    def search(index, rows, *words, **more):
        asked.append(len(rows))
        return real(index, rows, *words, **more)

    monkeypatch.setattr(Index, "search", search)
    answers = find_shared(shop.index, vectors, questions)
    assert asked == [3, 2]  # those who ask alone look up by themselves
    with pytest.raises(ConfigError, match="smaller"):
        answers.pop()()
    found = [answer() for answer in answers]
    for number, ([hits], timings) in enumerate(found):
        alone = {name: of[number : number + 1] for name, of in vectors.items()}
        assert list(hits) == list(find(shop.index, alone, questions[number])[0][0])
        assert list(timings) == ["search"]
    assert [len(hits) for [hits], _ in found] == [2, 2, 2, 4, 2, 2, 0, 0, 2]


def test_the_batches_of_concurrent_callers_reach_the_model(filled, tiny_bundle, monkeypatch):
    with Searcher.open(
        tiny_bundle, filled.index.path, device="cpu", threads=1, batching=Batching(max_wait=60)
    ) as searcher:
        real = searcher.model.encoders["text"]
        sizes, entered, go_on = [], threading.Event(), threading.Event()

        class Slow:
            def run_all(self, batch):
                sizes.append(len(batch))
                entered.set()
                assert go_on.wait(60)
                return real.run_all(batch)

        monkeypatch.setitem(searcher.model.encoders, "text", Slow())
        with ThreadPoolExecutor(5) as pool:
            calls = [pool.submit(searcher.search, text="red")]
            assert entered.wait(60)
            calls += [pool.submit(searcher.search, text=name) for name in ("red", "blue", "a green bag", "white")]
            batcher = searcher._batchers["text"]
            while batcher._gathering is None or len(batcher._gathering.items) < 4:
                threading.Event().wait(0.001)
            go_on.set()
            assert [call.result(60)[0].id for call in calls] == ["red", "red", "blue", "green", "white"]
        assert sizes == [1, 4]
        monkeypatch.undo()
