"""Acceptance tests 13 and 14: CCA and its deep loss against known correlations, JRL against its own objective."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA as SklearnCCA

from dckt.errors import ConfigError, ItemError, TrainingError
from dckt_trainer.baselines import JRLSettings, dcca_loss, fit_cca, fit_jrl

CORRELATIONS = np.array([0.9, 0.6, 0.2])


def correlated(pairs=40, mixed=True, seed=0):
    """Images (pairs, 3) and texts (pairs, 4) whose canonical correlations are exactly ``CORRELATIONS``."""
    rng = np.random.default_rng(seed)
    columns = rng.standard_normal((pairs, 7))
    basis = np.linalg.qr(columns - columns.mean(0))[0] * np.sqrt(pairs - 1)  # centred, uncorrelated, variance 1
    image, text = basis[:, :3], basis[:, 3:].copy()
    text[:, :3] = CORRELATIONS * image + np.sqrt(1 - CORRELATIONS**2) * text[:, :3]
    if mixed:
        image, text = image @ rng.standard_normal((3, 3)) + 5, text @ rng.standard_normal((4, 4)) - 2
    return image, text


# --- CCA ----------------------------------------------------------------------------------------------------------


def test_cca_finds_the_correlations_that_the_toy_was_built_with():
    image, text = correlated()
    fitted = fit_cca(image, text, 3, regularisation=0)
    np.testing.assert_allclose(fitted.correlations, CORRELATIONS, atol=1e-10)
    np.testing.assert_allclose(fit_cca(image, text, 2, 0).correlations, CORRELATIONS[:2], atol=1e-10)


def test_projected_training_pairs_are_white_and_correlate_as_stated():
    image, text = correlated()
    fitted = fit_cca(image, text, 3, regularisation=0)
    both = fitted.image(image), fitted.text(text)
    assert [rows.dtype for rows in both] == [np.float32, np.float32]
    stated = np.block([[np.eye(3), np.diag(CORRELATIONS)], [np.diag(CORRELATIONS), np.eye(3)]])
    np.testing.assert_allclose(np.cov(np.hstack(both), rowvar=False), stated, atol=1e-5)
    np.testing.assert_allclose(np.mean(both, axis=1), 0, atol=1e-6)


def test_cca_agrees_with_scikit_learn():
    rng = np.random.default_rng(4)
    shared = rng.standard_normal((60, 2))
    image, text = (shared @ rng.standard_normal((2, 5)) + rng.standard_normal((60, 5)) for _ in range(2))
    fitted = fit_cca(image, text, 2, regularisation=0)
    theirs = SklearnCCA(n_components=2, tol=1e-12, max_iter=5000).fit_transform(image, text)
    for ours, other in zip((fitted.image(image), fitted.text(text)), theirs, strict=True):
        for component in range(2):  # up to sign and scale
            assert abs(np.corrcoef(ours[:, component], other[:, component])[0, 1]) == pytest.approx(1, abs=1e-5)
    expected = [np.corrcoef(theirs[0][:, k], theirs[1][:, k])[0, 1] for k in range(2)]
    np.testing.assert_allclose(fitted.correlations, expected, atol=1e-6)


def test_regularisation_shrinks_by_its_share_of_the_variance():
    image, text = correlated(mixed=False)
    for share in (0.25, 1.0):  # of variances that are all 1; and whatever the scale of a medium
        shrunk = fit_cca(image * 100, text[:, :3] / 7, 3, share)
        np.testing.assert_allclose(shrunk.correlations, CORRELATIONS / (1 + share), atol=1e-10)
        np.testing.assert_allclose(shrunk.image(image * 100).var(0, ddof=1), 1 / (1 + share), atol=1e-5)


def test_regularisation_makes_singular_features_usable():
    image, text = correlated()
    copied = np.hstack([image, image[:, :1], np.ones((len(image), 1))])
    with pytest.raises(ConfigError, match="5 image features over 40 pairs is singular"):
        fit_cca(copied, text, 3, 0)
    np.testing.assert_allclose(fit_cca(copied, text, 3, 1e-6).correlations, CORRELATIONS, atol=1e-3)
    with pytest.raises(ConfigError, match="singular"):
        fit_cca(np.ones((9, 2)), np.random.default_rng(0).standard_normal((9, 2)), 1, 0.1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"components": 4}, ConfigError, "components is 4; expected 1 to 3"),
        ({"components": 0}, ConfigError, "components is 0"),
        ({"regularisation": -1e-3}, ConfigError, "regularisation is -0.001"),
        ({"regularisation": float("nan")}, ConfigError, "regularisation is nan"),
        ({"text": np.zeros((39, 4))}, ItemError, "40 image rows and 39 text rows"),
        ({"image": np.zeros(40)}, ItemError, "image rows are float64"),
        ({"image": np.full((40, 3), "a")}, ItemError, "image rows are <U1"),
        ({"text": np.where(np.arange(40)[:, None] == 7, np.nan, np.ones((40, 4)))}, ItemError, r"text rows \[7\]"),
    ],
)
def test_cca_refuses(changes, error, message):
    image, text = correlated()
    with pytest.raises(error, match=message):
        fit_cca(**({"image": image, "text": text, "components": 3} | changes))


def test_cca_takes_no_more_components_than_pairs_allow_and_only_the_width_it_knows():
    image, text = correlated()
    with pytest.raises(ConfigError, match="expected 1 to 2 for 3 pairs"):
        fit_cca(image[:3], text[:3], 3)
    with pytest.raises(ItemError, match="width 4; expected 3"):
        fit_cca(image, text, 3).image(text)


# --- deep CCA -----------------------------------------------------------------------------------------------------


def tensors(*arrays, dtype=torch.float64):
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def test_dcca_loss_of_the_features_themselves_is_minus_the_sum_of_their_correlations():
    loss = dcca_loss(*tensors(*correlated()), 0, 0)
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(-CORRELATIONS.sum(), abs=1e-10)


def test_dcca_loss_regularises_each_medium_by_its_own_share():
    image, text = correlated()
    covariance = np.cov(np.hstack([image, text]), rowvar=False)
    s11, s12, s22 = covariance[:3, :3] + 0.3 * np.eye(3), covariance[:3, 3:], covariance[3:, 3:] + 0.05 * np.eye(4)
    squares = scipy.linalg.eigh(s12 @ np.linalg.inv(s22) @ s12.T, s11, eigvals_only=True)
    assert float(dcca_loss(*tensors(image, text), 0.3, 0.05)) == pytest.approx(-np.sqrt(squares).sum(), abs=1e-10)


def test_dcca_gradient():
    batches = [batch.requires_grad_() for batch in tensors(*correlated(pairs=9))]
    assert torch.autograd.gradcheck(lambda image, text: dcca_loss(image, text, 0.1, 0.2), batches)


def test_dcca_gradient_where_variances_are_equal():
    batches = [batch.requires_grad_() for batch in tensors(*correlated(pairs=9, mixed=False))]
    assert torch.autograd.gradcheck(dcca_loss, batches)


def test_dcca_training_raises_the_correlation_of_single_precision_outputs():
    rng = np.random.default_rng(2)
    image, text = tensors(*rng.standard_normal((2, 50, 4)), dtype=torch.float32)
    weight = torch.eye(4)[:, :2].clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = dcca_loss(image @ weight, text)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert loss.dtype == weight.grad.dtype == torch.float32
    best = fit_cca(image.numpy(), text.numpy(), 2, 0).correlations.sum()
    assert losses[0] > -best + 0.05  # there is something to learn
    assert losses[-1] == pytest.approx(-best, abs=0.01)


@pytest.mark.parametrize(
    ("image", "regularisation", "error", "message"),
    [
        (torch.ones(5), 0.1, ItemError, r"got \(5,\) and \(40, 4\)"),
        (torch.ones(39, 3), 0.1, ItemError, r"got \(39, 3\)"),
        (torch.ones(40, 3), 0.0, TrainingError, "image outputs of width 3 is singular"),
        (torch.full((40, 3), torch.inf), 0.1, TrainingError, "image outputs are not finite"),
        (torch.ones(40, 3), -0.1, ConfigError, "regularisations are -0.1"),
    ],
)
def test_dcca_refuses(image, regularisation, error, message):
    text = tensors(correlated()[1])[0]
    with pytest.raises(error, match=message):
        dcca_loss(image, text, regularisation)


# --- JRL ----------------------------------------------------------------------------------------------------------

GENTLE = JRLSettings(smoothness=0.5, sparsity=0.3, neighbours=5, rounds=300, tolerance=0)


def classes(pairs=60, seed=0):
    """Images (pairs, 6) and texts (pairs, 5) of three classes with labels 4, 7 and 9, noise about as large as what
    tells the classes apart, and two features of each medium of noise alone."""
    rng = np.random.default_rng(9)
    prototypes = [np.hstack([rng.standard_normal((3, width - 2)), np.zeros((3, 2))]) for width in (6, 5)]
    rng = np.random.default_rng(seed)
    codes = np.arange(pairs) % 3
    image, text = (2 * p[codes] + rng.standard_normal((pairs, p.shape[1])) for p in prototypes)
    return image * 10 + 3, text - 1, np.array([4, 7, 9])[codes]


def written_out(settings, features, projections, one_hot, extra=None):
    """The objective from its formula, edge by edge: (p_i / sqrt(d_i) - p_j / sqrt(d_j))^2 summed is 2 p' L p."""
    projected = [x @ p for x, p in zip(features, projections, strict=True)]
    value = settings.correlation * ((projected[0] - projected[1]) ** 2).sum()
    for x, p, rows in zip(features, projections, projected, strict=True):
        distances = torch.cdist(x, x).fill_diagonal_(torch.inf)
        joined = torch.zeros_like(distances).scatter_(1, distances.argsort(1)[:, : settings.neighbours], 1)
        joined = ((joined + joined.T) > 0).double()
        scaled = rows / joined.sum(1, keepdim=True).sqrt()
        differences = (scaled[:, None] - scaled[None]).square().sum(-1)
        value = value + settings.semantic * ((rows - one_hot) ** 2).sum()
        value = value + settings.smoothness * (joined * differences).sum() / 2
        value = value + settings.sparsity * p.norm(dim=1).sum()
    return value


