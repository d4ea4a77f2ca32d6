"""Three media from corpora to hits, by the commands: pictures, texts, and sounds that come as vectors."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest

from dckt import Bundle, Searcher
from dckt_trainer.data.synthetic import BANDS, write_synthetic
from dckt_trainer.runs import open_run

MEDIA = ("image", "text", "audio")
CLASSES = 4
# Enough for words that few texts hold, and for steps in a corpus of so few batches.
LEARNS = {
    "image.grid": 3,
    "text.dimension": 32,
    "text.epochs": 40,
    "text.maps": 32,
    "text.cnn_epochs": 25,
    "network.width": 64,
    "pretrain.batch": 16,
    "pretrain.target_epochs": 40,
    "pretrain.target_start": "source",
    "transfer.batch": 16,
}


@pytest.fixture(scope="module")
def heard(command, quick, tmp_path_factory):
    """Trained, exported and indexed by the commands; the folder that holds all of it."""
    root = tmp_path_factory.mktemp("heard")
    write_synthetic(
        root,
        source_classes=8,
        source_pairs_per_class=25,
        target_classes=CLASSES,
        target_pairs_per_class=20,
        val_pairs_per_class=5,
        test_pairs_per_class=6,
        side=64,
        audio=True,
    )
    settings = [word for key, value in LEARNS.items() for word in ("--set", f"{key}={value}")]
    media = [*settings, "--set", 'media.vectors=["audio"]']
    done = command(
        "dckt-train", "--source", root / "source", "--target", root / "target", *quick, *media, "--out", root / "run"
    )
    assert "MAP by direction" in done.stdout
    command("dckt-export", root / "run", "--out", root / "shop.dckt")
    command("dckt", "index", root / "shop.dckt", root / "shop.index", "--pairs", root / "target", "--split", "test")
    return root


def queries(root, medium):
    """The test items of a medium, as a search takes them, and their labels."""
    rows = np.load(root / "target/vectors/audio.npy")
    pairs = [json.loads(line) for line in (root / "target/pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    made = {
        "image": lambda place, pair: {"image": root / "target" / pair["image"]},
        "text": lambda place, pair: {"text": pair["text"]},
        "audio": lambda place, pair: {"features": rows[place], "medium": "audio"},
    }[medium]
    return [(made(place, pair), pair) for place, pair in enumerate(pairs) if pair["split"] == "test"]


@pytest.mark.parametrize(("asked", "found"), list(permutations(MEDIA, 2)))
def test_every_direction_retrieves_better_than_chance(heard, asked, found):
    precision = []
    with Searcher.open(heard / "shop.dckt", heard / "shop.index") as searcher:
        for query, pair in queries(heard, asked):
            hits = searcher.search(**query, k=1000, media=found)
            assert len(hits) == 6 * CLASSES
            right = np.array([hit.metadata["label"] == pair["label"] for hit in hits])
            precision.append((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())
    assert np.mean(precision) > 0.6  # in a random order the AP of 6 among 24 is .34 on average
    kept = open_run(heard / "run").evaluation["test"]["best"][f"{asked}_to_{found}"]
    assert np.mean(precision) == pytest.approx(kept, abs=0.02)  # here ties go by id, there by expectation


def test_the_bundle_holds_three_media_and_the_gate_compared_them(heard):
    manifest = Bundle.open(heard / "shop.dckt").manifest
    assert set(manifest.graphs["fp32"]) == set(MEDIA)
    parity = manifest.measured["variants"]["onnxruntime-fp32"]["parity"]["probability"]
    assert parity["media"]["audio"]["cosine_min"] >= 0.9999
    assert set(parity["directions"]) == {f"{asked}_to_{found}" for asked, found in permutations(MEDIA, 2)}
    assert set(manifest.calibration.ranking["probability"]) == set(parity["directions"])


def test_the_searcher_encodes_a_sound_as_the_training_does(heard):
    rows = np.load(heard / "target/vectors/audio.npy")[:5]
    with Searcher.open(heard / "shop.dckt", heard / "shop.index") as searcher:
        report = searcher.add_features(rows, ids=[f"new {place}" for place in range(5)], medium="audio")
        assert report.added == 5
        assert searcher.model.width("audio") == BANDS
        encoder = searcher.model.encoders["audio"]
        vector = searcher.index.vector("new 3", "audio")
        expected = encoder.run(rows[3:4])[0]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
        searcher.delete([f"new {place}" for place in range(5)], "audio")


def test_the_command_searches_with_a_sound_and_shows_the_bundle(heard, command, tmp_path):
    np.save(tmp_path / "sound.npy", np.load(heard / "target/vectors/audio.npy")[0])
    where = heard / "shop.dckt", heard / "shop.index", tmp_path / "sound.npy"
    found = json.loads(command("dckt", "search", *where, "--features", "audio", "--json").stdout)
    assert found["query_medium"] == "audio"
    assert {hit["medium"] for hit in found["hits"]} <= {"image", "text"}
    assert f"vectors float32 (any, {BANDS})" in command("dckt", "inspect", heard / "shop.dckt").stdout


def test_mistakes_are_said(heard, command, quick, tmp_path):
    corpora = ("--source", heard / "source", "--target", heard / "target")
    refused = command(
        "dckt-train", *corpora, *quick, "--set", 'media.vectors=["video"]', "--out", tmp_path / "r", fails=True
    )
    assert "vectors/video.npy: there is no such file" in " ".join(refused.stderr.split())
    refused = command(
        "dckt", "search", heard / "shop.dckt", heard / "shop.index", "x.npy", "--features", "audio", fails=True
    )
    assert "x.npy: there is no such file" in " ".join(refused.stderr.split())
