"""A target whose labels are unknown: the parts, that labels have no influence, a whole training, and bad input."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dckt.errors import ConfigError, CorpusError
from dckt_trainer.config import load_config
from dckt_trainer.data.corpus import read_corpus
from dckt_trainer.data.feature_corpus import read_feature_corpus
from dckt_trainer.evaluate import evaluate
from dckt_trainer.linear import default_clusters, fit_both, fit_unlabelled, transfer_helps
from dckt_trainer.linear.clusters import BLUR, SCALINGS, balanced, find_clusters
from dckt_trainer.linear.fit import Choice, Data, class_means, steps, unit
from dckt_trainer.linear.unlabelled import (
    SHARE,
    TEMPERATURE,
    Space,
    as_own_classes,
    choose_space,
    feature_clusters,
    join,
    plainest,
    side_by_side,
)
from dckt_trainer.pairs import PairSet
from dckt_trainer.progress import Silent
from dckt_trainer.runs import open_run
from dckt_trainer.train import train

CPU = torch.device("cpu")
IMAGE, TEXT = (np.random.default_rng(seed).normal(size=(6, width)) for seed, width in ((1, 30), (2, 24)))
CLASSES = 6


def pairs_of(per_class, seed, classes=CLASSES, noise=0.8):
    """Both media see six hidden numbers of the pair's class, and of the pair itself, each in its way."""
    chance = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    means = 2 * np.random.default_rng(classes).normal(size=(classes, 6))
    hidden = means[labels] + 0.7 * chance.normal(size=(len(labels), 6))
    image, text = (
        torch.tensor(hidden @ mix + noise * chance.normal(size=(len(labels), mix.shape[1])), dtype=torch.float32)
        for mix in (IMAGE, TEXT)
    )
    return PairSet({"image": image, "text": text}, torch.tensor(labels), tuple(map(str, range(len(labels)))))


@pytest.fixture(scope="module")
def target():
    sets = {"train": pairs_of(8, 3), "val": pairs_of(6, 4)}
    return {f"target.{part}{how}": pairs for part, pairs in sets.items() for how in ("", ".by_source")}


@pytest.fixture(scope="module")
def source():
    return pairs_of(20, 6, classes=30)


class Listening(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


# -- the parts -------------------------------------------------------------------------------------------------------


def test_balanced_clusters_are_those_of_a_naive_loop():
    scores = np.random.default_rng(0).uniform(-0.2, 0.2, size=(8, 3))
    kernel = [[np.exp(score / BLUR) for score in row] for row in scores]
    rows, columns = [1.0] * 8, [1.0] * 3
    for _ in range(SCALINGS):
        columns = [8 / 3 / sum(rows[n] * kernel[n][k] for n in range(8)) for k in range(3)]
        rows = [1 / sum(kernel[n][k] * columns[k] for k in range(3)) for n in range(8)]
    expected = [[rows[n] * kernel[n][k] * columns[k] for k in range(3)] for n in range(8)]
    np.testing.assert_allclose(balanced(scores), expected, rtol=1e-6)


def test_shares_add_up_and_clusters_are_of_one_size():
    shares = balanced(np.random.default_rng(0).uniform(-0.2, 0.2, size=(60, 4)))
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares.sum(0), 15, rtol=1e-3)