def test_jrl_reaches_a_minimum_of_the_objective_as_it_is_written():
    image, text, labels = classes()
    fitted = fit_jrl(image, text, labels, GENTLE)
    features = tensors(*((x - x.mean(0)) / x.std(0) for x in (image, text)))
    one_hot = torch.tensor(labels[:, None] == [4, 7, 9], dtype=torch.float64)
    projections = [p.requires_grad_() for p in tensors(fitted.images.projection, fitted.texts.projection)]
    value = written_out(GENTLE, features, projections, one_hot)
    assert float(value.detach()) == pytest.approx(fitted.objective[-1], rel=1e-9)
    for gradient, p in zip(torch.autograd.grad(value, projections), projections, strict=True):
        assert p.norm(dim=1).min() > 1e-3  # no row is near zero, where the norm has no gradient
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        JRLSettings(neighbours=20, rounds=40, tolerance=0),
        replace(GENTLE, rounds=40),
        replace(GENTLE, correlation=1000.0, rounds=40),  # nearly only the other medium's last value counts
        replace(GENTLE, correlation=50.0, smoothness=0.0, sparsity=1e-3, rounds=40),
    ],
)
def test_jrl_objective_does_not_rise(settings):
    for seed in range(3):
        objective = np.array(fit_jrl(*classes(seed=seed), replace(settings, seed=seed)).objective)
        rises = np.diff(objective)
        assert len(rises) > 5
        assert rises[:3].max() < 0
        assert rises.max() <= 1e-10 * objective[0]  # no more than rounding


