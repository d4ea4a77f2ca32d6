"""The linear model against the formulas, and a training with it."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dckt.errors import ConfigError
from dckt_trainer.baselines import fit_cca
from dckt_trainer.config import load_config
from dckt_trainer.estimate import estimate
from dckt_trainer.evaluate import evaluate, represent
from dckt_trainer.linear import fit_both, fit_linear, transfer_helps
from dckt_trainer.linear.basis import fit_basis, leading, svd
from dckt_trainer.linear.fit import _Covariances, class_means
from dckt_trainer.linear.regression import regressions
from dckt_trainer.pairs import PairSet
from dckt_trainer.progress import Silent
from dckt_trainer.runs import open_run
from dckt_trainer.train import train

CPU = torch.device("cpu")
IMAGE, TEXT = (np.random.default_rng(seed).normal(size=(6, width)) for seed, width in ((1, 30), (2, 24)))


def pairs_of(labels, means, seed, unrelated=False):
    """Both media see six hidden numbers, of the pair and of its class, each in its way; or all in other ways."""
    chance = np.random.default_rng(seed)
    hidden = means[labels] + 0.7 * chance.normal(size=(len(labels), 6))
    mixes = [chance.permutation(mix.ravel()).reshape(mix.shape) if unrelated else mix for mix in (IMAGE, TEXT)]
    rows = [hidden @ mix + 0.8 * chance.normal(size=(len(labels), mix.shape[1])) for mix in mixes]
    image, text = (torch.tensor(part, dtype=torch.float32) for part in rows)
    return PairSet({"image": image, "text": text}, torch.tensor(labels), tuple(map(str, range(len(labels)))))


@pytest.fixture(scope="module")
def target():
    means = np.random.default_rng(0).normal(size=(8, 6))
    sets = {
        "train": pairs_of(np.repeat(np.arange(8), 2), means, 3),
        "val": pairs_of(np.repeat(np.arange(8), 12), means, 4),
    }
    return {f"target.{part}{how}": pairs for part, pairs in sets.items() for how in ("", ".by_source")}


@pytest.fixture(scope="module")
def source():
    return pairs_of(np.repeat(np.arange(40), 20), np.random.default_rng(5).normal(size=(40, 6)), 6)


@pytest.fixture(scope="module")
def unrelated():
    return pairs_of(np.repeat(np.arange(40), 20), np.random.default_rng(5).normal(size=(40, 6)), 6, unrelated=True)


class Listening(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


# -- the parts -------------------------------------------------------------------------------------------------------


def test_correlations_are_those_of_cca(source):
    image, text = (source.features[medium].double().numpy() for medium in ("image", "text"))
    there = fit_cca(image, text, 5, regularisation=0.3)
    image, text = image - image.mean(0), text - text.mean(0)
    count = len(image) - 1
    here = _Covariances(image.T @ image / count, text.T @ text / count, image.T @ text / count).correlate(0.3)
    np.testing.assert_allclose(here.correlations[:5], there.correlations, rtol=1e-9)
    np.testing.assert_allclose(np.abs(here.image[:, :5]), np.abs(there.image_projection), atol=1e-9)
    np.testing.assert_allclose(np.abs(here.text[:, :5]), np.abs(there.text_projection), atol=1e-9)


def test_a_decomposition_that_does_not_converge_is_made_in_another_way(monkeypatch):
    matrix = np.random.default_rng(0).normal(size=(7, 5))
    expected = np.linalg.svd(matrix, full_matrices=False)

    def failing(*args, **options):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", failing)
    left, values, right = svd(matrix)
    np.testing.assert_allclose(values, expected[1], rtol=1e-12)
    np.testing.assert_allclose(left * values @ right, matrix, atol=1e-12)


def test_one_pair_of_each_class_is_no_mistake():
    rows = np.random.default_rng(0).normal(size=(6, 4))
    (found,) = regressions(rows, np.arange(6), 6, [100.0])
    assert found.probabilities(rows).argmax(1).tolist() == list(range(6))


def test_coordinates_are_weighted_by_their_correlations():
    chance = np.random.default_rng(0)
    across = chance.normal(size=(4, 3))
    analysis = _Covariances(np.eye(4), np.eye(3), across).correlate(0.0)
    image, text = analysis.weighted(2)
    np.testing.assert_allclose(image @ np.diag(analysis.correlations**-3.0) @ text.T, across, atol=1e-9)


def test_class_means():
    rows = np.arange(12.0).reshape(4, 3)
    means = class_means(rows, np.array([2, 0, 2, 0]), 4)
    np.testing.assert_array_equal(means, [rows[[1, 3]].mean(0), [0, 0, 0], rows[[0, 2]].mean(0), [0, 0, 0]])


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1600, 1510)])
def test_leading_directions(shape):
    rows = np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[1])
    found = leading(rows, 4)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-8)
    strengths = np.linalg.svd(rows, compute_uv=False)[:4]
    np.testing.assert_allclose(np.linalg.norm(rows @ found, axis=0), strengths, rtol=1e-6)


def test_a_basis_loses_nothing_of_few_pairs():
    chance = np.random.default_rng(0)
    target, source = chance.normal(size=(9, 50)), chance.normal(size=(400, 50)) + 3
    basis = fit_basis(target, source, standardise=True)
    scaled = (target - target.mean(0)) / np.sqrt(target.var(0) + 0.05 * target.var(0).mean())
    rows = basis.target(target)
    ratio = (rows @ rows.T) / (scaled @ scaled.T)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    for part in (rows, basis.source(source)):
        assert part.var(0).sum() == pytest.approx(1)
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-9)
    weight, bias = basis.affine(np.eye(rows.shape[1]))
    np.testing.assert_allclose(target @ weight + bias, rows, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 3])
def test_regressions_are_those_of_the_library(classes):
    chance = np.random.default_rng(0)
    labels = np.arange(30) % classes
    rows = chance.normal(size=(30, 4)) + labels[:, None]
    (found,) = regressions(rows, labels * 2, 2 * classes, [3.0])
    expected = LogisticRegression(C=3.0, max_iter=300).fit(rows, labels).predict_proba(rows)
    probabilities = found.probabilities(rows)
    np.testing.assert_allclose(probabilities[:, ::2], expected, atol=1e-4)
    np.testing.assert_allclose(probabilities[:, 1::2], 0, atol=1e-9)  # classes without a pair


# -- the whole -------------------------------------------------------------------------------------------------------


def test_what_is_fitted_is_what_the_model_computes(target, source):
    fitted = fit_linear(target["target.train"], target["target.val"], 8, source=source)
    assert evaluate(fitted.model, target["target.val"], CPU).average == pytest.approx(fitted.per_pair.mean(), abs=2e-4)
    vectors = represent(fitted.model, target["target.val"], CPU)
    for rows in vectors.values():
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        assert rows.shape[1] == fitted.model.dimensions["joined"]
    probability, _ = fitted.model.represent("image", target["target.val"].features["image"])
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)


def test_correlations_transfer_between_label_spaces(target, source):
    alone, both = fit_both({**target, "source.train": source}, 8, Silent())
    gain, error = both.ahead_of(alone)
    assert gain == pytest.approx(both.per_pair.mean() - alone.per_pair.mean())
    assert gain > 2 * error > 0
    assert alone.choice.mass == 0
    assert both.choice.mass > 0
    heard = Listening()
    assert transfer_helps((alone, both), heard)
    assert "is taken in" in heard.lines[-1]


def test_a_source_that_is_no_better_is_left_out(target):
    alone = fit_linear(target["target.train"], target["target.val"], 8)
    heard = Listening()
    assert not transfer_helps((alone, alone), heard)
    assert "left out" in heard.lines[-1]
    assert not transfer_helps((alone,), heard)


def test_a_source_with_nothing_in_common_does_no_harm(target, unrelated):
    """What is kept is at most a point worse on pairs that chose nothing."""
    found = fit_both({**target, "source.train": unrelated}, 8, Silent())
    kept = found[1] if transfer_helps(found, Silent()) else found[0]
    test = pairs_of(np.repeat(np.arange(8), 50), np.random.default_rng(0).normal(size=(8, 6)), 11)
    alone, here = (evaluate(one.model, test, CPU).average for one in (found[0], kept))
    assert here > alone - 0.01


def test_the_same_pairs_give_the_same_model(target, source):
    one, other = (fit_linear(target["target.train"], target["target.val"], 8, source=source) for _ in range(2))
    states = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -- in a training ---------------------------------------------------------------------------------------------------

MODERN = ("image.trunk=squeezenet1_1", "image.weights=random", "image.side=48", "text.dimension=12", "text.epochs=3")


def trained(out, corpora, cache, *changes, **options):
    where = {"source": corpora / "source", "target": corpora / "target", "cache": cache, "device": "cpu"}
    return train(out=out, config=load_config("modern", [*MODERN, *changes]), **{**where, **options})


def test_a_training(corpora, cache, tmp_path):
    run = trained(tmp_path / "run", corpora, cache)
    evaluation = run.evaluation
    assert [entry["round"] for entry in evaluation["validation"]] == [0, 1]
    assert evaluation["test"]["model_t0"]["round"] == 0
    assert evaluation["test"]["last"]["round"] == 1
    assert evaluation["test"]["best"]["round"] in (0, 1)
    model = open_run(tmp_path / "run").model()
    assert model.network.retrieves_by == "joined"
    assert "takes the source in" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    again = trained(tmp_path / "again", corpora, cache)
    assert again.evaluation == evaluation


def test_a_target_alone(corpora, cache, tmp_path):
    run = trained(tmp_path / "run", corpora, cache, source=None)
    assert [entry["round"] for entry in run.evaluation["validation"]] == [0]
    both = trained(tmp_path / "both", corpora, cache)
    # The twin in a run with a source has seen nothing of the source but its words.
    assert both.evaluation["test"]["model_t0"]["average"] == pytest.approx(
        run.evaluation["test"]["best"]["average"], abs=0.05
    )


def test_ready_features(arrays, tmp_path):
    np.savez(tmp_path / "pairs.npz", **arrays)
    run = train(None, tmp_path / "pairs.npz", tmp_path / "run", load_config("modern", []), device="cpu")
    assert run.evaluation["test"]["best"]["average"] > 0.6
    network = open_run(tmp_path / "run").network()
    assert json.loads((tmp_path / "run" / "target" / "model.json").read_text())["kind"] == "linear"
    assert network.dimensions["joined"] == 2 * 3 + network.width


def test_a_dry_run(corpora, cache):
    found = estimate(
        corpora / "source", corpora / "target", None, load_config("modern", list(MODERN)), device="cpu", cache=cache
    )
    assert found.seconds["correlations"] > 0
    assert found.inputs["text"] == 12 + 300 + 200
    assert not [name for name in found.seconds if "pretraining" in name or "round" in name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("text.encoder=cnn", "reads texts as bags"),
        ("media.vectors=['audio']", "leave media.vectors empty"),
        ("text.training=end_to_end", "nothing to learn"),
    ],
)
def test_what_does_not_go_together(corpora, cache, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path / "run", corpora, cache, change)
    assert not (tmp_path / "run").exists()


def test_no_pretraining_is_taken_over(corpora, cache, finished, tmp_path):
    with pytest.raises(ConfigError, match="no pretraining"):
        trained(tmp_path / "run", corpora, cache, pretrained_from=finished.path)


def test_a_network_that_reads_bags(run_training, tmp_path):
    run = run_training(tmp_path / "run", "text.encoder=bag", "text.topics=7")
    model = run.model()
    assert model.reader.topics > 7
    assert model.network.inputs["text"] == model.reader.outputs
