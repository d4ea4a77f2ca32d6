"""Corpora of ready features: which array is what, which rows are which split, and what is refused."""

import numpy as np
import pytest

from dckt.errors import CorpusError
from dckt_trainer.data.corpus import SPLITS
from dckt_trainer.data.feature_corpus import is_feature_corpus, read_feature_corpus


@pytest.fixture
def write(tmp_path, arrays):
    """Writes the arrays with changes, None leaving one out, and returns the path."""

    def to(name="features.npz", **changes):
        held = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
        np.savez(tmp_path / name, **held)
        return tmp_path / name

    return to


def counts(corpus):
    return [len(corpus.part(split)) for split in SPLITS]


def changed(values, place, value):
    values = values.copy()
    values[place] = value
    return values


def test_reads_every_array(write, arrays):
    corpus = read_feature_corpus(write())
    assert (corpus.name, corpus.widths, counts(corpus)) == ("features", {"image": 5, "text": 7}, [24, 6, 12])
    assert corpus.labels == ("ant", "bee", "cat")
    assert corpus.warnings == corpus.skipped == ()
    first = corpus.part("val")[0]
    assert (first.id, first.label, first.split, first.row) == ("pair24", "ant", "val", 24)
    assert (first.image, first.text) == (None, "")
    vectors = corpus.vectors("test")
    assert vectors["text"].dtype == np.float32
    np.testing.assert_array_equal(vectors["image"], arrays["image"][30:])
    np.testing.assert_array_equal(vectors["text"], arrays["text"][30:].astype(np.float32))


def test_what_may_be_absent(write):
    corpus = read_feature_corpus(write(ids=None, split=None, class_names=None))
    assert corpus.part("train")[41].id == "41"
    assert corpus.labels == ("0", "1", "2")
    assert counts(corpus) == [42, 0, 0]
    assert corpus.warnings == ("no val pairs", "no test pairs")


def test_labels_may_be_texts_and_ids_integers(write, arrays):
    names = np.array(["x", "y", "z"])[arrays["labels"]]
    corpus = read_feature_corpus(write(labels=names, ids=np.arange(100, 142), class_names=None))
    assert corpus.labels == ("x", "y", "z")
    assert corpus.part("train")[0].id == "100"


def test_arrays_are_named_behind_a_colon(write, arrays):
    path = write(image=None, image_sift=arrays["image"], other=arrays["text"] + 1, image_ids=arrays["ids"])
    assert read_feature_corpus(path).widths["image"] == 5  # the only one with rows of numbers
    corpus = read_feature_corpus(f"{path}:image=image_sift,text=other")
    np.testing.assert_allclose(corpus.features["text"], arrays["text"] + 1, rtol=1e-6)
    assert corpus.root == path
    assert [is_feature_corpus(p) for p in (path, f"{path}:text=other", "a/b", "a.npz/pairs.jsonl")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("val=rows", [24, 3, 12]),  # exactly these; the other val rows are left out
        ("test=rows", [24, 3, 3]),  # taken from val, and no other row is test
        ("val=tests", [24, 4, 8]),  # taken from test
        ("train=first,val=rows", [12, 3, 12]),
        ("val=rows,test=tests", [24, 3, 4]),
    ],
)
def test_lists_of_rows_are_exactly_the_split(write, suffix, expected):
    path = write(rows=np.array([24, 26, 28]), tests=np.arange(38, 42), first=np.arange(12))
    assert counts(read_feature_corpus(f"{path}:{suffix}")) == expected