def test_jrl_stops_when_a_round_hardly_helps():
    objective = np.array(fit_jrl(*classes(), replace(GENTLE, tolerance=0.02)).objective)
    gains = -np.diff(objective) / objective[:-1]
    assert 1 < len(gains) < 300
    assert gains[-1] < 0.02 <= gains[:-1].min()


@pytest.mark.parametrize("settings", [replace(GENTLE, rounds=5), JRLSettings(neighbours=20)])
def test_jrl_tells_new_items_classes(settings):
    fitted = fit_jrl(*classes(), settings)
    image, text, labels = classes(seed=1)
    for probability in (fitted.image_probability(image), fitted.text_probability(text)):
        assert probability.dtype == np.float32
        np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)
        assert (fitted.classes[probability.argmax(1)] == labels).mean() > 0.7  # chance is a third
    same = labels[:, None] == labels
    similarity = fitted.similarity(image, text)
    assert similarity[same].mean() > 1.5 * similarity[~same].mean()


def test_jrl_prediction_is_the_weighted_label_of_the_nearest_training_items():
    fitted = fit_jrl(*classes(), replace(GENTLE, neighbours=3))
    image = classes(seed=1)[0][:4]
    for row, probability in zip(fitted.image(image), fitted.image_probability(image), strict=True):
        squared = np.square(fitted.images.train - row).sum(1)
        nearest = np.argsort(squared)[:3]
        weights = np.exp(-squared[nearest] / squared[nearest].mean())
        np.testing.assert_allclose(probability, weights @ fitted.one_hot[nearest] / weights.sum(), atol=1e-5)


