"""report.html and analysis.json of a run: every section is there, and the figures are those of an independent count."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dckt_trainer import report as module
from dckt_trainer.analysis import confusions, score_spread, selection
from dckt_trainer.config import load_config
from dckt_trainer.data.corpus import Corpus, Pair
from dckt_trainer.data.feature_corpus import FeatureCorpus, FeaturePair
from dckt_trainer.evaluate import Answers
from dckt_trainer.plots import drawable
from dckt_trainer.report import write_run_report
from dckt_trainer.runs import create_run

ROUNDS = 3
FIGURES = {
    "Validation MAP",
    "Precision and recall",
    "MAP by class",
    "Confusion of classes",
    "Selection by round",
    "Which pairs were selected",
    "Loss terms of the transfer",
    "Pretraining",
    "Word CNN",
}
GALLERIES = {
    "Most and least often selected",
    "Image in, texts out",
    "Image in, texts out: the worst",
    "Text in, images out",
    "Text in, images out: the worst",
}


class Page(HTMLParser):
    """Parses a page, and fails where its tags do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)

    @property
    def text(self):
        return " ".join(self.words)

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


# --- a run that was really trained ------------------------------------------------------------------------------


def test_every_section_is_there_and_the_page_is_whole(finished):
    page = Page(finished.path / "report.html")
    assert set(page.titles) == {"MAP on 12 test pairs", "Every class", "Settings"} | FIGURES | GALLERIES
    assert len(page.titles) == len(set(page.titles))
    links = [str(link["href"]) for link in page.named("a")]
    assert links == [f"#{section['id']}" for section in page.named("section")], "the contents lead to every section"
    assert page.named("script") == []
    assert all(str(image["alt"]) for image in page.named("img"))
    assert all(str(image["src"]).startswith("data:image/") for image in page.named("img"))
    assert len(page.named("details")) == 2
    assert (finished.path / "report.html").stat().st_size < 1_500_000
    plots = {path.name for path in (finished.path / "plots").iterdir()}
    assert plots == {f"{title.lower().replace(' ', '-')}.png" for title in FIGURES}
    for name in plots:
        with Image.open(finished.path / "plots" / name) as plot:
            assert plot.format == "PNG"
            assert len(set(plot.convert("L").resize((64, 64)).tobytes())) > 10, "something is drawn"


def test_the_analysis_agrees_with_the_evaluation(finished):
    analysis = json.loads((finished.path / "analysis.json").read_text(encoding="utf-8"))
    assert analysis["kept"] == "last"
    assert len(analysis["test"]) == 12
    for name, network in analysis["networks"].items():
        expected = finished.evaluation["test"][name]
        for way in ("image_to_text", "text_to_image"):
            assert np.mean(network[way]["per_query"]) == pytest.approx(expected[way])
            # As many test pairs in every class: the mean over classes is that over queries.
            assert np.mean(list(network[way]["per_class"].values())) == pytest.approx(expected[way])
        assert all(sum(count for *_, count in cells) == 12 for cells in network["confusion"].values())
    assert set(analysis["networks"]) == {"model_t0", "last"}
    assert analysis["networks"]["model_t0"] != analysis["networks"]["last"]
    times = Counter(key for event in finished.events("selection") for key in event["selected"])
    assert {key: count for key, count in analysis["selection"]["times"].items() if count} == times
    assert len(analysis["selection"]["times"]) == 15


# --- a run made by hand -----------------------------------------------------------------------------------------


def made_run(root, labels, *, rounds=ROUNDS, keep="best"):
    """A run folder that a training might have left, for a target whose train pairs are one a label, by id."""
    facts = {"path": str(root / "target"), "fingerprint": "f"}
    run = create_run(root / "run", load_config("small"), None, facts, trunk="t")
    entry = {"image_to_text": 0.5, "text_to_image": 0.25, "average": 0.375, "interval": (0.3, 0.4)}
    shown = {**entry, "lowest": 0.3, "highest": 0.4, "average_at_50": 0.5}
    test = {"pairs": 4, **{name: {"round": 0, **shown} for name in ("model_t0", "last", "best")}}
    validation = [{"round": number, **entry} for number in range(rounds + 1)]
    outcome = {"kept": keep, "validation": validation, "test": test}
    (run.path / "evaluation.json").write_text(json.dumps(outcome), encoding="utf-8")
    for number in range(rounds + 1):
        losses = {"total": 3.0, "weighted": {"semantic/target.image": 2.0, "mmd/common.fc8": 1.0}, "steps": 1}
        run.log("metrics", {"stage": f"round/{number}", "validation": entry, **(losses if number else {})})
    for number in range(1, rounds + 1):
        scores = np.linspace(0.1, 0.6 + number / 10, len(labels))
        selected = [f"train-{place}" for place in range(0, len(labels), number)]
        run.log(
            "selection",
            {
                "stage": f"round/{number}",
                "round": number,
                "pairs": len(labels),
                "selected": selected,
                **score_spread(scores),
                "mean_consistency": 0.5,
                "mean_consistency_selected": 0.6,
            },
        )
    return run