def test_clusters_are_found():
    chance = np.random.default_rng(0)
    centres = np.linalg.qr(chance.normal(size=(10, 5)))[0].T
    labels = np.repeat(np.arange(5), 12)
    rows = unit(centres[labels] + 0.05 * chance.normal(size=(60, 10)))
    found = find_clusters(rows, 5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    nearest = (rows @ found.T).argmax(1)
    assert len({(label, cluster) for label, cluster in zip(labels, nearest, strict=True)}) == 5
    np.testing.assert_array_equal(find_clusters(rows, 5), found)


@pytest.mark.parametrize(("pairs", "clusters"), [(2, 2), (4, 4), (100, 20), (800, 57)])
def test_as_many_clusters_as_no_user_named(pairs, clusters):
    assert default_clusters(pairs) == clusters


def test_pairs_choose_by_the_rank_of_the_partner(target):
    data = Data.of(as_own_classes(target["target.train"]), as_own_classes(target["target.val"]), None)
    image, text = data.rows
    np.testing.assert_allclose(data.target.across, sum(np.outer(*pair) for pair in zip(image, text, strict=True)) / 48)
    space = choose_space(data, (0.0,))
    image, text = (unit(rows @ to) for rows, to in zip(data.asked, space.maps, strict=True))
    scores = image @ text.T
    for number, found in enumerate(space.reciprocal_ranks):
        ranks = [1 + sum(row > row[number]) for row in (scores[number], scores[:, number])]
        assert found == pytest.approx((1 / ranks[0] + 1 / ranks[1]) / 2)


def test_the_plainest_of_those_that_are_as_good():
    chance = np.random.default_rng(0).normal(size=100)
    wave = 0.2 * np.tile([1.0, -1.0], 50)  # a standard error of .02
    near, clear = chance - 0.03 + wave, chance - 0.05 + wave
    settings = [(0.3, 0.5, 2, chance), (0.6, 2.0, 1, near), (0.6, 0.1, 2, near), (0.6, 0.5, 2, near)]
    spaces = [Space(Choice(mass, ridge, power), (), ranks) for mass, ridge, power, ranks in settings]
    behind = Space(Choice(0.95, 2.0, 2), (), clear)
    assert plainest([*spaces, behind]) is spaces[3]
    assert plainest([spaces[0], behind]) is spaces[0]


def test_clusters_of_features_in_part_of_the_covariance(target):
    data = Data.of(as_own_classes(target["target.train"]), as_own_classes(target["target.val"]), None)
    labels = feature_clusters(data, 4)
    assert set(labels) == {0, 1, 2, 3}
    mixed = data.in_part_by(labels, 0.3).target
    of_clusters = sum(np.outer(*(class_means(rows, labels)[label] for rows in data.rows)) for label in labels) / len(
        labels
    )
    np.testing.assert_allclose(mixed.across, 0.7 * data.target.across + 0.3 * of_clusters, atol=1e-12)
    np.testing.assert_allclose(mixed.image, data.target.image, atol=1e-12)


def test_spaces_side_by_side_count_alike(target):
    data = Data.of(as_own_classes(target["target.train"]), as_own_classes(target["target.val"]), None)
    space = choose_space(data, (0.0,))
    longer = replace(space, maps=[3 * to[:, :4] for to in space.maps])
    both = side_by_side([space, longer], data)
    assert both.choice == space.choice
    widths = [to.shape[1] for to in (*space.maps, *both.maps)]
    assert widths[2:] == [width + 4 for width in widths[:2]]
    for first in (slice(None, -4), slice(-4, None)):
        lengths = [
            np.linalg.norm(rows @ to[:, first], axis=1).mean() for rows, to in zip(data.rows, both.maps, strict=True)
        ]
        assert np.mean(lengths) == pytest.approx(1)
    alone = side_by_side([space], data)
    np.testing.assert_allclose(alone.reciprocal_ranks, space.reciprocal_ranks)


def test_what_items_are_compared_by(target):
    data = Data.of(as_own_classes(target["target.train"]), as_own_classes(target["target.val"]), None)
    space = choose_space(data, (0.0,))
    prototypes = find_clusters(space.places(data.rows), 4)
    found = join(space, data, prototypes)
    for i, t in ((0, 0), (3, 11)):
        z = [unit(rows[place] @ to) for rows, place, to in zip(data.asked, (i, t), space.maps, strict=True)]
        p = [np.exp(place @ prototypes.T / TEMPERATURE) for place in z]
        cosine = p[0] @ p[1] / np.sqrt((p[0] @ p[0]) * (p[1] @ p[1]))
        assert found.scores[i, t] == pytest.approx(SHARE * cosine + (1 - SHARE) * (z[0] @ z[1]))


# -- the whole -------------------------------------------------------------------------------------------------------


def test_labels_have_no_influence(target, source):
    shuffled = {
        name: replace(pairs, labels=pairs.labels.flip(0).roll(len(pairs) // 3)) for name, pairs in target.items()
    }
    assert not torch.equal(shuffled["target.val"].labels, target["target.val"].labels)
    found = [fit_both({**pairs, "source.train": source}, 9, Silent(), labelled=False) for pairs in (target, shuffled)]
    assert [one.choice for one in found[0]] == [one.choice for one in found[1]]
    for one, other in zip(*found, strict=True):
        there = other.model.state_dict()
        assert all(torch.equal(tensor, there[name]) for name, tensor in one.model.state_dict().items())
        np.testing.assert_array_equal(one.per_pair, other.per_pair)


def test_what_is_fitted_is_what_the_model_computes(target, source):
    done = []
    fitted = fit_unlabelled(target["target.train"], target["target.val"], 9, source=source, advance=done.append)
    assert sum(done) == steps(source=True, labelled=False)
    own = as_own_classes(target["target.val"])
    assert evaluate(fitted.model, own, CPU).average == pytest.approx(fitted.per_pair.mean(), abs=1e-3)
    assert fitted.model.classes == 9
    assert fitted.choice.mass > 0
    probability, joined = fitted.model.represent("text", own.features["text"])
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 1, atol=1e-5)


def test_clusters_make_a_search_by_meaning_better(target):
    train_part, validation = target["target.train"], target["target.val"]
    fitted = fit_unlabelled(train_part, validation, CLASSES)
    with_clusters = evaluate(fitted.model, validation, CPU).average
    fitted.model.share.fill_(0.0)
    assert with_clusters > evaluate(fitted.model, validation, CPU).average + 0.01


@pytest.mark.parametrize(("behind", "helps"), [(0.0, True), (0.5, False)])
def test_the_source_is_left_out_where_it_does_harm(target, behind, helps):
    alone = fit_unlabelled(target["target.train"], target["target.val"], 9)
    together = replace(alone, per_pair=alone.per_pair - behind * np.linspace(0.5, 1.5, len(alone.per_pair)))
    heard = Listening()
    assert transfer_helps((alone, together), heard, labelled=False) is helps
    assert "reciprocal rank" in heard.lines[-1]
    assert ("clear harm" in heard.lines[-1]) is not helps


# -- in a training ---------------------------------------------------------------------------------------------------

MODERN = ("image.trunk=squeezenet1_1", "image.weights=random", "image.side=48", "text.dimension=12", "text.epochs=3")


def trained(out, corpora, cache, *changes, **options):
    where = {"source": corpora / "source", "target": corpora / "target", "cache": cache, "device": "cpu"}
    config = load_config("modern", [*MODERN, "target.labels=unknown", *changes])
    return train(out=out, config=config, **{**where, **options})


@pytest.fixture
def without_labels(corpora, tmp_path):
    """A copy of the target whose rows have no label, or an empty one."""
    folder = tmp_path / "target"
    shutil.copytree(corpora / "target", folder)
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        row.pop("label") if number % 2 else row.update(label="")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_a_training(corpora, cache, without_labels, tmp_path):
    run = trained(tmp_path / "run", corpora, cache)
    assert run.evaluation["labels"] == "unknown"
    assert "unknown to the training" in (run.path / "report.html").read_text(encoding="utf-8")
    assert json.loads((run.path / "target" / "model.json").read_text(encoding="utf-8"))["labels"][0] == "cluster 1"
    bare = trained(tmp_path / "bare", corpora, cache, target=without_labels)
    there = open_run(bare.path).model().network.state_dict()
    state = open_run(run.path).model().network.state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in state.items())
    # Of a pair that fits nothing else, average precision is the reciprocal rank of its partner.
    assert bare.evaluation["test"]["best"]["average"] < run.evaluation["test"]["best"]["average"]


def test_ready_features_and_a_number_of_clusters(arrays, tmp_path):
    arrays = {name: rows for name, rows in arrays.items() if name not in ("labels", "class_names")}
    np.savez(tmp_path / "pairs.npz", **arrays)
    config = load_config("modern", ["target.labels=unknown", "target.clusters=4"])
    run = train(None, tmp_path / "pairs.npz", tmp_path / "run", config, device="cpu")
    assert open_run(run.path).network().dimensions["probability"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.kind=network"], "network learns from labels"),
        (["target.pairs_per_class=2"], "chooses by label"),
        (["target.clusters=1"], "target.clusters is 1; expected 0, or 2 to 15"),
        (["target.clusters=16"], "target.clusters is 16; expected 0, or 2 to 15"),
        (["target.labels=known", "target.clusters=4"], "there are classes"),
    ],
)
def test_what_does_not_go_together(corpora, cache, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path / "run", corpora, cache, *changes)
    assert not (tmp_path / "run").exists()


