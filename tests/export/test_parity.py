"""Figures of the gate against hand-computed ones, and what it refuses."""

import dataclasses
import math
from itertools import permutations

import numpy as np
import pytest

from dckt.errors import ConfigError, ParityError
from dckt_export.parity import Parity, RankingParity, Thresholds, failures, measure, read_thresholds

FP32 = read_thresholds()["fp32"]

LABELS = ("a", "a", "b", "b")
IDS = ("p0", "p1", "p2", "p3")
EXACT = {
    "image": np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32),
    "text": np.array([[1, 0.1], [0.8, 0.1], [0.1, 1], [0.2, 0.8]], np.float32),
}


def changed(medium, row, vector, base=EXACT):
    vectors = {name: rows.copy() for name, rows in base.items()}
    vectors[medium][row] = vector
    return vectors


def test_a_model_equals_itself():
    parity = measure(EXACT, EXACT, LABELS, IDS)
    for medium in parity.media.values():
        assert medium.cosine_min == pytest.approx(1, abs=1e-12)
        assert medium.cosine_min <= 1
        assert medium.max_difference == 0
        assert medium.rows == 4
    for direction in parity.directions.values():
        assert direction.map_torch == direction.map_exported == 1
        assert direction.top10_overlap == 1
    assert failures({"probability": parity}, FP32) == []


def test_cosine_and_difference_of_known_vectors():
    # Row 0 turns by 60 degrees; row 2 becomes twice as long, which is no other direction.
    onnx = changed("image", 0, [0.5, math.sqrt(0.75)])
    onnx = changed("image", 2, [0, 2], onnx)
    image = measure(EXACT, onnx, LABELS, IDS).media["image"]
    assert image.cosine_min == pytest.approx(0.5, abs=1e-7)
    assert image.cosine_median == pytest.approx(1)
    # Sorted: 0.5, 1, 1, 1. The first percentile lies 3 % of the way from the first to the second.
    assert image.cosine_p1 == pytest.approx(0.515, abs=1e-6)
    assert image.max_difference == pytest.approx(1)
    assert image.worst[0][0] == "p0"
    assert len(image.worst) == 4
    assert measure(EXACT, onnx, LABELS, IDS).media["text"].cosine_min == pytest.approx(1)


def test_worst_rows_are_the_five_worst_in_order():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(20, 8)).astype(np.float32)
    noise = (generator.normal(size=(20, 8)) * np.arange(20)[:, None] / 20).astype(np.float32)
    ids = [f"id{number}" for number in range(20)]
    base = {"image": rows, "text": rows}
    worst = measure(base, {"image": rows + noise, "text": rows}, ["x", "y"] * 10, ids).media["image"].worst
    naive = []
    for name, left, right in zip(ids, rows.tolist(), (rows + noise).tolist(), strict=True):
        product = sum(a * b for a, b in zip(left, right, strict=True))
        naive.append((product / math.sqrt(sum(a * a for a in left) * sum(b * b for b in right)), name))
    assert [name for name, _ in worst] == [name for _, name in sorted(naive)[:5]]
    assert [cosine for _, cosine in worst] == pytest.approx([cosine for cosine, _ in sorted(naive)[:5]])


@pytest.mark.parametrize(
    ("torch_row", "onnx_row", "cosine"),
    [
        ([0, 0], [0, 0], 1),
        ([0, 0], [0, 1e-8], 1),  # rounding error around zero has no direction
        ([1e-8, 0], [0, 1e-8], 1),
        ([0, 0], [0.5, 0], 0),
        ([0.5, 0], [0, 0], 0),
        ([1e-3, 0], [1e-3, 0], 1),
    ],
)
def test_vectors_near_zero(torch_row, onnx_row, cosine):
    parity = measure(changed("image", 1, torch_row), changed("image", 1, onnx_row), LABELS, IDS)
    assert parity.media["image"].cosine_min == pytest.approx(cosine, abs=1e-6)


def test_all_zero_vectors_are_equal():
    zero = {medium: np.zeros((4, 2), np.float32) for medium in EXACT}
    parity = measure(zero, zero, LABELS, IDS)
    assert parity.media["image"].cosine_min == 1
    assert failures({"fc9": parity}, FP32) == []


def test_map_of_both_models():
    # The image of p0 moves to the other class: its ranking of texts is p2, p3, p1, p0 with p0 and p1 relevant,
    # AP = (1/3 + 2/4) / 2 = 5/12; the other three queries keep AP 1.
    onnx = changed("image", 0, [0, 1])
    directions = measure(EXACT, onnx, LABELS, IDS).directions
    assert directions["image_to_text"].map_torch == 1
    assert directions["image_to_text"].map_exported == pytest.approx((3 + 5 / 12) / 4)
    # The texts of class a rank the image of p0 last or last but one; those of class b find it first or second.
    assert directions["text_to_image"].map_exported < 1


