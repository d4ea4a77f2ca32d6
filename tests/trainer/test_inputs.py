"""Trainings on ready features: no trunk, no words, and a run that says so."""

import numpy as np
import pytest
import torch

from dckt.errors import ConfigError, RunError
from dckt.metrics import cross_media_map
from dckt_trainer.data.feature_corpus import read_feature_corpus
from dckt_trainer.evaluate import represent
from dckt_trainer.inputs import prepare
from dckt_trainer.pairs import PairSet
from dckt_trainer.runs import open_run
from dckt_trainer.train import resume


@pytest.fixture(scope="module")
def features(tmp_path_factory, arrays):
    """Folder of the feature corpora ``source.npz`` (classes dog, eel, fox, gnu) and ``target.npz``."""
    root = tmp_path_factory.mktemp("features")
    np.savez(root / "target.npz", **arrays)
    chance, labels = np.random.default_rng(1), np.arange(80) % 4
    np.savez(
        root / "source.npz",
        image=chance.normal(size=(80, 5)) + 2 * np.eye(4, 5)[labels],
        text=chance.normal(size=(80, 7)) + 2 * np.eye(4, 7)[labels],
        labels=np.array(["dog", "eel", "fox", "gnu"])[labels],
    )
    return root


@pytest.fixture(scope="module")
def run_on_features(run_training, features):
    def run(out, *changes, **options):
        where = {"source": features / "source.npz", "target": features / "target.npz"}
        return run_training(out, *changes, **{**where, **options})

    return run


@pytest.fixture(scope="module")
def trained(run_on_features, tmp_path_factory):
    return run_on_features(tmp_path_factory.mktemp("runs") / "whole")


def same(first, second, domain="target"):
    states = [run.network(domain).state_dict() for run in (first, second)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_a_run_on_features_leaves(trained, features):
    kept = {path.stem for path in trained.checkpoints.iterdir()}
    assert {name for name in kept if "best" not in name} == {"source-0", "target-0", "joint"}
    assert {path.name for path in (trained.path / "target").iterdir()} == {"network.safetensors", "model.json"}
    assert trained.facts["trunk"] is None
    assert trained.network("source").classes == 4
    assert [event["round"] for event in trained.events("selection")] == [1, 2, 3]
    page = (trained.path / "report.html").read_text(encoding="utf-8")
    assert "data:image/jpeg" not in page
    assert "MAP on 12 test pairs" in page
    for domain in ("source", "target"):
        with pytest.raises(RunError, match="trained on ready features, so it has no trunk"):
            open_run(trained.path).model(domain)


def test_the_saved_network_reproduces_the_test_figures(trained, features):
    corpus = read_feature_corpus(features / "target.npz")
    pairs = corpus.part("test")
    labels = torch.tensor([corpus.labels.index(pair.label) for pair in pairs])
    rows = {medium: torch.from_numpy(values) for medium, values in corpus.vectors("test").items()}
    given = PairSet(rows, labels, tuple(pair.id for pair in pairs))
    vectors = represent(trained.network(), given, torch.device("cpu"))
    result = cross_media_map(vectors["image"], vectors["text"], labels.numpy())
    expected = trained.evaluation["test"]["last"]
    assert result.image_to_text.map == pytest.approx(expected["image_to_text"])
    assert result.text_to_image.map == pytest.approx(expected["text_to_image"])
    assert result.average > 0.5  # the classes are far apart; chance is a third


def test_a_stopped_run_on_features_goes_on_to_the_same_weights(run_on_features, trained, tmp_path, monkeypatch):
    import dckt_trainer.train as module

    real, rounds = module.transfer_round, []

    def stop_in_the_third(number, *arguments, **options):
        rounds.append(number)
        if rounds == [1, 2, 3]:
            raise KeyboardInterrupt
        return real(number, *arguments, **options)

    monkeypatch.setattr(module, "transfer_round", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_on_features(tmp_path / "run")
    run = resume(tmp_path / "run", device="cpu")
    assert rounds == [1, 2, 3, 3]
    assert same(run, trained)
    assert same(run, trained, "source")
    assert run.evaluation == trained.evaluation


def test_features_alone_excluded_and_taken_over(run_on_features, trained, tmp_path):
    alone = run_on_features(tmp_path / "alone", "transfer.rounds=0", source=None)
    assert alone.source is None
    fewer = run_on_features(tmp_path / "fewer", "source.exclude=['fox']", "transfer.rounds=1")
    assert fewer.network("source").classes == 3
    taken = run_on_features(tmp_path / "taken", "transfer.law=all", pretrained_from=trained.path)
    assert same(taken, run_on_features(tmp_path / "anew", "transfer.law=all"))


def test_a_changed_file_stops_a_resume(run_on_features, features, arrays, tmp_path, monkeypatch):
    import dckt_trainer.train as module

    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "transfer_round", stop)
    with pytest.raises(KeyboardInterrupt):
        run_on_features(tmp_path / "run", target=f"{path}:ids=ids")
    np.savez(path, **{**arrays, "image": arrays["image"] + 1})
    with pytest.raises(RunError, match=r"target corpus .*mine\.npz:ids=ids changed"):
        resume(tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": np.eye(42, 3)}, "text features 7 in .*source.npz and 3 in .*npz"),
        ({"split": np.array(["train"] * 30 + ["test"] * 12)}, r"no pairs in: val; .*val and test may be lists of rows"),
        ({"image": np.full((42, 5), 0.5) + 1e-6 * np.eye(42, 5)}, "image features of .* hardly differ"),
    ],
)
def test_feature_corpora_that_cannot_be_trained_on(run_on_features, arrays, tmp_path, change, says):
    np.savez(tmp_path / "bad.npz", **{**arrays, **change})
    with pytest.raises(ConfigError, match=says):
        run_on_features(tmp_path / "run", target=tmp_path / "bad.npz")
    assert not (tmp_path / "run").exists()


def test_features_and_pictures_do_not_mix(run_on_features, corpora, tmp_path):
    with pytest.raises(ConfigError, match="one is a file of ready features and the other"):
        run_on_features(tmp_path / "run", source=corpora / "source")
    with pytest.raises(ConfigError, match="ready features have no Word CNN"):
        run_on_features(tmp_path / "run", "text.training=end_to_end")
    assert not (tmp_path / "run").exists()


def test_prepare_is_the_arrays_themselves(trained, features, arrays):
    from dckt_trainer.plan import remake_plan
    from dckt_trainer.progress import Silent

    plan = remake_plan(trained, device="cpu", reporter=Silent())
    inputs = prepare(trained, plan, cache=features, reporter=Silent())
    assert inputs.readers == {}
    assert inputs.vocabulary is None
    np.testing.assert_array_equal(inputs.pairs["target.val"].features["image"].numpy(), arrays["image"][24:30])
    assert inputs.pairs["target.val"].labels.tolist() == arrays["labels"][24:30].tolist()
    assert inputs.pairs["source.train"].features["text"].shape == (80, 7)
