"""Small corpora and a training of seconds, for every test that needs a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dckt_trainer.config import load_config
from dckt_trainer.data.synthetic import write_synthetic
from dckt_trainer.runs import Run
from dckt_trainer.train import train

SMALL = (
    "image.trunk=squeezenet1_1",
    "image.weights=random",
    "image.side=48",
    "text.dimension=12",
    "text.epochs=3",
    "text.maps=6",
    "text.cnn_epochs=3",
    "network.width=16",
    "pretrain.source_epochs=4",
    "pretrain.target_epochs=6",
    "pretrain.batch=16",
    "transfer.rounds=3",
    "transfer.batch=16",
    "transfer.alpha=0.5",
    "transfer.keep=last",
)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Changes of the preset ``small`` for a training of seconds."""
    return SMALL


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the corpora ``source`` and ``target``; do not write into it."""
    root = tmp_path_factory.mktemp("corpora")
    write_synthetic(
        root,
        source_classes=5,
        source_pairs_per_class=10,
        target_classes=3,
        target_pairs_per_class=5,
        val_pairs_per_class=3,
        test_pairs_per_class=4,
        side=48,
    )
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature cache that all trainings share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_training(corpora: Path, cache: Path) -> Callable[..., Run]:
    """``run_training(out, *changes, **options)`` trains on ``corpora``, or on other ones that the options name."""

    def run(out: Path, *changes: str, **options: object) -> Run:
        where = {"source": corpora / "source", "target": corpora / "target", "cache": cache, "device": "cpu"}
        return train(out=out, config=load_config("small", [*SMALL, *changes]), **{**where, **options})

    return run


@pytest.fixture(scope="session")
def finished(run_training: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run on ``corpora``; do not write into it."""
    return run_training(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="session")
def arrays() -> dict[str, np.ndarray]:
    """The arrays of a corpus of ready features: 42 rows of three classes, 24 train, 6 val, 12 test; image 5, text 7."""
    chance = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 14)
    return {
        "image": (chance.normal(size=(42, 5)) + 2 * np.eye(3, 5)[labels]).astype(np.float32),
        "text": chance.normal(size=(42, 7)) + 2 * np.eye(3, 7)[labels],
        "labels": labels,
        "class_names": np.array(CLASSES),
        "ids": np.array([f"pair{row}" for row in range(42)]),
        "split": np.repeat(["train", "val", "test"], [24, 6, 12]),
    }