def test_a_single_validation_pair_chooses_nothing(arrays, tmp_path):
    split = arrays["split"].copy()
    split[25:30] = "train"
    np.savez(tmp_path / "pairs.npz", **{**arrays, "split": split})
    config = load_config("modern", ["target.labels=unknown"])
    with pytest.raises(ConfigError, match="29 train and 1 val pairs"):
        train(None, tmp_path / "pairs.npz", tmp_path / "run", config, device="cpu")


# -- corpora without labels ------------------------------------------------------------------------------------------


def test_a_pair_without_a_label_has_its_own(without_labels, corpora):
    found = read_corpus(without_labels, labels="unknown")
    assert [pair.label for pair in found.pairs] == [f"pair {pair.id}" for pair in found.pairs]
    assert [pair.split for pair in found.pairs] == [pair.split for pair in read_corpus(corpora / "target").pairs]
    with pytest.raises(CorpusError, match="label is"):
        read_corpus(without_labels)


def test_a_table_may_lack_the_column(corpora, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(corpora / "target" / "images", folder / "images")
    pairs = read_corpus(corpora / "target").pairs
    rows = [f'{pair.id},images/{pair.image.name},"{pair.text}"' for pair in pairs]
    (folder / "pairs.csv").write_text("\n".join(["id,image,text", *rows]), encoding="utf-8")
    with pytest.raises(CorpusError, match="lacks 'label'"):
        read_corpus(folder)
    found = read_corpus(folder, labels="unknown")
    counts = [len(found.part(split)) for split in ("train", "val", "test")]
    tenth = (len(pairs) + 5) // 10
    assert counts == [len(pairs) - 2 * tenth, tenth, tenth]


def test_the_split_does_not_hang_on_labels(corpora, tmp_path):
    splits = []
    for name, label in (("one", lambda row: row["label"]), ("other", lambda row: row["id"][-1])):
        folder = tmp_path / name
        shutil.copytree(corpora / "target", folder)
        lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [{"id": row["id"], "image": row["image"], "text": row["text"], "label": label(row)} for row in rows]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        splits.append([pair.split for pair in read_corpus(folder, labels="unknown").pairs])
    assert splits[0] == splits[1]


def test_ready_features_without_labels(arrays, tmp_path):
    labels = np.array(["ant", "", "cat"])[arrays["labels"]]
    np.savez(tmp_path / "some.npz", **{**arrays, "labels": labels, "class_names": np.array(["unused"])})

    with pytest.raises(CorpusError, match="labels is empty"):
        read_feature_corpus(tmp_path / "some.npz")
    found = read_feature_corpus(tmp_path / "some.npz", labels="unknown")
    assert [pair.label for pair in found.pairs[:3]] == ["ant", "pair pair1", "cat"]
    with pytest.raises(ConfigError, match="expected one of known, unknown"):
        read_corpus(tmp_path, labels="maybe")  # type: ignore[arg-type]
