"""Thresholds from labelled pairs: against figures counted by hand, and what a bundle keeps of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dckt.calibration import Calibration, Quality, Threshold, calibrate, reordered, thresholds
from dckt.errors import ConfigError, ItemError


def unit(degrees):
    angles = np.radians(np.asarray(degrees, float))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def counted(queries, query_labels, items, item_labels, similarity, *, exclude_self=False):
    """The figures of a threshold, counted one pair at a time."""
    rows = []
    for place, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        others = [
            (float(query @ item), label == of)
            for number, (item, of) in enumerate(zip(items, item_labels, strict=True))
            if not (exclude_self and number == place)
        ]
        hits = [fits for score, fits in others if score >= similarity]
        relevant = sum(fits for _, fits in others)
        precision = sum(hits) / len(hits) if hits else None
        recall = sum(hits) / max(relevant, 1)
        f1 = 2 * sum(hits) / (len(hits) + max(relevant, 1))
        rows.append((precision, recall, f1, bool(hits), not all(hits)))
    precisions = [row[0] for row in rows if row[0] is not None]
    mean = [float(np.mean([row[column] for row in rows])) for column in (1, 2, 3, 4)]
    return {
        "precision": float(np.mean(precisions)) if precisions else 0.0,
        **dict(zip(("recall", "f1", "answered", "mistaken"), mean, strict=True)),
    }


def test_a_threshold_between_what_fits_and_what_does_not():
    queries, items = unit([0, 90]), unit([10, 20, 80, 70])
    found = thresholds(queries, np.array([0, 1]), items, np.array([0, 0, 1, 1]))
    best = found["best_f1"]
    assert np.cos(np.radians(70)) < best.similarity <= np.cos(np.radians(20))
    assert best.similarity == pytest.approx(np.cos(np.radians(20)), abs=1e-5)
    assert (best.precision, best.recall, best.f1, best.answered, best.mistaken) == (1, 1, 1, 1, 0)
    assert found == dict.fromkeys(("best_f1", "precision_0.8", "precision_0.9", "precision_0.95"), best)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_figures_are_what_counting_gives(seed, exclude_self):
    random = np.random.default_rng(seed)
    labels = random.integers(4, size=300)
    items = random.normal(size=(300, 6)) + 1.2 * np.eye(6)[labels]
    items = (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)
    queries, asked = (items, labels) if exclude_self else (items[:70][::-1], labels[:70][::-1])
    found = thresholds(queries, asked, items, labels, exclude_self=exclude_self)
    assert found["best_f1"].f1 > 0.3
    for name, threshold in found.items():
        expected = counted(queries, asked, items, labels, threshold.similarity, exclude_self=exclude_self)
        for figure, value in expected.items():
            assert getattr(threshold, figure) == pytest.approx(value, abs=1e-9), (name, figure)
    # No similarity of a pair has a better F1, but for the levels between those that were tried.
    every = [
        counted(queries, asked, items, labels, similarity, exclude_self=exclude_self)["f1"]
        for similarity in np.linspace(-0.5, 0.99, 60)
    ]
    assert found["best_f1"].f1 >= max(every) - 0.005


def test_a_precision_is_the_lowest_similarity_that_reaches_it():
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 60)
    items = random.normal(size=(180, 4)) + 1.5 * np.eye(4)[labels]
    items = (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)
    found = thresholds(items, labels, items, labels, exclude_self=True)
    for name, threshold in found.items():
        if name != "best_f1":
            wanted = float(name.removeprefix("precision_"))
            assert threshold.precision >= wanted
            lower = counted(items, labels, items, labels, threshold.similarity - 0.05, exclude_self=True)
            assert lower["precision"] < wanted
    steps = [found[name].similarity for name in ("precision_0.8", "precision_0.9", "precision_0.95")]
    assert steps == sorted(steps)


def test_saturated_vectors_keep_their_best_hits():
    """All that fits has similarity 1, and rounding must not drop it."""
    rows = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 2]]
    best = thresholds(rows, np.array([0, 0, 1, 1, 2, 2]), rows, np.array([0, 0, 1, 1, 2, 2]))["best_f1"]
    assert 0.999 < best.similarity < 1 - 1e-7
    assert best.f1 == 1


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_nothing_to_tell_apart(labels):
    rows = unit([0, 10, 20])
    assert thresholds(rows, np.array(labels), rows, np.array(labels), exclude_self=True) == {}


# --- the whole ---


@pytest.fixture
def vectors():
    """fc9 tells pairs apart; probability only labels."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    own = random.normal(size=(40, 16))
    return {
        "probability": {medium: 5 * np.eye(4)[labels] + random.random((40, 4)) + 0.01 for medium in ("image", "text")},
        "fc9": {medium: own + 0.05 * random.normal(size=own.shape) for medium in ("image", "text")},
    }, [f"class {label}" for label in labels]