def test_sparsity_drops_the_features_that_tell_nothing():
    fitted = fit_jrl(*classes(), replace(GENTLE, sparsity=25.0))
    for medium in (fitted.images, fitted.texts):
        norms = np.linalg.norm(medium.projection, axis=1)
        assert norms[-2:].max() < 1e-3 < 1e-2 < norms[:-2].max()


def test_unlabelled_rows_shape_the_graph():
    further = classes(seed=1)
    plain = fit_jrl(*classes(), GENTLE)
    images = fit_jrl(*classes(), GENTLE, unlabelled_image=further[0])
    texts = fit_jrl(*classes(), GENTLE, unlabelled_text=further[1])
    assert abs(images.images.projection - plain.images.projection).max() > 1e-3
    assert abs(texts.texts.projection - plain.texts.projection).max() > 1e-3
    np.testing.assert_array_equal(images.images.mean, plain.images.mean)
    assert images.images.train.shape == (60, 3)


def test_jrl_takes_a_constant_feature():
    image, text, labels = classes()
    image[:, 0] = 0.1
    fitted = fit_jrl(image, text, labels, GENTLE)
    assert np.isfinite(fitted.image_probability(image)).all()
    assert abs(fitted.images.projection[0]).max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"settings": JRLSettings()}, ConfigError, "neighbours is 100 for 60 pairs"),
        ({"labels": np.zeros(59, int)}, ItemError, r"labels are int64 \(59,\) for 60 pairs"),
        ({"labels": np.zeros(60)}, ItemError, "labels are float64"),
        ({"text": np.full((60, 5), np.inf)}, ItemError, "text rows .* not finite"),
        ({"text": np.ones((61, 5))}, ItemError, "60 image rows and 61 text rows"),
        ({"unlabelled_text": np.ones((2, 4))}, ItemError, "unlabelled text rows have width 4; expected 5"),
    ],
)
def test_jrl_refuses(changes, error, message):
    image, text, labels = classes()
    given = {"image": image, "text": text, "labels": labels, "settings": GENTLE} | changes
    with pytest.raises(error, match=message):
        fit_jrl(**given)


@pytest.mark.parametrize(
    "changes",
    [
        {"semantic": 0},
        {"sparsity": 0},
        {"correlation": -1},
        {"smoothness": np.nan},
        {"rounds": 0},
        {"neighbours": 0},
        {"tolerance": -0.1},
    ],
)
def test_jrl_settings_refuse(changes):
    with pytest.raises(ConfigError, match=r"expected weights|expected at least 1 neighbour"):
        JRLSettings(**changes)
