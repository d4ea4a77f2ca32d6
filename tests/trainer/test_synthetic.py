"""The synthetic pair of domains."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dckt.errors import ConfigError, CorpusError
from dckt.preprocessing import decode_image, tokenize
from dckt_trainer.data import synthetic
from dckt_trainer.data.corpus import Corpus, read_corpus
from dckt_trainer.data.synthetic import COLOURS, SHAPES, TEXTURES, write_synthetic

SMALL: dict[str, Any] = {
    "source_classes": 12,
    "source_pairs_per_class": 3,
    "target_classes": 4,
    "target_pairs_per_class": 2,
    "val_pairs_per_class": 1,
    "test_pairs_per_class": 2,
    "side": 48,
}


def make(root: Path, **changes: Any) -> tuple[Corpus, Corpus]:
    source, target = write_synthetic(root, **{**SMALL, **changes})
    return read_corpus(source), read_corpus(target)


def pixels(corpus: Corpus) -> dict[str, bytes]:
    return {pair.id: decode_image(pair.image).tobytes() for pair in corpus.pairs}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    return make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Labels and texts of many pairs."""
    corpora = make(tmp_path_factory.mktemp("many"), source_classes=40, source_pairs_per_class=10, side=32)
    return [(pair.label, pair.text) for corpus in corpora for pair in corpus.pairs]


def test_both_corpora_are_valid_and_complete(small: tuple[Corpus, Corpus]) -> None:
    source, target = small
    assert (source.name, target.name) == ("source", "target")
    assert source.warnings == target.warnings == ()
    for corpus, classes, sizes in ((source, 12, (3, 1, 1)), (target, 4, (2, 1, 2))):
        for split, size in zip(("train", "val", "test"), sizes, strict=True):
            assert Counter(p.label for p in corpus.part(split)) == dict.fromkeys(corpus.labels, size)  # type: ignore[arg-type]
        assert len(corpus.labels) == classes


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["images", "pairs.jsonl"]
    assert len(list((tmp_path / "target/images").iterdir())) == 4 * 5


def test_label_spaces_are_disjoint_and_share_their_values(small: tuple[Corpus, Corpus]) -> None:
    source, target = small
    assert not set(source.labels) & set(target.labels)
    values = [{part for label in corpus.labels for part in label.split("-")} for corpus in small]
    assert values[1] <= values[0]


def test_unrelated_corpora_share_no_value_and_no_word_for_one(tmp_path: Path) -> None:
    corpora = make(tmp_path, unrelated=True, source_pairs_per_class=20, target_pairs_per_class=20)
    values = [{part for label in corpus.labels for part in label.split("-")} for corpus in corpora]
    assert not values[0] & values[1]
    words = {
        value: {word for of in names for word in of.split()}
        for value, names in [*SHAPES.items(), *TEXTURES.items(), *((each, of) for each, (_, of) in COLOURS.items())]
    }
    told = [{word for pair in corpus.pairs for word in tokenize(pair.text)} for corpus in corpora]
    own, foreign = (
        [set().union(*(words[value] for value in each)) for each in order] for order in (values, values[::-1])
    )
    for place in (0, 1):
        assert told[place] & own[place]
        assert not told[place] & (foreign[place] - own[place])
    assert told[0] & told[1]  # but for the words between