def test_directions_and_ways_of_ranking(vectors):
    found = calibrate(*vectors, representation="probability", pairs={"corpus": "x"}, candidates=10)
    assert found.pairs == {"corpus": "x", "count": 40}
    assert set(found.thresholds) == {"image_to_text", "text_to_image", "image_to_image", "text_to_text"}
    assert set(found.ranking) == {"probability", "fc9", "probability then fc9"}
    for direction in ("image_to_text", "text_to_image"):
        alone, fc9, both = (found.ranking[name][direction] for name in ("probability", "fc9", "probability then fc9"))
        assert alone.map == pytest.approx(1, abs=1e-6)
        assert fc9.map < 0.6
        assert both.map == pytest.approx(1, abs=1e-6), "the candidates are those of the label"
        assert alone.recall["1"] < 0.5
        assert fc9.recall["1"] == both.recall["1"] == 1
        assert list(both.recall) == ["1", "5", "10"]


def test_the_second_stage_only_sees_candidates(vectors):
    few = calibrate(*vectors, representation="probability", pairs={}, candidates=3)
    alone, both = few.ranking["probability"]["image_to_text"], few.ranking["probability then fc9"]["image_to_text"]
    assert alone.recall["1"] <= both.recall["1"] < 1
    assert few.candidates == 3
    assert calibrate(*vectors, representation="probability", pairs={}, candidates=99).candidates == 40


def test_reordered():
    first = [[0.9, 0.8, 0.8, 0.1, -1.0]]
    second = [[0.1, -1.0, 0.5, 1.0, 1.0]]
    orders = {count: np.argsort(-reordered(first, second, count)[0], kind="stable").tolist() for count in (1, 2, 3, 5)}
    assert orders == {1: [0, 1, 2, 3, 4], 2: [0, 1, 2, 3, 4], 3: [2, 0, 1, 3, 4], 5: [3, 4, 2, 0, 1]}


def test_one_label_gives_no_threshold(vectors):
    found = calibrate(vectors[0], ["same"] * 40, representation="fc9", pairs={})
    assert found.thresholds == {}
    with pytest.raises(ConfigError, match=r"not calibrated for image_to_text \(it is for: none\); run dckt calibrate"):
        found.threshold("image", "text")


def test_a_vector_without_direction_is_like_nothing(vectors):
    given, labels = vectors
    given["fc9"]["image"][3] = 0
    assert calibrate(given, labels, representation="fc9", pairs={}).thresholds


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda given: given["fc9"].update(image=np.zeros((39, 16))), ItemError, r"image fc9 is \(39, 16\)"),
        (lambda given: given["fc9"].update(text=np.full((40, 16), np.nan)), ItemError, "text fc9 .* not finite"),
        (lambda given: given.pop("probability"), ConfigError, "representation is 'probability'"),
    ],
)
def test_bad_input(vectors, change, error, said):
    given, labels = vectors
    change(given)
    with pytest.raises(error, match=said):
        calibrate(given, labels, representation="probability", pairs={})


def test_no_candidates(vectors):
    with pytest.raises(ConfigError, match="candidates 0"):
        calibrate(*vectors, representation="fc9", pairs={}, candidates=0)


# --- as JSON ---


@pytest.fixture
def calibration(vectors):
    return calibrate(*vectors, representation="probability", pairs={"corpus": "x"})


def test_what_was_written_is_read(calibration):
    content = json.loads(json.dumps(calibration.as_json(), allow_nan=False))
    assert Calibration.from_json(content) == calibration
    best = calibration.thresholds["text_to_image"]["best_f1"]
    assert isinstance(best, Threshold)
    assert calibration.threshold("text", "image") == best.similarity
    assert isinstance(calibration.ranking["fc9"]["text_to_image"], Quality)
    whole_numbers = replace(calibration, candidates=7)
    assert Calibration.from_json(json.loads(json.dumps(whole_numbers.as_json()))).candidates == 7


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("pairs"),
        lambda content: content.update(more=1),
        lambda content: content.update(representation=3),
        lambda content: content.update(candidates=True),
        lambda content: content.update(thresholds=[]),
        lambda content: content["thresholds"].update(image_to_text=None),
        lambda content: content["thresholds"]["image_to_text"]["best_f1"].update(similarity="0.5"),
        lambda content: content["thresholds"]["image_to_text"]["best_f1"].pop("f1"),
        lambda content: content["ranking"]["fc9"]["image_to_text"].update(recall=[1]),
        lambda content: content["ranking"]["fc9"]["image_to_text"]["recall"].update({"1": None}),
    ],
)
def test_what_was_not_written_by_us(calibration, change):
    content = json.loads(json.dumps(calibration.as_json()))
    change(content)
    with pytest.raises(ConfigError, match="the calibration is not what dckt writes"):
        Calibration.from_json(content)