def test_top_ten_overlap():
    # 40 texts on an arc; the image points at its start, so its ten nearest are texts 0 to 9. In the other model it
    # points at text 5, whose ten nearest are, by symmetry, 0 to 9 too, or 1 to 10; seven of text 8's are 3 to 9.
    angles = np.radians(np.arange(40))
    arc = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    image = np.repeat(arc[:1], 40, 0)
    aside = np.radians(7.6)
    other = np.repeat(np.array([[np.cos(aside), np.sin(aside)]], np.float32), 40, 0)
    labels, ids = ["x"] * 40, [str(n) for n in range(40)]
    directions = measure({"image": image, "text": arc}, {"image": other, "text": arc}, labels, ids).directions
    # Nearest to 7.6 degrees: 3 to 12; of these 3 to 9 are among 0 to 9.
    assert directions["image_to_text"].top10_overlap == pytest.approx(0.7)


def test_near_ties_with_the_tenth_count_as_kept():
    # Twelve texts are equal: any ten of them are the first ten.
    text = np.ones((12, 2), np.float32)
    nudged = text.copy()
    nudged[:3, 0] -= 1e-6
    image = np.repeat(np.array([[1, 0.2]], np.float32), 12, 0)
    labels, ids = ["x"] * 12, [str(n) for n in range(12)]
    directions = measure({"image": image, "text": text}, {"image": image, "text": nudged}, labels, ids).directions
    assert directions["image_to_text"].top10_overlap == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["PyTorch", "exported"])
def test_numbers_that_are_not_finite_are_refused(bad, side):
    spoilt = changed("text", 2, [bad, 0])
    models = (spoilt, EXACT) if side == "PyTorch" else (EXACT, spoilt)
    with pytest.raises(ParityError, match=f"the {side} model, text: .* not finite in 1 of 4 rows, first p2"):
        measure(*models, LABELS, IDS)


def test_other_shapes_are_refused():
    narrow = {medium: rows[:, :1] for medium, rows in EXACT.items()}
    with pytest.raises(ParityError, match=r"image: the exported model gives \(4, 1\), the PyTorch model \(4, 2\)"):
        measure(EXACT, narrow, LABELS, IDS)


def many(vectors, times=10):
    """The same pairs again and again, so that a change in one is a change in many, and no chance."""
    return {medium: np.tile(rows, (times, 1)) for medium, rows in vectors.items()}


MANY_LABELS, MANY_IDS = LABELS * 10, tuple(f"p{number}" for number in range(40))


def test_a_refusal_lists_all_that_failed():
    good = measure(many(EXACT), many(EXACT), MANY_LABELS, MANY_IDS)
    bad = measure(many(EXACT), many(changed("image", 0, [0, 1])), MANY_LABELS, MANY_IDS)
    lines = failures({"probability": good, "fc9": bad}, FP32)
    assert [line.partition(":")[0] for line in lines] == ["fc9, image", "fc9, image to text", "fc9, text to image"]
    assert "cosine of 40 rows down to 0.000000 (median 1.000000), expected at least 0.9999" in lines[0]
    assert "worst rows: p0 (0.000000)" in lines[0]
    change = bad.directions["image_to_text"].map_exported - 1
    assert f"MAP 1.0000 became {1 + change:.4f} ({change:+.4f} ± " in lines[1]
    assert "expected a change below 0.0005" in lines[1]


def test_the_interval_of_a_change():
    # One query of four falls from 1 to 5/12: the mean falls by 7/48, the standard deviation is sqrt(3) times that.
    direction = measure(EXACT, changed("image", 0, [0, 1]), LABELS, IDS).directions["image_to_text"]
    assert direction.map_exported - direction.map_torch == pytest.approx(-7 / 48)
    assert direction.interval == pytest.approx(1.959964 * math.sqrt(3) * 7 / 48 / 2)


def test_a_change_that_may_be_chance_is_no_reason():
    few = measure(EXACT, changed("image", 0, [0, 1]), LABELS, IDS)
    lines = failures({"fc9": few}, Thresholds(cosine_min=0, cosine_median=0, map_change=0.0005))
    assert not any("image to text" in line for line in lines)
    more = measure(many(EXACT), many(changed("image", 0, [0, 1])), MANY_LABELS, MANY_IDS)
    lines = failures({"fc9": more}, Thresholds(cosine_min=0, cosine_median=0, map_change=0.0005))
    assert any("image to text" in line for line in lines)


