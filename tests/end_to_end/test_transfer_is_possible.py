"""On generated corpora a target that starts from the source's weights beats one trained alone, at 5 pairs per class."""

import shutil

import numpy as np
import pytest

from dckt_trainer.config import load_config
from dckt_trainer.data.synthetic import write_synthetic
from dckt_trainer.runs import create_run
from dckt_trainer.train import resume, train

# A smaller source and network than the benchmark's, for time; the rest is the preset.
CHANGES = [
    "image.trunk=alexnet",
    "image.weights=random",
    "image.side=128",
    "image.grid=3",
    "image.crop_share=1.0",
    "text.cnn_epochs=12",
    "text.dimension=50",
    "network.width=128",
    "pretrain.source_epochs=40",
    "transfer.rounds=0",
]


def map_of(run):
    return run.evaluation["test"]["last"]["average"]


@pytest.mark.slow
def test_the_sources_weights_help_over_five_seeds(tmp_path, capsys):
    gains = []
    for seed in range(5):
        source, target = write_synthetic(
            tmp_path / str(seed),
            seed=seed,
            source_classes=24,
            source_pairs_per_class=40,
            target_classes=8,
            val_pairs_per_class=2,
            test_pairs_per_class=12,
            side=96,
        )
        config, cache = load_config("small", [*CHANGES, f"seed={seed}"]), tmp_path / "cache"
        alone = train(source, target, tmp_path / f"alone-{seed}", config, cache=cache, device="cpu")
        # The same run up to the target network, which now starts from the source's weights.
        config = load_config("small", [*CHANGES, f"seed={seed}", "pretrain.target_start=source"])
        begun = create_run(
            tmp_path / f"from-source-{seed}",
            config,
            alone.facts["source"],
            alone.facts["target"],
            trunk=alone.facts["trunk"],
        )
        for name in ("words", "text-source", "text-target", "source-0"):
            shutil.copy(alone.checkpoints / f"{name}.safetensors", begun.checkpoints)
        gains.append(map_of(resume(begun.path, cache=cache, device="cpu")) - map_of(alone))
    with capsys.disabled():
        print(f"\nMAP gained by starting from the source, by seed: {' '.join(f'{gain:+.3f}' for gain in gains)}")
    assert np.mean(gains) > 0.05
    assert min(gains) > 0
