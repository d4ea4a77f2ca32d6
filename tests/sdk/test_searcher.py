"""The searcher on a tiny model that knows colours: what is found, what is stored, what is refused."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dckt.bundle import Bundle, write_bundle
from dckt.collect import Collection, Item
from dckt.errors import (
    BundleCorruptError,
    BundleError,
    ConfigError,
    ImageError,
    IndexFolderError,
    ItemError,
    ModelMismatchError,
    ProviderError,
    TextError,
    UnknownItemError,
)
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
    real = filled._encoders["image"]

    class Counting:
        dimension = real.dimension

        def run(self, batch):
            sizes.append(len(batch))
            return real.run(batch)

    monkeypatch.setitem(filled._encoders, "image", Counting())
    filled.search_batch(list(colour_images.values()), batch_size=4)
    assert sizes == [4, 2]
    sizes.clear()
    filled.add_images(list(colour_images.values()), batch_size=5)
    assert sizes == [5, 1]


def test_timings_of_every_stage(filled):
    timings = filled.search(text="red").timings
    assert list(timings) == ["preprocess", "encode", "search"]
    assert all(seconds >= 0 for seconds in timings.values())


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
        dimension = 4

        def run(self, batch):
            vectors = np.ones((len(batch), 4), np.float32)
            vectors[np.asarray(batch).reshape(len(batch), -1).max(axis=1) == 0] = 0
            return vectors

    monkeypatch.setitem(searcher._encoders, "image", Black())
    images = [colour_images["red"], colour_images["black"]]
    with pytest.raises(ItemError, match=r"image 'black'.*no direction"):
        searcher.add_images(images, ids=["red", "black"])
    report = searcher.add_images(images, ids=["red", "black"], on_error="skip")
    assert (report.added, [item for item, _ in report.failed]) == (1, ["black"])


def test_ids_are_checked_before_anything_is_encoded(filled, colour_images, monkeypatch):
    monkeypatch.setattr(filled, "_run", lambda *_: pytest.fail("was encoded"))
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
    with pytest.raises(ProviderError, match="closed"):
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
