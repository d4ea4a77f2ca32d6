"""A user's path on small generated corpora: trained, exported and indexed once, by the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dckt_trainer.data.synthetic import write_synthetic

Command = Callable[..., subprocess.CompletedProcess[str]]
QUICK = {
    "image.side": 64,
    "image.grid": 1,
    "text.dimension": 16,
    "text.maps": 8,
    "text.cnn_epochs": 4,
    "network.width": 32,
    "pretrain.source_epochs": 6,
    "pretrain.target_epochs": 10,
    "transfer.rounds": 2,
}


@dataclass(frozen=True)
class Shop:
    """What the commands left: corpora, a run, a bundle, and an index of the target's test pairs."""

    source: Path
    target: Path
    run: Path
    bundle: Path
    index: Path

    def pairs(self, split: str = "test") -> list[dict[str, str]]:
        lines = (self.target / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        return [pair for pair in map(json.loads, lines) if pair["split"] == split]


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a program of this environment as a user would, with a cache of its own."""
    environment = {**os.environ, "DCKT_CACHE": str(tmp_path_factory.mktemp("cache")), "COLUMNS": "100"}

    def run(name: str, *arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / name
        done = subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (2 if fails else 0), done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def quick() -> list[str]:
    """Options that make a training take seconds."""
    options = ["--preset", "small", "--trunk", "alexnet", "--weights", "random"]
    return [*options, *(word for key, value in QUICK.items() for word in ("--set", f"{key}={value}"))]


@pytest.fixture(scope="session")
def shop(command: Command, quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Trained, exported and indexed by the commands."""
    root = tmp_path_factory.mktemp("shop")
    source, target = write_synthetic(
        root / "corpora",
        source_classes=6,
        source_pairs_per_class=12,
        target_classes=4,
        target_pairs_per_class=6,
        val_pairs_per_class=4,
        test_pairs_per_class=5,
        side=64,
    )
    made = Shop(source, target, root / "run", root / "shop.dckt", root / "catalog.index")
    command("dckt-train", "--source", source, "--target", target, *quick, "--out", made.run)
    command("dckt-export", made.run, "--out", made.bundle)
    command("dckt", "index", made.bundle, made.index, "--pairs", target, "--split", "test")
    return made