@pytest.mark.parametrize(("name", "count", "most"), [("source_classes", 76, 75), ("target_classes", 19, 18)])
def test_unrelated_corpora_have_fewer_combinations(tmp_path: Path, name: str, count: int, most: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {count}; expected at most {most}"):
        make(tmp_path, unrelated=True, **{name: count})
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_pixels_and_pairs(small: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    again = make(tmp_path)
    for first, second in zip(small, again, strict=True):
        assert (first.root / "pairs.jsonl").read_bytes() == (second.root / "pairs.jsonl").read_bytes()
        assert pixels(first) == pixels(second)


def test_another_seed_gives_others(small: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    for first, second in zip(small, make(tmp_path, seed=1), strict=True):
        assert first.labels != second.labels
        assert not set(pixels(first).values()) & set(pixels(second).values())
        assert not {pair.text for pair in first.pairs} & {pair.text for pair in second.pairs}


def test_texts_and_pixels_are_those_of_every_machine(small: tuple[Corpus, Corpus]) -> None:
    assert [corpus.fingerprint[:16] for corpus in small] == ["4126c8c5942af964", "43b84f673609b7d7"]
    # Mean colours bear it when another Pillow draws the edges of a polygon otherwise.
    means = [np.asarray(decode_image(corpus.pairs[0].image)).mean((0, 1)) for corpus in small]
    np.testing.assert_allclose(means, [[126.8, 162.0, 157.1], [161.4, 158.9, 171.3]], atol=1.5)


def test_pictures_differ_from_each_other(small: tuple[Corpus, Corpus]) -> None:
    shown = [data for corpus in small for data in pixels(corpus).values()]
    assert len(set(shown)) == len(shown) == 12 * 5 + 4 * 5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("source_classes", 13),
        ("source_pairs_per_class", 20),
        ("target_classes", 5),
        ("target_pairs_per_class", 3),
        ("val_pairs_per_class", 0),
        ("test_pairs_per_class", 3),
    ],
)
def test_sizes_take_effect(small: tuple[Corpus, Corpus], tmp_path: Path, option: str, value: int) -> None:
    changed = make(tmp_path, **{option: value})
    place = 0 if option.startswith("source") else 1
    corpus, before = changed[place], small[place]
    if option.endswith("classes"):
        assert len(corpus.labels) == value
    else:
        split: Any = {"val": "val", "test": "test"}.get(option.split("_")[0], "train")
        assert set(Counter(p.label for p in corpus.part(split)).values()) == ({value} if value else set())
        # The pairs that were there stay as they were.
        old, new = pixels(before), pixels(corpus)
        assert all(new[key] == old[key] for key in old.keys() & new.keys())
        assert len(old.keys() & new.keys()) >= min(len(old), len(new))
    if option == "source_pairs_per_class":
        assert (len(corpus.part("val")), len(corpus.part("test"))) == (2 * 12, 2 * 12)


def test_more_target_classes_keep_the_first_ones(small: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    assert set(small[1].labels) < set(make(tmp_path, target_classes=6)[1].labels)


def test_side_takes_effect(tmp_path: Path) -> None:
    for corpus in make(tmp_path, side=40):
        assert {decode_image(pair.image).size for pair in corpus.pairs} == {(40, 40)}


def test_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    make(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 80) for done in range(1, 81)]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_existing_corpora_are_kept_unless_forced(tmp_path: Path) -> None:
    (source, _) = make(tmp_path)
    before = (source.root / "pairs.jsonl").read_bytes()
    with pytest.raises(CorpusError, match=r"exists already; give another folder, or replace it with force"):
        make(tmp_path, seed=1)
    assert (source.root / "pairs.jsonl").read_bytes() == before
    make(tmp_path, seed=1, force=True)
    assert (source.root / "pairs.jsonl").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_force_replaces_corpora_only(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/thesis.txt").write_text("dear")
    with pytest.raises(CorpusError, match="target: exists and is no corpus"):
        make(tmp_path, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "thesis.txt"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="cannot be written"):
        make(tmp_path / "file")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("source_classes", 1),
        ("source_classes", 321),
        ("target_classes", 1),
        ("source_pairs_per_class", 0),
        ("target_pairs_per_class", 0),
        ("val_pairs_per_class", -1),
        ("test_pairs_per_class", 10_001),
        ("side", 31),
    ],
)
def test_sizes_out_of_range(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{option} is {value}; expected"):
        make(tmp_path, **{option: value})


def test_too_few_combinations_are_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"310 source classes leave 10 other combinations.*target_classes is 11"):
        make(tmp_path, source_classes=310, target_classes=11)


def test_no_word_of_a_label_stands_in_a_text(texts: list[tuple[str, str]]) -> None:
    words = {word for _, text in texts for word in tokenize(text)}
    assert not words & {part for label, _ in texts for part in label.split("-")}