def vectors(labels, classes, seed):
    """Probabilities that lean to the true class."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(len(labels), len(classes))).astype(np.float32)
    logits[np.arange(len(labels)), [classes.index(label) for label in labels]] += 1
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


def written(root, corpus, *, rounds=ROUNDS):
    labels = [pair.label for pair in corpus.part("test")]
    said = [
        {medium: vectors(labels, corpus.labels, seed + place) for place, medium in enumerate(("image", "text"))}
        for seed in (0, 10)
    ]
    run = made_run(root, [pair.label for pair in corpus.part("train")], rounds=rounds)
    path = write_run_report(run, corpus, *(Answers(vectors, vectors) for vectors in said))
    return Page(path), json.loads((run.path / "analysis.json").read_text(encoding="utf-8")), said


def feature_corpus(labels, per_class=2):
    train_pairs = [FeaturePair(f"train-{n}", label, "train", n) for n, label in enumerate(labels)]
    test_pairs = [FeaturePair(f"test-{n}", label, "test", 0) for n, label in enumerate(labels * per_class)]
    return FeatureCorpus("f", Path("f.npz"), {}, (*train_pairs, *test_pairs))


def picture_corpus(root, labels, text="a text"):
    (root / "target").mkdir()
    pairs = []
    for number, label in enumerate(labels * 3):
        split = "train" if number < len(labels) else "test"
        key = f"train-{number}" if split == "train" else f"test-{number}"
        path = root / "target" / f"{number}.png"
        Image.new("RGB", (8, 8), (number * 3 % 255, 0, 0)).save(path)
        pairs.append(Pair(key, path, text, label, split))
    return Corpus("target", root / "target", tuple(pairs))


def ap(order, relevant):
    """The definition, one rank after the other."""
    found, total = 0, 0.0
    for rank, place in enumerate(order, 1):
        if relevant[place]:
            found += 1
            total += found / rank
    return total / max(found, 1)


def test_the_analysis_is_that_of_a_count_by_hand(tmp_path):
    corpus = feature_corpus(["a", "b", "c", "d"], per_class=5)
    _, analysis, said = written(tmp_path, corpus)
    labels = np.array([pair.label for pair in corpus.part("test")])
    assert analysis["test"] == [pair.id for pair in corpus.part("test")]
    for name, network in zip(("model_t0", "best"), said, strict=True):
        units = {m: rows / np.linalg.norm(rows, axis=1, keepdims=True) for m, rows in network.items()}
        for way, asked, found in (("image_to_text", "image", "text"), ("text_to_image", "text", "image")):
            similarity = units[asked] @ units[found].T
            figures = analysis["networks"][name][way]
            by_hand = [ap(np.argsort(-row), labels == label) for row, label in zip(similarity, labels, strict=True)]
            assert figures["per_query"] == pytest.approx(by_hand)
            for label in "abcd":
                mean = np.mean([value for value, of in zip(by_hand, labels, strict=True) if of == label])
                assert figures["per_class"][label] == pytest.approx(mean)
            curves = [interpolated(np.argsort(-row), labels == of) for row, of in zip(similarity, labels, strict=True)]
            assert figures["recall"] == pytest.approx(np.linspace(0, 1, 11))
            assert figures["precision"] == pytest.approx(np.mean(curves, axis=0))
        for medium in ("image", "text"):
            expected = Counter(
                (true, corpus.labels[answer])
                for true, answer in zip(labels, network[medium].argmax(axis=1), strict=True)
            )
            cells = analysis["networks"][name]["confusion"][medium]
            assert {(true, answered): count for true, answered, count in cells} == expected


def interpolated(order, relevant):
    """The highest precision at any rank that has reached each of 11 levels of recall."""
    hits = np.cumsum(relevant[order])
    precision, recall = hits / np.arange(1, len(order) + 1), hits / hits[-1]
    return [precision[recall >= level - 1e-12].max() for level in np.linspace(0, 1, 11)]


def test_a_target_of_ready_features_has_no_pictures(tmp_path):
    page, _, _ = written(tmp_path, feature_corpus(["a", "b", "c"]))
    assert not GALLERIES - {"Most and least often selected"} & set(page.titles)
    assert "data:image/jpeg" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "train-0" in page.text, "the pairs that were selected most often are named in a table"


def test_without_rounds_there_is_no_selection(tmp_path):
    page, analysis, _ = written(tmp_path, feature_corpus(["a", "b"]), rounds=0)
    assert not {"Selection by round", "Which pairs were selected", "Loss terms of the transfer"} & set(page.titles)
    assert analysis["selection"]["rounds"] == 0
    assert set(analysis["selection"]["times"].values()) == {0}


@pytest.mark.parametrize("count", [26, 61, 130])
def test_many_classes(tmp_path, count):
    page, analysis, _ = written(tmp_path, feature_corpus([f"class-{number:03}" for number in range(count)]))
    heat_map = count <= 60
    assert ("Confusion of classes" in page.titles) == heat_map
    assert ("Classes that are confused most" in page.titles) != heat_map
    assert len(analysis["networks"]["best"]["image_to_text"]["per_class"]) == count
    rows = page.text.split("Show ")
    assert any(part.startswith(f"{count} rows") for part in rows)


def test_names_that_a_plot_cannot_write(tmp_path):
    labels = ["価格$x_1$", "a & b <i>", "$unbalanced", "x" * 300, "line\nbreak", "café"]
    page, _, _ = written(tmp_path, feature_corpus(labels))
    assert "価格$x_1$" in page.text
    assert "a & b <i>" in page.text
    assert drawable(labels) == ["class 0", "a & b <i>", r"\$unbalanced", "x" * 21 + "…", "line break", "café"]


def test_a_picture_that_was_lost_does_not_cost_the_report(tmp_path):
    corpus = picture_corpus(tmp_path, ["a", "b"])
    for pair in corpus.part("test")[1:]:
        pair.image.unlink()
    page, _, _ = written(tmp_path, corpus)
    assert "(the picture cannot be read any more)" in page.text
    assert set(page.titles) >= GALLERIES


def test_the_worst_queries_are_of_different_classes_and_the_right_ones(tmp_path):
    corpus = picture_corpus(tmp_path, list("abcdef"))
    page, analysis, _ = written(tmp_path, corpus)
    precision = analysis["networks"]["best"]["image_to_text"]["per_query"]
    lowest: dict[str, float] = {}
    for value, pair in sorted(zip(precision, corpus.part("test"), strict=True), key=lambda item: item[0]):
        lowest.setdefault(pair.label, value)
    section = page.text.split("Image in, texts out: the worst")[2].split("one query of a class")[0]
    for label, value in list(lowest.items())[:4]:
        assert f"{label} · query, AP {value:.3f}" in section
    assert section.count("query, AP") == 4


def test_long_texts_are_cut(tmp_path):
    page, _, _ = written(tmp_path, picture_corpus(tmp_path, ["a", "b"], text="word " * 5000))
    assert max(map(len, page.words)) < 3000
    assert "…" in page.text


def test_selection_counts():
    pairs = [FeaturePair(str(number), label, "train", 0) for number, label in enumerate("aabb")]
    events = [{"selected": ["0", "2", "3"]}, {"selected": ["0"]}]
    assert selection(events, pairs) == {
        "rounds": 2,
        "times": {"0": 2, "1": 0, "2": 1, "3": 1},
        "per_class": {"a": 0.5, "b": 0.5},
    }


def test_confusions_of_equally_likely_classes_take_the_first():
    pairs = [FeaturePair(str(number), label, "test", 0) for number, label in enumerate("bb")]
    found = confusions({"image": np.array([[0.5, 0.5], [0.1, 0.9]], np.float32)}, ("a", "b"), pairs)
    assert sorted(found["image"]) == [("b", "a", 1), ("b", "b", 1)]


def test_the_spread_of_scores():
    spread = score_spread(np.array([0.0, 1.0, 2.0]))
    assert spread["quantiles"] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert (spread["histogram"]["low"], spread["histogram"]["high"]) == (0.0, 2.0)
    counts = spread["histogram"]["counts"]
    assert (counts[0], counts[20], counts[-1], sum(counts)) == (1, 1, 1, 3)
    wide = score_spread(np.array([-3.0, 5.0]))["histogram"]
    assert (wide["low"], wide["high"], sum(wide["counts"])) == (-3.0, 5.0, 2)


def test_rounds_of_different_ranges_are_shown_on_one(tmp_path):
    histograms = [score_spread(np.array(scores))["histogram"] for scores in ([0.1, 0.2, 1.9], [0.5, 7.9])]
    counts, edges = module._on_one_range(histograms, 0.0, histograms[1]["high"])
    assert counts.sum(axis=1).tolist() == [3, 2]
    assert (edges[0], edges[-1]) == (0.0, 7.9)
    assert counts[1, 39] == 1
    assert counts[0, :2].sum() == 2