def test_the_more_rankings_the_wider_the_interval():
    # A change of 2.2 standard errors (40 queries): beyond the interval of one ranking or two, within that of four.
    def parity(change):
        ranking = RankingParity(map_torch=0.5, map_exported=0.5 + change, interval=1.959964 * 0.01, top10_overlap=1)
        still = dataclasses.replace(ranking, map_exported=0.5)
        media = measure(EXACT, EXACT, LABELS, IDS).media
        return Parity(media=media, directions={"image_to_text": ranking, "text_to_image": still})

    bounds = Thresholds(cosine_min=0, cosine_median=0, map_change=0.002)
    one = dataclasses.replace(parity(0.022), directions={"image_to_text": parity(0.022).directions["image_to_text"]})
    assert failures({"fc9": one}, bounds)
    assert failures({"fc9": parity(0.023)}, bounds)  # two: 2.24
    assert failures({"fc9": parity(0.022)}, bounds) == []
    both = {"fc9": parity(0.0249), "probability": parity(0)}
    assert failures(both, bounds) == []  # four: 2.50
    (line,) = failures({**both, "fc9": parity(0.0251)}, bounds)
    assert "(+0.0251 ± 0.0250)" in line


def test_each_threshold_counts():
    parity = {"fc9": measure(many(EXACT), many(changed("image", 0, [0, 1])), MANY_LABELS, MANY_IDS)}
    assert failures(parity, Thresholds(cosine_min=0, cosine_median=0, map_change=1)) == []
    (line,) = failures(parity, Thresholds(cosine_min=0.5, cosine_median=0, map_change=1))
    assert "cosine of 40 rows down to" in line
    lines = failures(parity, Thresholds(cosine_min=0, cosine_median=0, map_change=0.1))
    assert lines
    assert all("MAP" in line for line in lines)
    half = {"fc9": measure(EXACT, {**EXACT, "image": EXACT["text"][::-1]}, LABELS, IDS)}
    (line,) = failures(half, Thresholds(cosine_min=0, cosine_median=0.9, map_change=1.1))
    assert "fc9, image: median cosine of 4 rows 0." in line


def test_a_medium_beside_image_and_text_is_compared_too():
    base = {**EXACT, "audio": EXACT["image"]}
    turned = {**base, "audio": changed("image", 3, [1, 0])["image"]}
    parity = measure(base, turned, LABELS, IDS)
    assert parity.media["audio"].worst[0][0] == "p3"
    assert set(parity.directions) == {f"{a}_to_{b}" for a, b in permutations(("image", "text", "audio"), 2)}
    lines = [line.partition(":")[0] for line in failures({"fc9": parity}, FP32)]
    assert lines == ["fc9, audio", "fc9, image to audio", "fc9, text to audio"]


def test_the_thresholds_of_each_precision():
    found = {name: dataclasses.astuple(one) for name, one in read_thresholds().items()}
    assert found == {
        "fp32": (0.9999, 0.9999, 0.0005),
        "fp16": (0.999, 0.999, 0.002),
        "bf16": (0.995, 0.999, 0.001),
        "int8": (0.95, 0.99, 0.005),
    }
    turned = math.acos(0.9998)
    onnx = changed("image", 0, [math.cos(turned), math.sin(turned)])
    parity = measure(EXACT, onnx, LABELS, IDS)
    assert parity.directions["image_to_text"].map_exported == 1
    (line,) = failures({"probability": parity}, FP32)
    assert "probability, image: cosine of 4 rows down to 0.999800" in line


def test_own_thresholds_replace_only_what_they_name(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[int8]\ncosine_min = 0.5\n")
    found = read_thresholds(file)
    assert found["int8"] == Thresholds(cosine_min=0.5, cosine_median=0.99, map_change=0.005)
    assert found["fp16"] == read_thresholds()["fp16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[int4]\ncosine_min = 0.5", "expected tables fp32, fp16, bf16, int8"),
        ("[int8]\ncosine = 0.5", "with cosine_min, cosine_median, map_change"),
        ("int8 = 3", "with cosine_min, cosine_median, map_change"),
        ("[int8]\ncosine_min = 2.0", "cosine_min of .int8. is 2.0; expected a number from 0 to 1"),
        ("[int8]\ncosine_min = true", "is True"),
        ("[int8", "mine.toml"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_thresholds(file)
