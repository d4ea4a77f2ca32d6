"""A small run that was trained for a moment, and the corpus that it was trained on."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image, ImageDraw

from dckt.preprocessing import TextSpec, Vocabulary, image_batch
from dckt_export.graphs import onnx_from_encoder
from dckt_trainer.config import Config, ImageConfig, NetworkConfig, TextConfig
from dckt_trainer.data.corpus import Corpus, read_corpus
from dckt_trainer.model import DomainModel, save_model
from dckt_trainer.network import DomainNetwork
from dckt_trainer.runs import create_run
from dckt_trainer.trunk import build_trunk
from dckt_trainer.word_cnn import WordCNN, text_vectors

COLOURS = {"blue": (20, 40, 200), "green": (20, 160, 40), "grey": (128, 128, 128), "red": (200, 30, 30)}
COLOURS["yellow"] = (220, 200, 40)
SPLITS = ("train",) * 8 + ("val",) * 6 + ("test",) * 2
WORDS = (*COLOURS, *(f"{colour}ish" for colour in COLOURS), *(f"word{number}" for number in range(38)))
SIDE, WIDTH = 64, 16


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """80 pairs of 5 classes: a cluttered picture of a colour, and 2 to 9 words about it, some of them unknown."""
    root = tmp_path_factory.mktemp("corpus") / "colours"
    root.mkdir()
    chance = random.Random(7)
    rows = []
    for label, colour in COLOURS.items():
        for number, split in enumerate(SPLITS):
            picture = Image.new("RGB", (90 + number, 70), colour)
            draw = ImageDraw.Draw(picture)
            for _ in range(number % 3):
                left, top = chance.randrange(60), chance.randrange(40)
                shade = tuple(chance.randrange(256) for _ in range(3))
                draw.ellipse((left, top, left + 30, top + 25), fill=shade)
            picture.save(root / f"{label}{number}.png")
            words = [label if number % 3 else f"{label}ish"] * 2
            words += [chance.choice((*WORDS[10:], "unheard")) for _ in range(number % 8)]
            chance.shuffle(words)
            row = {"id": f"{label}{number}", "image": f"{label}{number}.png", "text": " ".join(words)}
            rows.append({**row, "label": label, "split": split})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_corpus(root)


@pytest.fixture(scope="session")
def config() -> Config:
    return Config(
        seed=3,
        image=ImageConfig(trunk="squeezenet1_1", weights="random", side=SIDE),
        text=TextConfig(dimension=16, maps=10, max_tokens=40),
        network=NetworkConfig(width=WIDTH),
    )


@pytest.fixture(scope="session")
def model(corpus: Corpus, config: Config) -> DomainModel:
    """Frozen random trunk and Word CNN; the network behind them has learnt the classes and has its statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        trunk = build_trunk(config.image, config.seed)
        vocabulary, spec = Vocabulary.of(WORDS), TextSpec(max_tokens=config.text.max_tokens)
        vectors = torch.randn(len(vocabulary), config.text.dimension)
        vectors[:2] = 0  # padding and the unknown word
        cnn = WordCNN(vectors, config.text.windows, config.text.maps)
        train = corpus.part("train")
        tokens = [vocabulary.encode(pair.text, spec, allow_unknown=True) for pair in train]
        with torch.no_grad():
            features = {
                "image": trunk(torch.from_numpy(image_batch([pair.image for pair in train], trunk.spec))),
                "text": text_vectors(cnn, tokens, torch.device("cpu")),
            }
        labels = torch.tensor([corpus.labels.index(pair.label) for pair in train])
        network = DomainNetwork({medium: rows.shape[1] for medium, rows in features.items()}, WIDTH, len(COLOURS))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(100):
            logits = network({medium: rows[:, None] for medium, rows in features.items()}).logits
            optimizer.zero_grad()
            sum(torch.nn.functional.cross_entropy(rows[:, 0], labels) for rows in logits.values()).backward()
            optimizer.step()
    return DomainModel(trunk, cnn.eval(), network.eval(), vocabulary, corpus.labels, spec)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, model: DomainModel, corpus: Corpus, config: Config) -> Path:
    """The run folder; do not write into it, copy it."""
    path = tmp_path_factory.mktemp("runs") / "colours"
    facts = {"path": str(corpus.root), "fingerprint": corpus.fingerprint, "on_bad_pair": "raise"}
    run = create_run(path, config, facts, facts, trunk="made by the test")
    save_model(model, path / "target", config.image)
    evaluation = {
        "kept": "best",
        "validation": [],
        "test": {
            "pairs": 10,
            "last": {"image_to_text": 0.1, "text_to_image": 0.2, "average": 0.15},
            "best": {"image_to_text": 0.75, "text_to_image": 0.5, "average": 0.625},
        },
    }
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    run.finish()
    return path


@pytest.fixture(scope="session")
def graphs(model: DomainModel) -> dict[str, onnx.ModelProto]:
    """Both graphs of the model by the name of their input, exported once; do not change them."""
    pixels, tokens = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8), torch.ones(3, 7, dtype=torch.int64)
    return {
        "pixels": onnx_from_encoder(model.image_encoder(), pixels, input_name="pixels", dynamic={0: "batch"}),
        "tokens": onnx_from_encoder(
            model.text_encoder(), tokens, input_name="tokens", dynamic={0: "batch", 1: "length"}
        ),
    }


@pytest.fixture
def quick(graphs: dict[str, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test of what comes after the exporter the seconds that it takes; opset and encoder have no effect."""

    def copied(encoder: object, example: object, *, input_name: str, **options: object) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(graphs[input_name])
        return copy

    monkeypatch.setattr("dckt_export.graphs.onnx_from_encoder", copied)


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go during the test, so that it can see whether any is left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", os.fspath(folder))
    return folder
