"""The dry run: it refuses what a training refuses, writes nothing, and its formulas are those of a real step."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dckt.errors import ConfigError, CorpusError, RunError
from dckt_trainer import estimate as module
from dckt_trainer.cli import app
from dckt_trainer.config import load_config
from dckt_trainer.estimate import estimate
from dckt_trainer.losses import joint_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, optimize, sgd
from dckt_trainer.pairs import PairSet, PairStream

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features(tmp_path_factory, arrays):
    """A feature corpus that is its own source."""
    path = tmp_path_factory.mktemp("features") / "both.npz"
    np.savez(path, **arrays, audio=np.random.default_rng(1).normal(size=(42, 9)))
    return path


@pytest.fixture
def config(small):
    return lambda *changes: load_config("small", [*small, *changes])


def everything(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_pictures_and_texts(corpora, config, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "runs" / "run"
    before = everything(corpora)
    found = estimate(corpora / "source", corpora / "target", out, config(), device="cpu", cache=cache)
    assert everything(corpora) == before
    assert list(tmp_path.iterdir()) == []
    assert found.pairs["target"] == {"train": 15, "val": 9, "test": 12}
    assert found.inputs == {"image": 512, "text": 18}
    assert found.pictures == 50 + 15 + 9 + 12
    assert found.disk["feature cache"] == 4 * 512 * 86
    assert set(found.seconds) == {
        *("image features", "pretraining, source", "pretraining, target", "a round", "all rounds", "in all")
    }
    assert all(value > 0 for value in found.seconds.values())
    assert found.warnings == ()


def test_features_that_are_cached_cost_nothing(finished, corpora, cache, config):
    found = estimate(corpora / "source", corpora / "target", None, config(), device="cpu", cache=cache)
    assert found.pictures == 0
    assert found.seconds["image features"] == 0
    assert "feature cache" not in found.disk


def test_seconds_are_steps_times_the_time_of_one(features, config, monkeypatch):
    monkeypatch.setattr(module._Estimation, "_step", lambda *arguments: 2.0)
    seconds = estimate(features, features, None, config(), device="cpu").seconds
    # 24 pairs in batches of 16: 4 epochs are 6 passes, 6 are 9, a round has 2.
    expected = {"pretraining, source": 12, "pretraining, target": 18, "a round": 4, "all rounds": 12, "in all": 42}
    assert seconds == expected
    folded = config("pretrain.accumulate=4", "transfer.accumulate=2")
    seconds = estimate(features, features, None, folded, device="cpu").seconds
    assert (seconds["pretraining, target"], seconds["a round"]) == (6, 2)
    alone = estimate(None, features, None, config("transfer.rounds=0"), device="cpu").seconds
    assert alone == {"pretraining, target": 18, "in all": 18}


def test_a_pretraining_that_is_taken_over_takes_no_time(finished, corpora, cache, config):
    where = (corpora / "source", corpora / "target", None, config("transfer.law=all"))
    found = estimate(*where, device="cpu", cache=cache, pretrained_from=finished.path)
    assert found.seconds["pretraining, source"] == found.seconds["pretraining, target"] == 0
    assert found.seconds["in all"] == found.seconds["all rounds"] > 0
    with pytest.raises(RunError, match="not that of this run"):
        estimate(*where[:3], config("seed=1"), device="cpu", cache=cache, pretrained_from=finished.path)


@pytest.mark.parametrize(("kernels", "media"), [(1, "[]"), (5, "[]"), (5, "['audio']")])
def test_memory_is_that_of_a_real_step(features, config, kernels, media):
    changes = (f"mmd.kernels={kernels}", "mmd.bandwidth=mean", f"media.vectors={media}")
    settings = config("network.width=96", "transfer.accumulate=3", *changes)
    found = estimate(features, features, None, settings, device="cpu")
    networks = {name: DomainNetwork(found.inputs, 96, 3) for name in ("source", "target")}
    rows = {medium: torch.randn(16, size) for medium, size in found.inputs.items()}
    pairs = PairSet(rows, torch.arange(16) % 3, tuple("abcdefghijklmnop"))
    stream = PairStream(pairs, np.arange(16), 16, 0, "test", CPU)
    optimizer = sgd(list(networks.values()), settings.optimizer)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no two have one place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        optimize(
            {name: Domain(network, stream) for name, network in networks.items()},
            joint_terms(found.inputs, settings.losses, settings.mmd),
            optimizer,
            passes=3,
            accumulate=3,
            rate=lambda step: 0.01,
            compute=settings.compute,
            stage="test",
        )
    parameters = [parameter for network in networks.values() for parameter in network.parameters()]
    assert found.memory["weights"] == sum(p.nbytes for p in parameters)
    assert found.memory["gradients"] == sum(p.grad.nbytes for p in parameters)
    assert found.memory["momentum"] == sum(optimizer.state[p]["momentum_buffer"].nbytes for p in parameters)
    of_weights = {p.untyped_storage().data_ptr() for p in parameters}
    activations = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in of_weights)
    assert found.memory["activations"] == pytest.approx(activations, rel=0.05)


def test_disk_is_that_of_a_real_run(run_training, features, tmp_path):
    changes = ("network.width=128", "transfer.rounds=1")
    run = run_training(tmp_path / "run", *changes, source=features, target=features)
    written = sum(path.stat().st_size for path in run.path.rglob("*.safetensors"))
    written += (run.checkpoints / "joint.safetensors").stat().st_size  # each round's stands beside the one before
    found = estimate(features, features, None, run.config, device="cpu")
    assert found.disk["run folder"] == pytest.approx(written, rel=0.1)


def test_what_is_too_large_is_said(features, config, monkeypatch):
    monkeypatch.setattr(module, "_free_memory", lambda device: 1000)
    monkeypatch.setattr(module, "_free_disk", lambda path: 1000)
    found = estimate(features, features, None, config(), device="cpu")
    assert [line.split(" of ")[0] for line in found.warnings] == [
        "the training takes 0.0 GB",
        "the run folder takes 0.0 GB",
    ]
    assert found.seconds["in all"] is None
    assert found.seconds["a round"] is None


def test_low_precision_takes_copies(features, config):
    plain, low = (
        estimate(features, features, None, config(f"compute.precision={precision}"), device="cpu").memory
        for precision in ("float32", "bfloat16")
    )
    assert "weights in low precision" not in plain
    assert plain["weights"] / 2 < low["weights in low precision"] < plain["weights"]


def test_what_a_training_refuses(finished, corpora, cache, config, features, tmp_path):
    def refused(error, says, source=corpora / "source", target=corpora / "target", out=None, *changes):
        with pytest.raises(error, match=says):
            estimate(source, target, out, config(*changes), device="cpu", cache=cache)

    refused(CorpusError, "no such folder", tmp_path / "absent")
    refused(RunError, "--force", corpora / "source", corpora / "target", finished.path)
    refused(ConfigError, "there is no source", None)
    refused(ConfigError, "the other a corpus of pictures", features)
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("these are\nno vectors at all\n", encoding="utf-8")
    refused(ConfigError, "text.vectors", None, corpora / "target", None, "transfer.rounds=0", f"text.vectors={vectors}")
    refused(
        ConfigError,
        "cannot be read",
        None,
        corpora / "target",
        None,
        "transfer.rounds=0",
        "image.weights=x.safetensors",
    )


def test_the_command(features, small, tmp_path):
    words = ["--target", f"{features}:text=text", "--preset", "small", "--rounds", "0", "--dry-run", "--threads", "1"]
    words += [word for change in small if not change.startswith("transfer.rounds") for word in ("--set", change)]
    out = tmp_path / "run"
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["inputs"] == {"image": 5, "text": 7}
    assert found["seconds"]["in all"] > 0
    assert not out.exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "pretraining, target" in done.stdout
    assert "Nothing was written" in done.stdout