def test_every_word_of_the_lists_is_used(texts: list[tuple[str, str]]) -> None:
    words = {word for _, text in texts for word in tokenize(text)}
    expected = {word for _, words in COLOURS.values() for word in words}
    expected |= {word for words in TEXTURES.values() for word in words}
    expected |= {word for words in SHAPES.values() for pair in words for word in pair.split()}
    assert expected <= words


def test_a_word_means_one_value_only() -> None:
    meanings = Counter(
        word
        for group in (
            *(words for _, words in COLOURS.values()),
            *TEXTURES.values(),
            *(" ".join(words).split() for words in SHAPES.values()),
        )
        for word in group
    )
    assert [word for word, count in meanings.items() if count > 1] == []


def test_texts_tell_the_class_but_not_always(texts: list[tuple[str, str]]) -> None:
    told = Counter()
    for label, text in texts:
        colour, texture, shape = label.split("-")
        words = set(tokenize(text))
        told["colour"] += bool(words & set(COLOURS[colour][1]))
        told["texture"] += bool(words & set(TEXTURES[texture]))
        told["shape"] += bool(words & set(" ".join(SHAPES[shape]).split()))
    # 0.95 of the pictures are as their class is, and both captions are silent about an attribute in 1 of 144.
    assert all(0.9 < count / len(texts) < 0.99 for count in told.values()), told


def test_texts_are_two_lines_and_rarely_alike(texts: list[tuple[str, str]]) -> None:
    assert {text.count("\n") for _, text in texts} == {1}
    assert len({text for _, text in texts}) == len(texts)


def test_colours_are_seen() -> None:
    """The middle of large plain figures has the hue of the class."""
    for number, colour in enumerate(("red", "green", "blue")):
        stream = synthetic._Stream("test")
        canvas = Image.new("RGB", (100, 100), "white")
        synthetic._figure(stream, canvas, synthetic.Look(colour, "plain", "square"), (50, 50), 40)
        assert int(np.asarray(canvas)[50, 50].argmax()) == number


@pytest.mark.parametrize("texture", sorted(TEXTURES))
def test_textures_are_seen(texture: str) -> None:
    canvas = Image.new("RGB", (100, 100), "white")
    synthetic._figure(synthetic._Stream("x"), canvas, synthetic.Look("red", texture, "square"), (50, 50), 45)
    shades = np.unique(np.asarray(canvas)[30:70, 30:70].reshape(-1, 3), axis=0)
    assert len(shades) == (1 if texture == "plain" else 2)


def test_shapes_and_textures_all_look_different() -> None:
    seen = set()
    for texture in TEXTURES:
        for shape in SHAPES:
            canvas = Image.new("RGB", (100, 100))
            synthetic._figure(synthetic._Stream("x"), canvas, synthetic.Look("red", texture, shape), (50, 50), 45)
            seen.add(canvas.tobytes())
    assert len(seen) == len(TEXTURES) * len(SHAPES)


def test_the_count_is_seen_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    figure = synthetic._figure

    def spy(stream: Any, canvas: Any, look: synthetic.Look, *rest: Any) -> None:
        drawn.append(look.shape)
        figure(stream, canvas, look, *rest)

    monkeypatch.setattr(synthetic, "_figure", spy)
    for number in range(30):
        drawn.clear()
        _, _, text = synthetic._pair(
            synthetic._Stream(str(number)), synthetic.Look("red", "plain", "star"), synthetic.ALL, 32
        )
        count = Counter(drawn).get(drawn[-1])
        assert count is not None
        assert any(words in text.lower() for words in synthetic.COUNTS[count])


def test_the_manifest_is_plain_json(small: tuple[Corpus, Corpus]) -> None:
    first = json.loads((small[1].root / "pairs.jsonl").read_text().splitlines()[0])
    assert first == {
        "id": "target-000-train-0000",
        "image": "images/target-000-train-0000.png",
        "text": small[1].pairs[0].text,
        "label": small[1].pairs[0].label,
        "split": "train",
    }