def test_a_split_may_come_from_lists_alone(write):
    path = write(split=None, v=np.arange(6), t=np.arange(6, 10))
    corpus = read_feature_corpus(f"{path}:val=v,test=t")
    assert counts(corpus) == [32, 6, 4]
    assert [pair.row for pair in corpus.part("test")] == [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("changes", "suffix", "says"),
    [
        ({"text": None}, "", r"no array is the text features; .*text=ARRAY; the file has the arrays class_names, ids"),
        (
            {"text": None, "text_a": np.ones((42, 2)), "text_b": np.ones((42, 3))},
            "",
            r"text_a and text_b may be .*features\.npz:text=text_a",
        ),
        ({}, ":image=sift", r"no array 'sift' for image; the file has the arrays class_names, ids, image"),
        ({}, ":picture=image", "'picture=image' is not understood; .* of: image, text, labels"),
        ({}, ":image", "'image' is not understood"),
        ({}, ":image=image,image=text", "is not understood; .*each key once"),
        ({"text": np.ones((41, 3))}, "", "42 rows of image features and 41 of text features"),
        ({"image": np.ones(42)}, "", r"image features are an array of float64 with shape \(42,\); expected rows"),
        ({"image": np.array([["a"]] * 42)}, "", "image features are an array of <U1"),
        ({"image": np.ones((42, 0))}, "", "expected rows of numbers"),
        ({"labels": None}, "", "there are no labels; name an array with labels=ARRAY"),
        ({"labels": np.zeros(42)}, "", "labels is an array of float64 .*; expected 42 texts or integers"),
        ({"labels": np.zeros(41, int)}, "", r"labels is an array of int64 with shape \(41,\); expected 42"),
        ({"labels": np.array([["a"]] * 42, object)}, "", "without pickles"),
        ({"class_names": np.array(["a", "b", "a"])}, "", "class_names is .*; expected different names"),
        ({"labels": np.array(["a", "b"] * 21)}, ":class_names=class_names", "leave class_names out"),
        ({"rows": np.array([0, 42])}, ":val=rows", r"rows of val are .*; expected numbers from 0 to 41"),
        ({"rows": np.array([-1])}, ":val=rows", "expected numbers from 0"),
        ({"rows": np.array([], int)}, ":val=rows", "expected numbers from 0"),
        ({"rows": np.array([1, 2, 1])}, ":val=rows", "row 1 is listed for val and for val, or twice"),
        ({"rows": np.array([1, 2])}, ":val=rows,test=rows", "row 1 is listed for val and for test"),
        ({"labels": np.repeat([0, 1, 2], [30, 6, 6])}, "", "the labels do not allow training"),
        ({"labels": np.zeros(42, int)}, "", "expected 2 or more labels"),
        ({"split": np.array(["test"] * 42)}, "", "none of 42 usable pairs has split 'train'"),
    ],
)
def test_what_is_refused(write, changes, suffix, says):
    with pytest.raises(CorpusError, match=says):
        read_feature_corpus(f"{write(**changes)}{suffix}")


@pytest.mark.parametrize(
    ("key", "place", "value", "says"),
    [
        ("image", (3, 1), np.nan, "row 3: the image features hold a number that is not finite"),
        ("text", (3, 0), -np.inf, "row 3: the text features hold a number that is not finite"),
        ("text", (3, 0), 1e300, "row 3: the text features hold a number that is not finite"),  # not in float32
        ("ids", 3, "pair1", "row 3: id 'pair1' is that of row 1 already"),
        ("ids", 3, "", "row 3: ids is empty"),
        ("split", 3, "dev", "row 3: split is 'dev'; expected train, val or test"),
        ("labels", 3, 9, "row 3: label 9 has no name; class_names has 3, counted from 0"),
        ("labels", 3, -1, "row 3: label -1 has no name"),
    ],
)
def test_a_bad_row_is_named_or_left_out(write, arrays, key, place, value, says):
    path = write(**{key: changed(arrays[key], place, value)})
    with pytest.raises(CorpusError, match=r"1 of 42 rows cannot be used; .*on_bad_pair") as caught:
        read_feature_corpus(path)
    assert caught.value.mistakes[0].startswith(says)
    corpus = read_feature_corpus(path, on_bad_pair="skip")
    assert 3 not in [pair.row for pair in corpus.pairs]
    assert len(corpus.pairs) == 41
    assert corpus.skipped == caught.value.mistakes


def test_files_that_are_none(tmp_path):
    with pytest.raises(CorpusError, match=r"cannot be read as a NumPy \.npz"):
        read_feature_corpus(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(CorpusError, match=r"cannot be read as a NumPy \.npz"):
        read_feature_corpus(tmp_path / "text.npz")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(CorpusError, match=r"cannot be read as a NumPy \.npz"):
        read_feature_corpus(tmp_path / "array.npz")


def test_the_fingerprint_is_that_of_the_content(write, arrays):
    prints = [
        read_feature_corpus(path).fingerprint
        for path in (
            write(),
            write("elsewhere.npz"),
            write("a.npz", image=changed(arrays["image"], (0, 0), 9)),
            write("b.npz", ids=changed(arrays["ids"], 0, "x")),
            write("c.npz", labels=changed(arrays["labels"], 0, 1)),
            write("d.npz", split=changed(arrays["split"], 0, "val")),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5


@pytest.mark.data
def test_the_wikipedia_features(data_dir):
    path = data_dir / "wikipedia" / "features.npz"
    with pytest.raises(CorpusError, match="text_lda and text_tfidf may be the text features"):
        read_feature_corpus(path)
    corpus = read_feature_corpus(f"{path}:text=text_tfidf,val=val231")
    assert counts(corpus) == [2173, 231, 462]
    assert corpus.widths == {"image": 128, "text": 1000}
    assert counts(read_feature_corpus(f"{path}:text=text_lda,val=val231,test=test462")) == [2173, 231, 462]
