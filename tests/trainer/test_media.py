"""A medium beside pictures and texts: how it is read, what is refused, how it is trained and judged."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from stopping import StopAfter

from dckt.errors import ConfigError, CorpusError, RunError
from dckt.metrics import mean_average_precision
from dckt_trainer.config import LossConfig, MmdConfig, load_config
from dckt_trainer.data.corpus import read_corpus
from dckt_trainer.data.feature_corpus import is_feature_corpus, read_feature_corpus
from dckt_trainer.data.subset import subset_per_class
from dckt_trainer.data.synthetic import BANDS, write_synthetic
from dckt_trainer.estimate import estimate
from dckt_trainer.evaluate import score
from dckt_trainer.losses import Batch, joint_terms, pretraining_terms
from dckt_trainer.media import directions, faulty_names
from dckt_trainer.mmd import mmd
from dckt_trainer.network import DomainNetwork
from dckt_trainer.pairs import PairSet
from dckt_trainer.progress import Silent
from dckt_trainer.runs import open_run
from dckt_trainer.selection import SCORES, domain_consistency
from dckt_trainer.train import resume

MEDIA = ("image", "text", "audio")
WAYS = [f"{asked}_to_{found}" for asked, found in permutations(MEDIA, 2)]
AUDIO = "media.vectors=['audio']"


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """The corpora of the other tests, with sounds."""
    root = tmp_path_factory.mktemp("heard")
    sizes = {"source_classes": 5, "source_pairs_per_class": 10, "target_classes": 3, "target_pairs_per_class": 5}
    write_synthetic(root, **sizes, val_pairs_per_class=3, test_pairs_per_class=4, side=48, audio=True)
    return root


@pytest.fixture(scope="module")
def train_heard(run_training, heard):
    def run(out, *changes, **options):
        where = {"source": heard / "source", "target": heard / "target"}
        return run_training(out, AUDIO, *changes, **{**where, **options})

    return run


@pytest.fixture(scope="module")
def trained(train_heard, tmp_path_factory):
    return train_heard(tmp_path_factory.mktemp("runs") / "heard")


@pytest.fixture
def target(heard, tmp_path):
    """A copy of the target to spoil."""
    return shutil.copytree(heard / "target", tmp_path / "target")


def spoil(corpus, change):
    """Replaces the vectors by what ``change`` makes of them; None deletes the file."""
    file = corpus / "vectors/audio.npy"
    rows = change(np.load(file))
    if rows is None:
        file.unlink()
    else:
        np.save(file, rows, allow_pickle=True)
    return file


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["Audio"], "no name of a medium"),
        (["audio clip"], "no name of a medium"),
        (["audio_clip"], "no name of a medium"),
        (["../audio"], "no name of a medium"),
        ([""], "no name of a medium"),
        (["image"], "'image' has a meaning of its own"),
        (["labels"], "'labels' has a meaning of its own"),
        (["common"], "'common' has a meaning of its own"),
        (["type"], "'type' has a meaning of its own"),  # of a PyTorch module
        (["audio", "audio"], "occurs twice"),
    ],
)
def test_names_that_are_refused(train_heard, tmp_path, names, says):
    with pytest.raises(ConfigError, match=says):
        train_heard(tmp_path / "run", f"media.vectors={json.dumps(names)}")
    assert not (tmp_path / "run").exists()


def test_names_that_are_good():
    assert faulty_names(["audio", "video2", "model3d"]) == []
    assert list(directions(MEDIA)) == WAYS


# --- corpora ----------------------------------------------------------------------------------------------------


def test_vectors_are_read_in_the_order_of_the_manifest(heard):
    corpus, rows = read_corpus(heard / "target", vectors=["audio"]), np.load(heard / "target/vectors/audio.npy")
    assert corpus.widths == {"audio": BANDS}
    np.testing.assert_array_equal([pair.vectors["audio"] for pair in corpus.pairs], rows)
    places = [place for place, pair in enumerate(corpus.pairs) if pair.split == "val"]
    np.testing.assert_array_equal(corpus.vectors("val")["audio"], rows[places])
    assert corpus.vectors("val")["audio"].dtype == np.float32
    few = subset_per_class(corpus, 2, seed=0)
    by_id = {pair.id: row for pair, row in zip(corpus.pairs, rows, strict=True)}
    np.testing.assert_array_equal(few.vectors("train")["audio"], [by_id[pair.id] for pair in few.part("train")])


def test_what_nobody_asks_for_has_no_effect(heard, target):
    spoil(target, lambda rows: None)
    plain, without = read_corpus(heard / "target"), read_corpus(target)
    assert plain.widths == {}
    assert plain.fingerprint == without.fingerprint
    assert plain.fingerprint != read_corpus(heard / "target", vectors=["audio"]).fingerprint


def test_a_manifest_in_csv_has_them_too(heard, target):
    rows = [json.loads(line) for line in (target / "pairs.jsonl").read_text().splitlines()]
    (target / "pairs.jsonl").unlink()
    with (target / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found, expected = (read_corpus(root, vectors=["audio"]) for root in (target, heard / "target"))
    assert found.fingerprint == expected.fingerprint


def test_the_fingerprint_holds_every_number(target):
    before = read_corpus(target, vectors=["audio"]).fingerprint
    spoil(target, lambda rows: rows + np.eye(len(rows), rows.shape[1], dtype=np.float32) * 1e-3)
    assert read_corpus(target, vectors=["audio"]).fingerprint != before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: None, "there is no such file"),
        (lambda rows: rows[1:], r"array of float32 with shape \(35, 24\); expected .* of 36 rows .*pairs\.jsonl"),
        (lambda rows: rows[0], r"shape \(24,\)"),
        (lambda rows: rows[:, :0], r"shape \(36, 0\)"),
        (lambda rows: rows.astype(str), "array of <U"),
        (lambda rows: rows.astype(object), r"no NumPy \.npy file without pickles"),
        (lambda rows: rows + 1j, "array of complex"),
    ],
)
def test_arrays_that_are_refused(target, change, says):
    file = spoil(target, change)
    with pytest.raises(CorpusError, match=says) as caught:
        read_corpus(target, vectors=["audio"])
    assert str(file) in str(caught.value)


def test_other_files_are_refused(target):
    file = target / "vectors/audio.npy"
    with file.open("wb") as archive:
        np.savez(archive, rows=np.zeros((36, 2)))
    with pytest.raises(CorpusError, match="holds several arrays"):
        read_corpus(target, vectors=["audio"])
    file.write_bytes(b"RIFF")
    with pytest.raises(CorpusError, match=r"no NumPy \.npy file"):
        read_corpus(target, vectors=["audio"])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_row_that_is_not_finite_is_named_or_left_out(target, value):
    def change(rows):
        rows = rows.astype(np.float64)
        rows[3, 5] = value
        return rows

    spoil(target, change)
    with pytest.raises(CorpusError, match="1 of 36 pairs cannot be used") as caught:
        read_corpus(target, vectors=["audio"])
    assert caught.value.mistakes == ("line 4: vectors/audio.npy holds a number that is not finite in row 3, from 0",)
    kept = read_corpus(target, vectors=["audio"], on_bad_pair="skip")
    assert len(kept.pairs) == 35
    rows = np.delete(np.load(target / "vectors/audio.npy"), 3, axis=0).astype(np.float32)
    np.testing.assert_array_equal([pair.vectors["audio"] for pair in kept.pairs], rows)


def test_ready_features_may_hold_more_media(tmp_path, arrays):
    sound = np.random.default_rng(2).normal(size=(42, 3))
    path = tmp_path / "features.npz"
    np.savez(path, **arrays, audio=sound, other=sound + 1)
    corpus = read_feature_corpus(path, vectors=["audio"])
    assert corpus.widths == {"image": 5, "text": 7, "audio": 3}
    np.testing.assert_array_equal(corpus.vectors("test")["audio"], sound[30:].astype(np.float32))
    named = read_feature_corpus(f"{path}:audio=other,text=text", vectors=["audio"])
    np.testing.assert_array_equal(named.vectors("test")["audio"], (sound[30:] + 1).astype(np.float32))
    assert len({c.fingerprint for c in (corpus, named, read_feature_corpus(path))}) == 3
    assert is_feature_corpus(f"{path}:audio=other")
    with pytest.raises(CorpusError, match="'audio=other' is not understood"):
        read_feature_corpus(f"{path}:audio=other")
    with pytest.raises(CorpusError, match="no array is the touch features"):
        read_feature_corpus(path, vectors=["touch"])


# --- what a training makes of them ------------------------------------------------------------------------------


def test_three_media_are_trained_and_judged(trained, heard):
    assert trained.network().inputs == {"image": 512, "text": 18, "audio": BANDS}
    assert trained.model("source").network.inputs["audio"] == BANDS
    names = trained.events("metrics")[-1]["weighted"]
    assert {name for name in names if "audio" in name} == {
        *(f"semantic/{domain}.audio" for domain in ("source", "target")),
        *(
            f"pair/{domain}.{fc}.{medium}-audio"
            for domain in ("source", "target")
            for fc in ("fc6", "fc7")
            for medium in ("image", "text")
        ),
        *(f"mmd/audio.{fc}" for fc in ("fc6", "fc7")),
    }
    for figures in (*trained.evaluation["validation"], *(trained.evaluation["test"][k] for k in ("model_t0", "last"))):
        assert [key for key in figures if "_to_" in key] == WAYS
        assert figures["average"] == pytest.approx(np.mean([figures[way] for way in WAYS]))
    analysis = json.loads((trained.path / "analysis.json").read_text())
    last = analysis["networks"]["last"]
    assert list(last["confusion"]) == list(MEDIA)
    for way in WAYS:
        assert np.mean(last[way]["per_query"]) == pytest.approx(trained.evaluation["test"]["last"][way])
    page = (trained.path / "report.html").read_text(encoding="utf-8")
    assert "MAP by direction" in page
    assert "audio to image" in page


def test_the_saved_network_reproduces_the_figures(trained, heard):
    corpus = read_corpus(heard / "target", vectors=["audio"])
    labels = [pair.label for pair in corpus.part("test")]
    model = trained.model()
    with torch.inference_mode():
        audio = model.network.represent("audio", torch.from_numpy(corpus.vectors("test")["audio"]))[0].numpy()
        pixels = torch.from_numpy(np.stack([_pixels(pair, model) for pair in corpus.part("test")]))
        image = model.image_encoder()(pixels)[0].numpy()
    found = mean_average_precision(audio, labels, image, labels).map
    assert found == pytest.approx(trained.evaluation["test"]["last"]["audio_to_image"], abs=1e-3)


def _pixels(pair, model):
    from dckt.preprocessing import image_array

    return image_array(pair.image, model.trunk.spec)


@pytest.mark.parametrize("stage", ["pretraining, target", "round 2 of 3"])
def test_a_stopped_run_goes_on_to_the_same_weights(train_heard, trained, cache, tmp_path, stage):
    with pytest.raises(KeyboardInterrupt):
        train_heard(tmp_path / "run", reporter=StopAfter(stage))
    run = resume(tmp_path / "run", device="cpu", cache=cache, reporter=Silent())
    for domain in ("source", "target"):
        state = trained.network(domain).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in run.network(domain).state_dict().items())
    assert run.evaluation == trained.evaluation


def test_changed_vectors_stop_a_resume(train_heard, heard, target, cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_heard(tmp_path / "run", target=target, reporter=StopAfter("pretraining, target"))
    spoil(target, lambda rows: rows + 1)
    with pytest.raises(RunError, match=r"target corpus .* changed"):
        resume(tmp_path / "run", device="cpu", cache=cache)


def test_other_media_are_another_pretraining(train_heard, trained, heard, run_training, tmp_path):
    taken = train_heard(tmp_path / "taken", "transfer.rounds=1", pretrained_from=trained.path)
    assert taken.network().inputs["audio"] == BANDS
    where = {"source": heard / "source", "target": heard / "target"}
    with pytest.raises(RunError, match=r"media\.vectors is \('audio',\) there and \(\) here"):
        run_training(tmp_path / "two", **where, pretrained_from=trained.path)


def test_pictures_and_texts_alone_are_trained_as_ever(finished, heard, run_training, tmp_path):
    """Sounds that lie beside a corpus change nothing where they are not asked for."""
    run = run_training(tmp_path / "run", source=heard / "source", target=heard / "target")
    assert run.evaluation == finished.evaluation
    assert run.facts["target"]["fingerprint"] == finished.facts["target"]["fingerprint"]


def test_widths_must_agree_and_numbers_must_differ(train_heard, target, tmp_path):
    spoil(target, lambda rows: rows[:, :7])
    with pytest.raises(ConfigError, match=r"audio features 24 in .* and 7 in"):
        train_heard(tmp_path / "run", target=target)
    spoil(target, lambda rows: np.ones((36, 24)))
    with pytest.raises(ConfigError, match=r"audio features of .* hardly differ"):
        train_heard(tmp_path / "run", target=target)
    assert not (tmp_path / "run").exists()


def test_ready_features_of_three_media_are_trained(run_training, tmp_path, arrays):
    chance = np.random.default_rng(3)
    path = tmp_path / "features.npz"
    np.savez(path, **arrays, audio=1000 * chance.normal(size=(42, 4)) + 2000 * np.eye(3, 4)[arrays["labels"]])
    run = run_training(tmp_path / "run", AUDIO, "transfer.rounds=1", source=path, target=path)
    assert run.network().inputs == {"image": 5, "text": 7, "audio": 4}
    assert run.evaluation["test"]["last"]["audio_to_text"] > 0.5  # chance is a third


def test_the_dry_run_counts_them(heard, small, cache):
    where = heard / "source", heard / "target", None
    plain, more = (
        estimate(*where, load_config("small", [*small, *changes]), device="cpu", cache=cache)
        for changes in ((), (AUDIO,))
    )
    assert more.inputs == {**plain.inputs, "audio": BANDS}
    assert more.memory["audio vectors"] == 4 * BANDS * (15 + 9 + 12 + 50 + 15)
    for part in ("weights", "activations"):
        assert more.memory[part] > plain.memory[part]


# --- losses and scores, against loops ---------------------------------------------------------------------------


def batch(seed, classes=3, rows=6):
    torch.manual_seed(seed)
    widths = {"image": 5, "text": 4, "audio": 3}
    features = {medium: torch.randn(rows, 2, width) for medium, width in widths.items()}
    with torch.no_grad():
        activations = DomainNetwork(widths, 8, classes)(features)
    return Batch(activations, (torch.arange(2 * rows) % classes).view(rows, 2))


def test_losses_of_three_media_equal_a_loop():
    batches = {"source": batch(0), "target": batch(1, classes=2)}
    weights = LossConfig(semantic_source=0.3, pair_source=0.02, pair_target=0.05, mmd_fc6=0.7, mmd_fc9=2.0)
    terms = joint_terms(MEDIA, weights, MmdConfig())
    total = sum(float(term.weight * term.value(batches)) for term in terms)

    expected = 0.0
    for domain, semantic, pair in (("source", 0.3, 0.02), ("target", 1.0, 0.05)):
        activations, labels = batches[domain].activations, batches[domain].labels
        for medium in MEDIA:
            chances = activations.logits[medium].softmax(-1)
            rows = [-chances[b, g, labels[b, g]].log() for b in range(6) for g in range(2)]
            expected += semantic * float(sum(rows)) / 12
        for layer in (activations.fc6, activations.fc7):
            for first, second in combinations(MEDIA, 2):
                apart = [(layer[first][b, g] - layer[second][b, g]).square().sum() for b in range(6) for g in range(2)]
                expected += pair * float(sum(apart)) / (2 * 12)
    source, target = (batches[domain].activations for domain in ("source", "target"))
    for medium in MEDIA:
        expected += 0.7 * float(mmd(source.fc6[medium], target.fc6[medium], MmdConfig()))
        expected += float(mmd(source.fc7[medium], target.fc7[medium], MmdConfig()))
    expected += float(mmd(source.fc8, target.fc8, MmdConfig())) + 2 * float(mmd(source.fc9, target.fc9, MmdConfig()))
    assert total == pytest.approx(expected, rel=1e-5)
    assert source.fc8.shape == (18, 2, 8)  # shared layers see the media stacked
    assert len(pretraining_terms("source", MEDIA, weights)) == 3 + 2 * 3


def test_the_order_of_media_decides_no_pair_loss():
    batches = {"target": batch(1, classes=2)}
    both = [
        sum(float(term.value(batches)) for term in pretraining_terms("target", order, LossConfig()))
        for order in (MEDIA, MEDIA[::-1])
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


def test_scores_of_three_media_are_means_over_every_two():
    chance = np.random.default_rng(4)
    source = {medium: chance.dirichlet(np.ones(6), 15).astype(np.float32) for medium in MEDIA}
    labels = np.arange(15) % 3
    ways = [
        mean_average_precision(source[asked], labels, source[found], labels).per_query
        for asked, found in permutations(MEDIA, 2)
    ]
    assert SCORES["consistency"](source, {}, labels) == pytest.approx(2 * np.mean(ways, axis=0))
    units = {medium: rows / np.linalg.norm(rows, axis=1, keepdims=True) for medium, rows in source.items()}
    ranks = []
    for asked, found in permutations(MEDIA, 2):
        similarity = units[asked] @ units[found].T
        ranks.append(1 / (1 + (similarity > similarity.diagonal()[:, None]).sum(1)))
    assert SCORES["reciprocal_rank"](source, {}, labels) == pytest.approx(2 * np.mean(ranks, axis=0), abs=1e-6)
    two = {medium: source[medium] for medium in ("image", "text")}
    assert np.array_equal(
        SCORES["consistency"](two, {}, labels), domain_consistency(source["image"], source["text"], labels)
    )


def test_an_evaluation_is_the_mean_over_directions():
    chance = np.random.default_rng(5)
    vectors = {medium: chance.normal(size=(9, 4)).astype(np.float32) for medium in MEDIA}
    pairs = PairSet({}, torch.arange(9) % 3, tuple("abcdefghi"))
    found = score(vectors, pairs)
    assert list(found.directions) == WAYS
    assert found.average == pytest.approx(np.mean([one.map for one in found.directions.values()]))
    assert found.per_pair == pytest.approx(np.mean([one.per_query for one in found.directions.values()], axis=0))
    assert found.lowest <= found.average <= found.highest


# --- generated sounds -------------------------------------------------------------------------------------------


def test_generated_sounds_leave_pictures_and_texts_as_they_were(heard, corpora):
    for domain in ("source", "target"):
        assert (heard / domain / "pairs.jsonl").read_bytes() == (corpora / domain / "pairs.jsonl").read_bytes()
        assert not (corpora / domain / "vectors").exists()
        for picture in (corpora / domain / "images").iterdir():
            assert (heard / domain / "images" / picture.name).read_bytes() == picture.read_bytes()


def test_generated_sounds_tell_the_class(heard):
    corpus = read_corpus(heard / "source", vectors=["audio"])
    train, test = ({p.id: p for p in corpus.part(split)} for split in ("train", "val"))
    means = {
        label: np.mean([p.vectors["audio"] for p in train.values() if p.label == label], axis=0)
        for label in corpus.labels
    }
    right = [
        min(means, key=lambda label: np.linalg.norm(means[label] - p.vectors["audio"])) == p.label
        for p in test.values()
    ]
    assert np.mean(right) > 0.5  # chance is a fifth


def test_generated_sounds_are_those_of_every_machine(heard, tmp_path):
    rows = np.load(heard / "target/vectors/audio.npy")
    assert rows.shape == (36, BANDS)
    write_synthetic(tmp_path, source_classes=5, target_classes=3, target_pairs_per_class=1, audio=True, side=32)
    again = np.load(tmp_path / "target/vectors/audio.npy")
    np.testing.assert_array_equal(again[0], rows[0])  # a pair hangs on its class, split and place alone
    assert len(np.unique(rows, axis=0)) == 36


def test_an_open_run_says_its_media(trained):
    assert open_run(trained.path).config.media.vectors == ("audio",)
